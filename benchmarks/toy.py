"""Guidance on two-dimensional distributions whose denoisers are known in closed form: the pictures of the help pages.

    python run.py bench toy

Every guided step goes through the pack's own functions. tests/benchmarks/test_toy.py asserts what the pictures show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lodestar.guiders.engine.step import Step
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.shapers.apg import projected_update
from lodestar.guiders.spaces import Layout
from lodestar.guiders.terms.autoguidance import autoguidance_update
from lodestar.guiders.terms.pag import PAG

Denoiser = Callable[[Tensor, float], Tensor]


# --- distributions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Gaussians: means [K, 2], axes [K, 2, 2] (columns), variances [K, 2] along them, weights [K], branch [K] that each is part of."""

    means: Tensor
    axes: Tensor
    variances: Tensor
    weights: Tensor
    branch: Tensor

    def _local(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(log of weight_k N(x; k, sigma) [B, K], x - mean_k along the axes of component k [B, K, 2])."""
        away = torch.einsum("bi,kij->bkj", x, self.axes) - torch.einsum("ki,kij->kj", self.means, self.axes)
        noisy = self.variances + sigma**2
        return self.weights.log() - 0.5 * (away**2 / noisy + (2 * math.pi * noisy).log()).sum(-1), away

    def denoised(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x0 + sigma n = x]: [B, 2] -> [B, 2]."""
        log, away = self._local(x, sigma)
        posterior = log.softmax(-1)
        shift = away * (self.variances / (self.variances + sigma**2)) * posterior[..., None]
        return posterior @ self.means + torch.einsum("bkj,kij->bi", shift, self.axes)

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x): [B, 2] -> [B]."""
        return self._local(x, 0.0)[0].logsumexp(-1)

    def shares(self, x: Tensor) -> Tensor:
        """The share of the points in each branch: [B, 2] -> [branches]."""
        nearest = self.branch[self._local(x, 0.0)[0].argmax(-1)]
        return torch.bincount(nearest, minlength=int(self.branch.max()) + 1) / len(x)

    def draw(self, n: int, seed: int = 0, sigma: float = 0.0) -> Tensor:
        """n noisy points: [n, 2]."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(2, n, 2, dtype=self.means.dtype, generator=generator)
        away = torch.einsum("nij,nj->ni", self.axes[which], noise[0] * self.variances[which].sqrt())
        return self.means[which] + away + sigma * noise[1]

    def blurred(self, width: float) -> Mixture:
        """What a network learns that cannot resolve details below ``width``."""
        return replace(self, variances=self.variances + width**2)

    def __or__(self, other: Mixture) -> Mixture:
        """An even mix of both."""
        parts = [(m.means, m.axes, m.variances, m.weights / 2, m.branch) for m in (self, other)]
        return Mixture(*(torch.cat(part) for part in zip(*parts, strict=True)))


def fractal(angle: float, depth: int = 5, seed: int = 2) -> Mixture:
    """A tree that forks at every level: one class of the kind of toy that Karras et al. use (arXiv 2406.02507, section 3)."""
    random = np.random.RandomState(seed)
    rows: list[tuple] = []
    forks = 0

    def grow(level: int, start: np.ndarray, angle: float) -> None:
        nonlocal forks
        along = np.array([np.cos(angle), np.sin(angle)])
        length = 0.45 * 0.8**level * (1 + 0.2 * random.randn())
        for t in np.linspace(0.08, 0.92, 6):
            axes = np.stack([along, along[::-1] * (-1, 1)], axis=1)
            variances = ((length / 10) ** 2, (0.012 * 0.8**level) ** 2)
            rows.append((start + along * length * t, axes, variances, length * 0.5**level, forks))
        forks += 1
        if level + 1 < depth:
            for sign in (1, -1):
                grow(level + 1, start + along * length, angle + sign * 0.75 * 0.85**level * (1 + 0.2 * random.randn()))

    grow(0, np.zeros(2), angle)
    means, axes, variances, weights, branch = (torch.tensor(np.array(column)) for column in zip(*rows, strict=True))
    return Mixture(means, axes, variances, weights / weights.sum(), branch)


