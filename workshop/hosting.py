"""Find a ComfyUI to run with: the user's own, or one that is installed into the cache. Standard library only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from workshop.installing import pinned_host, test_packages
from workshop.releases import NEWEST, OLDEST, RELEASES, Host, Release, SetupError


def find_host(version: str | None = None, tests: bool = False) -> Host:
    """The host to use, installed first if need be: release `version`, else $COMFYUI_PATH, else the newest release."""
    own = os.environ.get("COMFYUI_PATH")
    if own and version is None:
        host = existing_host(Path(own).expanduser().resolve())
        warn_if_untested(host)
    else:
        host = pinned_host(release(version) if version else NEWEST)
    if tests:
        return Host(host.comfy, host.python, test_packages(host.python))
    return host


def release(version: str) -> Release:
    for known in RELEASES:
        if known.comfyui == version:
            return known
    raise SetupError(f"ComfyUI {version} is not one of {', '.join(r.comfyui for r in RELEASES)}.")


# ----------------------------------------------------------------------------------------------- the user's own ComfyUI


def existing_host(path: Path) -> Host:
    comfy = next((p for p in (path, path / "ComfyUI") if (p / "main.py").is_file() and (p / "comfy").is_dir()), None)
    if comfy is None:
        raise SetupError(f"COMFYUI_PATH is {path}, but there is no ComfyUI (main.py and comfy/) in that folder.")
    for python in pythons_of(comfy):
        if has_torch(python):
            return Host(comfy, python)
    raise SetupError(
        f"No Python with torch was found for {comfy}: run this with the Python that runs your ComfyUI, "
        "or unset COMFYUI_PATH to have a separate ComfyUI installed."
    )


def warn_if_untested(host: Host) -> None:
    if not as_numbers(OLDEST.comfyui) <= as_numbers(host.version) <= as_numbers(NEWEST.comfyui):
        print(f"ComfyUI {host.version} is outside the versions tested, {OLDEST.comfyui} to {NEWEST.comfyui}.", flush=True)


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def pythons_of(comfy: Path) -> Iterator[Path]:
    for folder in (comfy, comfy.parent):
        for name in ("venv", ".venv", "python_embeded"):
            for python in (
                folder / name / "bin" / "python",
                folder / name / "Scripts" / "python.exe",
                folder / name / "python.exe",
            ):
                if python.is_file():
                    yield python
    yield Path(sys.executable)


def has_torch(python: Path) -> bool:
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0
