"""Setting: what a fit or a search was made for. Its result is good for the same setting only, and says so when the setting differs.

A plain value: ``recognition.py`` reads it off a sampling call of the host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROJECTIONS = 8  # of a prompt's encoding; its size stands before them
_TOLERANCE = 0.03  # between two encodings of one prompt, relative to their size


@dataclass(frozen=True)
class Setting:
    """The parts of a sampling call that a result depends on.

    model: class and hash. sigmas: the whole schedule, T + 1 values. space: that of the scores.
    negative: for every encoding of the negative prompt its size and PROJECTIONS projections.
    """

    model: str
    sampler: str
    sigmas: tuple[float, ...]
    cfg: float
    space: str
    negative: tuple[float, ...]

    @property
    def steps(self) -> int:
        """T."""
        return len(self.sigmas) - 1

    def differences(self, other: Setting) -> Iterator[str]:
        """For every difference, what this setting and what ``other`` has, as one clause."""
        if self.model != other.model:
            yield f"the model {self.model}, not {other.model}"
        if self.sampler != other.sampler:
            yield f"the sampler {self.sampler}, not {other.sampler}"
        if self.steps != other.steps:
            yield f"{self.steps} steps, not {other.steps}"
        elif not _same_schedule(self.sigmas, other.sigmas):
            yield f"the schedule {schedule_id(self.sigmas)}, not {schedule_id(other.sigmas)}"
        if abs(self.cfg - other.cfg) > 1e-4:
            yield f"cfg {self.cfg:g}, not {other.cfg:g}"
        if self.space != other.space:
            yield f"a model that predicts {self.space}, not {other.space}"
        if not _same_prompt(self.negative, other.negative):
            yield "another negative prompt"

    def refuse_other(self, name: str, what: str, other: Setting) -> None:
        """Raise ValueError naming everything in which ``other``, the setting of the run that starts, differs."""
        differences = list(self.differences(other))
        if differences:
            raise ValueError(f"{name}: {what} made for {'; for '.join(differences)}.")

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "model": self.model, "sampler": self.sampler, "steps": self.steps, "cfg": self.cfg, "space": self.space,
            "schedule": schedule_id(self.sigmas), "sigmas": list(self.sigmas), "negative": list(self.negative),
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Setting:
        """Undo ``to_json``. Raises ValueError naming what is missing or wrong."""
        try:
            sigmas, negative = (tuple(float(number) for number in values[name]) for name in ("sigmas", "negative"))
            setting = cls(str(values["model"]), str(values["sampler"]), sigmas, float(values["cfg"]), str(values["space"]), negative)
            steps, schedule = int(values["steps"]), values["schedule"]
        except KeyError as error:
            raise ValueError(f"it has no {error.args[0]!r}") from None
        except TypeError:
            raise ValueError("a value in it is of the wrong type") from None
        if setting.steps != steps or schedule_id(sigmas) != schedule:
            raise ValueError(f"its {len(sigmas)} sigmas are not those of its {steps} steps and schedule {schedule}")
        return setting


def schedule_id(sigmas: Sequence[float]) -> str:
    """Twelve characters that stand for a schedule; six digits of each sigma count."""
    return hashlib.sha256(" ".join(f"{sigma:.5e}" for sigma in sigmas).encode()).hexdigest()[:12]


def _same_schedule(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(p - q) <= 1e-4 * max(abs(p), abs(q)) for p, q in zip(a, b, strict=True))


def _same_prompt(a: Sequence[float], b: Sequence[float]) -> bool:
    """Encodings of one prompt differ a little from machine to machine."""
    each = 1 + PROJECTIONS
    sizes = [a[i - i % each] for i in range(len(a))]
    return len(a) == len(b) and all(abs(p - q) <= _TOLERANCE * max(size, 1e-6) for p, q, size in zip(a, b, sizes, strict=True))
