"""What a gradient through the host needs: ordinary weights, and the blocks that are computed again."""

from __future__ import annotations

import tools
import torch

from lodestar.guiders.learning.checkpoints import blocks
from lodestar.guiders.learning.gradients import gradients, ordinary_weights


def test_blocks_are_the_residual_and_transformer_blocks():
    of = {kind: [type(block).__name__ for block in blocks(tools.tiny(kind).model.diffusion_model)] for kind in ("unet", "mmdit", "wan")}
    assert of["unet"].count("ResBlock") == 8 and of["unet"].count("BasicTransformerBlock") == 8
    assert sum("JointBlock" in name for name in of["mmdit"]) == 3
    assert of["wan"].count("WanAttentionBlock") == 3


def test_inference_tensors_are_seen_as_ordinary_ones_on_the_same_memory():
    with torch.inference_mode():
        layer = torch.nn.Linear(3, 2).requires_grad_(False)
        layer.register_buffer("table", torch.arange(4.0)[1:])
    before = layer.weight, layer.table
    with gradients(), ordinary_weights(layer):
        assert not layer.weight.is_inference() and not layer.weight.requires_grad and layer.weight.data_ptr() == before[0].data_ptr()
        assert layer.table.tolist() == [1, 2, 3]
        x = torch.randn(1, 3, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad is not None
    assert layer.weight is before[0] and layer.table is before[1]
