"""How good the demo models are: ``python run.py bench demo_quality [--samples N] [--sheet FILE] [--write]``.

Samples one-object captions with each model through the host's own sampler and asks the embedded classifier which attributes of
the caption the pictures have. Exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from lodestar.benchmarks import _results
from lodestar.benchmarks._sampling import decoded, empty, ksampler, prompts
from lodestar.demo import classifier, models
from lodestar.demo.shapes import ATTRIBUTES, Scenes, captions, draw, random_scenes
from lodestar.pictures import sheets
from lodestar.pictures.text import write

CFG, STEPS, BATCH = 4.0, 20, 64
SEED = 77
FRESH = 4096  # pictures for the classifier's own accuracy
TARGETS = {"classifier": 0.98, "unet main": 0.90, "mmdit main": 0.85}
LARGEST = 16.0  # MB of all weights


class Sampled(NamedTuple):
    """A model's pictures [B, 3, H, W] in [0, 1] and which attributes are right, {name: bool [B]}."""

    pictures: Tensor
    right: dict[str, Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, metavar="N", help="captions for each model (default: 512)")
    parser.add_argument("--models", nargs="+", choices=models.MODELS, default=models.MODELS, help="which models (default: both)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="save a picture of the first 64 samples of each model")
    _results.add_option(parser)
    args = parser.parse_args(argv)
    write = _results.is_wanted(parser, args)

    net = classifier.load_classifier()
    scenes = random_scenes(args.samples, torch.Generator().manual_seed(SEED), pairs=0.0)
    fresh = classifier_accuracy(net)
    sampled = {f"{model} {strength}": measure(net, model, strength, scenes) for model in args.models for strength in models.STRENGTHS}
    about = f"Share of {args.samples} pictures with the attribute right; cfg {CFG:g}, {STEPS} Euler steps"
    table = accuracy_table({"classifier": fresh} | {name: result.right for name, result in sampled.items()})
    print(f"\n{about}\n\n{table}")
    if write:
        _results.write(_results.RESULTS, "demo_quality", f"{about}.\n\n{table}")
    weights = sizes()
    print(f"\nweights, MB: {', '.join(f'{name} {size:.2f}' for name, size in weights.items())}; all {sum(weights.values()):.2f}\n")
    if args.sheet:
        sample_sheet(sampled).save(args.sheet)
    return verdict({"classifier": fresh} | {name: result.right for name, result in sampled.items()}, sum(weights.values()))


# ------------------------------------------------------------------------------------------------------------ measuring


@torch.inference_mode()
def classifier_accuracy(net: classifier.AttributeClassifier) -> dict[str, Tensor]:
    """Which attributes the classifier finds on freshly drawn pictures."""
    generator = torch.Generator().manual_seed(SEED + 1)
    scenes = random_scenes(FRESH, generator, pairs=0.0)
    return classifier.correct(classify(net, draw(scenes, generator)), scenes)


@torch.inference_mode()
def classify(net: classifier.AttributeClassifier, pictures: Tensor) -> dict[str, Tensor]:
    """The classifier's logits, computed in batches."""
    parts = [net(part) for part in pictures.split(256)]
    return {name: torch.cat([part[name] for part in parts]) for name in ATTRIBUTES}


def measure(net: classifier.AttributeClassifier, model: str, strength: str, scenes: Scenes) -> Sampled:
    """Sample every scene's caption and classify the pictures."""
    patcher = models.load_model(model, strength)
    pictures = []
    with tqdm(total=len(scenes), desc=f"{model} {strength}", unit="picture") as bar:
        for number, part in enumerate(batches(scenes)):
            pictures.append(sample(patcher, captions(part), models.SCHEDULERS[model], SEED + number))
            bar.update(len(part))
    together = torch.cat(pictures)
    return Sampled(together, classifier.correct(classify(net, together), scenes))


def batches(scenes: Scenes) -> Iterator[Scenes]:
    """The scenes in parts of at most BATCH."""
    parts = (field.split(BATCH) for field in (scenes.objects, scenes.background, scenes.relation))
    return (Scenes(*part) for part in zip(*parts, strict=True))


@torch.inference_mode()
def sample(patcher: Any, texts: Sequence[str], scheduler: str, seed: int) -> Tensor:
    """A picture for each caption, [B, 3, H, W] in [0, 1]."""
    return decoded(ksampler(patcher, prompts(texts), empty(len(texts)), steps=STEPS, cfg=CFG, scheduler=scheduler, seed=seed))


def sizes() -> dict[str, float]:
    """Megabytes of each weights file."""
    return {file.stem: file.stat().st_size / 1e6 for file in sorted(models.WEIGHTS.glob("*.safetensors"))}


# ------------------------------------------------------------------------------------------------------------ reporting


def accuracy_table(results: Mapping[str, Mapping[str, Tensor]]) -> str:
    """One line for each model, one column for each attribute, in Markdown."""
    names = (*ATTRIBUTES, "all")
    lines = [f"| {'model':<12}|" + "".join(f"{name:>12} |" for name in names), f"|{'-' * 13}|" + f"{'-' * 12}:|" * len(names)]
    for label, right in results.items():
        lines.append(f"| {label:<12}|" + "".join(f"{right[name].float().mean():>12.1%} |" for name in names))
    return "\n".join(lines)


def verdict(results: Mapping[str, Mapping[str, Tensor]], megabytes: float) -> int:
    """Print each target and whether it is met; the exit code."""
    checks = [
        (f"{name}: all attributes right", f"{results[name]['all'].float().mean():.1%}", f"at least {target:.0%}", ok)
        for name, target in TARGETS.items()
        if name in results
        for ok in [results[name]["all"].float().mean().item() >= target]
    ]
    checks.append(("all weights", f"{megabytes:.2f} MB", f"at most {LARGEST:g} MB", megabytes <= LARGEST))
    for what, value, target, ok in checks:
        print(f"{'pass' if ok else 'FAIL'}  {what:<36}{value:>10}   {target}")
    return 0 if all(ok for *_, ok in checks) else 1


def sample_sheet(sampled: Mapping[str, Sampled], count: int = 64, side: int = 512) -> Image.Image:
    """The first pictures of each model side by side, the wrong ones framed in red."""
    page = Image.new("RGB", (len(sampled) * (side + 12) + 12, side + 48), "white")
    pen = ImageDraw.Draw(page)
    for column, (label, result) in enumerate(sampled.items()):
        x = 12 + column * (side + 12)
        write(pen, (x, 8), f"{label}: {result.right['all'].float().mean():.1%} right", 18, "#222222")
        tiles = (result.pictures[:count].movedim(1, -1) * 255).byte().numpy()
        framed = [frame(Image.fromarray(tile), bool(ok)) for tile, ok in zip(tiles, result.right["all"][:count], strict=True)]
        page.paste(sheets.tiled(framed, side), (x, 36))
    return page


def frame(picture: Image.Image, right: bool) -> Image.Image:
    """The picture with a one-pixel frame that says whether it is right."""
    framed = picture.copy()
    ImageDraw.Draw(framed).rectangle((0, 0, framed.width - 1, framed.height - 1), outline="white" if right else "red")
    return framed


if __name__ == "__main__":
    sys.exit(main())
