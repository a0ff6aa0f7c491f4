"""How far a fit or a search is: the host's bar, and a line of text with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable

import comfy.utils

MOST_OFTEN = 0.5  # seconds between two lines


class Progress:
    """Counts ``total`` parts of one task. ``write`` gets the lines, one every half second at most, and the last."""

    def __init__(self, total: int, write: Callable[[str], None] | None = None) -> None:
        self.total, self.write = total, write
        self.bar = comfy.utils.ProgressBar(total)
        self.done = 0
        self.began = time.monotonic()
        self.written = -MOST_OFTEN

    def update(self, text: str) -> None:
        """One more part is done. ``text``: what there is to say besides the time."""
        self.done += 1
        self.bar.update(1)
        took = time.monotonic() - self.began
        last = self.done == self.total
        if self.write is None or (took - self.written < MOST_OFTEN and not last):
            return
        self.written = took
        left = took / self.done * (self.total - self.done)
        self.write(f"{text} · done in {clock(took)}" if last else f"{text} · {clock(left)} left")


def clock(seconds: float) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
