"""Identity attention in a transformer: the function that stands in for the host's attention while one forward pass runs.

It has to know two things that the host's call does not say: whether a chosen block runs, and which of the tokens are the image's.
``layers`` says for each class of network how both are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor

from .around import around, with_attention
from .calls import Call, flags_left, merge
from .layers import Layer, listing, module_of
from .masked_attention import masked_attention


def refuse_queries(layer: Layer, before: Sequence[str]) -> NoReturn:
    """Raise ValueError where the queries' tokens are not those of the values: V would have no effect, or be of another shape.

    before: whose functions may have changed them.
    """
    other = " and ".join(dict.fromkeys(before)) or "another node"
    raise ValueError(
        f"PAG (Perturbed-Attention Guidance) and {other} do not go together in the layer {listing((layer,))}: its queries were "
        f"divided or merged and its values were not; perturb other layers, or bypass {other}."
    )


def refuse_replaced(layer: Layer) -> NoReturn:
    """Raise ValueError where a chosen layer does not ask the host for its attention."""
    raise ValueError(
        f"PAG (Perturbed-Attention Guidance) does not reach the layer {listing((layer,))}: another node has replaced its attention; "
        "perturb other layers, or bypass that node."
    )


@dataclass(frozen=True)
class _Found:
    """A self-attention of a chosen block. image: the image's among the keys; own: the queries' among the keys."""

    image: slice
    own: slice
    all_keys: int

    @property
    def only_image(self) -> bool:
        """Whether there is no text among the keys."""
        return self.image == slice(0, self.all_keys)


@dataclass
class _RunningBlock:
    """A chosen block while it runs.

    Without joint attention a block begins with its self-attention, in one call or in several that each take the next of the
    queries (LTXV's guide frames); whatever comes after it is cross-attention.

    text, image, total: numbers of tokens that are known when it begins. asked: whether it has called the host's attention.
    """

    layer: Layer
    text: int | None = None
    image: int | None = None
    total: int | None = None
    asked: bool = False
    seen: int = 0
    length: int | None = None

    def own(self, queries: int, keys: int) -> slice | None:
        """Which of the keys the queries of this call are, if it is (a part of) the self-attention."""
        self.length = self.length or keys
        if keys != self.length or self.seen + queries > keys:
            return None
        self.seen += queries
        return slice(self.seen - queries, self.seen)

    @property
    def complete(self) -> bool:
        """Whether the self-attention was found."""
        return self.seen > 0 and self.seen == self.length


class OverriddenAttention:
    """The attention function of one forward pass: identity attention while a chosen block runs, else the ordinary one.

    masked: whether image tokens go on seeing the text. before: whose functions may change queries before they come here.
    """

    def __init__(
        self, layers: Sequence[Layer], masked: bool, previous: Callable | None, perturbed: Sequence[bool], before: Sequence[str]
    ) -> None:
        self.masked, self.previous, self.perturbed, self.before = masked, previous, tuple(perturbed), before
        self.architecture = layers[0].architecture
        self.chosen = {layer.block: layer for layer in layers}
        self.block: _RunningBlock | None = None
        self.text = 0  # text tokens of this forward pass
        self.image: int | None = None  # its image tokens, where they are measured
        self.unnumbered = 0  # calls of attention outside of numbered blocks
        self.refined = 0  # tokens in the last of these: where text and image are refined before they are joined, the image's

    # --- around blocks -----------------------------------------------------------------------------------------------

    def measured(self, original: Callable, args: dict[str, Any]) -> dict[str, Any]:
        """Run a block of the host's replacement and note the number of text tokens."""
        self.text = args["txt"].shape[1]
        return original(args)

    def replaced(self, layer: Layer, original: Callable, args: dict[str, Any]) -> dict[str, Any]:
        """Run a chosen block of the host's replacement with identity attention."""
        block = _RunningBlock(layer)
        if self.architecture.joint and "txt" in args:
            self.text, block.image = args["txt"].shape[1], args["img"].shape[1]
            block.text = min(self.text, args.get("num_tokens", self.text))  # Mochi cuts its text
        elif self.architecture.joint:
            block.text, block.total = self.text, args["img"].shape[1]
        return self._inside(block, partial(original, args))

    def _inside(self, block: _RunningBlock, run: Callable[[], Any]) -> Any:
        self.block = block
        try:
            out = run()
            if any(self.perturbed) and not block.asked:
                refuse_replaced(block.layer)
            if any(self.perturbed) and not block.complete:
                refuse_queries(block.layer, self.before)
            return out
        finally:
            self.block = None

    @contextmanager
    def in_network(self, layers: Sequence[Layer], network: Any) -> Iterator[None]:
        """Put wrappers around modules of the network for one forward pass, where the host has no replacement of blocks."""
        with ExitStack() as stack:
            if self.architecture.measured:
                what, module = self.architecture.measured
                stack.enter_context(around(attrgetter(module)(network), partial(_then, partial(self._note, what))))
            for layer in layers:
                stack.enter_context(around(module_of(network, layer), partial(self._in_module, layer)))
            yield

    def _note(self, what: str, out: Tensor) -> None:
        setattr(self, what, out.shape[1])

    def _in_module(self, layer: Layer, forward: Callable) -> Callable:
        if self.architecture.hook == "call":
            forward = with_attention(forward, self)
            if forward is None:
                refuse_replaced(layer)
        return lambda *args, **kwargs: self._inside(self._begun(layer), partial(forward, *args, **kwargs))

    def _begun(self, layer: Layer) -> _RunningBlock:
        return _RunningBlock(layer, text=self.text) if self.image is None else _RunningBlock(layer, image=self.image)

    # --- the host's call ---------------------------------------------------------------------------------------------

    def __call__(self, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The host's call of an attention override: ``func`` is the attention function, the rest are its arguments."""
        call = Call.overridden(self.previous, func, *args, **kwargs)
        flags = flags_left(call.transformer_options, self.perturbed)
        found = self._chosen_self_attention(call)
        if found is None or not any(flags):
            return call.func(*args, **kwargs)
        if all(flags):
            return self._identity(call, found)
        keep = [not flag for flag in flags]
        return merge(call.rows(keep)(), self._identity(call.rows(flags), found), flags)

    def _chosen_self_attention(self, call: Call) -> _Found | None:
        """What a call is if it is a self-attention of a chosen block, else None."""
        queries, keys = call.lengths
        if self.architecture.hook not in ("index", "pairs"):
            return None if self.block is None else self._found(queries, keys)
        index = self._number(call.transformer_options, queries)
        if index not in self.chosen:
            return None
        if self.block is not None and self.block.layer.block == index:
            return self._found(queries, keys)
        text = call.transformer_options.get("img_slice", (keys - self.refined,))[0]
        self.block = _RunningBlock(self.chosen[index], text=text)
        found = self._found(queries, keys)
        if any(self.perturbed) and not self.block.complete:
            refuse_queries(self.block.layer, self.before)
        return found

    def _number(self, options: dict[str, Any], queries: int) -> int | None:
        """Without anything around blocks: which one calls, from its number in the options or from the count of calls."""
        index = options.get("block_index")
        if index is None:
            self.refined = queries
            index = self.unnumbered // 2 if self.architecture.hook == "pairs" else None
            self.unnumbered += 1
        return index

    def _found(self, queries: int, keys: int) -> _Found | None:
        block = self.block
        block.asked = True
        if not self.architecture.joint:
            own = block.own(queries, keys)
            return None if own is None else _Found(slice(0, keys), own, keys)
        image = self._image_tokens(block, queries, keys)
        if image is None or queries not in (keys, image):
            return None
        start = 0 if self.architecture.image_first else keys - image
        block.seen = block.length = keys
        return _Found(slice(start, start + image), slice(None) if queries == keys else slice(start, start + image), keys)

    def _image_tokens(self, block: _RunningBlock, queries: int, keys: int) -> int | None:
        """How many of the keys are the image's; None where they are not the tokens that this block should have."""
        if self.architecture.image_asks:
            return queries if queries <= keys else None
        if block.image is not None:
            known = block.text is None or keys - block.image in (0, block.text)
            return block.image if known and keys >= block.image else None
        if block.total not in (None, keys) or keys < block.text:
            return None
        block.image = keys - block.text
        return block.image

    def _identity(self, call: Call, found: _Found) -> Tensor:
        """The perturbed rows: V, or, where text and image share the attention, the masked form."""
        q, k, v = call.by_head()
        if not self.masked or found.only_image:
            return call.output(v[:, :, found.own])
        whole = found.own == slice(None)
        image = call.queries(found.image) if whole else call
        out = call.output(masked_attention(q[:, :, found.image] if whole else q, k, v, found.image, image.mask, call.options.get("scale")))
        if not whole:
            return out
        if found.image.start:
            return torch.cat([call.queries(slice(0, found.image.start))(), out], dim=call.output_tokens)
        return torch.cat([out, call.queries(slice(found.image.stop, found.all_keys))()], dim=call.output_tokens)


def _then(note: Callable[[Tensor], None], forward: Callable) -> Callable:
    """A forward whose result is noted."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        out = forward(*args, **kwargs)
        note(out)
        return out

    return run
