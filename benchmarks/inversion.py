"""From picture to noise and back: ``python run.py bench inversion [--samples N] [--steps N [N ...]] [--write]``.

Inverts fresh pictures with CFG++, with plain CFG at the weight that is worth as much on that schedule, and with CFG at the weight that
the authors match with lambda, and prints the PSNR of what sampling makes of the noise. Then samples it with another colour or another
shape in the caption, and prints what the classifier finds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any

import comfy.samplers
import torch
from torch import Tensor
from tqdm import tqdm

from lodestar.benchmarks import _results
from lodestar.benchmarks._sampling import decoded
from lodestar.benchmarks.effects.cells import SEED, Batch
from lodestar.demo import classifier, models
from lodestar.demo.shapes import ATTRIBUTES, SIZE, Scenes, captions, draw, random_scenes
from lodestar.guiders.cfgpp.inversion import LARGEST_TIME, Inversion
from lodestar.guiders.cfgpp.sampler import cfgpp_sampler
from lodestar.guiders.cfgpp.solvers import mean_equivalent_cfg
from lodestar.guiders.spaces import is_flow, levels_of

CFG, CFGPP, AUTHORS = "CFG", "CFG++", "CFG, authors' match"
AUTHORS_CFG = {0.2: 2.0, 0.4: 5.0, 0.6: 7.5, 0.8: 9.0, 1.0: 12.5}  # by lambda: their table for 50 steps of Stable Diffusion
LAMBDAS = tuple(AUTHORS_CFG)
BORDER = 4  # pixels from the edge, where no shape reaches
EDITED = {"colour": 1, "shape": 2}  # attribute and its place in Scenes.objects


class CFGInversion(Inversion):
    """Plain DDIM inversion under CFG, at the same points: one guided prediction for both parts of a step."""

    def predictor(self, guider: Any, extra_args: dict[str, Any]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """D_w twice."""
        both = super().predictor(guider, extra_args)
        return lambda x, sigma: (both(x, sigma)[0],) * 2


def schedule(model: str, steps: int) -> Tensor:
    """The demo model's schedule, as inversion hands it on."""
    sampling = _sampling(model)
    sigmas = comfy.samplers.calculate_sigmas(sampling, models.SCHEDULERS[model], steps)
    return sigmas.clamp(max=LARGEST_TIME) if is_flow(sampling) else sigmas


@cache
def _sampling(model: str) -> Any:
    return models.build(model, "weak").model_sampling


def worth(model: str, steps: int) -> float:
    """The mean equivalent cfg of lambda 1."""
    return mean_equivalent_cfg(1.0, levels_of(schedule(model, steps).tolist(), is_flow(_sampling(model))))


def originals(batch: Batch, *, model: str) -> Tensor:
    """Fresh pictures [B, 3, H, W] of the batch's captions."""
    return draw(batch.scenes, torch.Generator().manual_seed(batch.seed))


def there_and_back(batch: Batch, *, model: str, method: str, lambda_: float, steps: int = 20, attribute: str | None = None) -> Tensor:
    """The originals, inverted under their captions and sampled under the same, or under captions with another value of ``attribute``.

    method: CFGPP, or CFG or AUTHORS with the weight that ``matched`` gives.
    """
    patcher, clip, sigmas = batch.model(model), models.load_clip(), schedule(model, steps)
    latent = originals(batch, model=model) * 2 - 1
    target = batch.scenes if attribute is None else edited(batch.scenes, attribute)
    source, wanted, nothing = (models.encode(clip, texts) for texts in (batch.captions, captions(target), [""] * len(latent)))
    weight = 1.0 if method == CFGPP else matched(model, method, lambda_, steps)
    inversion, sampler = Inversion(lambda_), cfgpp_sampler("euler", lambda_)
    if method != CFGPP:
        inversion, sampler = CFGInversion(weight), comfy.samplers.sampler_object("euler")

    def run(what: Any, latent: Tensor, positive: list) -> Tensor:
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(positive, nothing)
        guider.set_cfg(weight)
        return guider.sample(torch.zeros_like(latent), latent, what, sigmas, disable_pbar=True, seed=0)

    return decoded(run(sampler, run(inversion, latent, source), wanted))