def ring(classes: int = 8, along: float = 0.12, across: float = 0.05) -> Mixture:
    """Blobs on the unit circle, longer along it than across; each is a branch."""
    angles = torch.arange(classes, dtype=torch.float64) * 2 * math.pi / classes
    outward, sideways = torch.stack([angles.cos(), angles.sin()], -1), torch.stack([-angles.sin(), angles.cos()], -1)
    variances = torch.tensor([across**2, along**2], dtype=torch.float64).expand(classes, 2)
    axes = torch.stack([outward, sideways], -1)
    return Mixture(outward, axes, variances, torch.full((classes,), 1 / classes, dtype=torch.float64), torch.arange(classes))


def only(mixture: Mixture, branch: int) -> Mixture:
    """One branch of a mixture."""
    keep = mixture.branch == branch
    parts = (mixture.means, mixture.axes, mixture.variances, mixture.weights / mixture.weights[keep].sum(), mixture.branch)
    return Mixture(*(part[keep] for part in parts))


# --- sampling --------------------------------------------------------------------------------------------------------


def edm_sigmas(steps: int, low: float = 0.002, high: float = 5.0, rho: float = 7.0) -> list[float]:
    """The schedule of Karras et al., arXiv 2206.00364, eq. 5, with the final 0."""
    return [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)] + [0.0]


