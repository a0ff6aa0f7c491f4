"""RESULTS.md and what the README takes from it: each benchmark writes its own part, between two marks that name the command."""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "benchmarks" / "RESULTS.md", ROOT / "README.md"


def add_option(parser: argparse.ArgumentParser) -> None:
    """``--write``."""
    parser.add_argument("--write", action="store_true", help="also write the result into benchmarks/RESULTS.md (default settings only)")


def is_wanted(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """Whether to write. Ends the program where other settings than the default ones would go into the documents."""
    others = [name for name, value in vars(args).items() if name != "write" and value != parser.get_default(name)]
    if args.write and others:
        parser.error(f"--write goes with the default settings, not with --{others[0].replace('_', '-')}")
    return args.write


def part(file: Path, name: str) -> tuple[str, str, str]:
    """What a document has before, within and after the part of this name, marks excluded from the middle.

    Raises ValueError if the document has no such part, or two.
    """
    text = file.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: ", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{file.name} has to have one part between '{begin}... -->' and '{end}'")
    start = text.index("\n", text.index(begin)) + 1
    return text[:start], text[start : text.index(end)], text[text.index(end) :]


def write(file: Path, name: str, text: str) -> None:
    """Replace the part of this name."""
    before, _, after = part(file, name)
    file.write_text(f"{before}\n{text.strip()}\n\n{after}", encoding="utf-8")