def matched(model: str, method: str, lambda_: float, steps: int) -> float:
    """The weight of CFG that lambda is compared with."""
    return AUTHORS_CFG[lambda_] if method == AUTHORS else lambda_ * worth(model, steps)


def edited(scenes: Scenes, attribute: str) -> Scenes:
    """The scenes with the next value of an attribute but one."""
    objects, place = scenes.objects.clone(), EDITED[attribute]
    objects[..., place] = (objects[..., place] + 2) % len(ATTRIBUTES[attribute])
    return Scenes(objects, scenes.background, scenes.relation)


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB: [B, 3, H, W] in [0, 1] -> [B]."""
    return -10 * (pictures - reference).square().flatten(1).mean(1).clamp_min(1e-10).log10()


def border(pictures: Tensor) -> Tensor:
    """The pixels of the background near the edge, [B, 3, n]."""
    edge = torch.ones(SIZE, SIZE, dtype=torch.bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return pictures[..., edge]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="pictures for each setting (default: 16)")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20], metavar="N", help="sampling steps (default: 10 20)")
    parser.add_argument("--models", nargs="+", choices=models.MODELS, default=models.MODELS, help="which models (default: both)")
    _results.add_option(parser)
    args = parser.parse_args(argv)
    write = _results.is_wanted(parser, args)
    scenes = random_scenes(args.samples, torch.Generator().manual_seed(SEED), pairs=0.0)
    batch = Batch(scenes, SEED)
    runs = len(args.models) * (3 * len(LAMBDAS) * len(args.steps) + 2 * len(EDITED))
    lines = []
    with torch.inference_mode(), tqdm(total=runs, unit="setting") as bar:
        for model in args.models:
            for line in chain(round_trips(batch, model, args.steps, bar), edits(batch, model, bar)):
                bar.write(line)
                lines.append(line)
    if write:
        _results.write(_results.RESULTS, "inversion", "\n".join(lines))
    return 0


def round_trips(batch: Batch, model: str, steps: Sequence[int], bar: tqdm) -> Iterator[str]:
    """PSNR for each number of steps and lambda."""
    pictures = originals(batch, model=model)
    yield f"\n{model}: PSNR of the round trip, dB, mean of {len(pictures)} pictures; in brackets, the cfg\n"
    yield f"| steps | method |{''.join(f' {lambda_:g} |' for lambda_ in LAMBDAS)}\n|---|---|{'---:|' * len(LAMBDAS)}"
    for count in steps:
        for method in (CFGPP, CFG, AUTHORS):
            cells = []
            for lambda_ in LAMBDAS:
                found = psnr(there_and_back(batch, model=model, method=method, lambda_=lambda_, steps=count), pictures).mean()
                cells.append(f"{found:.1f}" + ("" if method == CFGPP else f" ({matched(model, method, lambda_, count):.3g})"))
                bar.update()
            yield f"| {count} | {method} | {' | '.join(cells)} |"


def edits(batch: Batch, model: str, bar: tqdm) -> Iterator[str]:
    """Shares of pictures with each attribute of the new caption, and PSNR of the background, at lambda 0.6 and 20 steps."""
    net, pictures = classifier.load_classifier(), originals(batch, model=model)
    yield f"\n{model}: edits with lambda 0.6 in 20 steps, share of pictures as the new caption has it\n"
    yield f"| changed | method | {' | '.join(ATTRIBUTES)} | all | background, dB |\n|---|---|{'---:|' * 6}"
    for attribute in EDITED:
        for method in (CFGPP, CFG):
            made = there_and_back(batch, model=model, method=method, lambda_=0.6, attribute=attribute)
            right = classifier.correct(net(made), edited(batch.scenes, attribute))
            shares = " | ".join(f"{right[name].float().mean():.1%}" for name in (*ATTRIBUTES, "all"))
            bar.update()
            yield f"| {attribute} | {method} | {shares} | {psnr(border(made), border(pictures)).mean():.1f} |"


if __name__ == "__main__":
    sys.exit(main())
