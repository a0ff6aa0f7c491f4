"""Run pip, and show what it does in one line. Standard library only."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from workshop.caching import cache_root
from workshop.releases import SetupError

NO_NETWORK = re.compile(
    r"Failed to establish a new connection|NewConnectionError|NameResolutionError|name resolution|Connection refused"
    r"|Network is unreachable|ConnectTimeout|ReadTimeout|ProxyError|Could not fetch URL"
)


def pip(python: Path, *args: str | Path) -> None:
    """Run pip, its output condensed to a line of progress and kept whole in the cache's setup.log."""
    command = [python, "-m", "pip", *args, "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    log = cache_root() / "setup.log"
    lines = []
    with log.open("a", encoding="utf-8") as file, Progress() as progress:
        file.write(f"{time.asctime()}: {' '.join(map(str, command))}\n")
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            close_fds=False,  # it holds the lock as well, so that nobody works on the same folder if it outlives us
        )
        try:
            for line in process.stdout:
                lines.append(line.strip())
                file.write(line)
                progress.show(line.strip())
        except BaseException:
            process.kill()
            raise
        finally:
            process.communicate()
    if process.returncode:
        raise SetupError(reason(lines, log))


def reason(lines: list[str], log: Path) -> str:
    """What made pip fail, in one sentence."""
    if any(NO_NETWORK.search(line) for line in lines):
        return (
            "There is no network, or no way through it to the Python package index, and the set-up needs it this once: "
            "connect, then repeat."
        )
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "A downloaded package is not the one expected (its sha256 differs), so it was not used."
    errors = [line for line in lines if line.startswith("ERROR")]
    last = errors[-1] if errors else "no reason given"
    return f"pip could not install what is needed ({last}); its full output is in {log}."


class Progress:
    """One line saying what pip does and for how long: rewritten in a terminal, repeated now and then elsewhere."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.last = -10.0
        self.count = 0
        self.live = sys.stdout.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.rewrite("")
            print("\r", end="", flush=True)

    def show(self, line: str) -> None:
        """Take in a line of pip's output."""
        if line.startswith("Installing collected packages"):
            self.put(f"installing {line.count(',') + 1} packages, which takes the longest", at_once=True)
        elif line.startswith("Collecting "):
            self.count += 1
            self.put(f"package {self.count}: {line.split()[1]}")
        elif line.startswith("Downloading "):
            self.put(f"package {self.count}: {line.removeprefix('Downloading ')}")

    def put(self, text: str, at_once: bool = False) -> None:
        elapsed = time.monotonic() - self.started
        minutes, seconds = divmod(int(elapsed), 60)
        text = f"      {minutes}:{seconds:02}  {text}"
        if self.live:
            self.rewrite(text)
        elif at_once or elapsed - self.last >= 10:
            self.last = elapsed
            print(text, flush=True)

    def rewrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print("\r" + text[:width].ljust(width), end="", flush=True)
