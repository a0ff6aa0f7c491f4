"""FreCaS: pictures larger than those a model was trained on (Zhang, Li, Zhang 2025, arXiv 2410.18410, tables 1 to 3 and ablations).

The demo models know 32x32. What is measured on 64x64 and 128x128 is measured after shrinking, except for objects and sharpness.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from skimage.measure import label
from torch import Tensor

from lodestar.benchmarks._sampling import decoded, prompts
from lodestar.demo import models
from lodestar.demo.models import MODELS
from lodestar.demo.shapes import SIZE, background_rgb, colour_rgb
from lodestar.guiders.frecas.cascade import Cascade
from lodestar.guiders.shapers.frequency import low_pass

from ..cells import Batch, Cell
from ..claims import Claim, Results
from ..method import Curve, Method
from ..metrics import ACCURACY, FRECHET, Metric, Moments, OfRows, Pictures, frechet_distance, mean_of

CFG, HIGH = 4.0, 8.0  # w_l and w_h; pixels want less of w_h than the latents of the paper
END = {"unet": 0.572, "mmdit": 0.3}
GAMMA = {"unet": 1.5, "mmdit": 1.0}
STEPS = {64: (20, 10), 128: (16, 6, 8)}
SMALLEST = 0.005  # of a picture: what counts as an object
OTHER_NOISE = 1000  # added to the seed of the native pictures, so that no cell is compared with its own first stage


def enlarged(batch: Batch, *, model: str, stages: str, gamma: float, high_scale: float, map_weight: float, seed: int) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] of a cascade; of one stage, plain sampling."""
    cascade = Cascade.read(
        stages, model=batch.model(model), vae=models.load_vae(), cfg=CFG, sampler="euler", scheduler=models.SCHEDULERS[model],
        gamma=gamma, high_scale=high_scale, map_weight=map_weight,
    )  # fmt: skip
    latent = cascade.latent(None, len(batch.scenes))
    return decoded(cascade.sample(*prompts(batch.captions), batch.seed + seed, latent)[-1]["samples"])


def cell(model: str, name: str, stages: str, gamma: float | None = None, high: float = HIGH, maps: float = 0.6, seed: int = 0) -> Cell:
    """A cell with the cascade's settings, as far as they are not given."""
    settings = {"model": model, "stages": stages, "gamma": GAMMA[model] if gamma is None else gamma}
    return Cell(name, enlarged, tuple((settings | {"high_scale": high, "map_weight": maps, "seed": seed}).items()))


def native(model: str) -> Cell:
    """Plain sampling at the trained size."""
    return cell(model, f"{SIZE}x{SIZE}", f"{SIZE}x{SIZE}: 20 steps", seed=OTHER_NOISE)


def direct(model: str, size: int) -> Cell:
    """Plain sampling at the target size with as many steps as the cascade."""
    return cell(model, f"direct {size}", f"{size}x{size}: {sum(STEPS[size])} steps")


def cascade(model: str, size: int, name: str = "FreCaS", **changes: float) -> Cell:
    """FreCaS from the trained size, doubling."""
    steps = STEPS[size]
    ends = [f", end {END[model]}"] * (len(steps) - 1) + [""]
    sides = [SIZE * 2**i for i in range(len(steps))]
    stages = "; ".join(f"{side}x{side}: {n} steps{end}" for side, n, end in zip(sides, steps, ends, strict=True))
    return cell(model, f"{name} {size}", stages, **changes)


def ablations(model: str) -> dict[str, Cell]:
    """The cascade to twice the size without each of its parts."""
    cells = {"without level shift": cascade(model, 64, "no level shift", gamma=0.0), "w_h = w_l": cascade(model, 64, "w_h = w_l", high=CFG)}
    return cells | ({"without maps": cascade(model, 64, "no maps", maps=0.0)} if model == "unet" else {})


# --- measures --------------------------------------------------------------------------------------------------------


def objects(pictures: Pictures) -> np.ndarray:
    """How many connected objects of the caption's colour each picture shows [N]."""
    wanted = (colour_rgb(pictures.scenes.objects[:, 0, 1]), background_rgb(pictures.scenes.background))
    near = [(pictures.pictures - colour[:, :, None, None]).square().sum(1) for colour in wanted]
    masks, least = (near[0] < near[1]).numpy(), SMALLEST * pictures.pictures[0, 0].numel()
    return np.array([(np.bincount(label(mask).ravel())[1:] >= least).sum() for mask in masks], dtype=float)


def detail(pictures: Pictures) -> np.ndarray:
    """Energy above the trained size's frequencies, relative to the picture's contrast [N]."""
    grey = pictures.pictures.mean(1, keepdim=True)
    high = (grey - low_pass(grey, SIZE, SIZE)).square().mean((1, 2, 3))
    return (high / grey.var((1, 2, 3)).clamp_min(1e-6)).numpy()


REPEATED = Metric("pictures with repeated objects", lambda made, _: mean_of((objects(made) > 1).astype(float)), -1)
WRONG_COUNT = Metric("objects too many or too few", lambda made, _: mean_of(np.abs(objects(made) - 1)), -1)
DETAIL = Metric("high-frequency energy", lambda made, _: mean_of(detail(made)), 1)


def to_native(results: Results, model: str) -> Metric:
    """The paper's FID_b: Fréchet distance of the shrunk pictures to pictures made at the trained size."""
    moments = Moments.of(results.pictures(native(model)).features)

    def of(made: Pictures, _: object) -> OfRows:
        return lambda rows: frechet_distance(made.features[rows], moments)

    return Metric("Fréchet distance to native", of, -1)


def claims(results: Results) -> list[Claim]:
    """Against direct sampling, then the ablations."""
    rows = []
    for model in MODELS:
        near = to_native(results, model)
        for size in STEPS:
            ours, plain = cascade(model, size), direct(model, size)
            rows += [
                Claim(f"{size // SIZE} times the size: looks like native pictures", ours, plain, near),
                Claim(f"{size // SIZE} times the size: no repeated objects", ours, plain, REPEATED),
                Claim(f"{size // SIZE} times the size: the right number of objects", ours, plain, WRONG_COUNT),
                Claim(f"{size // SIZE} times the size: attributes as asked", ours, plain, ACCURACY),
            ]
        without, ours = ablations(model), cascade(model, 64)
        rows += [
            Claim("the level shift gives detail", ours, without["without level shift"], DETAIL),
            Claim("w_h gives detail", ours, without["w_h = w_l"], DETAIL),
        ]
        if "without maps" in without:
            rows.append(Claim("maps keep the number of objects", ours, without["without maps"], WRONG_COUNT))
    return rows


def over_sizes(model: str, name: str, make: Callable[[str, int], Cell]) -> Curve:
    """A way to large pictures over their size."""
    return Curve(name, model, ((float(SIZE), native(model)), *((float(size), make(model, size)) for size in STEPS)))


METHOD = Method(
    title="FreCaS Cascade",
    axis="side in pixels",
    claims=claims,
    curves=tuple(curve for model in MODELS for curve in (over_sizes(model, "direct", direct), over_sizes(model, "FreCaS", cascade))),
    strips=tuple(way(model, size) for model in MODELS for size in STEPS for way in (direct, cascade)),
    others=tuple(made for model in MODELS for made in ablations(model).values()),
    panels=(FRECHET, ACCURACY, REPEATED, DETAIL),
)
