"""What is evaluated in which call: branches of one model together, nothing that nobody needs."""

from __future__ import annotations

import pytest
import tools
from tools import KINDS, attach, close, comfy, counted, empty_latent, guided, log_of, pag, sample, tiny

from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

STEPS = 3


def small(model, batch: int = 1):
    return empty_latent(model, batch, 8)


def run(model, batch: int = 1, **more):
    return sample(model, steps=STEPS, latent=small(model, batch), **more)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_a_model_are_one_call(kind, batch):
    model, weak = tiny(kind), tiny(kind, seed=7)
    main = guided(model, APG(), pag(model), Autoguidance(weak_model=weak))
    with counted(model) as rows, counted(weak) as weak_rows:
        run(main, batch)
    assert rows == [3 * batch] * STEPS
    assert weak_rows == [batch] * STEPS
    log = log_of(main)
    assert (log.calls, log.rows, log.nfe) == (2 * STEPS, 4 * batch * STEPS, 4 * STEPS)
    assert (log.steps, log.batch) == (STEPS, batch)


@pytest.mark.parametrize(
    ("cfg", "rules", "expected"),
    [
        (4.0, lambda m: [pag(m)], 3),
        (1.0, lambda m: [pag(m)], 2),
        (1.0, lambda m: [APG()], 1),
        (4.0, lambda m: [pag(m), pag(m, scale=1.0, rescale=0.5)], 3),  # one branch for two rules
        (4.0, lambda m: [pag(m, scale=0.0)], 2),
        (4.0, lambda m: [Autoguidance(weak_model=tiny("unet", seed=7), scale=1.0)], 2),
        (4.0, lambda m: [], 2),
    ],
)
def test_rows_of_a_step(cfg, rules, expected):
    model = tiny("unet")
    main = guided(attach(model), *rules(model))
    with counted(model) as rows:
        run(main, batch=2, cfg=cfg)
    assert rows == [2 * expected] * STEPS
    assert log_of(main).rows == sum(rows)


def test_two_layers_are_two_branches():
    model = tiny("unet")
    other = tools.PAG(perturbation=tools.IdentityAttention(tools.resolve_layers(model, "input:1")))
    with counted(model) as rows:
        run(guided(model, pag(model), other))
    assert rows == [4] * STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_windows_decide_what_is_evaluated(kind):
    """PAG acts in the first part, CFG in the rest; each costs a row only there."""
    model = tiny(kind)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 6)
    share = 0.4
    boundary = float(model.get_model_object("model_sampling").percent_to_sigma(share))
    early = [float(s) > boundary for s in sigmas[:-1]]
    assert any(early) and not all(early)
    main = guided(model, pag(model, end_percent=share), GuidanceInterval(start_percent=share))
    with counted(model) as rows:
        sample(main, steps=6, latent=small(model))
    assert rows == [2] * 6
    main = guided(model, pag(model, end_percent=share), GuidanceInterval(end_percent=share))
    with counted(model) as rows:
        sample(main, steps=6, latent=small(model))
    assert rows == [3 if now else 1 for now in early]


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_splits_when_memory_is_short(kind, monkeypatch):
    model = tiny(kind)
    main = guided(model, *tools.all_rules(kind))
    whole = run(main, batch=2)
    monkeypatch.setattr(model.model, "memory_required", lambda shape, cond_shapes=None: 0 if shape[0] <= 2 else 1e30)
    with counted(model) as rows:
        split = run(main, batch=2)
    assert rows == [2] * 3 * STEPS
    assert close(split, whole)
