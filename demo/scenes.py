"""The world of the 128-pixel demo models: one to three objects with textures and relations, their captions, and pictures of them.

A picture follows from its layout (every number that the caption leaves open), a layout from its scene and a generator; none depends on the
picture's size. Everything is drawn from signed distances, in batches. Needs torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

SIZE = 128
MOST = 3  # objects in one picture
SIZES = ("small", "large")
COLOURS = ("red", "orange", "green", "blue", "purple", "teal")
SHAPES = ("disc", "ring", "triangle", "square", "pentagon", "hexagon", "star", "cross")
TEXTURES = ("plain", "striped", "dotted")  # "plain" is not said
BACKGROUNDS = ("grey", "cream", "blue", "dark")
RELATIONS = ("left of", "above", "inside")
LEFT, ABOVE, INSIDE = range(3)
CONTAINERS = SHAPES[:6]  # what an object can be inside of
WORDS = tuple(
    dict.fromkeys(("a", *SIZES, *TEXTURES[1:], *COLOURS, *SHAPES, *" ".join(RELATIONS).split(), "on", *BACKGROUNDS, "background"))
)

_COLOUR_RGB = torch.tensor([
    [0.79, 0.25, 0.24], [0.92, 0.57, 0.20], [0.33, 0.60, 0.32], [0.22, 0.40, 0.74], [0.53, 0.32, 0.66], [0.16, 0.61, 0.60],
])  # fmt: skip
_BACKGROUND_RGB = torch.tensor([[0.66, 0.66, 0.67], [0.92, 0.87, 0.76], [0.66, 0.77, 0.89], [0.18, 0.18, 0.22]])

# Lengths are in half pictures: x and y run from -1 to 1, y downwards.
_RADIUS = torch.tensor([  # [objects in a row, size, (low, high)]
    [[0.360, 0.410], [0.600, 0.660]], [[0.240, 0.265], [0.375, 0.400]], [[0.165, 0.180], [0.250, 0.265]],
])  # fmt: skip
_SPACING = torch.tensor([0.0, 0.95, 0.64])  # between neighbours, by objects in a row
_JITTER = torch.tensor([0.10, 0.02, 0.02])
_GROW = torch.tensor([1.0, 1.0, 1.18, 1.12, 1.04, 1.0, 1.12, 1.0])  # equal-looking sizes
_INNER = torch.tensor([0.52, 0.40, 0.44, 0.52, 0.52, 0.52, 0.0, 0.0])  # radius of what is inside, for a container of radius 1
_STEPS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])  # from subject to object; the last row: no relation


@dataclass(frozen=True)
class Scenes:
    """Attributes of B pictures, as indices into the tuples above. An object beyond ``count`` is not shown.

    objects [B, 3, 4]: size, colour, shape, texture. relations [B, 2]: of the first object to the second, of the second to the third;
    -1 for none. At most one relation is "inside": of a small object in a large container.
    """

    objects: torch.Tensor
    count: torch.Tensor
    relations: torch.Tensor
    background: torch.Tensor

    def __len__(self) -> int:
        return len(self.background)

    def __getitem__(self, rows: slice | torch.Tensor) -> Scenes:
        """The scenes of some rows."""
        return Scenes(*(getattr(self, field.name)[rows] for field in fields(self)))

    def shown(self) -> torch.Tensor:
        """Which objects exist, bool [B, 3]."""
        return torch.arange(MOST) < self.count[:, None]

    def inner(self) -> torch.Tensor:
        """Which objects are inside the one after them, bool [B, 3]."""
        return torch.cat([self.relations == INSIDE, torch.zeros(len(self), 1, dtype=torch.bool)], dim=1)


class Layout(NamedTuple):
    """Everything that a caption leaves open, for B pictures."""

    scenes: Scenes
    centre: torch.Tensor  # [B, 3, 2]
    radius: torch.Tensor  # [B, 3]
    turn: torch.Tensor  # [B, 3], radians
    tint: torch.Tensor  # [B, 3, 3], RGB in the middle of the object
    light: torch.Tensor  # [B, 2], unit vector towards the light
    base: torch.Tensor  # [B, 3], RGB in the middle of the background
    ramp: torch.Tensor  # [B, 2], how the background's brightness changes along x and y


def random_scenes(count: int, generator: torch.Generator, shares: Sequence[float] = (0.4, 0.4, 0.2)) -> Scenes:
    """Draw attributes uniformly. shares: how often there are one, two and three objects. The objects of a picture differ in colour."""

    def pick(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, (count, *shape), generator=generator)

    number = 1 + torch.multinomial(torch.tensor(shares).float(), count, replacement=True, generator=generator) if count else pick(1)
    relations = pick(len(RELATIONS), 2)
    twice = (relations == INSIDE).all(dim=1)
    relations[:, 1] = torch.where(twice, pick(INSIDE), relations[:, 1])
    relations = torch.where(torch.arange(1, MOST) < number[:, None], relations, -1)
    colour = torch.rand(count, len(COLOURS), generator=generator).argsort(dim=1)[:, :MOST]
    objects = torch.stack([pick(len(SIZES), MOST), colour, pick(len(SHAPES), MOST), pick(len(TEXTURES), MOST)], dim=-1)
    scenes = Scenes(objects, number, relations, pick(len(BACKGROUNDS)))
    inner, container = scenes.inner(), scenes.inner().roll(1, dims=1)
    objects[..., 0] = torch.where(inner, 0, torch.where(container, 1, objects[..., 0]))
    objects[..., 2] = torch.where(container, pick(len(CONTAINERS), MOST), objects[..., 2])
    return scenes


# ------------------------------------------------------------------------------------------------------------- captions


def captions(scenes: Scenes) -> list[str]:
    """The sentence that describes each scene."""
    rows = zip(scenes.objects.tolist(), scenes.count.tolist(), scenes.relations.tolist(), scenes.background.tolist(), strict=True)
    return [_caption(objects[:count], relations, background) for objects, count, relations, background in rows]


def _caption(objects: list[list[int]], relations: list[int], background: int) -> str:
    parts = []
    for index, (size, colour, shape, texture) in enumerate(objects):
        if index:
            parts.append(RELATIONS[relations[index - 1]])
        parts += ["a", SIZES[size], *TEXTURES[texture : texture + 1] * (texture > 0), COLOURS[colour], SHAPES[shape]]
    return " ".join([*parts, "on a", BACKGROUNDS[background], "background"])


def parse(caption: str) -> Scenes:
    """One scene from what ``captions`` writes; equal to the scene where it is shown. Raises ValueError for any other sentence."""
    subject, _, background = caption.removesuffix(" background").partition(" on a ")
    for relation in RELATIONS:
        subject = subject.replace(f" {relation} ", f"|{relation}|")
    things, relations = subject.split("|")[::2], subject.split("|")[1::2]
    objects = [[0, 0, 0, 0] for _ in range(MOST)]
    try:
        for index, thing in enumerate(things):
            _, size, *texture, colour, shape = thing.split()
            objects[index] = [SIZES.index(size), COLOURS.index(colour), SHAPES.index(shape), TEXTURES.index(*texture or TEXTURES[:1])]
        links = [RELATIONS.index(relation) for relation in relations] + [-1] * (MOST - len(things))
        place = BACKGROUNDS.index(background)
    except (ValueError, TypeError, IndexError):
        raise ValueError(f"Not a caption of this world: {caption!r}.") from None
    if _caption(objects[: len(things)], links, place) != caption or not _possible(objects, links):
        raise ValueError(f"Not a caption of this world: {caption!r}.")
    return Scenes(torch.tensor([objects]), torch.tensor([len(things)]), torch.tensor([links]), torch.tensor([place]))


def _possible(objects: list[list[int]], relations: list[int]) -> bool:
    """Whether what is inside is small, its container large and of a shape with room; and no container is itself inside."""
    inside = [index for index, relation in enumerate(relations) if relation == INSIDE]
    return len(inside) < 2 and all(objects[i][0] == 0 < objects[i + 1][0] and objects[i + 1][2] < len(CONTAINERS) for i in inside)


# --------------------------------------------------------------------------------------------------------------- layout


def layout(scenes: Scenes, generator: torch.Generator) -> Layout:
    """Choose places, turns, radii, tints and light inside what the captions leave open."""
    count = len(scenes)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    shown, inner = scenes.shown()[..., None], scenes.inner()
    cells = torch.cat([torch.zeros(count, 1, 2), _STEPS[scenes.relations].cumsum(dim=1)], dim=1)
    low, high = cells.where(shown, torch.inf).amin(dim=1), cells.where(shown, -torch.inf).amax(dim=1)
    row = (high - low).amax(dim=1).long()  # objects in the longest row, less one
    bounds = _RADIUS[row[:, None], scenes.objects[..., 0]]
    radius = torch.lerp(bounds[..., 0], bounds[..., 1], uniform(0, 1, MOST))
    radius = torch.where(inner, radius.roll(-1, 1) * _INNER[scenes.objects[..., 2]].roll(-1, 1) * uniform(0.93, 1, MOST), radius)
    jitter = _JITTER[row][:, None, None] * uniform(-1, 1, MOST, 2)
    offset = torch.where(inner[..., None], jitter.roll(-1, 1) + 0.04 * radius[..., None] * uniform(-1, 1, MOST, 2), jitter)
    centre = (cells - (low + high)[:, None] / 2) * _SPACING[row][:, None, None] + offset
    turn = uniform(-0.12, 0.12, MOST)
    tint = _COLOUR_RGB[scenes.objects[..., 1]] + uniform(-0.025, 0.025, MOST, 3)
    sun, slope = uniform(-0.9, 0.9), uniform(0, 2 * math.pi)
    light = torch.stack([sun.sin(), -sun.cos()], dim=1)
    base = _BACKGROUND_RGB[scenes.background] + uniform(-0.025, 0.025, 1) + uniform(-0.012, 0.012, 3)
    ramp = uniform(0.02, 0.12, 1) * torch.stack([slope.cos(), slope.sin()], dim=1)
    return Layout(scenes, centre, radius * _GROW[scenes.objects[..., 2]], turn, tint, light, base, ramp)


# -------------------------------------------------------------------------------------------------------------- drawing


def draw(scenes: Scenes, generator: torch.Generator, size: int = SIZE) -> torch.Tensor:
    """Pictures [B, 3, size, size] in [0, 1] of the scenes, in random layouts."""
    return render(layout(scenes, generator), size)


def render(plan: Layout, size: int = SIZE, window: torch.Tensor | None = None, side: int | None = None) -> torch.Tensor:
    """Pictures [B, 3, size, size] in [0, 1]; with a window [B, 2] only side x side pixels of them, from that column and row on."""
    x, y = _axes(plan, size, window, side)
    ramp = x * plan.ramp[:, 0, None, None] + y * plan.ramp[:, 1, None, None]
    picture = plan.base[:, :, None, None] * (1 + ramp[:, None])
    shown, inner = plan.scenes.shown(), plan.scenes.inner()
    for level in (shown & ~inner, inner):
        for rows, index in _each(level):  # all shadows before all bodies, so that no object darkens another
            distance = _distance(plan, x, y, rows, index, offset=-0.16)
            depth = (0.5 - distance / (0.16 * plan.radius[rows, index] + 0.04)[:, None, None]).clamp(0, 1)
            picture[rows] *= (1 - 0.32 * depth * depth * (3 - 2 * depth))[:, None]
        for rows, index in _each(level):
            cover = _cover(_distance(plan, x, y, rows, index), size)[:, None]
            picture[rows] = torch.lerp(picture[rows], _body(plan, x, y, rows, index, size), cover)
    return picture.clamp(0, 1)


def masks(plan: Layout, size: int = SIZE) -> torch.Tensor:
    """How much of each pixel each object covers, [B, 3, size, size] in [0, 1]; zero for objects that are not shown."""
    x, y = _axes(plan, size)
    covers = torch.zeros(len(plan.scenes), MOST, size, size)
    for rows, index in _each(plan.scenes.shown()):
        covers[rows, index] = _cover(_distance(plan, x, y, rows, index), size)
    return covers


def _axes(plan: Layout, size: int, window: torch.Tensor | None = None, side: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels' x [B, 1, W] and y [B, H, 1]."""
    corner = torch.zeros(len(plan.scenes), 2) if window is None else window
    axis = (torch.arange(side or size) + corner[..., None] + 0.5) * (2 / size) - 1
    return axis[:, 0, None, :], axis[:, 1, :, None]


