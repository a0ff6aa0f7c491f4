"""The stages of a cascade: their text form, their sizes, and the authors' settings per model family."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ..spaces import is_flow

NAME = "FreCaS Cascade"  # as the user reads it on the node
_SIZE = r"(\d+)\s*[x×]\s*(\d+)"
_WINDOWS = rf"(?:\s*,\s*windows\s+{_SIZE})?"
_STAGE = re.compile(rf"{_SIZE}\s*:\s*(\d+)\s*steps?(?:\s*,\s*end\s+(\d*\.?\d+))?{_WINDOWS}", re.IGNORECASE)
_AUTO = re.compile(rf"auto\s+{_SIZE}{_WINDOWS}", re.IGNORECASE)
_EXAMPLE = "'1024x1024: 40 steps, end 0.57; 2048x2048: 10 steps' or 'auto 2048x2048', either with ', windows 2x2' at its end"


@dataclass(frozen=True)
class Stage:
    """One stage: its size in pixels, its evaluated levels, and the noise level of the last of them (0: to the end).

    windows: of its self-attention, across and down (see windows.py); 1 and 1 for none.
    """

    width: int
    height: int
    steps: int
    end: float = 0.0
    windows: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        end = f", end {self.end:.4g}" if self.end else ""
        windows = "" if self.windows == (1, 1) else f", windows {self.windows[0]}x{self.windows[1]}"
        return f"{self.width}x{self.height}: {self.steps} steps{end}{windows}"


@dataclass(frozen=True)
class Preset:
    """The authors' settings for a number of stages. ends: sigmas of the last evaluated levels, but for the last stage."""

    steps: tuple[int, ...]
    ends: tuple[float, ...]
    gamma: float


# The authors' test.sh, where ends are training timesteps: 100, 200 and 400 of SD's schedule, 50 of SD3's with its shift of 3.
# SD3's third stage is its second once more; the authors have none.
_SD2 = {2: Preset((40, 10), (0.344,), 3.0), 3: Preset((30, 10, 10), (0.572, 0.572), 3.0)}
_SDXL = {2: Preset((40, 10), (0.572,), 1.5), 3: Preset((30, 5, 15), (1.164, 0.572), 2.0)}
_SD3 = {2: Preset((20, 8), (0.136,), 1.0), 3: Preset((20, 8, 8), (0.136, 0.136), 1.0)}
_NATIVE = {"SD20": 512, "SD15": 512}  # by class name in the host; all other models: 1024, unless they say it themselves


def native_size(model: Any) -> int:
    """The side in pixels of the square pictures that a ModelPatcher's model was trained on."""
    config = type(model.model.model_config)
    family = next((cls.__name__ for cls in config.__mro__ if cls.__name__ in _NATIVE), None)
    if family == "SD20" and model.model.model_type.name == "V_PREDICTION":
        return 768
    return getattr(config, "native_size", None) or _NATIVE.get(family, 1024)


def preset_of(model: Any, count: int) -> Preset:
    """The settings for a model and a number of stages: SD2's, SDXL's (for all eps and v models) or SD3's (for all flow models)."""
    names = {cls.__name__ for cls in type(model.model.model_config).__mro__}
    flow = is_flow(model.get_model_object("model_sampling"))
    presets = _SD3 if flow else _SD2 if "SD20" in names else _SDXL
    longest = presets[3]
    if count <= 3:
        return presets[max(2, count)]
    extra = count - 3
    steps = (longest.steps[0], *[longest.steps[1]] * extra, *longest.steps[1:])
    return replace(longest, steps=steps, ends=(*longest.ends[:1], *[longest.ends[1]] * extra, longest.ends[1]))


def gamma_of(model: Any, count: int, given: float) -> float:
    """The given gamma; below 0 the authors' for a model and a number of stages."""
    return preset_of(model, count).gamma if given < 0 else given


def size_multiple(model: Any, compression: int) -> int:
    """Pixels per side of the smallest patch that the model sees: those of the VAE's latent pixel times the model's patch."""
    patch = getattr(model.get_model_object("diffusion_model"), "patch_size", None) or 1
    return compression * int(patch if isinstance(patch, int) else patch[-1])


