"""Cells: N pictures made with one setting, cached by a hash of the setting and of the code that makes them.

A cell's pictures are made for the same captions and from the same noise as every other cell's, so that cells can be compared
picture by picture.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lodestar.benchmarks._flops import counted_flops
from lodestar.benchmarks._sampling import decoded, empty, ksampler
from lodestar.demo import models
from lodestar.demo.shapes import Scenes, captions, random_scenes
from nodes import NODE_CLASS_MAPPINGS

PACK = Path(__file__).resolve().parents[2]
PER_CAPTION = 4  # pictures of each caption, for the variety within one
SEED = 77
WEAK = "weak model"  # as a node's input: the weak version of the cell's model


@dataclass(frozen=True)
class Node:
    """A guidance node on the model: its id and those inputs that are not at their defaults."""

    id: str
    inputs: tuple[tuple[str, Any], ...] = ()

    def attach(self, model: Any, weak: Callable[[], Any]) -> Any:
        """The MODEL with the node on it."""
        cls = _node_class(self.id)
        given = {name: weak() if value == WEAK else value for name, value in self.inputs}
        defaults = {entry.id: entry.default for entry in cls.define_schema().inputs if getattr(entry, "default", None) is not None}
        return cls.execute(**defaults | {"model": model} | given).result[0]


def node(id: str, **inputs: Any) -> Node:
    """A node with its inputs by name."""
    return Node(id, tuple(inputs.items()))


@dataclass(frozen=True)
class Cell:
    """How pictures are made. ``make`` is a function of this pack, called with a Batch and the settings; its code is part of the hash.

    label: what a reader of the tables calls it.
    prepare: called with the settings first; what a picture costs does not include it.
    """

    label: str
    make: Callable[..., Tensor]
    settings: tuple[tuple[str, Any], ...] = ()
    prepare: Callable[..., object] | None = None

    def key(self, samples: int) -> str:
        """Hash of everything that the pictures depend on."""
        settings = json.dumps([asdict(value) if isinstance(value, Node) else value for value in self.settings], default=_plain)
        about = [self.make.__qualname__, settings, str(samples), *_weights()]
        wanted = [self.make.__module__, *(_node_class(part.id).__module__ for part in _nodes(self.settings))]
        return hashlib.sha256("\n".join([*about, *code_version(wanted)]).encode()).hexdigest()[:24]

    def __getitem__(self, name: str) -> Any:
        return dict(self.settings)[name]


def guided(model: str, label: str, cfg: float, *nodes: Node, **more: Any) -> Cell:
    """A cell of one of the demo models with guidance nodes on it, sampled as KSampler does. ``more``: see ``sampled``."""
    return Cell(label, sampled, (("model", model), ("cfg", cfg), ("nodes", nodes), *more.items()))


@dataclass
class Batch:
    """Some pictures of a cell: their captions, their noise, and what making them costs.

    A make function takes its models from ``model``, so that their evaluations are counted.
    """

    scenes: Scenes
    seed: int
    rows: int = 0

    @property
    def captions(self) -> list[str]:
        """One sentence a picture."""
        return captions(self.scenes)

    @property
    def latent(self) -> Tensor:
        """What sampling begins with, [B, 3, H, W]."""
        return empty(len(self.scenes))

    def model(self, kind: str, strength: str = "main") -> Any:
        """A demo model whose evaluations are counted."""
        clone = _model(kind, strength).clone()
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "effects", self._apply_model)
        return clone

    def _apply_model(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.rows += len(x)
        return executor(x, *args, **kwargs)


def sampled(
    batch: Batch, *, model: str, cfg: float, nodes: tuple[Node, ...] = (), steps: int = 20, sampler: str = "euler", prompts: bool = True
) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1]: what KSampler and VAEDecode make of the captions, or of no prompt at all."""
    patcher = batch.model(model)
    for part in nodes:
        patcher = part.attach(patcher, lambda: batch.model(model, "weak"))
    clip, texts = _clip(), batch.captions
    nothing = models.encode(clip, [""] * len(texts))
    positive = models.encode(clip, texts) if prompts else nothing
    settings = {"steps": steps, "cfg": cfg, "sampler": sampler, "scheduler": models.SCHEDULERS[model]}
    return decoded(ksampler(patcher, (positive, nothing), batch.latent, seed=batch.seed, **settings))


# --- making and caching ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """A cell's pictures [N, 3, H, W] as bytes and what one picture cost: evaluations (rows), FLOPs, seconds."""

    pictures: Tensor
    nfe: float
    flops: float
    seconds: float


