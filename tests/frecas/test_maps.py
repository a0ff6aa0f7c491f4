"""The maths of cross-attention maps against float64 rewrites, and the store of one stage's maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lodestar.guiders.frecas.maps import Maps, attention_map, average, enlarged, map_by_head, with_tokens


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_map(height: int, width: int, tokens: int = 5, batch: int = 2, seed: int = 0) -> Tensor:
    """A map [B, T, h, w] whose rows over T sum to 1."""
    return random(batch, tokens, height, width, seed=seed).softmax(1)


# --- the maths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2**27, 64])
def test_a_map_is_the_mean_over_heads_of_the_softmax(at_once):
    q, k, heads = random(2, 12, 8), random(2, 5, 8, seed=1), 2
    expected = torch.zeros(2, 12, 5, dtype=torch.float64)
    for head in range(heads):
        part = slice(4 * head, 4 * head + 4)
        expected += torch.softmax(q[..., part].double() @ k[..., part].double().mT / 2, dim=-1) / heads
    by_head = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    torch.testing.assert_close(attention_map(q, k, heads).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(map_by_head(*by_head, at_once).double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_sum_to_1_and_stay_so():
    ones = lambda grid: torch.testing.assert_close(grid.sum(1), torch.ones_like(grid[:, 0]))  # noqa: E731
    torch.testing.assert_close(attention_map(random(2, 12, 8), random(2, 5, 8), 2).sum(-1), torch.ones(2, 12))
    for size in [(8, 12), (4, 6), (7, 5), (2, 3)]:
        ones(enlarged(a_map(4, 6), *size))
    ones(average({(4, 6): (a_map(4, 6) * 2, 2), (2, 3): (a_map(2, 3, seed=1), 1)}))
    ones(with_tokens(a_map(4, 6, 6), 3))
    ones(with_tokens(a_map(4, 6, 3), 12))


def test_maps_are_enlarged_in_two_dimensions():
    """What looks at the left half looks at the left half afterwards. Along the flattened queries, every row would hold half a row."""
    grid = torch.zeros(1, 2, 4, 6)
    grid[:, 0, :, :3] = grid[:, 1, :, 3:] = 1
    large = enlarged(grid, 8, 12)
    assert large[:, 0, :, :5].eq(1).all() and large[:, 0, :, 7:].eq(0).all()
    flat = torch.nn.functional.interpolate(grid.flatten(2), size=96, mode="linear").reshape(1, 2, 8, 12)
    assert flat[0, 0, 1].mean() < 0.1 < 0.9 < flat[0, 0, 0].mean()


def test_layers_of_one_size_are_averaged_before_the_sizes():
    large, small = a_map(4, 6), a_map(2, 3, seed=1)
    expected = (large + enlarged(small, 4, 6)) / 2
    torch.testing.assert_close(average({(2, 3): (small, 1), (4, 6): (large * 3, 3)}), expected)


def test_a_repeated_text_shares_the_weights():
    """The host pads the shorter text of a fused call with copies of itself, which does not change attention."""
    q, k, v = random(1, 12, 8), random(1, 3, 8, seed=1), random(1, 3, 8, seed=2)
    grid = attention_map(q, k, 1)
    as_grid = grid.mT.reshape(1, 3, 3, 4)
    twice = with_tokens(as_grid, 6).flatten(2).mT
    torch.testing.assert_close(twice, attention_map(q, k.repeat(1, 2, 1), 1))
    torch.testing.assert_close(twice @ v.repeat(1, 2, 1), grid @ v)
    torch.testing.assert_close(with_tokens(with_tokens(as_grid, 6), 3), as_grid)
    assert with_tokens(as_grid, 4) is None


def test_maps_are_kept_apart_and_cleared():
    store = Maps()
    for key in ("a", "b"):
        store.add(key, (2, 3), torch.full((1, 6, 4), 0.25 if key == "a" else 0.5))
    like = torch.zeros(1, dtype=torch.float16)
    assert store.at("a", (4, 6), 4, like).shape == (1, 24, 4) and store.at("a", (4, 6), 4, like).dtype == torch.float16
    assert store.at("a", (4, 6), 4, like) is store.at("a", (4, 6), 4, like)
    assert store.at("b", (2, 3), 4, like).eq(0.5).all()
    assert store.at("c", (2, 3), 4, like) is None and not store.empty
    store.clear()
    assert store.empty
    assert store.at("a", (4, 6), 4, like) is None
