"""Adaptive Guidance alone: its invariants on the real host, against the rule written without the engine."""

from __future__ import annotations

import conditioning_tools
import pytest
import tools
import torch
from adaptive_tools import STEPS, ag, between, cfg_until, gammas, met, noise_for, run, spread, without_the_engine
from tools import KINDS, close, cond, counted, guided, log_of, tiny

from lodestar.guiders.engine.curves import COSINE
from lodestar.guiders.policies.adaptive import SPACES, AdaptiveGuidance


@pytest.mark.parametrize("kind", KINDS)
def test_above_1_it_is_cfg_itself(kind):
    model = tiny(kind)
    with counted(model) as rows:
        assert torch.equal(run(guided(model, ag(1.001))), run(model))
    assert rows == [2] * 2 * STEPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("switch", ["next_step", "same_step"])
def test_at_minus_1_it_is_cfg_in_the_first_step_at_most(kind, switch):
    model = tiny(kind)
    main = guided(model, ag(-1.0, switch=switch))
    with counted(model) as rows:
        result = run(main)
    assert rows == [2] + [1] * (STEPS - 1)
    assert log_of(main).nfe == STEPS + 1
    if switch == "same_step":
        assert close(result, run(model, cfg=1.0), 1e-5)
    else:
        assert not close(result, run(model, cfg=1.0), 1e-3) and not close(result, run(model), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_predictions_switch_at_once_and_change_nothing(kind):
    model = tiny(kind)
    main = guided(model, ag(1.0))
    with counted(model) as rows:
        result = run(main, negative=cond(1))
    assert close(result, run(model, negative=cond(1)), 1e-5)
    if log_of(main).curves[COSINE][0] == 1:  # the two rows of a batch may differ by rounding
        assert rows == [2] + [1] * (STEPS - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("switch", ["next_step", "same_step"])
def test_cfg_before_the_switch_and_the_conditional_model_after_it(kind, at, switch):
    """Bit-exactly: the run is CFG's up to the switch, and from that state the conditional sampler's."""
    model = tiny(kind)
    main = guided(model, ag(between(gammas(model), at), switch=switch))
    with counted(model) as rows:
        result = run(main)
    assert rows == [2] * (at + 1) + [1] * (STEPS - at - 1)
    first = at + (switch == "next_step")
    assert log_of(main).switches["AG (Adaptive Guidance)"].steps == (first,)
    assert log_of(main).nfe == STEPS + at + 1
    expected = run(cfg_until(model, first))
    if switch == "next_step":
        assert torch.equal(result, expected)
    assert close(result, expected, 1e-5)  # in the same step D_c comes from a batch of two, and differs by its rounding


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_spaces(kind, space):
    """The switch is where float64 cosines in that space put it."""
    model = tiny(kind)
    if (kind, space) == ("mmdit", "noise"):  # pure noise at t = 1: the two are equal, and the rule stops at once
        main = guided(model, ag(0.99999, space=space))
        run(main)
        assert log_of(main).nfe == STEPS + 1
        return
    curve = gammas(model, space=space)
    threshold = max(between([*curve[:i], v], i) for i, v in enumerate(curve) if v > max(curve[:i], default=-1.0) + 1e-6)
    main = guided(model, ag(threshold, space=space))
    result = run(main)
    assert close(result, run(without_the_engine(model, threshold, space)))
    assert log_of(main).nfe == STEPS + met(curve, threshold) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_higher_threshold_never_switches_earlier(kind):
    model = tiny(kind)
    found = []
    for threshold in (-1.0, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.99999):
        main = guided(model, ag(threshold))
        run(main)
        found.append(log_of(main).nfe)
    assert found == sorted(found) and found[0] == STEPS + 1 and len(set(found)) > 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [-1.0, 0.9, 1.0])
def test_at_cfg_1_there_is_nothing_to_save(kind, threshold):
    model = tiny(kind)
    main = guided(model, ag(threshold))
    with counted(model) as rows:
        assert torch.equal(run(main, cfg=1.0), run(model, cfg=1.0))
    assert rows == [1] * 2 * STEPS


def test_gamma_falling_below_the_threshold_does_not_bring_cfg_back():
    model = tiny("unet_v")  # in noise space gamma falls from step to step
    curve = gammas(model, space="noise")
    assert curve[0] > curve[-1]
    main = guided(model, ag((curve[0] + curve[1]) / 2, space="noise"))
    run(main)
    assert log_of(main).nfe == STEPS + 1


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "switch", "sampler"),
    [
        ("unet", "next_step", "euler"), ("unet_v", "next_step", "euler"), ("mmdit", "next_step", "euler"),
        ("unet", "next_step", "heun"), ("unet_v", "same_step", "euler"), ("mmdit", "same_step", "dpm_2"),
    ],
)  # fmt: skip
def test_rows_do_not_depend_on_their_batch_and_switched_rows_cost_nothing(kind, switch, sampler):
    model = tiny(kind)
    noise = noise_for(model, 3)
    threshold = spread([gammas(model, noise[i : i + 1], sampler=sampler) for i in range(3)])
    main = guided(model, ag(threshold, switch=switch))
    with counted(model) as rows:
        together = run(main, noise, sampler=sampler)
    log = log_of(main)
    alone, rows_alone = [], 0
    for i in range(3):
        with counted(model) as own:
            alone.append(run(main, noise[i : i + 1], sampler=sampler))
        rows_alone += sum(own)
        assert log_of(main).switches[AdaptiveGuidance.name].steps == log.switches[AdaptiveGuidance.name].steps[i : i + 1]
    assert close(together, torch.cat(alone))
    assert sum(rows) == rows_alone == log.rows
    assert log.nfe == pytest.approx(log.rows / 3) and sum(log.evaluations.values()) == pytest.approx(log.nfe)
    assert len(set(log.switches[AdaptiveGuidance.name].steps)) > 1


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral"])
@pytest.mark.parametrize("switch", ["next_step", "same_step"])
def test_stages_of_a_step_get_one_decision(sampler, switch):
    model = tiny("unet")
    noise = noise_for(model, 3)
    curves = [gammas(model, noise[i : i + 1], sampler=sampler) for i in range(3)]
    threshold = spread(curves)
    main = guided(model, ag(threshold, switch=switch))
    result = run(main, noise, sampler=sampler)
    reference = without_the_engine(model, threshold, same_step=switch == "same_step", stages=2)
    assert close(result, run(reference, noise, sampler=sampler))


