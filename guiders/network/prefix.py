"""Shared beginnings: chunks of rows that differ only from some layer on go through the modules before it once.

Each module that comes before a change of the network works on the distinct rows. Where the network hands one block's result straight
to the next, its rows stay distinct until the first layer that tells them apart; elsewhere, as with a ControlNet, whose residuals are per
row, every result gets all rows again. Hooks on the modules do it, for the length of one forward pass. So the host's own code, its
wrappers and other packs' see what they always see.

A layout says which rows a tensor has: ``owners[i]`` is the chunk whose rows chunk i has. (0, 1, 1) are the rows of two chunks, of which
chunk 2 has the same as chunk 1; (0, 1, 2) is everything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.host import owner_of
from ..engine.sharing import Chunks
from .calls import narrowed
from .layers import UNET, Architecture, Layer, blocks_of
from .work import Work

Layout = tuple[int, ...]

# Class names of the host. Networks whose blocks take tensors that have their rows first, or no rows, and give such; with subclasses.
BY_BLOCK = {
    "StageC", "StageB", "MageFlowTransformer2DModel", "LensTransformer2DModel", "JoyImageTransformer3DModel",
    "HiDreamImageTransformer2DModel", "OmniGen2Transformer2DModel", "BooguTransformer2DModel", "Ideogram4Transformer2DModel",
    "ErnieImageModel",
}  # fmt: skip
# Those whose blocks, besides, take each other's results with nothing between them that counts rows. Subclasses may have that.
CHAINED = {
    "UNetModel", "OpenAISignatureMMDITWrapper", "Flux", "Chroma", "HunyuanVideo", "QwenImageTransformer2DModel", "WanModel", "LTXVModel",
    "Kandinsky5", "MMDiT", "NextDiT", "SingleStreamDiT", "MiniTrainDIT",
}  # fmt: skip
_SKIPPED = ("skip_mmdit", "skip_dit")  # attributes of Chroma: blocks that it leaves out
_LATE = ("middle_block_after_patch", "output_block_patch")  # patches of a UNet that come after its middle block
_PACK = __name__.partition(".guiders.")[0]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Enum)
_HIDDEN = 3  # dimensions of hidden states, at least; other tensors reach a module with all rows

# --- what comes before a layer ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A module that a network calls once in a forward pass. place: its stack and block. ends: code of the host's follows it."""

    module: nn.Module
    place: tuple[str, int]
    ends: bool


def parts_before(network: Any, layers: Sequence[Layer]) -> list[Part]:
    """The modules before the block of the first of the layers, in their order; in a UNet's block also those before its transformer.

    None, too, of a network whose blocks are given something else than rows.
    """
    before: list[Part] = []
    if not layers or not any(cls.__name__ in CHAINED or cls.__name__ in BY_BLOCK for cls in type(network).__mro__):
        return before
    layer = layers[0]
    for part in _parts(network, layer.architecture):
        if part.place == (layer.stack, layer.block) and (layer.architecture is not UNET or hasattr(part.module, "transformer_blocks")):
            break
        before.append(part)
    return before


def _parts(network: Any, architecture: Architecture) -> Iterator[Part]:
    for stack, attribute in architecture.stacks:
        if architecture is UNET:
            blocks = getattr(network, attribute)
            blocks = [list(block or ()) for block in ([blocks] if stack == "middle" else blocks)]
        else:
            blocks = [[block] for block in blocks_of(network, architecture, stack)]
        for i, modules in enumerate(blocks):
            yield from (Part(module, (stack, i), module is modules[-1]) for module in modules)


def layouts_of(depths: Sequence[int | None], names: Sequence[Any]) -> list[Layout]:
    """The layout of every part that some chunks share. depths: how many parts come before a chunk's change; None: it has none.

    Chunks of one name are equal before their changes. What they share is computed for the one that is changed last.
    """
    last = {name: max((i for i, other in enumerate(names) if other == name), key=lambda i: (_deep(depths[i]), -i)) for name in names}
    found: list[Layout] = []
    while True:
        part = len(found)
        layout = tuple(last[name] if _deep(depths[i]) > part else i for i, name in enumerate(names))
        if layout == tuple(range(len(names))):
            return found
        found.append(layout)