def read_stages(text: str, model: Any, compression: int) -> tuple[Stage, ...]:
    """The checked stages that a text stands for; ValueError with one sentence that says what is wrong."""
    auto = _AUTO.fullmatch(text.strip())
    multiple = size_multiple(model, compression)
    stages = _automatic(model, int(auto[1]), int(auto[2]), _windows(auto[3], auto[4]), multiple) if auto else parse_stages(text)
    check_stages(stages, multiple)
    return stages


def parse_stages(text: str) -> tuple[Stage, ...]:
    """``WIDTHxHEIGHT: STEPS steps, end LEVEL, windows ACROSSxDOWN`` for every stage, separated by semicolons or line breaks."""
    parts = [part.strip() for part in re.split(r"[;\n]", text) if part.strip()]
    if not parts:
        raise ValueError(f"{NAME}: stages is empty; write, for example, {_EXAMPLE}.")
    stages = []
    for part in parts:
        match = _STAGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{NAME}: '{part}' is not a stage; write, for example, {_EXAMPLE}.")
        width, height, steps, end, *windows = match.groups()
        stages.append(Stage(int(width), int(height), int(steps), float(end or 0), _windows(*windows)))
    return tuple(stages)


def _windows(across: str | None, down: str | None) -> tuple[int, int]:
    return int(across or 1), int(down or 1)


def check_stages(stages: Sequence[Stage], multiple: int) -> None:
    """Raise ValueError for sizes the model cannot take, stages that shrink, and levels or windows that are missing or make no sense."""
    for number, stage in enumerate(stages, 1):
        check_size(stage.width, stage.height, multiple)
        most = stage.width // multiple, stage.height // multiple
        if not all(1 <= count <= limit for count, limit in zip(stage.windows, most, strict=True)):
            across, down = stage.windows
            raise ValueError(f"{NAME}: stage {number} has windows {across}x{down}; 1x1 to {most[0]}x{most[1]} are accepted.")
        last = number == len(stages)
        if stage.steps < (1 if last else 2):
            raise ValueError(f"{NAME}: stage {number} has {stage.steps} steps; {'one is' if last else 'two are'} the least.")
        if last and stage.end:
            raise ValueError(f"{NAME}: the last stage goes to the end of the schedule; leave 'end {stage.end:g}' out.")
        if not last and not stage.end:
            raise ValueError(f"{NAME}: stage {number} needs 'end' with the noise level at which the next stage takes over.")
    for number, (small, large) in enumerate(pairwise(stages), 2):
        if large.width < small.width or large.height < small.height:
            raise ValueError(
                f"{NAME}: stage {number} is {large.width}x{large.height}, smaller than the {small.width}x{small.height} before it; "
                "stages may only grow."
            )


def check_size(width: int, height: int, multiple: int) -> None:
    """Refuse a size in pixels that is not made of whole patches, and name the nearest that is."""
    if width % multiple or height % multiple or not width or not height:
        near = "x".join(str(max(multiple, multiple * math.floor(side / multiple + 0.5))) for side in (width, height))
        raise ValueError(f"{NAME}: {width}x{height} is not a multiple of {multiple} pixels; the nearest valid size is {near}.")


def ratio(small: Stage, large: Stage) -> float:
    """rho: how many times larger a side is; the larger of both axes."""
    return max(large.width / small.width, large.height / small.height)


def _automatic(model: Any, width: int, height: int, windows: tuple[int, int], multiple: int) -> tuple[Stage, ...]:
    """Stages from the model's native size to this one, each at most twice the one before, with the authors' settings.

    windows: the last stage's. Those between have windows of the same size in pixels; the first of several has none.
    """
    check_size(width, height, multiple)
    rho = math.sqrt(width * height) / native_size(model)
    count = 1 + max(1, math.ceil(math.log2(rho) - 0.01)) if rho > 1.1 else 1
    preset = preset_of(model, count)
    if count == 1:
        return (Stage(width, height, sum(preset.steps), windows=windows),)
    stages = []
    for index, (steps, end) in enumerate(zip(preset.steps, (*preset.ends, 0.0), strict=True)):
        shrink = rho ** ((count - 1 - index) / (count - 1))
        sides = (max(multiple, round(side / shrink / multiple) * multiple) for side in (width, height))
        across, down = (max(1, round(count / shrink)) if index else 1 for count in windows)
        stages.append(Stage(*sides, steps, end, (across, down)))
    return tuple(stages)
