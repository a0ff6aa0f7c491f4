"""Text on pictures in whatever language: every line in a font of this machine that has its characters. Needs Pillow alone."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

from PIL import ImageDraw, ImageFont

_OWN = ""  # Pillow's own font, which has ASCII alone
_SUFFIXES = (".ttf", ".otf", ".ttc")
_USUAL = (  # tried before whatever else the system has
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",
    "segoeui.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "arial.ttf",
    "Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc",
)  # fmt: skip
_SHAPELESS = {"Mn", "Me", "Mc", "Cf", "Cc", "Zs", "Zl", "Zp"}  # marks, controls and spaces: drawn with their neighbours, or not at all
_NO_CHARACTER = "\U0010ffff"


def write(pen: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, size: int, colour: str) -> None:
    """Write lines of text from their top left corner downwards."""
    for number, line in enumerate(text.split("\n")):
        x, baseline = corner[0], corner[1] + size + number * line_height(size)
        for font, part in _parts(line, size):
            pen.text((x, baseline), part, fill=colour, font=font, anchor="ls")
            x += pen.textlength(part, font=font)


def line_height(size: int) -> int:
    """Pixels from one line to the next."""
    return round(size * 1.3)


def width(text: str, size: int) -> float:
    """Pixels that one line takes."""
    return sum(font.getlength(part) for font, part in _parts(text, size))


def wrapped(text: str, size: int, limit: float) -> str:
    """The text with line breaks, so that no line takes more than ``limit`` pixels; words longer than that are cut."""
    return "\n".join(line for paragraph in text.split("\n") for line in _lines(paragraph, size, limit))


def unwritable(text: str) -> str:
    """The characters of a text for which no font of this machine has a glyph, each once."""
    return "".join(dict.fromkeys(character for character in text if _has_shape(character) and not _writable(character)))


def _lines(paragraph: str, size: int, limit: float) -> Iterator[str]:
    line = ""
    for word in _words(paragraph):
        if line and width((line + word).rstrip(), size) > limit:
            yield line.rstrip()
            line = ""
        line += word.lstrip() if not line else word
        while width(line.rstrip(), size) > limit and len(line) > 1:
            fits = next((n for n in range(len(line) - 1, 1, -1) if width(line[:n], size) <= limit), 1)
            yield line[:fits]
            line = line[fits:]
    yield line.rstrip()


def _words(paragraph: str) -> Iterator[str]:
    """Pieces between which a line may break: words with the space after them, and every ideograph."""
    word = ""
    for character in paragraph:
        if unicodedata.east_asian_width(character) in "WF":
            yield from filter(None, (word, character))
            word = ""
        else:
            word += character
            if character == " ":
                yield word
                word = ""
    if word:
        yield word


# --- fonts -----------------------------------------------------------------------------------------------------------


def _parts(line: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """A line with the font for it: one that has all of it, or else pieces, each with a font of its own."""
    shaped = [character for character in line if _has_shape(character)]
    whole = next((file for file in _fonts() if all(_has(file, character) for character in shaped)), None)
    if whole is not None:
        return [(_open(whole, size), line)]
    sources, last = [], _OWN
    for character in line:
        last = next((file for file in _fonts() if _has(file, character)), last) if _has_shape(character) else last
        sources.append((last, character))
    return [(_open(file, size), "".join(c for _, c in part)) for file, part in groupby(sources, key=lambda source: source[0])]


def _writable(character: str) -> bool:
    return any(_has(file, character) for file in _fonts())


def _has_shape(character: str) -> bool:
    return unicodedata.category(character) not in _SHAPELESS


@cache
def _fonts() -> tuple[str, ...]:
    """Pillow's own font, the usual ones, and then all others on this machine."""
    files = sorted({file for folder in _folders() for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES})
    usual = [file for name in _USUAL for file in files if file.name == name]
    return (_OWN, *map(str, dict.fromkeys([*usual, *files])))


def _folders() -> Iterator[Path]:
    """Where the system keeps its fonts."""
    home = Path.home()
    if sys.platform == "win32":
        yield Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"
        yield Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "Microsoft" / "Windows" / "Fonts"
    elif sys.platform == "darwin":
        yield from (Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts")
        yield from Path("/System/Library/AssetsV2").glob("com_apple_MobileAsset_Font*")  # PingFang, on newer systems
    else:
        shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        own = os.environ.get("XDG_DATA_HOME") or home / ".local" / "share"
        yield from (Path(folder) / "fonts" for folder in (own, *shared.split(":")))
        yield home / ".fonts"


@cache
def _open(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


@cache
def _has(file: str, character: str) -> bool:
    """Whether a font has a glyph of its own for a character, and does not draw its box for missing ones."""
    try:
        return _mask(file, character) not in (_mask(file, _NO_CHARACTER), b"")
    except OSError:  # not a font that FreeType can scale
        return False


@cache
def _mask(file: str, character: str) -> bytes:
    return bytes(_open(file, 24).getmask(character))
