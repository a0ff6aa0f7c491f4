"""Logs of runs: found by their plan, and several in a row as one."""

from __future__ import annotations

from lodestar.guiders.engine.choice import Choice
from lodestar.guiders.engine.log import RunLog, Switch, joined, last_log, publish
from lodestar.guiders.engine.plan import GuidancePlan


def log(steps, nfe, **more):
    return RunLog(steps=steps, batch=2, calls=steps, rows=4 * steps, nfe=nfe, saved=1.0, seconds=0.5, **more)


def test_runs_in_a_row():
    first = log(2, 4, sigmas=[9.0, 4.0, 1.0], curves={"a": {0: 1.0, 1: 2.0}}, evaluations={0: 2, 1: 2}, choices={0: Choice()})
    second = log(1, 1, sigmas=[3.0, 0.0], curves={"a": {0: 3.0}, "b": {0: 4.0}}, evaluations={0: 1}, choices={0: Choice(weight=1.0)})
    second.switches["AG"] = Switch("a", 0.9, (0, None))
    whole = joined([first, second])
    assert (whole.steps, whole.batch, whole.calls, whole.rows, whole.nfe, whole.saved, whole.seconds) == (3, 2, 3, 12, 5, 2.0, 1.0)
    assert whole.sigmas == [9.0, 4.0, 3.0, 0.0]
    assert whole.curves == {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {2: 4.0}}
    assert whole.evaluations == {0: 2, 1: 2, 2: 1} and whole.choices == {0: Choice(), 2: Choice(weight=1.0)}
    assert whole.switches == {}
    assert first.curves == {"a": {0: 1.0, 1: 2.0}}


def test_the_last_log_of_a_plan():
    one, two = GuidancePlan(), GuidancePlan()
    assert last_log(one) is None
    for steps in (1, 2):
        publish(one, log(steps, 1))
    assert last_log(one).steps == 2 and last_log(two) is None
