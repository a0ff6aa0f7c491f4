"""Masked attention against explicit masks, and every form in which a transformer calls the host's attention functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_tools import explicit, explicit_call, random
from torch import Tensor

from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import ARCHITECTURES, Layer
from lodestar.guiders.network.masked_attention import masked_attention

# --- the maths, without a host ---------------------------------------------------------------------------------------


def qkv(text: int = 3, image: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random(2, 2, text + image, 4, seed=i, dtype=dtype) for i in range(3)]


def masked(q: Tensor, k: Tensor, v: Tensor, image: slice, mask: Tensor | None = None, *more: Any) -> Tensor:
    """The cheap form of a call for all tokens."""
    full = mask is not None and mask.shape[-2] > 1
    return masked_attention(q[:, :, image], k, v, image, mask[..., image, :] if full else mask, *more)


AFTER, BEFORE = slice(3, 8), slice(0, 5)  # where the image's tokens are among those of the text


@pytest.mark.parametrize("image", [AFTER, BEFORE])
@pytest.mark.parametrize("at_once", [1, 2**26])
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("kind", ["none", "keys", "full", "bool"])
def test_cheap_form_equals_explicit_mask(kind, scale, at_once, image):
    mask = {
        "none": None,
        "keys": random(2, 1, 1, 8, seed=7, dtype=torch.float64),
        "full": random(2, 2, 8, 8, seed=7, dtype=torch.float64),
        "bool": (random(2, 1, 8, 8, seed=7) > -1) | torch.eye(8, dtype=torch.bool),
    }[kind]
    q, k, v = qkv()
    expected = explicit(q, k, v, 3, True, mask, 0.5 if scale is None else scale, image == BEFORE)[:, :, image]
    torch.testing.assert_close(masked(q, k, v, image, mask, scale, at_once), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_cheap_form_in_the_models_dtype(dtype, tolerance):
    q, k, v = qkv(dtype=dtype)
    out = masked(q, k, v, AFTER)
    assert out.dtype == dtype
    expected = explicit(q, k, v, 3, True, None, 0.5)[:, :, 3:]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_without_text_the_value_returns():
    q, k, v = qkv(text=0)
    assert torch.equal(masked(q, k, v, slice(0, 5)), v)


def test_image_tokens_see_themselves_and_the_text_only():
    q, k, v = qkv()
    out = masked(q, k, v, AFTER)
    for x in (q, k, v):
        x[:, :, 3 + 2] += 1
    changed = masked(q, k, v, AFTER) != out
    assert changed.any(-1).any(0).any(0).tolist() == [False, False, True, False, False]
    out = masked(q, k, v, AFTER)
    k[:, :, 1] += 1
    assert (masked(q, k, v, AFTER) != out).all()


# --- the calls that a DiT makes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", ["masked", "passthrough"])
@pytest.mark.parametrize("kind", ["none", "2d", "keys", "per row", "bool"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_layouts_masks_and_grouped_heads(skip_reshape, skip_output_reshape, groups, kind, joint, host):
    """Every form in which the host's attention functions are called, in a chosen block of a joint model."""
    import comfy.ops
    from comfy.ldm.modules.attention import attention_pytorch

    if groups > 1 and not hasattr(comfy.ops, "repeat_kv_for_gqa"):
        pytest.skip("this host has no grouped heads")
    joint_rule = IdentityAttention((Layer(ARCHITECTURES["Flux"], "double", 1),), joint)
    q, k, v = random(3, 4, 8, 6), random(3, 4 // groups, 8, 6, seed=1), random(3, 4 // groups, 8, 6, seed=2)
    if not skip_reshape:
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    mask = {
        "none": None,
        "2d": random(8, 8, seed=3),
        "keys": random(3, 1, 8, seed=3),
        "per row": random(3, 1, 8, 8, seed=3),
        "bool": (random(3, 8, 8, seed=3) > -1) | torch.eye(8, dtype=torch.bool),
    }[kind]
    form = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, "enable_gqa": groups > 1}
    clean = attention_pytorch(q, k, v, 4, mask=mask, **form)
    options = joint_rule.patch({}, [False, True, False])

    def block(_: dict[str, Any]) -> Tensor:
        return attention_pytorch(q, k, v, 4, mask=mask, transformer_options=options, **form)

    args = {"txt": torch.empty(3, 3, 1), "img": torch.empty(3, 5, 1)}
    out = options["patches_replace"]["dit"][("double_block", 1)](args, {"original_block": block})
    expected = explicit_call(q, k, v, 4, mask, text=3, masked=joint == "masked", **form)
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    torch.testing.assert_close(out[1], expected[1], rtol=1e-5, atol=1e-5)


def test_self_attention_in_parts_and_cross_attention_of_equal_length(host):
    """LTXV's guide frames split the queries; a context as long as the image is still a context."""
    from comfy.ldm.modules.attention import attention_pytorch

    options = IdentityAttention((Layer(ARCHITECTURES["LTXVModel"], "double", 1),)).patch({}, [True])
    x, context = random(1, 8, 16), random(1, 8, 16, seed=1)
    calls = [(x[:, :3], x), (x[:, 3:7], x), (x[:, 7:], x), (x, context), (x, context[:, :5])]

    def block(_: dict[str, Any]) -> list[Tensor]:
        return [attention_pytorch(q, kv, kv, 2, transformer_options=options) for q, kv in calls]

    *own, equal, shorter = options["patches_replace"]["dit"][("double_block", 1)]({}, {"original_block": block})
    assert torch.cat(own, dim=1).equal(x)
    for out, (q, kv) in zip((equal, shorter), calls[3:], strict=True):
        assert out.equal(attention_pytorch(q, kv, kv, 2))