@dataclass
class Cache:
    """Finished cells in a folder, one safetensors file each."""

    folder: Path
    samples: int
    batch: int = 64
    _keys: dict[Cell, str] = field(default_factory=dict)

    def path(self, cell: Cell) -> Path:
        """Where the cell is, or will be."""
        if cell not in self._keys:
            self._keys[cell] = cell.key(self.samples)
        return self.folder / f"{self._keys[cell]}.safetensors"

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those that are still to be made, once each."""
        return [cell for cell in dict.fromkeys(cells) if not self.path(cell).is_file()]

    def load(self, cell: Cell) -> Made:
        """A finished cell."""
        with safe_open(self.path(cell), "pt") as file:
            cost = {name: float(value) for name, value in file.metadata().items()}
            return Made(file.get_tensor("pictures"), **cost)

    def make(self, cell: Cell) -> Iterator[int]:
        """Make the cell and keep it; yields how many pictures were added each time."""
        if cell.prepare is not None:
            with torch.inference_mode():
                cell.prepare(**dict(cell.settings))
        pictures, rows, flops, seconds = [], 0, 0.0, 0.0
        for number, scenes in enumerate(split(scenes_for(self.samples), self.batch)):
            batch = Batch(scenes, SEED + 1 + number)
            began = time.perf_counter()
            with torch.inference_mode():
                if number == 0:  # counting slows it down, and all batches cost the same
                    with counted_flops() as counter:
                        pictures.append(cell.make(batch, **dict(cell.settings)))
                    flops = counter.get_total_flops() / len(scenes)
                else:
                    pictures.append(cell.make(batch, **dict(cell.settings)))
                    seconds += time.perf_counter() - began
            rows += batch.rows
            yield len(scenes)
        cost = {"nfe": rows / self.samples, "flops": flops, "seconds": seconds / max(1, self.samples - self.batch)}
        self.folder.mkdir(parents=True, exist_ok=True)
        half_done = self.path(cell).with_suffix(f".{os.getpid()}")
        kept = (torch.cat(pictures) * 255).round().clamp(0, 255).to(torch.uint8)
        save_file({"pictures": kept}, half_done, {name: repr(value) for name, value in cost.items()})
        half_done.replace(self.path(cell))


def scenes_for(samples: int) -> Scenes:
    """What the pictures of every cell show: PER_CAPTION of each of ``samples / PER_CAPTION`` one-object captions."""
    return repeated(random_scenes(samples // PER_CAPTION, torch.Generator().manual_seed(SEED), pairs=0.0), PER_CAPTION)


def repeated(scenes: Scenes, times: int) -> Scenes:
    """Each scene ``times`` times in a row."""
    return Scenes(*(part.repeat_interleave(times, dim=0) for part in (scenes.objects, scenes.background, scenes.relation)))


def split(scenes: Scenes, size: int) -> Iterator[Scenes]:
    """The scenes in batches of at most ``size``."""
    parts = (part.split(size) for part in (scenes.objects, scenes.background, scenes.relation))
    return (Scenes(*part) for part in zip(*parts, strict=True))


@cache
def _model(kind: str, strength: str) -> Any:
    return models.load_model(kind, strength)


@cache
def _clip() -> Any:
    return models.load_clip()


def _node_class(id: str) -> Any:
    return NODE_CLASS_MAPPINGS[id]


def _nodes(settings: Iterable[tuple[str, Any]]) -> list[Node]:
    values = [value for _, value in settings]
    return [part for value in values for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, Node)]


def _plain(value: Any) -> Any:
    return asdict(value)


# --- code version ----------------------------------------------------------------------------------------------------


def code_version(names: Iterable[str]) -> list[str]:
    """Hashes of the pack's modules that importing ``names`` runs, so that other files can change without making cells stale."""
    files = sorted(_imported(frozenset(_file(name) for name in names)))
    return [f"{file.relative_to(PACK).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}" for file in files]


def _imported(files: frozenset[Path]) -> set[Path]:
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting.extend(_imports(file))
    return found


@cache
def _imports(file: Path) -> frozenset[Path]:
    """The pack's files that a file of the pack imports."""
    package = (PACK.name, *file.relative_to(PACK).parent.parts)
    targets = set()
    for statement in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.ImportFrom):
            if statement.level:
                base = [*package[1 : len(package) - statement.level + 1], *(statement.module or "").split(".")]
            elif (statement.module or "").split(".")[0] == "lodestar":
                base = statement.module.split(".")[1:]
            else:
                continue
            base = [part for part in base if part]
            targets |= {_path(base)} | {_path([*base, alias.name]) for alias in statement.names}
    return frozenset(target for target in targets if target is not None and target.name != "__init__.py")


def _path(parts: list[str]) -> Path | None:
    file = PACK.joinpath(*parts).with_suffix(".py") if parts else None
    return file if file is not None and file.is_file() else None


def _file(module: str) -> Path:
    return Path(importlib.import_module(module).__file__).resolve()


@cache
def _weights() -> tuple[str, ...]:
    return tuple(hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in sorted(models.WEIGHTS.glob("*.safetensors")))
