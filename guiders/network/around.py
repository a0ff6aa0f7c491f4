"""Wrappers around modules of a network, for the length of one forward pass.

The host has no hook in some networks. There a module's ``forward`` gets something around it before the pass, and is what it was after it,
also where the pass fails. Every device has a network of its own, and passes of several threads through one module keep apart: what
a thread put around a module, other threads do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

_ATTENTION = "optimized_attention"  # the host's function, by the name under which its networks import it
Transform = Callable[[Callable], Callable]  # from a module's forward to the one that runs in its place

_lock = threading.Lock()


class _Forward:
    """In place of a module's forward: the same, with what the running thread has put around it."""

    def __init__(self, module: Any) -> None:
        self.module, self.original, self.own = module, module.forward, module.__dict__.get("forward")
        self.transforms: dict[int, list[Transform]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.original
        for transform in self.transforms.get(threading.get_ident(), ()):
            forward = transform(forward)
        return forward(*args, **kwargs)

    def add(self, transform: Transform) -> None:
        self.module.__dict__["forward"] = self
        self.transforms.setdefault(threading.get_ident(), []).append(transform)

    def remove(self, transform: Transform) -> None:
        thread = threading.get_ident()
        self.transforms[thread].remove(transform)
        if not self.transforms[thread]:
            del self.transforms[thread]
        if not self.transforms and self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]
            if self.own is not None:
                self.module.__dict__["forward"] = self.own


@contextmanager
def around(module: Any, transform: Transform) -> Iterator[None]:
    """While this lasts, calls of the module in this thread run ``transform(forward)``; the last one entered is the outermost."""
    with _lock:
        there = module.__dict__.get("forward")
        forward = there if isinstance(there, _Forward) else _Forward(module)
        forward.add(transform)
    try:
        yield
    finally:
        with _lock:
            forward.remove(transform)


def with_attention(forward: Any, override: Callable) -> Callable | None:
    """A copy of a module's forward in which the name ``optimized_attention`` means ``override(optimized_attention, ...)``.

    For networks that call the host's attention function without the options in which it looks for an override. None where this
    forward does not call it by that name: another pack has put its own there.
    """
    function = getattr(forward, "__func__", None)
    if not isinstance(function, FunctionType) or _ATTENTION not in function.__code__.co_names or _ATTENTION not in function.__globals__:
        return None
    names = {**function.__globals__, _ATTENTION: partial(override, function.__globals__[_ATTENTION])}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return MethodType(copy, forward.__self__)
