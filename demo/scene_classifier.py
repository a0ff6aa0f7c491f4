"""Reads from a 128-pixel picture what its caption says: the measuring instrument of the latent demo models. Needs torch alone."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from . import scenes

PATH = Path(__file__).parent / "weights" / "latent" / "classifier.safetensors"
OBJECT = {"size": scenes.SIZES, "colour": scenes.COLOURS, "shape": scenes.SHAPES, "texture": scenes.TEXTURES}
_PLACES = 6  # that are looked at, each chosen by the picture
_FEATURES = 96


def _heads() -> dict[str, int]:
    """Choices of everything that is read; a relation that there is not is a choice too."""
    heads = {"count": scenes.MOST, "background": len(scenes.BACKGROUNDS)}
    heads |= {f"relation{index}": len(scenes.RELATIONS) + 1 for index in range(scenes.MOST - 1)}
    return heads | {f"{name}{index}": len(choices) for index in range(scenes.MOST) for name, choices in OBJECT.items()}


class _Stage(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


class _Residual(_Stage):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class SceneClassifier(nn.Module):
    """Pictures [B, 3, 128, 128] in [0, 1] -> {name: logits [B, choices]}; ``features`` gives [B, 96] for distances of distributions.

    Objects are numbered as in the caption, whose order follows from the picture: from left to right, downwards, and outwards.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            _Stage(12, 24),
            _Stage(24, 48, 2),
            _Residual(48),
            _Stage(48, 56, 2),
            _Residual(56),
            _Stage(56, 56, 2),
            _Residual(56),
            _Residual(56),
        )
        self.looks = nn.Conv2d(56 + 2, _PLACES, 1)
        self.mix = nn.Linear(_PLACES * (56 + 2), _FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(_FEATURES, choices) for name, choices in _heads().items()})

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """The representation in front of the heads: what stands at the places looked at, and where they are."""
        maps = self.body(pictures * 2 - 1)
        axes = [torch.linspace(-1, 1, side, dtype=maps.dtype, device=maps.device) for side in maps.shape[-2:]]
        where = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(len(maps), -1, -1, -1)
        maps = torch.cat([maps, where], dim=1)
        looks = self.looks(maps).flatten(2).softmax(dim=-1)
        return F.silu(self.mix(torch.einsum("bpn,bcn->bpc", looks, maps.flatten(2)).flatten(1)))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}


def targets(drawn: scenes.Scenes) -> dict[str, torch.Tensor]:
    """What the classifier should answer, [B] each; -100 for what a picture does not have."""
    wanted = {"count": drawn.count - 1, "background": drawn.background}
    for index in range(scenes.MOST - 1):
        wanted[f"relation{index}"] = drawn.relations[:, index] % (len(scenes.RELATIONS) + 1)
    shown = drawn.shown()
    for index in range(scenes.MOST):
        for name, value in zip(OBJECT, drawn.objects[:, index].unbind(-1), strict=True):
            wanted[f"{name}{index}"] = value.where(shown[:, index], -100)
    return wanted


def loss(logits: dict[str, torch.Tensor], drawn: scenes.Scenes) -> torch.Tensor:
    """Sum of the cross-entropies, each over the pictures that have it."""
    wanted = targets(drawn)
    return sum(F.cross_entropy(value, wanted[name], reduction="sum") for name, value in logits.items()) / len(drawn)


def correct(logits: dict[str, torch.Tensor], drawn: scenes.Scenes) -> dict[str, torch.Tensor]:
    """Which rows are right, bool [B]: in each of the four attributes for all objects, in "count", "relation", "background", in "all"."""
    wanted = targets(drawn)
    right = {name: (value.argmax(dim=-1) == wanted[name]) | (wanted[name] < 0) for name, value in logits.items()}
    grouped = {group: torch.stack([value for name, value in right.items() if name.rstrip("012") == group]).all(dim=0) for group in GROUPS}
    return grouped | {"all": torch.stack(list(right.values())).all(dim=0)}


GROUPS = (*OBJECT, "count", "relation", "background")


def load_classifier() -> SceneClassifier:
    """The embedded classifier, ready to use."""
    net = SceneClassifier()
    net.load_state_dict({name: value.float() for name, value in load_file(PATH).items()})
    return net.eval().requires_grad_(False)
