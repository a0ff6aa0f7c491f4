"""How the work of a forward pass is spread over a network's parts: multiplications of its linear and convolution layers and attention.

For a number in a report, so once in a run, by hooks that read shapes alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .calls import Call


class Work:
    """Counts one forward pass, in multiplications for one chunk of rows. chunks: how many the module that runs has."""

    def __init__(self) -> None:
        self.by_part: dict[int | None, float] = defaultdict(float)
        self.part: int | None = None
        self.chunks = 1

    def enter(self, part: int | None, chunks: int) -> None:
        """What comes now belongs to this part, or to none, and is done for so many chunks."""
        self.part, self.chunks = part, chunks

    def share(self, parts: Sequence[int]) -> float:
        """What the work is without these parts, as a share of all of it."""
        whole = sum(self.by_part.values())
        return 1 - sum(self.by_part[part] for part in parts) / whole if whole else 1.0

    def with_attention(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a forward pass in which attention is counted too."""
        return options | {"optimized_attention_override": partial(self._attention, options.get("optimized_attention_override"))}

    @contextmanager
    def counting(self, network: nn.Module, chunks: int) -> Iterator[None]:
        """While this lasts, the network's layers are counted."""
        self.enter(None, chunks)
        with ExitStack() as stack:
            for module in network.modules():
                if isinstance(module, (nn.Linear, _ConvNd)):
                    stack.callback(module.register_forward_hook(self._layer).remove)
            yield

    def _layer(self, module: nn.Linear | _ConvNd, args: tuple, out: Tensor) -> None:
        linear = isinstance(module, nn.Linear)
        each = module.in_features if linear else module.in_channels // module.groups * math.prod(module.kernel_size)
        self.by_part[self.part] += out.numel() * each / self.chunks

    def _attention(self, previous: Callable | None, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Two products of queries and keys, or weights and values."""
        call = Call.overridden(previous, func, *args, **kwargs)
        self.by_part[self.part] += 2 * call.q.numel() * call.lengths[1] / self.chunks
        return call.func(*args, **kwargs)
