"""Nodes that change the queries of a transformer: PAG says so in the first step, and never goes on without effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_tools import Case, build_flux, random
from torch import Tensor

from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import ARCHITECTURES, Layer

# --- in a network ----------------------------------------------------------------------------------------------------


def merging(q: Tensor, k: Tensor, v: Tensor, pe: Any, attn_mask: Any, extra_options: dict[str, Any]) -> dict[str, Any]:
    """A patch of another pack: every second token of the image asks."""
    text = extra_options["img_slice"][0]
    return {"q": torch.cat([q[:, :, :text], q[:, :, text::2]], dim=2), "pe": None}


def merging_all(q: Tensor, k: Tensor, v: Tensor, pe: Any, attn_mask: Any, extra_options: dict[str, Any]) -> dict[str, Any]:
    """Another: every second token is left out."""
    text = extra_options["img_slice"][0]
    merged = {name: torch.cat([x[:, :, :text], x[:, :, text::2]], dim=2) for name, x in {"q": q, "k": k, "v": v}.items()}
    return {**merged, "pe": None}


def unmerging(attention: Tensor, extra_options: dict[str, Any]) -> Tensor:
    """What both put behind the attention: all tokens are there again."""
    text = extra_options["img_slice"][0]
    return torch.cat([attention[:, :text], attention[:, text:].repeat_interleave(2, dim=1)], dim=1)


@pytest.fixture(scope="module")
def flux(host: object) -> Case:
    case, seen = build_flux(), []
    case.run(patches={"attn1_patch": [lambda *args, **kwargs: seen.append(1) or {}]})
    if not seen:
        pytest.skip("this host's Flux has no patches of queries")
    return case


@pytest.mark.parametrize("patch", [merging, merging_all])
@pytest.mark.parametrize("layer", ["double:1", "single:0"])
def test_a_patch_that_merges_tokens_is_named(flux, layer, patch):
    given = {"patches": {"attn1_patch": [patch], "attn1_output_patch": [unmerging]}}
    rule = flux.rule(layer)
    with pytest.raises(ValueError, match=rf"^PAG .* and {patch.__name__} do not go together in the layer {layer}: its queries were [^\n]*"):
        flux.perturbed(rule, [False, True, False], **given)
    assert flux.perturbed(rule, [False] * 3, **given).equal(flux.run(**given))


# --- calls of a block ------------------------------------------------------------------------------------------------


def called(name: str, calls: list[tuple[Tensor, Tensor]], **options: Any) -> None:
    """A chosen block of this architecture that makes these calls, of queries and keys, in a pass with a perturbed chunk."""
    from comfy.ldm.modules.attention import attention_pytorch

    architecture = ARCHITECTURES[name]
    patched = IdentityAttention((Layer(architecture, architecture.stacks[0][0], 1),)).patch({}, [False, True]) | options

    def block(_: dict[str, Any]) -> None:
        for q, kv in calls:
            attention_pytorch(q, kv, kv, 2, transformer_options=patched)

    replaced: Callable = (
        patched["patches_replace"].get("dit", {}).get(("double_block", 1), lambda args, extra: extra["original_block"](args))
    )
    replaced({"txt": torch.empty(2, 3, 1), "img": torch.empty(2, 5, 1)}, {"original_block": block})


@pytest.mark.parametrize("name", ["Flux", "WanModel", "LTXVModel", "Kandinsky5", "MiniTrainDIT", "SingleStreamDiT"])
def test_other_numbers_of_queries_or_keys_are_refused(name, host):
    options = {"block_index": 1, "img_slice": [3, 8]} if name in ("Kandinsky5", "MiniTrainDIT", "SingleStreamDiT") else {}
    x = random(2, 8, 8)
    called(name, [(x, x)], **options)
    for q, kv in ((x[:, :6], x), (x, x[:, :6])):
        with pytest.raises(ValueError, match=r"PAG .* and another node do not go together in the layer "):
            called(name, [(q, kv)], **options)


@pytest.mark.parametrize("name", ["WanModel", "LTXVModel"])
def test_a_block_in_which_nothing_asks_is_refused(name, host):
    """Another pack has put attention of its own there, which the host's override does not reach."""
    with pytest.raises(ValueError, match=r"^PAG .* does not reach the layer double:1: another node has replaced its attention; [^\n]*\.$"):
        called(name, [])
