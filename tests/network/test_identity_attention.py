"""Identity attention in the host's own models: its effect in tiny random instances, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from network_cases import BUILD
from network_tools import Case, T, build_mmdit, build_unet, random
from torch import Tensor

# --- every architecture ----------------------------------------------------------------------------------------------


@pytest.fixture(params=BUILD)
def case(request: pytest.FixtureRequest, host: object) -> Case:
    return BUILD[request.param]()


close = {"rtol": 1e-4, "atol": 1e-5}  # float32 networks of unit gain


@pytest.mark.parametrize("joint", ["masked", "passthrough"])
def test_perturbed_rows_equal_the_oracle_and_the_others_do_not_change(case, joint, monkeypatch):
    clean = case.run()
    for layers in (*([name] for name in case.layers), list(case.layers)[:2]):
        rule = case.rule(",".join(layers), joint)
        out = case.perturbed(rule, [False, True, False])
        oracle = case.oracle(layers, joint, monkeypatch)
        assert torch.equal(out[[0, 2]], clean[[0, 2]]), layers
        torch.testing.assert_close(out[1], oracle[1], **close)
        assert (oracle[1] - clean[1]).abs().max() > 1e-3, f"the perturbation of {layers} changes nothing"
    torch.testing.assert_close(case.perturbed(rule, [True, True, True]), oracle, **close)
    assert torch.equal(case.perturbed(rule, [False, False, False]), clean)


@pytest.mark.parametrize("name", ["unet", "svd", "mmdit", "flux", "lumina", "wan", "cosmos_predict2", "ernie", "hidream", "cosmos"])
def test_rules_for_different_chunks_go_together(name, host):
    """Two perturbations in one batch, one of them chained to the other, and no dictionary that was given changes."""
    case = BUILD[name]()
    first, second = (case.rule(layers, joint) for layers, joint in zip(list(case.layers)[:2], ("masked", "passthrough"), strict=True))
    alone = case.perturbed(first, [True, False, False])[0], case.perturbed(second, [False, False, True])[2]
    inner = first.patch({"cond_or_uncond": [0, 1, 0]}, [True, False, False])
    before = {kind: dict(patches) for kind, patches in inner["patches_replace"].items()}
    both = case.run(**second.patch(inner, [False, False, True]))
    assert inner["patches_replace"] == before
    torch.testing.assert_close(both[0], alone[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[2], alone[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(both[1], case.run()[1])


@pytest.mark.parametrize("name", ["unet", "mmdit", "flux", "wan", "lumina", "hidream", "pixeldit"])
def test_an_override_that_is_there_computes_everything_that_is_left(name, host):
    """Sage and flash attention nodes go on, see only the rows that need attention, and can read which these are."""
    case = BUILD[name]()
    seen = []

    def other(func: Callable, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((len(q), kwargs["transformer_options"]["cond_or_uncond"]))
        return func(q, *args, **kwargs) * 0.5

    given = {"optimized_attention_override": other, "cond_or_uncond": [0, 1, 0]}
    clean = case.run(**given)
    calls, seen = len(seen), []
    layer = list(case.layers)[1]
    out = case.run(**case.rule(layer, "passthrough").patch(given, [False, True, False]))
    assert given == {"optimized_attention_override": other, "cond_or_uncond": [0, 1, 0]}
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert len(seen) == calls and seen.count((2, [0, 0])) == 1
    seen = []
    case.run(**case.rule(layer, "passthrough").patch(given, [True] * 3))
    assert len(seen) == calls - 1, "attention was computed for perturbed rows"


# --- the UNet's own invariants ---------------------------------------------------------------------------------------


def layer_output(case: Case, flags: Sequence[bool], run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Input and output of the first attention layer of the case during ``run``."""
    module = next(iter(case.layers.values()))
    found: list[Tensor] = []
    handles = [
        module.to_v.register_forward_hook(lambda _, args, __: found.append(args[0].clone())),
        module.to_out.register_forward_hook(lambda _, __, out: found.append(out.clone())),
    ]
    run()
    for handle in handles:
        handle.remove()
    return found[0], found[1]


def test_unet_layer_is_its_value_projection(host):
    """to_out(to_v(x)), whatever W_q and W_k are, each token by itself."""
    case = build_unet()
    name, module = next(iter(case.layers.items()))
    options = case.rule(name).patch({}, [True] * 3)

    def run() -> tuple[Tensor, Tensor]:
        return layer_output(case, [True] * 3, lambda: case.run(**options))

    x, out = run()
    with torch.inference_mode():
        assert torch.equal(out, module.to_out(module.to_v(x)))
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
        replaced = options["patches_replace"]["attn1"][("input", 1, 0)]
        extra = {"n_heads": module.heads, "attn_precision": None}
        q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
        permuted = replaced(q[:, order], k[:, order], v[:, order], extra)
        torch.testing.assert_close(permuted, replaced(q, k, v, extra)[:, order], rtol=0, atol=0)
    for projection in (module.to_q, module.to_k):
        projection.weight.data.mul_(-3)
    assert torch.equal(run()[1], out)


