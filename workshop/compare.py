"""The comparison picture behind ``python run.py demo``: workflow files of this pack, run by the host's own server.

Rows are prompts, columns guidance methods. A table beside it says what each method cost and how saturated its pictures are.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lodestar.demo import shapes
from lodestar.pictures import sheets
from lodestar.pictures.colour import mean_saturation
from workshop import api
from workshop.serving import checkpoint_names, server

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"


class Method(NamedTuple):
    """A guidance method: the workflow that shows it, and whether CFG acts too (otherwise its cfg is 1)."""

    label: str
    workflow: str
    with_cfg: bool = True


METHODS = (
    Method("CFG", "demo_model"),
    Method("APG", "apg"),
    Method("PAG", "pag", with_cfg=False),
    Method("CFG + PAG", "pag"),
    Method("APG + PAG", "apg_pag"),
    Method("Autoguidance", "autoguidance", with_cfg=False),
)
SHAPES_PROMPTS = (
    "a large purple pentagon on a cream background",
    "a small teal hexagon on a blue background",
    "a small red triangle left of a large blue ring on a grey background",
    "a large orange star above a small green cross on a dark background",
)
OTHER_PROMPTS = ("a photograph of a red fox in the snow", "a red cube on top of a blue sphere, studio photograph")
NEEDS_WEAK = "needs a weaker version of the checkpoint: --weak FILE"


@dataclass(frozen=True)
class Settings:
    """What is compared. ``models`` are the server's names of the checkpoint and the weak one; none for the demo model."""

    prompts: tuple[str, ...]
    cfg: float
    seed: int
    steps: int
    batch: int
    size: int
    models: tuple[str, ...] = ()


@dataclass
class Result:
    """One column's pictures (a list for each prompt), its report's numbers, or why there are none."""

    method: Method
    pictures: list[list[Image.Image]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""

    def number(self, name: str) -> float:
        """One of the report's numbers: the median over the prompts, since the first run also loads the model."""
        return statistics.median(report[name] for report in self.reports)

    @property
    def saturation(self) -> float:
        """Mean HSV saturation of all pictures."""
        return float(np.mean([saturation(picture) for row in self.pictures for picture in row]))


def main(argv: Sequence[str]) -> int:
    """Command line."""
    args = parse(argv)
    began = time.monotonic()
    checkpoints = [file for file in (args.checkpoint, args.weak) if file]
    settings = settings_of(args, tuple(checkpoint_names(checkpoints)))
    print("Starting ComfyUI's server ...", flush=True)
    try:
        with server(checkpoints=checkpoints) as url:
            results = compare(api.Client(url), settings)
    except api.PromptError as error:
        print(f"lodestar: {error}", file=sys.stderr)
        return 1
    table = as_table(results, settings)
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "comparison.png"
    draw(results, settings).save(picture)
    picture.with_suffix(".md").write_text(as_page(table, settings), encoding="utf-8")
    print(f"\n{table}\n\nPicture: {picture}\nTable:   {picture.with_suffix('.md')}\n{time.monotonic() - began:.0f} s in all")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="use this checkpoint instead of the demo model")
    parser.add_argument("--weak", type=Path, metavar="FILE", help="a weaker version of it, for autoguidance")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="one row of the picture; may be repeated")
    parser.add_argument("--cfg", type=float, metavar="W", help="guidance scale (default: 10, or 7 for a checkpoint)")
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="seed of the noise (default: 7)")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="sampling steps (default: 20)")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of a checkpoint's pictures (default: what suits it)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    args = parser.parse_args(argv)
    if args.weak and not args.checkpoint:
        parser.error("--weak goes with --checkpoint; the demo model has a weak version of its own")
    return args


def settings_of(args: argparse.Namespace, models: tuple[str, ...]) -> Settings:
    """The options with what they leave open filled in."""
    prompts = tuple(args.prompt or (OTHER_PROMPTS if models else SHAPES_PROMPTS))
    cfg = args.cfg if args.cfg is not None else (7.0 if models else 10.0)
    size = (args.size or usual_size(args.checkpoint)) if models else shapes.SIZE
    return Settings(prompts, cfg, args.seed, args.steps, batch=1 if models else 4, size=size, models=models)


