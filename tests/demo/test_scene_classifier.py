"""The classifier of the 128-pixel demo pictures reads what they show."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def C():
    from lodestar.demo import scene_classifier

    return scene_classifier


def drawn(C, count, shares=(0.4, 0.4, 0.2)):
    generator = torch.Generator().manual_seed(41)
    wanted = C.scenes.random_scenes(count, generator, shares)
    return wanted, C.scenes.draw(wanted, generator)


@torch.inference_mode()
def test_it_reads_fresh_pictures(C):
    wanted, pictures = drawn(C, 96)
    net = C.load_classifier()
    right = C.correct(net(pictures), wanted)
    assert set(right) == {*C.GROUPS, "all"}
    assert min(right[group].double().mean() for group in C.GROUPS) > 0.94
    assert net.features(pictures[:2]).shape == (2, 96)


def test_targets_are_the_captions(C):
    """One answer for each choice that a caption makes, and none for objects that are not there."""
    caption = "a small dotted red disc inside a large blue ring on a dark background"
    wanted = {name: value.item() for name, value in C.targets(C.scenes.parse(caption)).items()}
    assert wanted == {
        "count": 1, "background": 3, "relation0": 2, "relation1": 3,
        "size0": 0, "colour0": 0, "shape0": 0, "texture0": 2, "size1": 1, "colour1": 3, "shape1": 1, "texture1": 0,
        "size2": -100, "colour2": -100, "shape2": -100, "texture2": -100,
    }  # fmt: skip


def test_what_is_right_and_the_loss(C):
    """Certain answers cost nothing; one wrong answer is wrong in its kind and in all, unless the picture has no such object."""
    wanted, _ = drawn(C, 12, (0.0, 1.0, 0.0))
    net = C.SceneClassifier()
    answers = C.targets(wanted)
    logits = {name: 50.0 * torch.eye(head.out_features)[answers[name].clamp(min=0)] for name, head in net.heads.items()}
    assert C.loss(logits, wanted) < 1e-6
    assert all(value.all() for value in C.correct(logits, wanted).values())
    logits["texture1"] = logits["texture1"].roll(1, dims=-1)
    logits["texture2"] = logits["texture2"].roll(1, dims=-1)
    right = C.correct(logits, wanted)
    assert not right["texture"].any() and not right["all"].any() and right["shape"].all()
    assert C.loss(logits, wanted) == pytest.approx(50.0)
