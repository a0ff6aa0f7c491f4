"""The operators of restoration: transposes in float64, and the same damage by other libraries."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from restoration_tools import random

from lodestar.guiders.restoration.measurement import Measurement
from lodestar.guiders.restoration.operators import (
    JPEG,
    Blur,
    Downscale,
    Grey,
    Inpaint,
    drawn_kernel,
    gaussian_kernel,
    motion_kernel,
)

SIZE = 24, 16


def half_known():
    known = torch.ones(1, 1, *SIZE)
    known[..., 4:12, 3:9] = 0
    return known


LINEAR = {
    "inpaint": Inpaint(half_known()),
    "bicubic": Downscale(4),
    "area": Downscale(8, "area"),
    "blur": Blur(gaussian_kernel(9, 2.0)),
    "motion": Blur(motion_kernel(11, 30.0)),
    "drawn": Blur(drawn_kernel(random(5, 5, 3).abs())),
    "grey": Grey(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_transpose_is_the_transpose(name):
    """<A x, y> = <x, A^T y>, and A^T is what autograd finds; A is linear."""
    operator, x = LINEAR[name], random(2, 3, *SIZE).requires_grad_()
    measured = operator.apply(x)
    y = random(*measured.shape, seed=1)
    product = (measured * y).sum()
    back = operator.transpose(y)
    torch.testing.assert_close(product, (x * back).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(product, x)[0], back)
    other = random(2, 3, *SIZE, seed=2)
    torch.testing.assert_close(operator.linear(x + 2 * other), measured + 2 * operator.apply(other))


@pytest.mark.parametrize("name", LINEAR)
def test_flat_pictures_keep_their_value(name):
    """No operator brightens or darkens, not even at the edges: weights have the sum 1."""
    flat = torch.full((1, 3, *SIZE), 0.3, dtype=torch.float64)
    measured = LINEAR[name].apply(flat)
    expected = 0.3 * half_known().expand(1, 3, -1, -1) if name == "inpaint" else torch.full_like(measured, 0.3)
    torch.testing.assert_close(measured, expected.double())


@pytest.mark.parametrize("method", ["bicubic", "area"])
def test_downscaling_is_torchs(method):
    x = random(1, 3, 32, 48)
    theirs = F.interpolate(x, (8, 12), mode=method, **({"antialias": True} if method == "bicubic" else {}))
    torch.testing.assert_close(Downscale(4, method).apply(x), theirs)


def test_blurring_is_the_sum_over_mirrored_neighbours():
    x, kernel = random(1, 1, 7, 6), random(3, 3, seed=1)
    mirrored = np.pad(x[0, 0].numpy(), 1, mode="reflect")
    expected = sum(mirrored[i : i + 7, j : j + 6] * float(kernel[i, j]) for i in range(3) for j in range(3))
    np.testing.assert_allclose(Blur(kernel).apply(x.expand(1, 3, -1, -1))[0, 2], expected)


def test_kernels():
    gaussian, level, upright = gaussian_kernel(61, 3.0), motion_kernel(9, 0.0), motion_kernel(9, 90.0)
    assert float(gaussian.sum()) == pytest.approx(1) and gaussian.argmax() == 30 * 61 + 30
    place = torch.arange(61, dtype=torch.float64) - 30
    assert float((gaussian.sum(0) * place**2).sum()) == pytest.approx(9, rel=1e-3)
    torch.testing.assert_close(level[4], torch.full((9,), 1 / 9, dtype=torch.float64))
    torch.testing.assert_close(upright, level.T)
    rising = motion_kernel(9, 45.0)
    assert rising[1, 7] > 0 and rising[7, 1] > 0 and rising[1, 1] == 0


def smooth_picture():
    """A colourful picture [1, 3, 48, 40] in [-1, 1] of whole bytes."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 48), torch.linspace(0, 2, 40), indexing="ij")
    waves = torch.stack([torch.sin(2 * x + y), torch.cos(3 * y), torch.sin(x * y)])[None]
    return ((waves + 1) * 127.5).round() / 127.5 - 1


@pytest.mark.parametrize("quality", [10, 30, 75, 95])
@pytest.mark.parametrize("grey", [True, False])
def test_jpeg_is_that_of_libjpeg(quality, grey):
    """Up to its integer arithmetic: less than one byte in 255."""
    x = smooth_picture()
    x = x[:, :1].expand(-1, 3, -1, -1) if grey else x
    pixels = ((x[0].movedim(0, -1) + 1) * 127.5).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2)
    theirs = torch.from_numpy(np.asarray(Image.open(file)).copy()).movedim(-1, 0)[None] / 127.5 - 1
    assert (JPEG(quality).apply(x) - theirs).abs().mean() < (0.002 if grey else 0.0079)


def test_jpeg_lets_gradients_straight_through():
    x = smooth_picture().requires_grad_()
    weights = random(1, 3, 48, 40).float()
    torch.testing.assert_close(torch.autograd.grad((JPEG(20).apply(x) * weights).sum(), x)[0], weights)


# --- measurements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINEAR)
def test_a_measurement_that_is_saved_and_read_again_is_the_same(name):
    pictures = torch.rand(2, *SIZE, 3, generator=torch.Generator().manual_seed(3))
    made = Measurement.of_original(pictures, LINEAR[name], 0.0, 0)
    read = Measurement.of_damaged(made.picture(), LINEAR[name], 0.0)
    assert (read.height, read.width) == (made.height, made.width) == SIZE
    torch.testing.assert_close(read.y, made.y.clamp(-1, 1), rtol=0, atol=1e-5)


def test_noise_is_that_of_the_seed_and_only_where_something_is_measured():
    pictures = torch.full((1, *SIZE, 3), 0.5)
    ones = [Measurement.of_original(pictures, LINEAR["inpaint"], 0.05, seed).y for seed in (1, 1, 2)]
    assert ones[0].equal(ones[1]) and not ones[0].equal(ones[2])
    known = half_known().bool().expand(1, 3, -1, -1)
    assert not ones[0][~known].any() and float(ones[0][known].std()) == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (Inpaint(torch.zeros(1, 1, *SIZE)), "hides the whole picture"),
        (Inpaint(torch.ones(1, 1, 8, 8)), "mask has 8x8 pixels and the picture 16x24"),
        (Downscale(5), "16x24 pixels cannot be made 5 times smaller"),
        (Blur(gaussian_kernel(6, 1.0)), "6 pixels on a side; it needs an odd number"),
        (Blur(gaussian_kernel(17, 1.0)), "17 pixels on a side and the picture 16x24"),
    ],
)
def test_what_cannot_be_measured(operator, message):
    with pytest.raises(ValueError, match=message):
        Measurement.of_original(torch.rand(1, *SIZE, 3), operator, 0.0, 0)


@pytest.mark.parametrize(("picture", "message"), [(torch.zeros(5, 5, 3), "black all over"), (torch.ones(5, 3, 3), "3x5 pixels")])
def test_kernels_that_are_none(picture, message):
    with pytest.raises(ValueError, match=message):
        drawn_kernel(picture)