def _deep(depth: int | None) -> float:
    return float("inf") if depth is None else depth


# --- rows ------------------------------------------------------------------------------------------------------------


class UnknownRows(Exception):
    """A module is given something whose rows cannot be told."""


class Rows:
    """Brings tensors from one layout to another; their length says which they have. size: rows of a chunk."""

    def __init__(self, size: int, chunks: int, layouts: Sequence[Layout]) -> None:
        self.size, self.full = size, tuple(range(chunks))
        self.layouts = {size * len(set(layout)): layout for layout in (*layouts, self.full)}
        self._pieces: dict[tuple[Layout, Layout], list[tuple[int, int]]] = {}

    def moved(self, value: Any, layout: Layout, strict: bool = False) -> Any:
        """``value``, which may nest tensors, in this layout. ``strict``: UnknownRows for anything that may have rows and cannot be told."""
        again = partial(self.moved, layout=layout, strict=strict)
        if isinstance(value, Tensor):
            return self._tensor(value, layout, strict)
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, dict):
            if "cond_or_uncond" in value:  # transformer_options
                return narrowed(value, [layout[i] == i for i in self.full]) if layout != self.full else value
            return {name: again(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            parts = map(again, value)
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{field.name: again(getattr(value, field.name)) for field in fields(value) if field.init})
        if strict:
            raise UnknownRows
        return value

    def _tensor(self, x: Tensor, layout: Layout, strict: bool) -> Tensor:
        if x.ndim == 0:
            return x
        have = self.layouts.get(len(x))
        if have is None and strict and len(x) != 1:
            raise UnknownRows
        if have is None or have == layout or (have != self.full and x.ndim < _HIDDEN):
            return x
        pieces = self._pieces.get((have, layout))
        if pieces is None:
            pieces = self._pieces[have, layout] = self._between(have, layout)
        parts = [x.narrow(0, start, length) for start, length in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _between(self, have: Layout, wanted: Layout) -> list[tuple[int, int]]:
        """(first row, number of rows) of the pieces of a tensor in one layout that make up the other."""
        held = sorted(set(have))
        pieces: list[tuple[int, int]] = []
        for start in (self.size * held.index(have[chunk]) for chunk in sorted(set(wanted))):
            if pieces and sum(pieces[-1]) == start:
                pieces[-1] = pieces[-1][0], pieces[-1][1] + self.size
            else:
                pieces.append((start, self.size))
        return pieces


# --- one forward pass ------------------------------------------------------------------------------------------------


class Sharing:
    """A context manager around one forward pass of a network.

    options: the transformer_options for it. foreign: because of whom nothing is shared. work: if it is to be measured.
    """

    def __init__(self, network: Any, chunks: Chunks, options: dict[str, Any], control: bool, measured: bool) -> None:
        """control: whether residuals are added between blocks."""
        network = getattr(network, "_orig_mod", network)  # compiled by torch
        before = [variant and parts_before(network, variant.layers) for variant in chunks.variants]
        self.layouts = layouts_of([None if parts is None else len(parts) for parts in before], chunks.names)
        self.parts = max((parts for parts in before if parts is not None), key=len)[: len(self.layouts)]
        self.options, self.network = options, network
        places = {part.place for part in self.parts}
        self.foreign = _foreign(options, chunks.replaced, places) if places else None
        self.chained = not control and is_chained(network)
        self.rows = Rows(chunks.size, len(chunks.names), self.layouts)
        self.work = Work() if measured and self.parts and not self.foreign else None
        self._left, self._thread = ExitStack(), threading.get_ident()
        if self.foreign:
            self.parts = []
        if self.chained and ("input", 0) in places:
            self._expand_skips()
        if self.work is not None:
            self.options = self.work.with_attention(self.options)

    def shares(self) -> list[float] | None:
        """Of every chunk, which share of a whole row's work was done for it; None where that was not measured."""
        if self.work is None:
            return None if self.parts else [1.0] * len(self.rows.full)
        return [self.work.share([number for number, layout in enumerate(self.layouts) if layout[i] != i]) for i in self.rows.full]

    def __enter__(self) -> Sharing:
        """Hook the modules."""
        with ExitStack() as stack:  # undone if one of them fails
            for number, part in enumerate(self.parts):
                for handle in (
                    part.module.register_forward_pre_hook(partial(self._before, number), with_kwargs=True),
                    part.module.register_forward_hook(partial(self._after, number)),
                ):
                    stack.callback(handle.remove)
            if self.work is not None:
                stack.enter_context(self.work.counting(self.network, len(self.rows.full)))
            self._left = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        """Take the hooks off again."""
        self._left.close()

    def _before(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """What a module is given, with the rows that its part has; all of them where something's rows cannot be told."""
        if threading.get_ident() != self._thread:  # another forward pass
            return None
        try:
            moved, layout = self.rows.moved((args, kwargs), self.layouts[number], strict=True), self.layouts[number]
        except UnknownRows:
            moved, layout = self.rows.moved((args, kwargs), self.rows.full), self.rows.full
        if self.work is not None:
            self.work.enter(number if layout != self.rows.full else None, len(set(layout)))
        return moved

    def _after(self, number: int, module: nn.Module, args: tuple, out: Any) -> Any:
        """A module's result, with the rows that come next."""
        if threading.get_ident() != self._thread:
            return out
        goes_on = number + 1 < len(self.parts) and (self.chained or not self.parts[number].ends)
        layout = self.layouts[number + 1] if goes_on else self.rows.full
        if self.work is not None:
            self.work.enter(None, len(set(layout)))
        return self.rows.moved(out, layout)

    def _expand_skips(self) -> None:
        """In a UNet, what skips over the middle may have fewer rows than what comes through it: get them where the two meet."""
        patches = self.options.get("patches", {})
        others = patches.get("output_block_patch", [])
        self.options = self.options | {"patches": patches | {"output_block_patch": [partial(_met, self.rows), *others]}}


def _met(rows: Rows, h: Tensor, skip: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """A patch of the host's UNet: what skips over the middle gets the rows of what comes through it."""
    if skip is None or len(skip) == len(h):
        return h, skip
    return h, rows.moved(skip, rows.layouts[len(h)])


def is_chained(network: Any) -> bool:
    """Whether a network's blocks take each other's results, by its class and as long as nobody has put a forward of his own on it."""
    replaced = any(name.lstrip("_").startswith("forward") and callable(value) for name, value in vars(network).items())
    return type(network).__name__ in CHAINED and not replaced and not any(getattr(network, name, None) for name in _SKIPPED)


def _foreign(options: Mapping[str, Any], replaced: Mapping[str, Any], places: set[tuple[str, int]]) -> str | None:
    """Whose function changes something in these blocks, and may do so differently for rows that are equal; None: nobody's.

    replaced: ``patches_replace`` as it was before our own.
    """
    late = _LATE if all(stack in ("input", "middle") for stack, _ in places) else ()
    for kind, functions in options.get("patches", {}).items():
        if functions and kind not in late:
            return _owner(functions[0])
    for patches, own in ((replaced, False), (options.get("patches_replace", {}), True)):
        for of_kind in patches.values():
            for key, function in of_kind.items():
                if (str(key[0]).removesuffix("_block"), key[1]) in places and not (own and _is_ours(function)):
                    return _owner(function)
    return None


def _owner(function: Any) -> str:
    return owner_of(function[-1] if isinstance(function, tuple) else function)


def _is_ours(function: Callable) -> bool:
    return str(getattr(function, "__module__", "")).startswith(f"{_PACK}.")