def heun(denoise: Denoiser, x: Tensor, sigmas: list[float]) -> Tensor:
    """Karras et al., arXiv 2206.00364, Algorithm 1 without noise."""
    for sigma, following in pairwise(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        predicted = x + (following - sigma) * d
        if following > 0:
            d = (d + (predicted - denoise(predicted, following)) / following) / 2
        x = x + (following - sigma) * d
    return x


# --- what the methods do ---------------------------------------------------------------------------------------------

TREE, OTHER_TREE, RING = fractal(math.pi / 4), fractal(math.pi * 5 / 4, seed=3), ring()
MAIN, WEAK = TREE.blurred(0.02), TREE.blurred(0.05)  # two networks that fail to resolve thin branches, one of them worse
UNCOND = (TREE | OTHER_TREE).blurred(0.05)


def tree_scene(n: int, steps: int = 24) -> dict[str, Tensor]:
    """Points of one class of the tree, by method. All start from the same noise."""

    def cfg(w: float, low: float, high: float) -> Denoiser:
        return lambda x, sigma: UNCOND.denoised(x, sigma).lerp(MAIN.denoised(x, sigma), w if low < sigma <= high else 1.0)

    def autoguidance(x: Tensor, sigma: float) -> Tensor:
        cond = MAIN.denoised(x, sigma)
        return cond + autoguidance_update(cond, WEAK.denoised(x, sigma), 3.0)

    start, sigmas = TREE.draw(n, seed=1, sigma=5.0), edm_sigmas(steps)
    methods = {
        "no guidance": MAIN.denoised,
        "CFG, w 4": cfg(4.0, 0.0, math.inf),
        "autoguidance, w 3": autoguidance,
        "CFG, w 4, interval": cfg(4.0, 0.05, 0.3),
    }
    return {"data": TREE.draw(n, seed=2)} | {name: heun(denoise, start, sigmas) for name, denoise in methods.items()}


def tree_measures(x: Tensor) -> tuple[float, int]:
    """(share of points off the data's support, number of branches that got less than a quarter of their share)."""
    truth = TREE.draw(8000, seed=3)
    outside = TREE.log_density(x) < TREE.log_density(truth).quantile(0.01)
    return outside.double().mean().item(), int((TREE.shares(x) < TREE.shares(truth) / 4).sum())


def ring_scene(n: int, w: float = 7.0, steps: int = 24) -> dict[str, Tensor]:
    """Points of every class of the ring [classes * n, 2], by method. The norm of a point stands for saturation."""
    classes = len(RING.weights)

    def guided(update: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.cat([heun(partial(step, only(RING, k), update), starts[k], edm_sigmas(steps)) for k in range(classes)])

    def step(target: Mixture, update: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: float) -> Tensor:
        cond = target.denoised(x, sigma)
        return cond + (w - 1) * update(cond - RING.denoised(x, sigma), cond)

    starts = [only(RING, k).draw(n, seed=k, sigma=5.0) for k in range(classes)]
    return {
        "data": torch.cat([only(RING, k).draw(n, seed=k) for k in range(classes)]),
        f"CFG, w {w:g}": guided(lambda g, cond: g),
        f"APG, w {w:g}, eta 0": guided(lambda g, cond: projected_update(g, cond, eta=0.0, r=0.0)),
    }


TOKENS, MODES = 8, ring(6, 0.06, 0.06)


def tokens_denoised(x: Tensor, sigma: float, share: float) -> Tensor:
    """A picture is TOKENS points of one mode [B, TOKENS, 2]. Each token weighs its own evidence and ``share`` of the others'.

    With share 1 that is the exact denoiser; a smaller one is a network whose self-attention is weak, and 0 is identity attention.
    """
    log, away = MODES._local(x.flatten(0, 1), sigma)
    log = log.unflatten(0, x.shape[:2])
    posterior = (log + share * (log.sum(1, keepdim=True) - log)).softmax(-1).flatten(0, 1)
    shift = away * (MODES.variances / (MODES.variances + sigma**2)) * posterior[..., None]
    return (posterior @ MODES.means + torch.einsum("bkj,kij->bi", shift, MODES.axes)).view_as(x)


def token_scene(n: int, s: float = 3.0, share: float = 0.15, steps: int = 24) -> dict[str, Tensor]:
    """Pictures [n, TOKENS, 2] by method."""
    rule = PAG(perturbation=IdentityAttention(()), scale=s)

    def pag(x: Tensor, sigma: float) -> Tensor:
        cond = tokens_denoised(x, sigma, share)
        return rule.add(cond, cond, {rule.branches[0]: tokens_denoised(x, sigma, 0.0)}, Step(0, sigma, True, Layout()))

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, n, TOKENS, 2, dtype=torch.float64, generator=generator)
    which = torch.randint(len(MODES.weights), (n,), generator=generator)
    data = MODES.means[which][:, None] + MODES.variances[0].sqrt() * noise[0]
    start, sigmas = data + 5 * noise[1], edm_sigmas(steps)
    return {
        "data": data,
        "no guidance": heun(partial(tokens_denoised, share=share), start, sigmas),
        f"PAG, s {s:g}": heun(pag, start, sigmas),
    }


def coherent(x: Tensor) -> Tensor:
    """Whether all tokens of a picture are of one mode: [B, TOKENS, 2] -> [B]."""
    nearest = (x[..., None, :] - MODES.means).norm(dim=-1).argmin(-1)
    return (nearest == nearest[:, :1]).all(1)


# --- pictures --------------------------------------------------------------------------------------------------------

_PANEL, _TITLE, _SCALE = 300, 44, 2  # pixels; drawn twice as large, for smooth dots
_INK, _FAINT = "#1f2933", "#dbe2ea"
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#b8860b", "#2a9d9d", "#7a5195", "#555555")


class Panel:
    """One square of a figure, in the coordinates of the data."""

    def __init__(self, pen: ImageDraw.ImageDraw, number: int, centre: tuple[float, float], width: float) -> None:
        self.pen, self.left, self.centre, self.width = pen, number * _PANEL * _SCALE, centre, width

    def at(self, point: Tensor) -> tuple[float, float]:
        """Pixels of a point [2]."""
        size = _PANEL * _SCALE
        x = (point[0].item() - self.centre[0]) / self.width + 0.5
        y = 0.5 - (point[1].item() - self.centre[1]) / self.width
        return self.left + x * size, _TITLE * _SCALE + y * size

    def dots(self, points: Tensor, colour: str, radius: float) -> None:
        """A dot at each point [n, 2]."""
        for x, y in (self.at(point) for point in points):
            self.pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)

    def lines(self, points: Tensor, colour: str) -> None:
        """A closed line through points [n, 2]."""
        self.pen.line([self.at(point) for point in [*points, points[0]]], fill=colour, width=_SCALE)

    def title(self, text: str, note: str) -> None:
        """Two lines above the square."""
        x = self.left + _PANEL * _SCALE / 2
        for y, line, size in ((4, text, 15), (24, note, 12)):
            self.pen.text((x, y * _SCALE), line, fill=_INK, font=ImageFont.load_default(size * _SCALE), anchor="ma")


