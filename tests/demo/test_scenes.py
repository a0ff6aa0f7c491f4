"""The world of the 128-pixel demo models: what its captions say is what its pictures hold."""

from __future__ import annotations

import pytest
import torch

COUNT = 600


@pytest.fixture(scope="module")
def S():
    from lodestar.demo import scenes

    return scenes


@pytest.fixture(scope="module")
def plan(S):
    """Random layouts with many relations and three objects."""
    generator = torch.Generator().manual_seed(5)
    return S.layout(S.random_scenes(COUNT, generator, shares=(0.2, 0.4, 0.4)), generator)


@pytest.fixture(scope="module")
def masks(S, plan):
    return S.masks(plan, 64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def only(S, caption, seed=0):
    """A layout of one caption."""
    return S.layout(S.parse(caption), seeded(seed))


# ------------------------------------------------------------------------------------------------- captions and scenes


def test_captions_use_the_vocabulary(S):
    written = S.captions(S.random_scenes(3000, seeded()))
    assert {word for caption in written for word in caption.split()} == set(S.WORDS)
    assert max(len(caption.split()) for caption in written) == 23
    assert len(set(written)) > 2500


def test_captions_parse_back(S):
    drawn = S.random_scenes(400, seeded(1))
    for index, caption in enumerate(S.captions(drawn)):
        read, wanted = S.parse(caption), drawn[index : index + 1]
        count = int(wanted.count)
        assert torch.equal(read.count, wanted.count)
        assert torch.equal(read.relations, wanted.relations)
        assert torch.equal(read.background, wanted.background)
        assert torch.equal(read.objects[:, :count], wanted.objects[:, :count])


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a purple pentagon",
        "a small pink disc on a grey background",
        "a small plain red disc on a grey background",
        "a small red disc on a grey background today",
        "a large red disc inside a large blue disc on a grey background",
        "a small red disc inside a small blue disc on a grey background",
        "a small red disc inside a large blue star on a grey background",
        "a small red disc inside a large blue disc inside a large green disc on a grey background",
        "a small red disc above a small blue disc above a small red star above a small teal disc on a grey background",
    ],
)
def test_other_sentences_are_refused(S, caption):
    with pytest.raises(ValueError, match="Not a caption of this world"):
        S.parse(caption)