def usual_size(checkpoint: Path) -> int:
    """Side of the pictures that a checkpoint was made for: 1024 for SDXL and transformers, 512 for the rest."""
    if checkpoint.suffix not in (".safetensors", ".sft"):
        return 512
    with checkpoint.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return 1024 if re.search(rb"conditioner\.embedders\.1|joint_blocks|double_blocks|single_transformer", header) else 512


# ----------------------------------------------------------------------------------------------------------------- run


def compare(client: api.Client, settings: Settings) -> list[Result]:
    """Run every column for every prompt. One that cannot be run says why, except plain CFG, which raises PromptError."""
    results = []
    with tqdm(total=len(METHODS) * len(settings.prompts), unit="run", bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} {elapsed}") as bar:
        for method in METHODS:
            bar.set_description(f"{method.label:<12}")
            result = Result(method)
            results.append(result)
            try:
                for text in settings.prompts:
                    one_run(client, settings, result, text, bar)
            except api.PromptError as error:
                if method is METHODS[0]:
                    raise
                result.problem = str(error)
            bar.n = len(results) * len(settings.prompts)
    return results


def one_run(client: api.Client, settings: Settings, result: Result, text: str, bar: tqdm) -> None:
    """Make one cell's pictures and keep its report."""
    prompt, image, report = prompt_for(client, settings, result.method, text)
    outputs = client.run(prompt, tick=lambda: sys.stderr.isatty() and bar.refresh())
    result.pictures.append([Image.open(io.BytesIO(file)).convert("RGB") for file in client.images(outputs[image])])
    result.reports.append(outputs[report]["lodestar_report"][0])
    bar.update()


def prompt_for(client: api.Client, settings: Settings, method: Method, text: str) -> tuple[api.Prompt, str, str]:
    """A column's workflow with these settings, and the ids of the nodes that show its decoded pictures and report on its run."""
    workflow = json.loads((WORKFLOWS / f"{method.workflow}.json").read_text(encoding="utf-8"))
    prompt = api.to_prompt(workflow, client.node_types)
    if settings.models:
        use_checkpoint(prompt, settings)
    (sampler,) = api.find(prompt, "KSampler")
    (decode,) = api.find(prompt, "VAEDecode")
    inputs = prompt[sampler]["inputs"]
    inputs |= {"seed": settings.seed, "steps": settings.steps, "cfg": settings.cfg if method.with_cfg else 1.0}
    prompt[inputs["positive"][0]]["inputs"]["text"] = text
    prompt[inputs["latent_image"][0]]["inputs"]["batch_size"] = settings.batch
    if settings.models and inputs["model"][0] in api.find(prompt, "CheckpointLoaderSimple"):  # count plain CFG as well
        inputs["model"] = [api.add(prompt, "LodestarGuidanceInterval", model=inputs["model"], start_percent=0.0, end_percent=1.0), 0]
    report = api.add(prompt, "LodestarReport", model=inputs["model"], latent=[sampler, 0])
    prompt[decode]["inputs"]["samples"] = [report, 0]
    shown = api.add(prompt, "PreviewImage", images=[decode, 0])
    return api.keep_only(prompt, [shown]), shown, report


def use_checkpoint(prompt: api.Prompt, settings: Settings) -> None:
    """Put checkpoints in place of the demo models, and what suits them in place of what suits the demo models."""
    for node_id in api.find(prompt, "LodestarDemoModel"):
        weak = prompt[node_id]["inputs"]["strength"] == "weak"
        if weak and len(settings.models) < 2:
            raise api.PromptError(NEEDS_WEAK)
        prompt[node_id] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": settings.models[weak]}}
    for node_id in api.find(prompt, "EmptyChromaRadianceLatentImage"):
        # for any model: the host's sampler nodes give an empty latent the model's channels and scale
        prompt[node_id] = {"class_type": "EmptyLatentImage", "inputs": {"width": settings.size, "height": settings.size}}
    for node_id in api.find(prompt, "LodestarAPG"):
        prompt[node_id]["inputs"]["norm_threshold"] = 15.0  # the node's default, for latents of full size


