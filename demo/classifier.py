"""A small classifier of the captions' attributes on clean pictures: the measuring instrument of the demo models. Needs torch alone."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .shapes import ATTRIBUTES, Scenes

PATH = Path(__file__).parent / "weights" / "classifier.safetensors"


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


class AttributeClassifier(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] -> {attribute: logits [B, choices]}; ``features`` gives [B, 96] for distribution distances."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _stage(3, 32, 1),
            _stage(32, 32, 2),
            _stage(32, 64, 1),
            _stage(64, 64, 2),
            _stage(64, 96, 1),
            _stage(96, 96, 2),
            _stage(96, 96, 1),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(choices)) for name, choices in ATTRIBUTES.items()})

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """The pooled representation in front of the heads."""
        return self.body(pictures * 2 - 1).mean(dim=(2, 3))

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}


def targets(scenes: Scenes) -> dict[str, torch.Tensor]:
    """What the classifier should answer for the first object of each scene."""
    size, colour, shape = scenes.objects[:, 0].unbind(-1)
    return {"size": size, "colour": colour, "shape": shape, "background": scenes.background}


def loss(logits: dict[str, torch.Tensor], scenes: Scenes) -> torch.Tensor:
    """Sum of the attributes' cross-entropies."""
    wanted = targets(scenes)
    return torch.stack([F.cross_entropy(value, wanted[name]) for name, value in logits.items()]).sum()


def correct(logits: dict[str, torch.Tensor], scenes: Scenes) -> dict[str, torch.Tensor]:
    """Per attribute, and for "all" of them together, which rows are right: {name: bool [B]}."""
    wanted = targets(scenes)
    right = {name: value.argmax(dim=-1) == wanted[name] for name, value in logits.items()}
    return right | {"all": torch.stack(list(right.values())).all(dim=0)}


def load_classifier() -> AttributeClassifier:
    """The embedded classifier, ready to use."""
    net = AttributeClassifier()
    net.load_state_dict({name: value.float() for name, value in load_file(PATH).items()})
    return net.eval()
