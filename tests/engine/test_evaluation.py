"""The value for a fused call, and what belongs to one evaluation."""

from __future__ import annotations

import pytest

from lodestar.guiders.engine.branches import Branch
from lodestar.guiders.engine.choice import Choice
from lodestar.guiders.engine.evaluation import Evaluation, FusedCall

A, B = Branch(variant="a"), Branch(variant="b")


@pytest.mark.parametrize(
    ("call", "host", "branches"),
    [
        (FusedCall(), [1, 0], [None, None]),
        (FusedCall((A,), positive=0), [0, 0], [None, A]),
        (FusedCall((A, B), positive=1), [1, 1], [B, A]),
    ],
)
def test_the_host_counts_branches_as_cond(call, host, branches):
    assert call.host_labels([1, 0]) == host
    assert [call.branch_of(label) for label in (1, 0)] == branches
    extra = len(call.branches)
    assert call.host_labels([extra, extra + 1]) == [0, 1]


def test_lists_that_are_not_named_need_all_rows():
    call = FusedCall(rows=((True, False), False))
    assert [call.rows_of(label) for label in range(3)] == [(True, False), False, True]


def test_a_call_ends_whatever_happens():
    evaluation, call = Evaluation(), FusedCall((A,))
    with pytest.raises(KeyError), evaluation.calling(call):
        assert evaluation.call is call
        raise KeyError
    assert evaluation.call == FusedCall()


def test_the_choice_is_what_all_policies_leave():
    evaluation = Evaluation(2, False)
    assert evaluation.choice == Choice()
    evaluation.choices = {0: Choice(uncond=(True, False)), 3: Choice(weight=2.0)}
    assert evaluation.choice == Choice(weight=2.0, uncond=(True, False))
    evaluation.choices[0] &= Choice(uncond=(False, True))
    assert evaluation.choice.uncond is False