# ------------------------------------------------------------------------------------------------------------- results


def saturation(picture: Image.Image) -> float:
    """Mean HSV saturation of a picture."""
    return mean_saturation(np.asarray(picture))


def real_saturation(prompts: Sequence[str], count: int = 64) -> float | None:
    """The same for real pictures of these captions; None where a prompt is not one of the generator's captions."""
    scenes = [scenes_of(prompt, count) for prompt in prompts]
    if None in scenes:
        return None
    generator = torch.Generator().manual_seed(0)
    pictures = torch.cat([shapes.draw(scene, generator) for scene in scenes]).movedim(1, -1)
    return float(np.mean([saturation(Image.fromarray(picture)) for picture in (pictures * 255).byte().numpy()]))


def scenes_of(caption: str, count: int) -> shapes.Scenes | None:
    """What a caption of the generator says, ``count`` times; None if it is not one of its captions."""
    thing = f"a ({'|'.join(shapes.SIZES)}) ({'|'.join(shapes.COLOURS)}) ({'|'.join(shapes.SHAPES)})"
    sentence = f"{thing}(?: ({'|'.join(shapes.RELATIONS)}) {thing})? on a ({'|'.join(shapes.BACKGROUNDS)}) background"
    found = re.fullmatch(sentence, caption)
    if not found:
        return None
    first, relation, second, background = found.group(1, 2, 3), found[4], found.group(5, 6, 7), found[8]
    choices = (shapes.SIZES, shapes.COLOURS, shapes.SHAPES)
    objects = [[kind.index(word) for kind, word in zip(choices, words, strict=True)] for words in (first, second if relation else first)]
    return shapes.Scenes(
        torch.tensor([objects] * count),
        torch.full((count,), shapes.BACKGROUNDS.index(background)),
        torch.full((count,), shapes.RELATIONS.index(relation) if relation else -1),
    )


def as_table(results: Sequence[Result], settings: Settings) -> str:
    """The table in Markdown, aligned so that it can be read in a terminal as well."""
    rows = [("method", "cfg", "NFE", "rows", "seconds", "saturation")]
    for result in results:
        cfg = f"{settings.cfg if result.method.with_cfg else 1:g}"
        if result.problem:
            rows.append((result.method.label, cfg, "", "", "", result.problem))
            continue
        nfe, fed, seconds = (result.number(name) for name in ("nfe", "rows", "seconds"))
        rows.append((result.method.label, cfg, f"{nfe:.0f}", f"{fed:.0f}", f"{seconds:.2f}", f"{result.saturation:.3f}"))
    real = None if settings.models else real_saturation(settings.prompts)
    if real is not None:
        rows.append(("real pictures", "", "", "", "", f"{real:.3f}"))
    widths = [max(len(row[i]) for row in rows if i < 5 or len(row[i]) < 12) for i in range(6)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows)


def as_page(table: str, settings: Settings) -> str:
    """The Markdown file."""
    what = " and ".join(settings.models) or "the demo model"
    lines = [
        f"# Guidance methods on {what}\n",
        f"{settings.steps} Euler steps, seed {settings.seed}, {settings.batch} picture(s) a prompt, {settings.size} pixels.",
        "NFE, rows and seconds are of one prompt's run (median over the prompts); the seconds are sampling alone.\n",
        f"{table}\n",
        "![comparison](comparison.png)\n",
        *(f"{number}. {text}" for number, text in enumerate(settings.prompts, 1)),
    ]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Result], settings: Settings) -> Image.Image:
    """The picture: one column for each method that could be run."""
    shown = [result for result in results if not result.problem]
    heads = []
    for result in shown:
        cfg = f"cfg {settings.cfg if result.method.with_cfg else 1:g}"
        heads.append((result.method.label, f"{cfg}, NFE {result.number('nfe'):.0f}", f"saturation {result.saturation:.2f}"))
    real = None if settings.models else real_saturation(settings.prompts)
    corner = "" if real is None else f"Real pictures:\nsaturation {real:.2f}"
    return sheets.comparison(heads, settings.prompts, [result.pictures for result in shown], corner)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
