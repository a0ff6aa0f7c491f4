"""PAG on pictures of a few tokens, which hold together only as far as the attention between them reaches."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lodestar.guiders.engine.step import Step
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.spaces import Layout
from lodestar.guiders.terms.pag import PAG

from .mixtures import edm_sigmas, heun, ring
from .panels import COLOURS, INK, Panel, figure

TOKENS, MODES = 8, ring(6, 0.06, 0.06)


def denoised(x: Tensor, sigma: float, share: float) -> Tensor:
    """A picture is TOKENS points of one mode [B, TOKENS, 2]. Each token weighs its own evidence and ``share`` of the others'.

    With share 1 that is the exact denoiser; a smaller one is a network whose self-attention is weak, and 0 is identity attention.
    """
    log, away = MODES.local(x.flatten(0, 1), sigma)
    log = log.unflatten(0, x.shape[:2])
    posterior = (log + share * (log.sum(1, keepdim=True) - log)).softmax(-1).flatten(0, 1)
    shift = away * (MODES.variances / (MODES.variances + sigma**2)) * posterior[..., None]
    return (posterior @ MODES.means + torch.einsum("bkj,kij->bi", shift, MODES.axes)).view_as(x)


def scene(n: int, s: float = 3.0, share: float = 0.15, steps: int = 24) -> dict[str, Tensor]:
    """Pictures [n, TOKENS, 2] by method."""
    rule = PAG(perturbation=IdentityAttention(()), scale=s)

    def pag(x: Tensor, sigma: float) -> Tensor:
        cond = denoised(x, sigma, share)
        return rule.add(cond, cond, {rule.branches[0]: denoised(x, sigma, 0.0)}, Step(0, sigma, True, Layout()))

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, n, TOKENS, 2, dtype=torch.float64, generator=generator)
    which = torch.randint(len(MODES.weights), (n,), generator=generator)
    data = MODES.means[which][:, None] + MODES.variances[0].sqrt() * noise[0]
    start, sigmas = data + 5 * noise[1], edm_sigmas(steps)
    return {
        "data": data,
        "no guidance": heun(partial(denoised, share=share), start, sigmas),
        f"PAG, s {s:g}": heun(pag, start, sigmas),
    }


def coherent(x: Tensor) -> Tensor:
    """Whether all tokens of a picture are of one mode: [B, TOKENS, 2] -> [B]."""
    nearest = (x[..., None, :] - MODES.means).norm(dim=-1).argmin(-1)
    return (nearest == nearest[:, :1]).all(1)


def draw(file: Path, found: dict[str, Tensor]) -> list[str]:
    """The tokens of each picture joined by a line; pictures that fall apart in red."""

    def show(pictures: Tensor, panel: Panel) -> None:
        whole = coherent(pictures)
        for tokens, good in sorted(zip(pictures, whole.tolist(), strict=True), key=lambda pair: not pair[1]):
            panel.lines(tokens, COLOURS[0] if good else "#f4a6b0")
        for tokens in pictures:
            panel.dots(tokens, INK, 2)

    panels = [(name, f"{coherent(x).double().mean():.0%} of the pictures hold together", partial(show, x)) for name, x in found.items()]
    return figure(file, (0.0, 0.0), 3.0, panels)
