"""Setting: what a fit or a search was made for. Its result is good for the same setting only, and says so when the setting differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spaces import is_flow

_SAMPLED = 64  # parameters, and values of each, that a model is recognised by
_PROJECTIONS = 8
_TOLERANCE = 0.03  # between two encodings of one prompt, relative to their size


@dataclass(frozen=True)
class Setting:
    """model: class and hash. sigmas: the whole schedule, T + 1 values. space: of the scores. negative: projections of its encoding."""

    model: str
    sampler: str
    sigmas: tuple[float, ...]
    cfg: float
    space: str
    negative: tuple[float, ...]

    @classmethod
    def of(cls, guider: Any, sampler: Any, sigmas: Tensor) -> Setting:
        """That of one sampling call of the host."""
        patcher = guider.model_patcher
        flow = is_flow(patcher.get_model_object("model_sampling"))
        return cls(
            model=model_id(patcher),
            sampler=sampler_id(sampler),
            sigmas=tuple(sigmas.tolist()),
            cfg=float(guider.cfg),
            space="velocity" if flow else "noise",
            negative=projections(guider.original_conds.get("negative") or ()),
        )

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
        """Raise ValueError naming everything in which ``other``, the setting of the run that begins, differs."""
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


def sampler_id(sampler: Any) -> str:
    """The name of a SAMPLER, with its options where it has any."""
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        return type(sampler).__name__
    name = getattr(function, "__name__", type(function).__name__).removeprefix("sample_")
    options = getattr(sampler, "extra_options", None) or {}
    return f"{name} ({', '.join(f'{key} {options[key]}' for key in sorted(options))})" if options else name


def schedule_id(sigmas: Sequence[float]) -> str:
    """Twelve characters that stand for a schedule; six digits of each sigma count."""
    return hashlib.sha256(" ".join(f"{sigma:.5e}" for sigma in sigmas).encode()).hexdigest()[:12]


def _same_schedule(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(abs(p - q) <= 1e-4 * max(abs(p), abs(q)) for p, q in zip(a, b, strict=True))


# --- the model -------------------------------------------------------------------------------------------------------


def model_id(patcher: Any) -> str:
    """Class of the network and a hash of its configuration, of some values of some weights as loaded, and of the LoRAs on it."""
    network = patcher.model.diffusion_model
    parts = hashlib.sha256()
    weights = [(name, weight) for name, weight in network.named_parameters() if type(weight.data) is torch.Tensor]
    for name, weight in weights:
        parts.update(f"{name} {tuple(weight.shape)}".encode())
    for name, weight in weights[:: max(1, len(weights) // _SAMPLED)]:
        original = patcher.backup.get(f"diffusion_model.{name}")  # where a LoRA is worked into the weight of a loaded model
        parts.update(_sampled(weight if original is None else original.weight))
    for key in sorted(patcher.patches):
        parts.update(key.encode())
        _add(parts, patcher.patches[key])
    return f"{type(network).__name__} {parts.hexdigest()[:12]}"


def _sampled(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].float().cpu().numpy().tobytes()


def _add(parts: Any, value: Any) -> None:
    """Add a weight patch of the host to a hash: strengths and tensors, however nested."""
    if isinstance(value, Tensor):
        parts.update(_sampled(value))
    elif isinstance(value, (tuple, list)):
        for entry in value:
            _add(parts, entry)
    elif isinstance(value, (int, float, str)):
        parts.update(str(value).encode())
    elif hasattr(value, "weights"):  # the host's weight adapters
        _add(parts, value.weights)


# --- the negative prompt ---------------------------------------------------------------------------------------------


def projections(conds: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """A few fixed projections of a conditioning's text encoding and pooled vector, by which it is recognised.

    Not a hash, because encodings of one prompt differ a little from machine to machine.
    """
    tensors = [cond[name] for cond in conds for name in ("cross_attn", "pooled_output") if isinstance(cond.get(name), Tensor)]
    return tuple(value for tensor in tensors for value in _project(tensor))


def _project(tensor: Tensor) -> list[float]:
    """Root mean square, and projections on pseudo-random signs (of about that size)."""
    flat = tensor.detach().flatten().double().cpu()
    places = torch.arange(len(flat))
    signs = [((places * 2654435761 + 40503 * number * (places + 1)) >> 15 & 1) * 2 - 1 for number in range(_PROJECTIONS)]
    return [float(flat.square().mean().sqrt()), *(float(flat @ sign.double() / len(flat) ** 0.5) for sign in signs)]


def _same_prompt(a: Sequence[float], b: Sequence[float]) -> bool:
    each = 1 + _PROJECTIONS
    sizes = [a[i - i % each] for i in range(len(a))]
    return len(a) == len(b) and all(abs(p - q) <= _TOLERANCE * max(size, 1e-6) for p, q, size in zip(a, b, sizes, strict=True))