def test_random_scenes_are_as_asked(S):
    for count in (1, 2, 3):
        drawn = S.random_scenes(200, seeded(), shares=[float(number == count) for number in (1, 2, 3)])
        assert (drawn.count == count).all()
        assert ((drawn.relations >= 0).sum(dim=1) == count - 1).all()
    colours = drawn.objects[..., 1].sort(dim=1).values
    assert (colours.diff(dim=1) > 0).all()  # all different
    shares = torch.bincount(S.random_scenes(4000, seeded()).count, minlength=4)[1:] / 4000
    assert torch.allclose(shares, torch.tensor([0.4, 0.4, 0.2]), atol=0.03)
    for choices, column in ((S.SIZES, 0), (S.SHAPES, 2), (S.TEXTURES, 3)):
        assert drawn.objects[..., column].unique().tolist() == list(range(len(choices)))


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [32, 96, 128])
def test_pictures_follow_from_the_seed(S, size):
    first, second, other = (S.draw(S.random_scenes(12, seeded()), seeded(seed), size) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (12, 3, size, size)
    assert first.min() >= 0 and first.max() <= 1


def test_a_row_does_not_depend_on_the_others(S, plan):
    part = S.Layout(plan.scenes[7:9], *(value[7:9] for value in plan[1:]))
    assert torch.allclose(S.render(part), S.render(S.Layout(plan.scenes[:16], *(value[:16] for value in plan[1:])))[7:9], atol=1e-5)


def test_all_sizes_show_the_same(S, plan):
    part = S.Layout(plan.scenes[:8], *(value[:8] for value in plan[1:]))
    coarse, fine = S.render(part, 128), torch.nn.functional.avg_pool2d(S.render(part, 512), 4)
    error = (coarse - fine).abs()
    assert error.mean() < 2e-3
    assert error.flatten(1).quantile(0.99, dim=1).max() < 0.06  # edges differ by how exact their smoothing is


def test_a_window_is_a_part_of_the_picture(S, plan):
    part = S.Layout(plan.scenes[:6], *(value[:6] for value in plan[1:]))
    corner = torch.tensor([[0, 0], [64, 0], [0, 64], [64, 64], [11, 37], [30, 30]])
    windows, whole = S.render(part, window=corner, side=64), S.render(part)
    for index, (left, top) in enumerate(corner.tolist()):
        assert torch.allclose(windows[index], whole[index, :, top : top + 64, left : left + 64], atol=1e-5)


# ----------------------------------------------------------------------------------------- what the captions say is there


def test_every_object_is_seen_whole(S, plan, masks):
    shown = plan.scenes.shown()
    assert ((masks.sum(dim=(2, 3)) > 25) == shown).all()
    assert masks[..., [0, -1], :].sum() == 0 and masks[..., [0, -1]].sum() == 0


def test_objects_overlap_only_inside(S, plan, masks):
    inner = plan.scenes.inner()
    for first, second in ((0, 1), (0, 2), (1, 2)):
        inside = inner[:, first] & (second == first + 1)
        both = (masks[:, first] * masks[:, second]).sum(dim=(1, 2))
        assert both[~inside].max() == 0


def test_what_is_inside_is_surrounded(S, plan, masks):
    ring = S.SHAPES.index("ring")
    seen = 0
    for index in range(2):
        rows = plan.scenes.inner()[:, index].nonzero()[:, 0]
        for row in rows.tolist():
            small, large = masks[row, index] > 0.5, masks[row, index + 1]
            if plan.scenes.objects[row, index + 1, 2] == ring:
                assert not (small & (large > 0.5)).any()  # it lies in the hole
            else:
                assert large[small].min() > 0.99
            for around in (large.cummax(dim=0).values, large.flip(0).cummax(dim=0).values.flip(0)):
                assert around[small].min() > 0.99  # the container goes on above and below it
            seen += 1
    assert seen > 100


def test_relations_hold(S, plan):
    for index, (relation, axis) in [(i, pair) for i in range(2) for pair in ((S.LEFT, 0), (S.ABOVE, 1))]:
        rows = plan.scenes.relations[:, index] == relation
        apart = plan.centre[rows, index + 1] - plan.centre[rows, index]
        assert len(apart) > 30
        assert (apart[:, axis] > 0.55).all()
        assert (apart[:, 1 - axis].abs() < 0.1).all()


def test_sizes_do_not_meet(S):
    """In the same surroundings every large object covers more than any small one of its shape."""
    for rest in ("", " left of a large teal disc", " above a large teal disc above a small blue star"):
        for shape in S.SHAPES:
            captions = [f"a {size} red {shape}{rest} on a grey background" for size in S.SIZES]
            small, large = (torch.stack([S.masks(only(S, caption, seed), 64)[0, 0].sum() for seed in range(3)]) for caption in captions)
            assert large.min() > 1.5 * small.max()


def test_shapes_are_theirs(S):
    """Areas of the shapes for radius 1, as geometry gives them."""
    exact = {
        "disc": 3.1416, "ring": 3.1416 * (1 - 0.52**2), "triangle": 1.2990, "square": 2.0, "pentagon": 2.3776, "hexagon": 2.5981,
        "star": 5 * 0.45 * 0.5878, "cross": 8 * 0.34 - 4 * 0.34**2,
    }  # fmt: skip
    for shape, area in exact.items():
        plan = only(S, f"a large red {shape} on a grey background")
        drawn = S.masks(plan, 256)[0, 0].sum() * (2 / 256) ** 2 / plan.radius[0, 0] ** 2
        assert abs(drawn / area - 1) < 0.01, shape


def test_colours_are_those_said(S, plan, masks):
    """The middle colour of every plain object is nearest to its own name's, that of the corners to the background's."""
    part = S.Layout(plan.scenes[:200], *(value[:200] for value in plan[1:]))
    pictures = S.render(part, 64)
    covered = [masks[:200, index] * (1 - masks[:200, index - 1] * (index > 0)) > 0.99 for index in range(S.MOST)]
    for index in range(S.MOST):
        rows = (part.scenes.shown() & (part.scenes.objects[..., 3] == 0) & ~part.scenes.inner().roll(1, 1))[:, index].nonzero()[:, 0]
        for row in rows.tolist():
            colour = pictures[row][:, covered[index][row]].mean(dim=1)
            assert (S._COLOUR_RGB - colour).norm(dim=1).argmin() == part.scenes.objects[row, index, 1]
    corners = pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(dim=2)
    assert torch.equal(torch.cdist(corners, S._BACKGROUND_RGB).argmin(dim=1), part.scenes.background)


@pytest.mark.parametrize("shape", ["disc", "ring", "star", "cross"])
def test_textures_show(S, shape):
    """Plain is smooth; stripes cover half of an object, dots less; both are of one lighter colour."""
    shares = {}
    for texture in S.TEXTURES:
        word = "" if texture == "plain" else f" {texture}"
        plan = only(S, f"a large{word} blue {shape} on a grey background")
        inside = S.masks(plan)[0, 0] > 0.99
        shares[texture] = (S.render(plan)[0, 0][inside] > plan.tint[0, 0, 0] + 0.2).float().mean()
    assert shares["plain"] == 0
    assert 0.40 < shares["striped"] < 0.60
    assert 0.20 < shares["dotted"] < 0.42


def test_shadows_fall_away_from_the_light(S):
    plan = only(S, "a large red disc on a grey background")
    around = S.masks(plan)[0, 0] == 0
    left_out = S.render(S.Layout(plan.scenes, plan.centre, plan.radius * 1e-3, *plan[3:]))[0]
    darker = ((left_out - S.render(plan)[0]).mean(dim=0) * around).clamp(min=0)
    axis = (torch.arange(128) + 0.5) / 64 - 1
    middle = torch.stack([(darker.sum(dim=0) * axis).sum(), (darker.sum(dim=1) * axis).sum()]) / darker.sum()
    assert darker.max() > 0.1
    assert (middle - plan.centre[0, 0]) @ plan.light[0] < -0.1
