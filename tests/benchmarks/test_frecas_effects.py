"""What bench effects measures of FreCaS, on pictures whose answers are known."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def frecas(host):
    from lodestar.benchmarks.effects.methods import frecas

    return frecas


def drawn(size, pairs=0.0, count=64):
    """Fresh pictures with their captions."""
    from lodestar.benchmarks.effects.metrics import Pictures
    from lodestar.demo.shapes import draw, random_scenes

    generator = torch.Generator().manual_seed(3)
    scenes = random_scenes(count, generator, pairs=pairs)
    return Pictures(draw(scenes, generator, size), scenes)


@pytest.mark.parametrize("size", [64, 128])
def test_one_object_is_one(frecas, size):
    counts = frecas.objects(drawn(size))
    assert (counts == 1).mean() >= 0.97


def test_copies_are_counted(frecas):
    from lodestar.benchmarks.effects.metrics import Pictures

    once = drawn(64)
    four = Pictures(once.pictures.tile(1, 1, 2, 2), once.scenes)
    assert (frecas.objects(four) == 4).mean() >= 0.95
    none = Pictures(once.pictures[:, :, :1, :1].expand(-1, -1, 64, 64), once.scenes)
    assert (frecas.objects(none) == 0).mean() >= 0.97


def test_a_sharp_picture_has_more_detail_than_an_enlarged_one(frecas):
    from lodestar.benchmarks.effects.metrics import Pictures

    sharp = drawn(64)
    small = torch.nn.functional.interpolate(sharp.pictures, size=32, mode="area")
    soft = Pictures(torch.nn.functional.interpolate(small, size=64, mode="bilinear"), sharp.scenes)
    assert (frecas.detail(sharp) > 2 * frecas.detail(soft)).mean() > 0.95


def test_large_pictures_are_judged_at_the_size_the_classifier_knows(frecas):
    assert drawn(64).right.mean() >= 0.9


def test_seams_are_seen():
    """A faint step where a border of windows was stands out of plain pictures; elsewhere it does not."""
    from lodestar.benchmarks.effects.methods.frecas_windows import SEAMS
    from lodestar.benchmarks.effects.metrics import Pictures

    scenes, rows = drawn(128).scenes, torch.arange(64).numpy()
    noise = 0.02 * torch.rand(64, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    ratios = []
    for line in (40, 44):  # 40 is a window of 32 and a quarter, 44 is no border
        noisy = noise.clone()
        noisy[..., line:] += 0.03
        ratios.append(SEAMS.of(Pictures(noisy, scenes), None)(rows))
    assert ratios[0] > 1.05 > 1 > ratios[1]


@pytest.mark.parametrize("model", ["unet", "mmdit"])
def test_windows_are_compared_with_the_same_cascade(model, frecas):
    from lodestar.benchmarks.effects.methods import frecas_windows

    assert frecas_windows.plain(model, 128) == frecas.cascade(model, 128)
    assert frecas_windows.divided(model, 128)["stages"].count("windows") == 2
    assert "windows 4x4" in frecas_windows.with_ag(model, 128)["stages"] and frecas_windows.with_ag(model, 128)["adaptive"]


@pytest.mark.parametrize("model", ["unet", "mmdit"])
def test_cells_have_as_many_steps_as_direct_sampling(frecas, model):
    for size, steps in frecas.STEPS.items():
        assert str(sum(steps)) in frecas.direct(model, size)["stages"]
        assert frecas.cascade(model, size)["stages"].count("steps") == len(steps)
    assert len(frecas.METHOD.cells) == 15 and len(set(frecas.METHOD.cells)) == 15