def _each(which: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """Rows and index of the objects in question, one index after the other."""
    return [(which[:, index].nonzero()[:, 0], index) for index in range(MOST)]


def _cover(distance: torch.Tensor, size: int) -> torch.Tensor:
    return (0.5 - distance * (size / 2)).clamp(0, 1)


def _local(
    plan: Layout, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, index: int, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, y in the object's own frame: its middle is 0, its radius 1. offset: how far it is moved towards the light."""
    middle = plan.centre[rows, index] + offset * plan.radius[rows, index, None] * plan.light[rows]
    x, y = x[rows] - middle[:, 0, None, None], y[rows] - middle[:, 1, None, None]
    cos, sin = (f(plan.turn[rows, index])[:, None, None] / plan.radius[rows, index, None, None] for f in (torch.cos, torch.sin))
    return x * cos + y * sin, y * cos - x * sin


def _body(plan: Layout, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, index: int, size: int) -> torch.Tensor:
    """Colours [R, 3, H, W] of an object: its tint, brighter towards the light, and its texture."""
    u, v = _local(plan, x, y, rows, index)
    radius, texture = plan.radius[rows, index, None, None], plan.scenes.objects[rows, index, 3]
    pixel = 2 / size / radius
    pattern = torch.zeros(u.shape)
    striped, dotted = texture == TEXTURES.index("striped"), texture == TEXTURES.index("dotted")
    pitch = (0.13 / radius).clamp(min=0.46)
    diagonal = (u + v) / math.sqrt(2) / pitch
    stripes = 0.25 - ((diagonal + 0.25) % 1 - 0.5).abs()
    pattern[striped] = (0.5 - stripes * pitch / pixel).clamp(0, 1)[striped]
    pitch = (0.155 / radius).clamp(min=0.60)
    nearest = [torch.hypot((u / pitch + s) % 1 - 0.5, (v / pitch + s) % 1 - 0.5) for s in (0.0, 0.5)]
    pattern[dotted] = (0.5 - (torch.minimum(*nearest) - 0.24) * pitch / pixel).clamp(0, 1)[dotted]
    light, middle = plan.light[rows, :, None, None], plan.centre[rows, index, :, None, None]
    shade = 1 + 0.13 * ((x[rows] - middle[:, 0]) * light[:, 0] + (y[rows] - middle[:, 1]) * light[:, 1]) / radius
    tint = plan.tint[rows, index, :, None, None]
    return (tint + 0.55 * (1 - tint) * pattern[:, None]) * shade[:, None]


def _distance(plan: Layout, x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, index: int, offset: float = 0.0) -> torch.Tensor:
    """Signed distance [R, H, W] to the edge of one object per row, negative inside, in half pictures."""
    u, v = _local(plan, x, y, rows, index, offset)
    out = torch.empty(u.shape)
    for shape, formula in enumerate(_DISTANCES):
        of_shape = plan.scenes.objects[rows, index, 2] == shape
        out[of_shape] = formula(u[of_shape], v[of_shape])
    return out * plan.radius[rows, index, None, None]


def _polygon(u: torch.Tensor, v: torch.Tensor, *normals: int) -> torch.Tensor:
    """A polygon of radius 1 from the directions, in degrees from the top, in which its right half's sides look."""
    inner = math.cos(math.radians(normals[1] - normals[0]) / 2)
    sides = [u.abs() * math.sin(math.radians(angle)) - v * math.cos(math.radians(angle)) for angle in normals]
    return torch.stack(sides).amax(dim=0) - inner


def _star(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    u, v, sin, cos, inner = u.abs(), -v, math.sin(math.pi / 5), math.cos(math.pi / 5), 0.45
    for _ in range(2):  # fold all spikes onto the upper one
        beyond = 2 * (u * cos - v * sin).clamp(min=0)
        u, v = (u - beyond * cos).abs(), v + beyond * sin
    return (u * (1 - inner * cos) + (v - 1) * inner * sin) / math.hypot(1 - inner * cos, inner * sin)


def _cross(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    u, v, arm = u.abs(), v.abs(), 0.34
    return torch.minimum(torch.maximum(u - 1, v - arm), torch.maximum(u - arm, v - 1))


_DISTANCES = (  # of SHAPES, for radius 1
    lambda u, v: torch.hypot(u, v) - 1,
    lambda u, v: (torch.hypot(u, v) - 0.76).abs() - 0.24,
    lambda u, v: _polygon(u, v, 60, 180),
    lambda u, v: _polygon(u, v, 0, 90, 180),
    lambda u, v: _polygon(u, v, 36, 108, 180),
    lambda u, v: _polygon(u, v, 30, 90, 150),
    _star,
    _cross,
)
