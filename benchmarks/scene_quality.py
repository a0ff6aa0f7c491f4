"""How good the 128-pixel demo models are: ``python run.py bench scene_quality [--samples N] [--models NAME ...] [--sheet FILE]``.

Samples captions of one object, and of two with a relation, through the host's own sampler and VAE, and asks the embedded classifier
whether everything that the caption says is there. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from lodestar.benchmarks._sampling import ksampler
from lodestar.benchmarks.demo_quality import frame
from lodestar.demo import autoencoder, latent_models, models, scene_classifier, scenes
from lodestar.pictures import sheets
from lodestar.pictures.text import write

STEPS, BATCH = 20, 32
CFGS = (1.0, 2.5, 4.0)
SEED = 77
FRESH = 2048  # pictures for the classifier's own accuracy
OBJECTS = {"one object": (1.0, 0.0, 0.0), "two objects": (0.0, 1.0, 0.0)}
NAMES = [f"{model}_{strength}" for model in models.MODELS for strength in latent_models.STRENGTHS]
TARGETS = {("main", "one object"): 0.97, ("main", "two objects"): 0.85}
CLASSIFIER = 0.99
LARGEST = 24.0  # MB of all weights
SHOWN = 16  # pictures of each setting on the sheet


class Sampled(NamedTuple):
    """A setting's pictures [B, 3, H, W] in [0, 1] and which are right in what, {group: bool [B]}."""

    pictures: Tensor
    right: dict[str, Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="captions of each kind for each setting (default: 256)")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES, help="which models (default: all)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="save a picture of the first samples of each setting beside drawn ones")
    args = parser.parse_args(argv)
    drawn = {kind: fresh(args.samples, shares) for kind, shares in OBJECTS.items()}
    results = {f"drawn, {kind}": classified(draw(of_kind), of_kind) for kind, of_kind in drawn.items()}
    checks = [check("classifier, fresh pictures", accuracy_on_fresh(), CLASSIFIER)]
    for name in args.models:
        model, strength = name.split("_")
        for kind, of_kind in drawn.items():
            found = {cfg: measured(model, strength, of_kind, cfg) for cfg in CFGS}
            results |= {f"{name}, {kind}, cfg {cfg:g}": result for cfg, result in found.items()}
            best = max(share(result, "all") for result in found.values())
            if (strength, kind) in TARGETS:
                checks.append(check(f"{name}, {kind}", best, TARGETS[strength, kind]))
    print(f"\nShare of {args.samples} pictures that are right; {STEPS} Euler steps\n\n{table(results)}\n")
    megabytes = sum(file.stat().st_size for file in latent_models.WEIGHTS.glob("*.safetensors")) / 1e6
    print(f"all weights {megabytes:.2f} MB of {LARGEST:g}")
    if args.sheet:
        sheet(results).save(args.sheet)
    return 0 if all(checks) and megabytes <= LARGEST else 1


# ------------------------------------------------------------------------------------------------------------ measuring


def fresh(count: int, shares: Sequence[float]) -> scenes.Scenes:
    """Scenes with one or two objects, by the shares."""
    return scenes.random_scenes(count, torch.Generator().manual_seed(SEED), shares)


def draw(wanted: scenes.Scenes) -> Tensor:
    """A true picture of each scene."""
    return scenes.draw(wanted, torch.Generator().manual_seed(SEED))


@torch.inference_mode()
def classified(pictures: Tensor, wanted: scenes.Scenes) -> Sampled:
    """Pictures, and in what the classifier finds them right."""
    net = scene_classifier.load_classifier()
    parts = [net(part) for part in pictures.split(BATCH)]
    logits = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Sampled(pictures, scene_classifier.correct(logits, wanted))


def accuracy_on_fresh() -> float:
    """The smallest share of fresh pictures, over the kinds of attributes, that the classifier reads right."""
    generator = torch.Generator().manual_seed(SEED + 1)
    wanted = scenes.random_scenes(FRESH, generator)
    right = classified(torch.cat([scenes.draw(wanted[start : start + BATCH], generator) for start in range(0, FRESH, BATCH)]), wanted).right
    return min(right[group].double().mean().item() for group in scene_classifier.GROUPS)


def measured(model: str, strength: str, wanted: scenes.Scenes, cfg: float) -> Sampled:
    """Sample every scene's caption and classify the pictures."""
    patcher, clip, vae = latent_models.load_model(model, strength), latent_models.load_clip(), latent_models.load_vae()
    pictures = []
    for start in tqdm(range(0, len(wanted), BATCH), desc=f"{model} {strength}, cfg {cfg:g}", unit="batch", mininterval=10):
        texts = scenes.captions(wanted[start : start + BATCH])
        pictures.append(sample(patcher, clip, vae, texts, cfg, models.SCHEDULERS[model], SEED + start))
    return classified(torch.cat(pictures), wanted)


@torch.inference_mode()
def sample(patcher: Any, clip: Any, vae: Any, texts: Sequence[str], cfg: float, scheduler: str, seed: int) -> Tensor:
    """A picture for each caption, [B, 3, 128, 128] in [0, 1]."""
    conds = models.encode(clip, texts), models.encode(clip, [""])
    side = scenes.SIZE // autoencoder.SCALE
    empty = torch.zeros(len(texts), autoencoder.CHANNELS, side, side)
    latent = ksampler(patcher, conds, empty, steps=STEPS, cfg=cfg, scheduler=scheduler, seed=seed)
    return vae.decode(latent).movedim(-1, 1).float().cpu()


# ------------------------------------------------------------------------------------------------------------ reporting


def share(result: Sampled, group: str) -> float:
    """How many of the pictures are right in one kind of attribute."""
    return result.right[group].double().mean().item()


def table(results: Mapping[str, Sampled]) -> str:
    """One line for each setting, one column for each kind of attribute, in Markdown."""
    names = (*scene_classifier.GROUPS, "all")
    lines = [f"| {'pictures':<34}|" + "".join(f"{name:>11} |" for name in names), f"|{'-' * 35}|" + f"{'-' * 11}:|" * len(names)]
    for label, result in results.items():
        lines.append(f"| {label:<34}|" + "".join(f"{share(result, name):>11.1%} |" for name in names))
    return "\n".join(lines)


def check(what: str, value: float, least: float) -> bool:
    """Print a target and whether it is met."""
    met = value >= least
    print(f"{'pass' if met else 'FAIL'}  {what:<36}{value:>8.1%}   at least {least:.0%}")
    return met


def sheet(results: Mapping[str, Sampled], columns: int = 4) -> Image.Image:
    """The first pictures of each setting at full size, the wrong ones framed in red."""
    side = scenes.SIZE * 4
    rows = -(-len(results) // columns)
    page = Image.new("RGB", (columns * (side + 12) + 12, rows * (side + 48)), "white")
    pen = ImageDraw.Draw(page)
    for number, (label, result) in enumerate(results.items()):
        x, y = 12 + number % columns * (side + 12), number // columns * (side + 48)
        write(pen, (x, y + 8), f"{label}: {share(result, 'all'):.0%} right", 18, "#222222")
        tiles = (result.pictures[:SHOWN].movedim(1, -1) * 255).byte().numpy()
        framed = [frame(Image.fromarray(tile), bool(ok)) for tile, ok in zip(tiles, result.right["all"][:SHOWN], strict=True)]
        page.paste(sheets.tiled(framed, side), (x, y + 36))
    return page


if __name__ == "__main__":
    sys.exit(main())
