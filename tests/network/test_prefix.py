"""Shared beginnings: equal to the unshared forward pass in every architecture, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from network_cases import BUILD
from network_tools import Case
from torch import Tensor

from lodestar.guiders.engine.branches import Branch
from lodestar.guiders.engine.sharing import Chunks
from lodestar.guiders.network.calls import chunks_left
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.prefix import BY_BLOCK, CHAINED, Part, Rows, Sharing, UnknownRows, layouts_of

# The classes of networks in the list whose blocks are given objects besides tensors. Their base classes share.
NOT_HERE = {"LTXAVModel"}
# How close: the rows before the perturbed layer are in a smaller batch, for which torch may choose other kernels, so not every bit.
close = {"rtol": 1e-5, "atol": 1e-5}


def network_of(case: Case) -> Any:
    """What is sampled with: build_svd has videos as rows around it, build_ltxav leaves out the sound."""
    return getattr(case.network, "unet", getattr(case.network, "network", case.network))


def patched(rules: Sequence[IdentityAttention | None], **options: Any) -> dict[str, Any]:
    """The options of a forward pass with a chunk for each rule, in which the rules act. For one pass."""
    given = {"cond_or_uncond": [0] * len(rules), **options}
    for rule in dict.fromkeys(filter(None, rules)):
        given = rule.patch(given, [other == rule for other in rules])
    return given


def shared(
    case: Case, rules: Sequence[IdentityAttention | None], rows: Sequence[int], control: bool = False, size: int = 1, **options: Any
) -> Sharing:
    """Sharing for chunks of ``size`` rows; chunks of the same rows are equal but for their rules."""
    network = network_of(case)
    names = tuple(tuple(rows[i * size : (i + 1) * size]) for i in range(len(rules)))
    frames = case.args[0].shape[1] if hasattr(case.network, "unet") else 1
    replaced = options.get("patches_replace", {})
    chunks = Chunks(tuple(rule and Branch(variant=rule) for rule in rules), names, size * frames, replaced)
    return Sharing(network, chunks, patched(rules, **options), control, measured=True)


def both(
    case: Case, rules: Sequence[IdentityAttention | None], rows: Sequence[int], control: bool = False, size: int = 1, **options: Any
) -> Sharing:
    """A forward pass with sharing, which has to be equal to one without."""
    sharing = shared(case, rules, rows, control, size, **options)
    with sharing:
        out = case.run(rows, **sharing.options)
    torch.testing.assert_close(out, case.run(rows, **patched(rules, **options)), **close)
    return sharing


def last_layer(case: Case) -> str:
    return max(case.layers, key=lambda name: len(shared(case, [None, case.rule(name)], [0, 0]).parts))


@pytest.fixture(params=BUILD)
def case(request: pytest.FixtureRequest, host: object) -> Case:
    return BUILD[request.param]()


def test_every_architecture_is_equal_to_the_unshared_pass(case):
    """With CFG, without it, and with CFG and a batch of two. As it is, and with all rows after each block, as with a ControlNet."""
    rule, names = case.rule(last_layer(case)), {cls.__name__ for cls in type(network_of(case)).__mro__}
    for rows, size, control in (((0, 1, 1), 1, False), ((1, 1), 1, True), ((1, 1), 1, False), ((0, 1, 1, 2, 1, 2), 2, False)):
        sharing = both(case, [None] * (len(rows) // size - 1) + [rule], rows, control, size)
        assert sharing.chained == (not control and type(network_of(case)).__name__ in CHAINED)
        *others, perturbed = sharing.shares()
        assert others == [1.0] * len(others)
        assert perturbed < 0.999 if names & (CHAINED | BY_BLOCK) and not names & NOT_HERE else perturbed == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.network.modules())


@pytest.fixture(scope="module", params=["unet", "flux"])
def deep(request: pytest.FixtureRequest, host: object) -> tuple[Case, list[IdentityAttention]]:
    """A network, and rules that begin in three places."""
    case = BUILD[request.param]()
    names = {"unet": ("input:1", "middle:0.1", "output:0.0"), "flux": ("double:1", "single:0", "single:2")}[request.param]
    return case, [case.rule(name) for name in names]


@pytest.mark.parametrize("chunks", [("u", "c", 0, 1, 2), (2, 1, "c", 0), (0, 1), (1, 2, 1 + 1j)], ids=str)
def test_several_branches_fork_where_each_begins(deep, chunks):
    """With the conditional rows or without, in any order. What 1 + 1j stands for is another row's."""
    case, rules = deep
    rows = [1 if chunk in ("u", 1 + 1j) else 0 for chunk in chunks]
    of_chunk = [None if isinstance(chunk, str) else rules[int(chunk.real)] for chunk in chunks]
    for control in (False, True):
        sharing = both(case, of_chunk, rows, control)
        shares = dict(zip(chunks, sharing.shares(), strict=True))
        if chunks == ("u", "c", 0, 1, 2):
            assert shares["u"] == shares["c"] == 1 > shares[0] > shares[1] > shares[2] > 0
        assert sum(share == 1 for share in shares.values()) == len(set(rows))


def test_nothing_is_done_where_nothing_can_be_shared(deep):
    """Another row, or a perturbation that begins at once: no hook, no other options."""
    case, rules = deep
    first = case.rule("double:0") if "double:0" in case.layers else None
    for rules_, rows in (([None, rules[1]], [0, 1]), *([([None, first], [0, 0])] if first else [])):
        sharing = shared(case, rules_, rows)
        options = sharing.options
        assert not sharing.parts and "output_block_patch" not in options.get("patches", {})
        with sharing:
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.network.modules())
        assert sharing.shares() == [1.0, 1.0] and sharing.options is options


