"""``host``: the real ComfyUI in this process, with the pack loaded as it loads it. Maths tests do without.

``url``: its real server in a process of its own. ``page``: the real front end in Chromium. ``shots``: where it puts pictures for people.
"""

from __future__ import annotations

import os
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from workshop import launching
from workshop.serving import NO_PROXY, server

sys.path.append(str(Path(__file__).parent))  # for tools.py and its like
launching.alias_pack_without_host()

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SLOWEST = {"front_end", "workshop"}  # folders
SHOTS = "LODESTAR_SCREENSHOTS"  # names a folder for the screenshots
_taken: set[Path] = set()


@pytest.fixture(scope="session")
def host() -> object:
    """The pack, loaded by the host; ``comfy`` and ``nodes`` can be imported from here on."""
    return launching.load_pack()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """One server for all tests of a file."""
    with server() as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; each of its contexts is a person with a browser of their own."""
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip("no chromium is installed (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(url, browser) -> Any:
    """The front end, loaded once; ``page.errors`` collects what it throws."""
    # Without this, its first start opens the templates, whose moving pictures keep a small machine busy.
    settings = urllib.request.Request(f"{url}/settings", b'{"Comfy.TutorialCompleted": true}', {"Content-Type": "application/json"})
    NO_PROXY.open(settings, timeout=60).close()
    return open_page(browser, url)


def open_page(browser, url) -> Any:
    """The front end in a new window, ready to work."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(60_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(url)
    page.wait_for_function("() => window.app?.graph && window.app.extensionManager?.command && app.api.clientId && app.graph.nodes.length")
    return page


@pytest.fixture
def another_page(url, browser) -> Iterator[Callable[[], Any]]:
    """Opens more windows, which the test's end closes."""
    pages = []

    def opened() -> Any:
        pages.append(open_page(browser, url))
        return pages[-1]

    yield opened
    for page in pages:
        page.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """A folder for screenshots: $LODESTAR_SCREENSHOTS, else below pytest's own temporary folder."""
    folder = Path(os.environ[SHOTS]) if SHOTS in os.environ else tmp_path_factory.mktemp("screenshots", numbered=False)
    folder.mkdir(parents=True, exist_ok=True)
    _taken.add(folder)
    return folder


def pytest_collection_modifyitems(items) -> None:
    """Files that start servers and browsers first: they take longest, and one of them at the end would keep one core alone busy."""
    items.sort(key=lambda item: not SLOWEST.intersection(item.path.parts))


def pytest_sessionfinish(session) -> None:
    """Where several processes run the tests: tell the first one about the screenshots."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["shots"] = [str(folder) for folder in _taken]


def pytest_testnodedown(node) -> None:
    """Called in the first process when another one has ended."""
    _taken.update(Path(folder) for folder in getattr(node, "workeroutput", {}).get("shots", ()))


def pytest_terminal_summary(terminalreporter) -> None:
    """Say where the screenshots are."""
    for folder in _taken:
        terminalreporter.write_line(f"screenshots: {folder}")
