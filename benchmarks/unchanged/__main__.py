"""Whether sampled latents are what they were in another revision: ``run.py bench unchanged [--against REV] [--only PATTERN]``.

Every case (every template, each rule alone and combined, several samplers, on tiny UNets, an MMDiT and a Flux model) is sampled in
this working copy and in a temporary worktree of REV, and compared bit for bit. Ends with status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lodestar.benchmarks.unchanged.comparison import Recording, report

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
FILE = "latents.safetensors"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", default="HEAD", metavar="REV", help="revision to compare with (default: HEAD)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose names have this in them, such as samplers/unet or */apg")
    parser.add_argument("--verbose", action="store_true", help="show the cases while they are sampled, with their times")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed
    with tempfile.TemporaryDirectory() as name, worktree(args.against, Path(name) / "tree") as other:
        whole = cache_file(args.against, "")
        kept = whole if whole.is_file() else cache_file(args.against, args.only)
        running = {"now": record(ROOT, Path(name) / "now", other / "workflows", args.only, args.verbose)}
        if not kept.is_file():
            running["before"] = record(other, Path(name) / "before", other / "workflows", args.only, False)
        try:
            for when, process in running.items():
                if process.wait():
                    print(f"Recording {when} failed:", (Path(name) / when / "log").read_text()[-2000:], file=sys.stderr)
                    return 1
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        if "before" in running:
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(Path(name) / "before" / FILE, kept)
        text, equal = report(Recording.load(kept).only(args.only), Recording.load(Path(name) / "now" / FILE))
    print(text)
    return 0 if equal else 1


def cache_file(revision: str, only: str) -> Path:
    """Where the recording of a revision is kept: what is recorded depends on it, on the recorder's own code, and on the host."""
    commit = git("rev-parse", f"{revision}^{{commit}}", capture_output=True, text=True).stdout.strip()
    parts = hashlib.sha256(f"{only} {torch.__version__} {Path(os.environ['COMFYUI_PATH']).resolve()}".encode())
    for file in ("../_tiny", "cases", "record", "rules", "templates"):
        parts.update((FOLDER / f"{file}.py").read_bytes())
    return Path(os.environ["LODESTAR_CACHE"]) / "unchanged" / f"{commit[:12]}-{parts.hexdigest()[:12]}.safetensors"


def git(*command: str, **options: Any) -> subprocess.CompletedProcess:
    """Run git in this repository. Raises CalledProcessError where it fails."""
    return subprocess.run(["git", "-C", str(ROOT), *command], check=True, **options)


@contextmanager
def worktree(revision: str, folder: Path) -> Iterator[Path]:
    """A checkout of a revision, removed in the end."""
    git("worktree", "add", "--detach", "--quiet", str(folder), revision, stdout=subprocess.DEVNULL)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def record(root: Path, folder: Path, workflows: Path, only: str, verbose: bool) -> subprocess.Popen:
    """Start recording with the pack in ``root``; what the host writes goes below ``folder``."""
    folder.mkdir()
    command = [sys.executable, root / "run.py", "python", FOLDER / "record.py", folder / FILE, workflows, "--only", only]
    environment = {**os.environ, "LODESTAR_BASE": str(folder / "base"), "LODESTAR_DEVICE": "cpu"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen([str(part) for part in command], cwd=root, env=environment, stdout=None if verbose else log, stderr=log)


if __name__ == "__main__":
    sys.exit(main())