def test_one_token_has_nothing_to_lose(host):
    """In the middle block of a 2x2 latent there is one token: softmax and identity coincide."""
    case = build_unet()
    case.args = (random(3, 4, 2, 2), T)
    torch.testing.assert_close(case.perturbed(case.rule("middle"), [True] * 3), case.run(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(case.perturbed(case.rule("input:1"), [True] * 3), case.run())


@pytest.mark.parametrize("key", [("middle", 0), ("middle", 0, 1)])
def test_a_replacement_that_is_there_keeps_the_clean_rows(key, host):
    """Keyed by block or by sub-block, it goes on in the clean rows and in the sub-blocks that are not perturbed."""
    case = build_unet()
    seen = []

    def other(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        seen.append((len(q), extra_options["cond_or_uncond"], extra_options["uuids"]))
        return v.roll(1, dims=1) * 2

    given = {"patches_replace": {"attn1": {key: other}}, "cond_or_uncond": [0, 1, 0], "uuids": ["a", "b", "c"]}
    clean = case.run(**given)
    whole, seen = list(seen), []
    out = case.run(**case.rule("middle:0.1").patch(given, [False, True, False]))
    assert given["patches_replace"] == {"attn1": {key: other}}
    assert seen == [*whole[:-1], (2, [0, 0], ["a", "c"])]
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert not torch.allclose(out[1], clean[1])


def test_other_attention_and_other_layers_are_left_alone(host):
    """attn2 and the layers that were not named never meet a replacement."""
    options = build_unet().rule("middle:0.1,output:0").patch({"patches_replace": {"attn2": {}}}, [True])
    assert set(options["patches_replace"]["attn1"]) == {("middle", 0, 1), ("output", 0, 0), ("output", 0, 1)}
    assert options["patches_replace"]["attn2"] == {}
    assert "optimized_attention_override" not in options


@pytest.mark.parametrize("shape", [(1, 3, 8), (2, 3, 8)], ids=["merged", "tiled"])
def test_queries_that_are_not_the_values_are_refused(shape, host):
    """Identity is not possible where tokens are merged or tiled in the queries alone. Chunks that are not perturbed go on."""

    def tiled(*_: Any) -> None:
        """A patch of another pack."""

    options = {"patches": {"attn1_patch": [tiled, tiled]}}
    rule, extra = build_unet().rule("middle:0.1"), {"n_heads": 2, "attn_precision": None}
    q, k, v = random(*shape), random(shape[0], 6, 8), random(shape[0], 6, 8)

    def called(perturbed: bool, **options: Any) -> Tensor:
        return rule.patch(options, [perturbed])["patches_replace"]["attn1"]["middle", 0, 1](q, k, v, extra)

    assert called(False, **options).shape == q.shape
    name = "test_queries_that_are_not_the_values_are_refused"
    sentence = rf"^PAG \(Perturbed-Attention Guidance\) and {name} do not go together in the layer middle:0.1: [^\n]*"
    with pytest.raises(ValueError, match=sentence):
        called(True, **options)
    with pytest.raises(ValueError, match="bypass another node"):
        called(True)


# --- a transformer's blocks ------------------------------------------------------------------------------------------


def test_a_block_that_is_skipped_or_fails_leaves_no_mark(host):
    """Skip-layer guidance may leave the block out; an error in it does not perturb what runs next."""
    from comfy.ldm.modules.attention import attention_pytorch

    case = build_mmdit(num_blocks=3)
    skip = {"patches_replace": {"dit": {("double_block", 1): lambda args, _: args}}}
    assert torch.equal(case.run(**case.rule("double:1").patch(skip, [True] * 3)), case.run(**skip))

    options = case.rule("double:1").patch({}, [True] * 3)

    def fail(_: Any) -> None:
        raise RuntimeError("out of memory")

    args = {"txt": torch.empty(3, 3, 1), "img": torch.empty(3, 5, 1)}
    with pytest.raises(RuntimeError, match="out of memory"):
        options["patches_replace"]["dit"][("double_block", 1)](args, {"original_block": fail})
    q = random(3, 8, 16)
    assert attention_pytorch(q, q, q, 2, transformer_options=options).equal(attention_pytorch(q, q, q, 2))


def test_rules_are_values(host):
    case = build_mmdit(num_blocks=3)
    assert case.rule("double:1,double:2") == case.rule("double:1-2, double:2")
    assert len({case.rule("double:1"), case.rule("middle"), case.rule("double:1", "passthrough")}) == 2