def other_pack(*args: Any) -> Any:
    """A function of another pack."""
    return args[0]


@pytest.mark.parametrize(
    ("name", "options", "shares"),
    [
        ("unet", {"patches": {"input_block_patch": [other_pack]}}, False),
        ("unet", {"patches": {"attn1_patch": [other_pack]}}, False),
        ("unet", {"patches": {"forward_timestep_embed_patch": [(torch.nn.Conv2d, other_pack)]}}, False),
        ("unet", {"patches": {"input_block_patch": []}}, True),
        ("unet", {"patches": {"output_block_patch": [lambda h, skip, _: (h * 0.5, skip * 2)]}}, True),
        ("unet", {"patches": {"middle_block_after_patch": [lambda given: {"h": given["h"] * 0.5}]}}, True),
        ("unet", {"patches_replace": {"attn2": {("input", 1, 0): other_pack}}}, False),
        ("unet", {"patches_replace": {"attn2": {("output", 1): lambda q, k, v, _: q}}}, True),
        ("flux", {"patches_replace": {"dit": {("double_block", 1): other_pack}}}, False),
        ("flux", {"patches_replace": {"dit": {("single_block", 2): other_pack}}}, True),
        ("flux", {"patches_replace": {"dit": {("single_block", 1): other_pack}}}, True),
        ("flux", {"patches": {"post_input": [other_pack]}}, False),
    ],
)
def test_other_packs_patches_before_the_first_layer_end_the_sharing(host, name, options, shares):
    """It cannot be known what they do with which row. Behind it they see all rows."""
    case = BUILD[name]()
    rule = case.rule({"unet": "middle:0.1", "flux": "single:1"}[name])
    sharing = shared(case, [None, rule], [0, 0], **options)
    assert (sharing.foreign is None, bool(sharing.parts)) == (shares, shares)
    if not shares:
        assert sharing.foreign == "other_pack" and sharing.shares() == [1.0, 1.0]
    else:
        both(case, [None, rule], [0, 0], **options)


def test_an_attention_override_sees_the_rows_that_are_left(host):
    """Sage and flash attention nodes: fewer rows before the layer, and labels for as many."""
    case, seen = BUILD["wan"](), []

    def override(func: Any, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = kwargs["transformer_options"]
        seen.append((len(q), len(options["cond_or_uncond"]), list(chunks_left(options, 3))))
        return func(q, *args, **kwargs)

    sharing = shared(case, [None, None, case.rule("double:2")], [0, 1, 1], optimized_attention_override=override)
    with sharing:
        case.run([0, 1, 1], **sharing.options)
    assert seen[:4] == [(2, 2, [0, 1])] * 4 and (3, 3, [0, 1, 2]) in seen[4:]


def test_a_forward_that_was_put_on_the_network_gets_all_rows_between_blocks(host):
    """Packs that cache what blocks do replace the method that calls them."""
    case, rows = BUILD["flux"](), []
    inner = case.network.forward_orig

    def forward_orig(*args: Any, **kwargs: Any) -> Tensor:
        handle = case.network.double_blocks[0].register_forward_hook(lambda _, __, out: rows.append(len(out[0])))
        try:
            return inner(*args, **kwargs)
        finally:
            handle.remove()

    case.network.forward_orig = forward_orig
    sharing = both(case, [None, None, case.rule("single:1")], [0, 1, 1])
    assert rows == [3, 3] and not sharing.chained


def test_an_error_takes_the_hooks_off(host):
    case = BUILD["unet"]()
    sharing = shared(case, [None, case.rule("middle")], [0, 0])
    with pytest.raises(RuntimeError, match="out of memory"), sharing:
        raise RuntimeError("out of memory")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.network.modules())


# --- layouts and rows ------------------------------------------------------------------------------------------------


def test_layouts():
    assert layouts_of([None, None, 2], "ucc") == [(0, 1, 1)] * 2
    assert layouts_of([1, None, 2], "ccc") == [(1, 1, 1), (0, 1, 1)]
    assert layouts_of([2, 3], "cc") == [(1, 1), (1, 1)]
    assert layouts_of([None, 3], "uc") == layouts_of([None, 0], "cc") == []


def test_rows_are_views_where_they_can_be():
    rows = Rows(2, 3, [(0, 1, 1)])
    x = torch.arange(6 * 4.0).reshape(6, 4, 1)
    narrow = rows.moved(x, (0, 1, 1))
    assert narrow.equal(x[:4]) and narrow.data_ptr() == x.data_ptr()
    assert rows.moved(narrow, rows.full).equal(x[[0, 1, 2, 3, 2, 3]])
    part = Part(torch.nn.Identity(), ("input", 0), True)
    vector, one, other = torch.zeros(4, 8), torch.zeros(1, 8, 3), torch.zeros(5, 3)
    assert rows.moved(vector, rows.full) is vector, "only hidden states come with fewer rows"
    nested = rows.moved({"a": [x, (one, 3, None)], "b": part}, (0, 1, 1))
    assert nested["a"][0].equal(x[:4]) and nested["a"][1] == (one, 3, None)
    assert rows.moved(other, (0, 1, 1)) is other
    for unknown in (other, object(), [object()]):
        with pytest.raises(UnknownRows):
            rows.moved(unknown, (0, 1, 1), strict=True)
