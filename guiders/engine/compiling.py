"""Forward passes that torch.compile has to leave alone.

The host's TorchCompileModel tells compiled networks apart by the shapes of what they are given, and not by ``transformer_options``. A
network that was compiled without a patch on its attention would run again, without a word, where the patch is there and the shapes are
the same; and the other way round. So a forward pass that carries a patch of ours runs as it is written.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()  # the host calls several devices at once, and torch's setting is one for all threads
_inside = 0
_setting = ExitStack()


@contextmanager
def uncompiled() -> Iterator[None]:
    """While this lasts, networks compiled by torch run as they are written, in all threads."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):  # nothing is compiled; before torch 2.6
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside
    with _lock:
        if _inside == 0:
            _setting.enter_context(torch.compiler.set_stance("force_eager"))
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if _inside == 0:
            _setting.close()