def test_video_has_one_gamma_per_sample():
    model = tiny("wan")
    main = guided(model, ag(1.0))
    plain, result = conditioning_tools.video_run(model), conditioning_tools.video_run(main)
    assert torch.equal(plain, result)
    curve = log_of(main).curves[COSINE]
    main = guided(model, ag(between(list(curve.values()), 1)))
    with counted(model) as rows:
        conditioning_tools.video_run(main)
    assert rows == [2, 2, 1]
    assert log_of(main).switches[AdaptiveGuidance.name].steps == (2,)


def test_packed_audio_and_video():
    model = tiny("av")
    main = guided(model, ag(-1.0))
    conditioning_tools.packed_run(main)
    assert log_of(main).nfe == conditioning_tools.STEPS + 1


# --- the node --------------------------------------------------------------------------------------------------------


def test_the_node_attaches_what_it_says():
    from lodestar.nodes.policies.adaptive import LodestarAdaptiveGuidance

    made = LodestarAdaptiveGuidance.execute(tiny("unet"), threshold=0.98, space="velocity", switch="same_step").args[0]
    assert tools.plan_of(made.model_options).rules == (ag(0.98, space="velocity", switch="same_step"),)
    made = LodestarAdaptiveGuidance.execute(tiny("unet"), threshold=0.98, space="noise", stop_terms=True).args[0]
    assert tools.plan_of(made.model_options).rules == (ag(0.98, space="noise", stop_terms=True),)
