"""Latents of fresh pictures, encoded once and kept: what the 128-pixel diffusion models are trained on. Needs torch alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lodestar.demo import autoencoder, scenes

SHARD = 2_000
_CHUNK = 50


@dataclass(frozen=True)
class Encoded:
    """Scenes and the latents [B, 4, 16, 16] of one picture of each, of about unit variance."""

    scenes: scenes.Scenes
    latents: torch.Tensor


class Store:
    """Shards of encoded pictures in a folder. A shard follows from its number and the encoder's weights; it is made when asked for."""

    def __init__(self, folder: Path, weights: Path, size: int = SHARD) -> None:
        values = load_file(weights)
        encoder = [values[name].numpy().tobytes() for name in sorted(values) if not name.startswith("decoder.")]
        self.folder = folder / hashlib.sha256(b"".join(encoder)).hexdigest()[:12]  # another encoder, other latents
        self.size = size
        self.net = autoencoder.Autoencoder().requires_grad_(False)
        self.net.load_state_dict({name: value.float() for name, value in values.items()})
        self.net.to(memory_format=torch.channels_last)

    def shard(self, number: int) -> Encoded:
        """One shard, from its file if there is one."""
        path = self.folder / f"{self.size}_{number}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self._make(number), path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        kept = load_file(path)
        latents = kept.pop("latents").float()
        return Encoded(scenes.Scenes(**{name: value.long() for name, value in kept.items()}), latents)

    def _make(self, number: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(2**33 + number)
        drawn = scenes.random_scenes(self.size, generator)
        parts = []
        for start in range(0, self.size, _CHUNK):
            pictures = scenes.draw(drawn[start : start + _CHUNK], generator) * 2 - 1
            parts.append(self.net.encode(pictures.contiguous(memory_format=torch.channels_last)).half())
        fields = {name: getattr(drawn, name).to(torch.int8) for name in ("objects", "count", "relations", "background")}
        return {"latents": torch.cat(parts).contiguous()} | fields


class Stream:
    """Batches of encoded pictures. Every shard serves for a while; then the next is made, and the oldest is dropped."""

    def __init__(self, store: Store, first: int = 2, most: int = 20, uses: int = 4) -> None:
        """first: shards to begin with. most: kept at a time. uses: how often a new picture is seen, about, before more are made."""
        self.store, self.first, self.most, self.uses = store, first, most, uses
        self.shards: dict[int, Encoded] = {}

    def batch(self, seen: int, count: int, generator: torch.Generator) -> Encoded:
        """``count`` pictures of a run that has seen ``seen``; the same for the same numbers and generator."""
        end = self.first + seen // (self.uses * self.store.size)
        begin = max(0, end - self.most)
        self.shards = {number: self.shards.get(number) or self.store.shard(number) for number in range(begin, end)}
        number = torch.randint(begin, end, (), generator=generator).item()
        rows = torch.randint(self.store.size, (count,), generator=generator)
        return Encoded(self.shards[number].scenes[rows], self.shards[number].latents[rows])
