"""The line of text of a fit or a search: what it is at, and how long it takes."""

from __future__ import annotations

import pytest


class Clock:
    """Stands where the module has ``time``; shows what a test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def progress(host):
    """The module."""
    from lodestar.guiders.learning import progress

    return progress


def test_lines_tell_the_time_that_is_left_and_do_not_follow_each_other_too_fast(progress, monkeypatch):
    lines: list[str] = []
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    counted = progress.Progress(100, lines.append)
    for done in range(1, 101):
        clock.now = done * 0.2
        counted.update(f"{done} of 100")
    assert lines[:2] == ["1 of 100 · 0:20 left", "4 of 100 · 0:19 left"] and lines[-1] == "100 of 100 · done in 0:20"
    assert 30 <= len(lines) <= 41


def test_without_a_reader_it_only_counts(progress):
    counted = progress.Progress(2)
    counted.update("one")
    counted.update("two")
    assert counted.done == 2


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (4000, "1:06:40")])
def test_seconds_as_a_clock_shows_them(progress, seconds, text):
    assert progress.clock(seconds) == text
