"""The one per-user cache that everything installed lies in. Standard library only.

Its folders are named after what they hold. A folder counts only with its stamp, which is written last and lists the folder's files:
what was interrupted or damaged is removed and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from workshop.releases import PACK

STAMP = "complete.json"


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
            print("Another process is setting up the same cache: waiting for it.", flush=True)
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
