"""Guidance on two-dimensional distributions whose denoisers are known in closed form: the pictures of the help pages.

    python run.py bench toy

Every guided step goes through the pack's own functions. tests/benchmarks/test_toy.py asserts what the pictures show.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lodestar.benchmarks import _results
from lodestar.benchmarks._sampling import empty, ksampler
from lodestar.benchmarks.toy import rings, tokens, trees
from lodestar.guiders.engine.attach import attach
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import resolve_layers
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.pag import PAG
from lodestar.nodes.demo_model import LodestarDemoModel
from lodestar.nodes.report import LodestarReport

FOLDER = Path(__file__).resolve().parents[2] / "js" / "docs"


def main() -> None:
    """Draw all figures into the help pages' folder, and write what they measure into RESULTS.md."""
    torch.set_num_threads(1)  # the tensors are too small for more
    tree = trees.scene(900)
    rows = ["| picture | with | what is seen |", "|---|---|---|"]
    rows += trees.draw(FOLDER / "autoguidance.png", tree, ["no guidance", "CFG, w 4", "autoguidance, w 3"])
    rows += trees.draw(FOLDER / "interval.png", tree, ["no guidance", "CFG, w 4", "CFG, w 4, interval"])
    rows += rings.draw(FOLDER / "apg.png", rings.scene(60))
    rows += tokens.draw(FOLDER / "pag.png", tokens.scene(40))
    draw_report(FOLDER / "report.png")
    _results.write(_results.RESULTS, "toy", "\n".join(rows))


def draw_report(file: Path) -> None:
    """What Guidance Report shows of a run of the demo model: the picture of its own help page."""
    model, clip, _ = LodestarDemoModel.execute("unet", "main").args
    perturbation = IdentityAttention(resolve_layers(model, "middle"))
    model = attach(attach(model, APG(norm_threshold=5.0)), PAG(perturbation=perturbation, scale=2.0, start_percent=0.1, end_percent=0.8))
    texts = ("a large purple pentagon on a cream background", "")
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts)
    with torch.inference_mode():
        ksampler(model, (positive, negative), empty(4), steps=20, cfg=6.0, scheduler="normal", seed=7)
    picture = LodestarReport.execute(model, {}).args[1][0]
    image = Image.fromarray((picture.numpy() * 255).round().astype(np.uint8))
    image.quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
