"""The data behind the demo models: captions of simple shapes, and pictures of them.

Everything is drawn from signed distances on the device of the generator, so a batch costs a few milliseconds. Needs torch alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange

SIZE = 32
SIZES = ("small", "large")
COLOURS = ("red", "orange", "green", "blue", "purple", "teal")
SHAPES = ("disc", "ring", "triangle", "square", "pentagon", "hexagon", "star", "cross")
BACKGROUNDS = ("grey", "cream", "blue", "dark")
RELATIONS = ("left of", "above")
ATTRIBUTES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS}

WORDS = tuple(dict.fromkeys(("a", *SIZES, *COLOURS, *SHAPES, *" ".join(RELATIONS).split(), "on", *BACKGROUNDS, "background")))

_COLOUR_RGB = torch.tensor([
    [0.72, 0.28, 0.26], [0.82, 0.55, 0.26], [0.36, 0.58, 0.33], [0.27, 0.42, 0.70], [0.52, 0.35, 0.62], [0.27, 0.62, 0.60],
])  # fmt: skip
_BACKGROUND_RGB = torch.tensor([[0.60, 0.60, 0.60], [0.87, 0.82, 0.70], [0.64, 0.75, 0.86], [0.20, 0.20, 0.23]])
_RADIUS = torch.tensor([[6.2, 6.8], [9.9, 10.8]])  # pixels, [size, (low, high)]
_PAIR_SCALE = 0.66  # two objects share the canvas, so both are drawn smaller
_SIDES = torch.tensor([3.0, 3.0, 3.0, 4.0, 5.0, 6.0, 3.0, 3.0])  # by shape index; only read for the polygons
_GROW = torch.tensor([1.0, 1.0, 1.22, 1.12, 1.04, 1.0, 1.15, 1.0])  # equal-looking sizes


@dataclass(frozen=True)
class Scenes:
    """Attributes of B pictures. ``objects`` [B, 2, 3] holds (size, colour, shape) indices; ``relation`` [B] is -1 for one object."""

    objects: torch.Tensor
    background: torch.Tensor
    relation: torch.Tensor

    def __len__(self) -> int:
        return len(self.background)


def random_scenes(count: int, generator: torch.Generator, pairs: float = 0.15) -> Scenes:
    """Draw attributes uniformly; a share ``pairs`` of the scenes has two objects of different colour."""

    def pick(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, (count, *shape), generator=generator)

    colour = pick(len(COLOURS), 2)
    colour[:, 1] = (colour[:, 0] + 1 + pick(len(COLOURS) - 1)) % len(COLOURS)
    objects = torch.stack([pick(len(SIZES), 2), colour, pick(len(SHAPES), 2)], dim=-1)
    two = torch.rand(count, generator=generator) < pairs
    return Scenes(objects, pick(len(BACKGROUNDS)), torch.where(two, pick(len(RELATIONS)), -1))


def colour_rgb(colours: torch.Tensor) -> torch.Tensor:
    """The middle [B, 3] of what the colours [B] of objects look like."""
    return _COLOUR_RGB[colours]


def background_rgb(backgrounds: torch.Tensor) -> torch.Tensor:
    """The same for backgrounds [B]."""
    return _BACKGROUND_RGB[backgrounds]


def captions(scenes: Scenes) -> list[str]:
    """The sentence that describes each scene."""

    def thing(size: int, colour: int, shape: int) -> str:
        return f"a {SIZES[size]} {COLOURS[colour]} {SHAPES[shape]}"

    sentences = []
    for objects, background, relation in zip(scenes.objects.tolist(), scenes.background.tolist(), scenes.relation.tolist(), strict=True):
        subject = thing(*objects[0])
        if relation >= 0:
            subject += f" {RELATIONS[relation]} {thing(*objects[1])}"
        sentences.append(f"{subject} on a {BACKGROUNDS[background]} background")
    return sentences


def draw(scenes: Scenes, generator: torch.Generator, size: int = SIZE) -> torch.Tensor:
    """Pictures [B, 3, size, size] in [0, 1] with random place, turn, light and tint inside what the caption leaves open."""
    count = len(scenes)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    axis = (torch.arange(size) + 0.5) * (SIZE / size) - SIZE / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    direction = uniform(0, 2 * math.pi, 1, 1)
    ramp = (x * direction.cos() + y * direction.sin()) / SIZE
    base = _BACKGROUND_RGB[scenes.background] + uniform(-0.03, 0.03, 1) + uniform(-0.015, 0.015, 3)
    picture = rearrange(base, "b c -> b c 1 1") * (1 + uniform(0.05, 0.3, 1, 1, 1) * ramp[:, None])

    two = scenes.relation >= 0
    light = uniform(0, 2 * math.pi)
    middle = uniform(-1.0, 1.0, 2)
    spread = torch.where(scenes.relation[:, None] == 0, torch.tensor([7.6, 0.0]), torch.tensor([0.0, 7.6]))
    for index, side in ((0, -1.0), (1, 1.0)):
        size_, colour, shape = scenes.objects[:, index].unbind(-1)
        low, high = _RADIUS[size_].unbind(-1)
        radius = (low + (high - low) * uniform(0, 1)) * torch.where(two, _PAIR_SCALE, 1.0)
        centre = torch.where(two[:, None], side * spread + uniform(-0.7, 0.7, 2), middle)
        px, py = x - rearrange(centre[:, 0], "b -> b 1 1"), y - rearrange(centre[:, 1], "b -> b 1 1")
        turn = uniform(-0.1, 0.1)
        cover = _cover(px, py, radius, turn, shape, size)
        shadow = _cover(px - 1.2, py - 1.4, radius, turn, shape, size, softness=2.5)
        shown = (two | (index == 0)).float()[:, None, None, None]
        shade = (px * rearrange(light.cos(), "b -> b 1 1") + py * rearrange(light.sin(), "b -> b 1 1")) / radius[:, None, None]
        tint = _COLOUR_RGB[colour] + uniform(-0.03, 0.03, 3)
        body = rearrange(tint, "b c -> b c 1 1") * (1 + 0.16 * shade.clamp(-1.2, 1.2)[:, None])
        picture = picture * (1 - 0.25 * shown * shadow[:, None])
        picture = torch.lerp(picture, body, shown * cover[:, None])
    return picture.clamp(0, 1)


def _cover(
    x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor, turn: torch.Tensor, shape: torch.Tensor, size: int, softness: float = 1.0
) -> torch.Tensor:
    """Anti-aliased coverage [B, H, W] of one shape per row."""
    distance = _signed_distance(x, y, radius * _GROW[shape], turn, shape)
    return (0.5 - distance * (size / SIZE) / softness).clamp(0, 1)


def _signed_distance(x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor, turn: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
    radius, turn = radius[:, None, None], turn[:, None, None]
    x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    length, angle = torch.hypot(x, y), torch.atan2(x, -y)  # angle 0 points up

    sector = 2 * math.pi / _SIDES[shape][:, None, None]
    half_turn = torch.where((shape == SHAPES.index("square"))[:, None, None], sector / 2, 0.0)
    folded = torch.remainder(angle + half_turn, sector) - sector / 2
    polygon = folded.cos() * length - radius * (sector / 2).cos()

    spike = math.pi / 5
    around = (torch.remainder(angle + spike, 2 * spike) - spike).abs()
    inner = 0.45
    edge_x, edge_y = inner * math.cos(spike) - 1, inner * math.sin(spike)
    norm = math.hypot(edge_x, edge_y)
    star = ((around.cos() * length - radius) * edge_y - around.sin() * length * edge_x) / norm

    arm = 0.34 * radius
    cross = torch.minimum(torch.maximum(x.abs() - radius, y.abs() - arm), torch.maximum(x.abs() - arm, y.abs() - radius))
    ring = (length - 0.76 * radius).abs() - 0.24 * radius
    kinds = torch.stack([length - radius, ring, polygon, polygon, polygon, polygon, star, cross], dim=1)
    return kinds[torch.arange(len(shape)), shape]
