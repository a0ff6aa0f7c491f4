"""GLIGEN: the host's patch of the network holds one row for each row of a chunk, so that chunks stay whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import tools
import torch
from comfy.gligen import GatedSelfAttentionDense, Gligen, PositionNet
from conditioning_tools import with_values
from tools import close, comfy, cond, counted, empty_latent, guided, log_of, pag, sample, tiny

from lodestar.guiders.engine.choice import Choice
from lodestar.guiders.engine.plan import Policy

STEPS = 3
BATCH = 3


@dataclass(frozen=True, kw_only=True)
class MiddleRowAlone(Policy):
    """The second of three images has no guidance."""

    name: ClassVar[str] = "Middle row alone"
    neutral = False

    def choose(self, step):
        return Choice(uncond=(True, False, True), terms=(True, False, True))


def widths(model):
    """The widths of the network's transformers, by their index."""
    found = {}

    def note(x, options):
        found[options["transformer_index"]] = x.shape[-1]
        return x

    clone = model.clone()
    clone.model_options["transformer_options"].setdefault("patches", {})["middle_patch"] = [note]
    sample(clone, steps=1, latent=empty_latent(model, 1, 8))
    return [found[index] for index in sorted(found)]


def boxes(model):
    """A positive CONDITIONING with GLIGEN on it: one box."""
    with torch.inference_mode(False):
        modules = [GatedSelfAttentionDense(width, tools.CONTEXT, 2, width // 2) for width in widths(model)]
        network = Gligen(modules, PositionNet(tools.CONTEXT, tools.CONTEXT), tools.CONTEXT).eval().requires_grad_(False)
    for part in (network, *modules):
        tools.fill(part, seed=13)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)
    return with_values(cond(1), gligen=("position", patcher, [(cond(5, tokens=1)[0][0][0], 4, 4, 2, 1)]))


def run(model, positive, cfg=4.0):
    return sample(model, steps=STEPS, latent=empty_latent(model, BATCH, 8), positive=positive, cfg=cfg)


@pytest.mark.parametrize("terms", [False, True])
def test_images_that_are_guided_differently(terms):
    model = tiny("unet")
    positive = boxes(model)
    rules = [pag(model)] if terms else []
    assert not close(run(model, positive), run(model, cond(1)), 1e-2)  # GLIGEN does something
    main = guided(model, *rules, MiddleRowAlone())
    with counted(model) as rows:
        result = run(main, positive)
    everything, alone = run(guided(model, *rules), positive), run(model, positive, cfg=1.0)
    assert close(result, torch.stack([everything[0], alone[1], everything[2]]))
    assert all(count % BATCH == 0 for count in rows)
    assert log_of(main).rows == sum(rows)


def test_without_gligen_rows_are_left_out():
    model = tiny("unet")
    with counted(model) as rows:
        run(guided(model, MiddleRowAlone()), cond(1))
    assert sum(rows) == STEPS * (2 * BATCH - 1)
