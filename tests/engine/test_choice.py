"""What one evaluation computes, and what is left of several choices."""

from __future__ import annotations

from lodestar.guiders.engine.choice import Choice, common


def test_common_rows():
    assert common(True, (True, False)) == common((True, False), True) == (True, False)
    assert common(False, (True, False)) is common((True, False), False) is False
    assert common((True, False), (False, True)) is False
    assert common((True, True), (False, True)) == (False, True)


def test_choices_combine_to_the_least():
    assert Choice() & Choice() == Choice()
    assert Choice(weight=3.0) & Choice() == Choice() & Choice(weight=3.0) == Choice(weight=3.0)
    assert (Choice(weight=0.0) & Choice(weight=1.0)).weight == 1
    assert (Choice(uncond=(True, False)) & Choice(predicted=True)) == Choice(uncond=(True, False), predicted=True)
    assert (Choice(uncond=(True, False)) & Choice(predicted=True)).evaluated is False
    assert (Choice(terms=False) & Choice(terms=(True, False))).terms is False