def figure(file: Path, centre: tuple[float, float], width: float, panels: Sequence[tuple[str, str, Callable[[Panel], None]]]) -> None:
    """Draw panels (title, note, what draws them) side by side and save them as a small PNG."""
    picture = Image.new("RGB", (_PANEL * len(panels) * _SCALE, (_PANEL + _TITLE) * _SCALE), "#ffffff")
    pen = ImageDraw.Draw(picture)
    for number, (title, note, draw) in enumerate(panels):
        panel = Panel(pen, number, centre, width)
        draw(panel)
        panel.title(title, note)
    small = picture.resize((picture.width // _SCALE, picture.height // _SCALE), Image.Resampling.LANCZOS)
    small.quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


def tree_figure(file: Path, scene: dict[str, Tensor], methods: Sequence[str]) -> None:
    """The data in grey, the points of a method on it."""
    support = TREE.draw(3000, seed=4)

    def draw(points: Tensor, panel: Panel) -> None:
        panel.dots(support, _FAINT, 2.5)
        panel.dots(points, _COLOURS[0], 1.8)

    panels = []
    for method in methods:
        outside, lost = tree_measures(scene[method])
        panels.append((method, f"{outside:.0%} off the data, {lost} of 31 branches lost", partial(draw, scene[method])))
    low, high = TREE.means.amin(0), TREE.means.amax(0)
    figure(file, tuple(((low + high) / 2).tolist()), 1.1 * (high - low).max().item(), panels)


def ring_figure(file: Path, scene: dict[str, Tensor]) -> None:
    """The classes in colours, on the circle that holds the data."""
    angle = torch.linspace(0, 2 * math.pi, 120)
    circle = torch.stack([angle.cos(), angle.sin()], -1)

    def draw(points: Tensor, panel: Panel) -> None:
        panel.lines(circle, _FAINT)
        for colour, of_class in zip(_COLOURS, points.chunk(len(RING.weights)), strict=True):
            panel.dots(of_class, colour, 3)

    panels = [(name, f"mean norm {x.norm(dim=1).mean():.2f}", partial(draw, x)) for name, x in scene.items()]
    figure(file, (0.0, 0.0), 2.9, panels)


def token_figure(file: Path, scene: dict[str, Tensor]) -> None:
    """The tokens of each picture joined by a line; pictures that fall apart in red."""

    def draw(pictures: Tensor, panel: Panel) -> None:
        whole = coherent(pictures)
        for tokens, good in sorted(zip(pictures, whole.tolist(), strict=True), key=lambda pair: not pair[1]):
            panel.lines(tokens, _COLOURS[0] if good else "#f4a6b0")
        for tokens in pictures:
            panel.dots(tokens, _INK, 2)

    panels = [(name, f"{coherent(x).double().mean():.0%} of the pictures hold together", partial(draw, x)) for name, x in scene.items()]
    figure(file, (0.0, 0.0), 3.0, panels)


def report_example(file: Path) -> None:
    """What Guidance Report shows of a run of the demo model: the picture of its own help page."""
    import comfy.sample

    from lodestar.guiders.engine.attach import attach
    from lodestar.guiders.network.layers import resolve_layers
    from lodestar.guiders.shapers.apg import APG
    from lodestar.nodes.demo_model import LodestarDemoModel
    from lodestar.nodes.report import LodestarReport

    model, clip, _ = LodestarDemoModel.execute("unet", "main").args
    perturbation = IdentityAttention(resolve_layers(model, "middle"))
    model = attach(attach(model, APG(norm_threshold=5.0)), PAG(perturbation=perturbation, scale=2.0, start_percent=0.1, end_percent=0.8))
    prompts = ("a large purple pentagon on a cream background", "")
    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(prompt)) for prompt in prompts]
    latent = torch.zeros(4, 3, 32, 32)
    noise = comfy.sample.prepare_noise(latent, 7)
    with torch.inference_mode():
        comfy.sample.sample(model, noise, 20, 6.0, "euler", "normal", *conds, latent, disable_pbar=True, seed=7)
    picture = LodestarReport.execute(model, {}).args[1][0]
    image = Image.fromarray((picture.numpy() * 255).round().astype(np.uint8))
    image.quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Draw all figures into the help pages' folder."""
    folder = Path(__file__).resolve().parent.parent / "js" / "docs"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the tensors are too small for more
    tree = tree_scene(900)
    tree_figure(folder / "autoguidance.png", tree, ["no guidance", "CFG, w 4", "autoguidance, w 3"])
    tree_figure(folder / "interval.png", tree, ["no guidance", "CFG, w 4", "CFG, w 4, interval"])
    ring_figure(folder / "apg.png", ring_scene(60))
    token_figure(folder / "pag.png", token_scene(40))
    report_example(folder / "report.png")


if __name__ == "__main__":
    main()
