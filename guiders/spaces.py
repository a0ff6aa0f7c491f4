"""The ground that all methods stand on: the path x = a x0 + s eps and its levels, denoised, noise and velocity, per-sample sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def is_flow(model_sampling: Any) -> bool:
    """Whether the model's path is x = (1 - t) x0 + t noise (flow) rather than x = x0 + sigma noise (eps, v, EDM)."""
    from comfy.model_sampling import CONST

    return isinstance(model_sampling, CONST)


class Level(NamedTuple):
    """A point of the path: a share ``a`` of signal, ``s`` of noise. The host's sigma is ``s``."""

    a: float | Tensor
    s: float | Tensor


def level_of(sigma: float | Tensor, flow: bool) -> Level:
    """The level that the host calls ``sigma``: a = 1 - t, s = t on flow models, a = 1, s = sigma on all others (eps, v, EDM)."""
    return Level(1 - sigma if flow else 1.0, sigma)


def levels_of(sigmas: Sequence[float], flow: bool) -> list[Level]:
    """A schedule as levels."""
    return [level_of(sigma, flow) for sigma in sigmas]


def level_at(rho: float, flow: bool) -> Level:
    """The level with noise-to-signal ratio ``rho`` = s / a."""
    return Level(1 / (1 + rho), rho / (1 + rho)) if flow else Level(1.0, rho)


def reparametrise(x: Tensor, sigma: Tensor, from_flow: bool, to_flow: bool) -> tuple[Tensor, Tensor]:
    """The same noisy point [B, ...] and level [B] on the other kind of path: sigma = t / (1 - t), x_flow = x / (1 + sigma).

    Signal-to-noise ratio and x0 are unchanged, so denoised predictions of both kinds of model can be compared.
    """
    if from_flow == to_flow:
        return x, sigma
    if to_flow:
        t = sigma / (1 + sigma)
        return x * level_of(_like(t, x), flow=True).a, t
    t = sigma.clamp(max=1 - 1e-4)
    return x / level_of(_like(t, x), flow=True).a, t / (1 - t)


def to_noise(denoised: Tensor, x: Tensor, sigma: Tensor, flow: bool) -> Tensor:
    """The noise eps in x = a x0 + s eps that belongs to a denoised prediction [B, ...] at x [B, ...], sigma [B]: (x - a D) / s."""
    a, s = level_of(_like(sigma, x), flow)
    return (x - a * denoised) / s


def to_velocity(denoised: Tensor, x: Tensor, sigma: Tensor, flow: bool) -> Tensor:
    """The velocity that belongs to a denoised prediction: dx/dt = eps - D of a flow model, else v = (eps - sigma D) / sqrt(1 + sigma^2).

    The latter is v-prediction (Salimans and Ho 2022): cos(phi) eps - sin(phi) x0 with tan(phi) = sigma.
    """
    noise = to_noise(denoised, x, sigma, flow)
    s = _like(sigma, x)
    return noise - denoised if flow else (noise - s * denoised) / (1 + s * s).sqrt()


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Layout:
    """How a latent batch divides into parts that are measured apart: one, or several in a packed audio + video latent.

    one_video: whether the rows of the batch are the frames of one video, which is one sample then.
    """

    sizes: tuple[int, ...] = ()
    one_video: bool = False

    @classmethod
    def of(cls, latent_shapes: Any) -> Layout:
        """From the host's ``latent_shapes``: a packed latent is [B, 1, sum of the parts' sizes]."""
        if latent_shapes is None or len(latent_shapes) < 2:
            return cls()
        return cls(tuple(torch.Size(shape[1:]).numel() for shape in latent_shapes))

    def split(self, x: Tensor) -> list[Tensor]:
        """x as one [B, n] matrix per part; [1, B n] where the batch is one video."""
        flat = x.flatten(1)
        parts = list(flat.split(self.sizes, dim=1)) if self.sizes else [flat]
        return [part.reshape(1, -1) for part in parts] if self.one_video else parts

    def join(self, parts: list[Tensor], like: Tensor) -> Tensor:
        """Undo ``split``: its parts back to the shape and dtype of ``like``."""
        if self.one_video:
            parts = [part.reshape(len(like), -1) for part in parts]
        return torch.cat(parts, dim=1).to(like.dtype).reshape(like.shape)


def on_device_of(x: Tensor, values: Sequence[int] | Sequence[bool]) -> Tensor:
    """A short list as a tensor on the device of x; a GPU is not waited for, as ``torch.tensor(values, device=...)`` would."""
    return torch.tensor(values).to(x.device, non_blocking=x.device.type == "cuda")


def precise(x: Tensor) -> Tensor:
    """x in float64, or in float32 on devices that have nothing wider (MPS, DirectML)."""
    return x.float() if x.device.type in ("mps", "privateuseone") else x.double()


def dot_per_sample(a: Tensor, b: Tensor) -> Tensor:
    """Inner product over all non-batch dimensions in high precision: [B, n], [B, n] -> [B, 1]."""
    return (precise(a) * precise(b)).sum(dim=1, keepdim=True)


def norm_per_sample(x: Tensor, layout: Layout) -> Tensor:
    """Euclidean norm [B] over all non-batch dimensions (and parts)."""
    return sum(dot_per_sample(part, part) for part in layout.split(x)).sqrt().squeeze(1)


def cosine_per_sample(a: Tensor, b: Tensor, layout: Layout) -> Tensor:
    """Cosine similarity [B] in [-1, 1] over all non-batch dimensions (and parts); exactly 1 of equal samples, 0 of a zero."""
    product = sum(dot_per_sample(p, q) for p, q in zip(layout.split(a), layout.split(b), strict=True)).squeeze(1)
    squares = [sum(dot_per_sample(part, part) for part in layout.split(x)).squeeze(1) for x in (a, b)]
    return (product / (squares[0] * squares[1]).sqrt().clamp_min(1e-30)).clamp(-1, 1)
