"""Policies decide for each step and row what is evaluated: what goes through the model, and what comes out."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import ClassVar

import conditioning_tools
import pytest
import tools
import torch
from tools import KINDS, close, cond, counted, empty_latent, guided, log_of, pag, sample, tiny

from lodestar.guiders.engine.choice import Choice
from lodestar.guiders.engine.plan import Policy
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.terms.autoguidance import Autoguidance

STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Listed(Policy):
    """Choices listed in advance, one for each step; sees and predicts what a test wants."""

    name: ClassVar[str] = "Listed"
    choices: tuple[Choice, ...]
    seen: list = field(default_factory=list)
    prediction: object = None
    revised: Choice | None = None

    @property
    def neutral(self):
        return False

    def choose(self, step):
        return self.choices[step.index]

    def observe(self, cond, uncond, x, sigma, step):
        self.seen.append((step.index, step.first, cond, uncond))
        return self.revised

    def predict(self, cond, x, sigma, step):
        return self.prediction(cond)


def constant(**choice):
    return Listed(choices=(Choice(**choice),) * STEPS)


def small(model, batch: int = 3):
    return empty_latent(model, batch, 8)


def run(model, batch: int = 3, **more):
    return sample(model, steps=STEPS, latent=small(model, batch), **more)


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_guided_cost_nothing_and_are_the_conditional_models(kind):
    model = tiny(kind)
    some = guided(model, constant(uncond=(True, False, True)))
    with counted(model) as rows:
        result = run(some)
    assert rows == [2, 3] * STEPS
    log = log_of(some)
    assert (log.calls, log.rows) == (2 * STEPS, 5 * STEPS)
    assert log.nfe == pytest.approx(STEPS * 5 / 3)
    assert log.evaluations == pytest.approx(dict.fromkeys(range(STEPS), 5 / 3))
    cfg, conditional = run(model), run(model, cfg=1.0)
    assert close(result[[0, 2]], cfg[[0, 2]]) and close(result[1:2], conditional[1:2])
    assert not close(cfg, conditional, 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_without_guided_rows_the_negative_is_not_evaluated(kind):
    model = tiny(kind)
    with counted(model) as rows:
        result = run(guided(model, constant(uncond=False)))
    assert rows == [3] * STEPS
    assert torch.equal(result, run(model, cfg=1.0))
    with counted(model) as rows:
        assert torch.equal(run(guided(model, constant())), run(model))
    assert rows[:STEPS] == [6] * STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_branches_too(kind):
    """PAG's rows and the negative's go through the model together, a weak model's through it."""
    model, weak = tiny(kind), tiny(kind, seed=7)
    rules = [APG(momentum=-0.5), pag(model, rescale=0.5), Autoguidance(weak_model=weak, scale=1.5)]
    some = (True, False, True)
    with counted(model) as rows, counted(weak) as weak_rows:
        result = run(guided(model, *rules, constant(uncond=some, terms=some)))
    assert sorted(rows) == sorted([3, 4] * STEPS) and weak_rows == [2] * STEPS
    whole, conditional = run(guided(model, *rules)), run(model, cfg=1.0)
    assert close(result[[0, 2]], whole[[0, 2]]) and close(result[1:2], conditional[1:2])
    with counted(model, weak) as rows:
        assert torch.equal(run(guided(model, *rules, constant(uncond=False, terms=False))), conditional)
    assert rows == [3] * STEPS
    with counted(model, weak) as rows:
        result = run(guided(model, *rules, constant(uncond=False)))
    assert rows == [6, 3] * STEPS and close(result, run(guided(model, *rules), cfg=1.0))


@pytest.mark.parametrize("conditioning", conditioning_tools.EVERYWHERE, ids=lambda function: function.__name__)
@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_conditioning_of_every_kind(kind, conditioning):
    model = tiny(kind)
    changes = conditioning(model)
    latent = changes.pop("latent", empty_latent(model, 1, conditioning_tools.SIZE)).repeat(3, 1, 1, 1)
    changes["negative"] = changes.get("negative", []) + changes["positive"][1:] if "positive" in changes else cond(2)
    changes["negative"] = changes["negative"] + for_each_row()

    def run(model, **more):
        return sample(model, steps=STEPS, latent=latent, **changes | more)

    some = guided(model, constant(uncond=(False, True, False)))
    result, cfg, conditional = run(some), run(model), run(model, cfg=1.0)
    assert close(result[1:2], cfg[1:2]) and close(result[[0, 2]], conditional[[0, 2]])


def for_each_row():
    """Conditioning with an entry of its own for each of three rows."""
    generator = torch.Generator().manual_seed(5)
    pooled = torch.randn(3, tools.CONTEXT, generator=generator)
    return [[torch.randn(3, 5, tools.CONTEXT, generator=generator), {"pooled_output": pooled}]]


@pytest.mark.parametrize("on", [("positive",), ("positive", "negative")], ids="+".join)
def test_control_nets(on):
    """They are prepared for all rows; the model takes what belongs to its own."""
    model = tiny("unet")
    control = conditioning_tools.control_net()
    conds = {"positive": cond(1), "negative": cond(2)}
    conds |= {name: conditioning_tools.with_values(conds[name], control=control) for name in on}
    latent = empty_latent(model, 3, conditioning_tools.SIZE)
    some = guided(model, constant(uncond=(False, True, True)))
    with counted(model) as rows:
        result = sample(some, steps=STEPS, latent=latent, **conds)
    assert sorted(rows) == sorted([2, 3] * STEPS)
    cfg, conditional = (sample(model, steps=STEPS, latent=latent, cfg=cfg, **conds) for cfg in (4.0, 1.0))
    assert close(result[1:], cfg[1:]) and close(result[:1], conditional[:1])


def test_context_windows_over_a_batch_of_pictures_are_evaluated_whole():
    model = tiny("unet")
    patch = conditioning_tools.windows(dim=0)
    latent = empty_latent(model, 5, 8)
    some = (False, True, True, False, True)
    main = guided(patch(model), constant(uncond=some))
    with counted(model) as rows:
        result = sample(main, steps=STEPS, latent=latent)
    assert not any(size % 2 for size in rows)
    cfg, conditional = (sample(patch(model), steps=STEPS, latent=latent, cfg=cfg) for cfg in (4.0, 1.0))
    for i, is_guided in enumerate(some):
        assert close(result[i], (cfg if is_guided else conditional)[i], 3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_splits_when_memory_is_short(kind, monkeypatch):
    model = tiny(kind)
    some = guided(model, constant(uncond=(True, False, True)))
    whole = run(some)
    monkeypatch.setattr(model.model, "memory_required", lambda shape, cond_shapes=None: 0 if shape[0] <= 3 else 1e30)
    with counted(model) as rows:
        assert close(run(some), whole)
    assert sorted(rows) == sorted([2, 3] * STEPS)


def test_patches_of_other_packs_see_whole_chunks():
    """Chunks of equal size, their labels, and uuids that no cache has seen with other rows."""
    model = tiny("unet")
    seen = []

    def patch(q, k, v, options):
        seen.append((len(q), options["cond_or_uncond"], options["uuids"], len(options["sigmas"])))
        return q, k, v

    patched = model.clone()
    patched.set_model_attn1_patch(patch)
    run(guided(patched, pag(model), constant(uncond=(True, False, True))))
    kinds = {(size, tuple(labels), levels) for size, labels, _, levels in seen}
    assert kinds == {(2, (1,), 2), (6, (0, 0), 3)}
    assert all(isinstance(name, uuid.UUID) for *_, names, _ in seen for name in names)
    full = len({names[0] for *_, names, _ in seen})
    assert full == 2
    run(patched)
    assert {tuple(labels) for _, labels, *_ in seen[-1:]} == {(1, 0)}
    plain = seen[-1][2]
    assert plain[0] not in {name for _, labels, names, _ in seen[:-1] if labels == [1] for name in names}


def test_a_pack_that_regroups_rows_gets_all_of_them():
    """Tiling wrappers put several tiles into one batch: whose row is whose cannot be told."""
    model = tiny("unet")

    def tiled(apply, arguments):
        twice = {k: torch.cat([v] * 2) if isinstance(v, torch.Tensor) else v for k, v in arguments["c"].items()}
        return apply(torch.cat([arguments["input"]] * 2), torch.cat([arguments["timestep"]] * 2), **twice).chunk(2)[0]

    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(tiled)
    some = guided(wrapped, constant(uncond=(True, False, True)))
    with counted(model) as rows:
        result = run(some)
    assert rows == [12] * STEPS
    assert close(result, run(guided(model, constant(uncond=(True, False, True)))))


# --- weights and predictions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_weight_in_place_of_the_samplers(kind, cfg):
    model = tiny(kind)
    with counted(model) as rows:
        result = run(guided(model, constant(weight=2.5)), cfg=cfg)
    assert rows == [6] * STEPS and torch.equal(result, run(model, cfg=2.5))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_0_is_the_negative_alone(kind):
    model = tiny(kind)
    with counted(model) as rows:
        result = run(guided(model, APG(), constant(weight=0)))
    assert rows == [3] * STEPS
    assert torch.equal(result, run(model, cfg=1.0, positive=cond(2)))
    with counted(model) as rows:  # a term needs D_c
        with_term = run(guided(model, pag(model), constant(weight=0)))
    assert rows == [9] * STEPS and close(with_term, run(guided(model, pag(model)), cfg=0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_in_place_of_an_evaluation(kind):
    model = tiny(kind)
    rule = Listed(choices=(Choice(predicted=True),) * STEPS, prediction=lambda d_c: 0.5 * d_c)
    expected = model.clone()
    expected.set_model_sampler_post_cfg_function(lambda args: 2.5 * args["cond_denoised"])  # 0.5 D_c + 4 (D_c - 0.5 D_c)
    with counted(model) as rows:
        result = run(guided(model, rule), cfg=4.0)
    assert rows == [3] * STEPS
    assert close(result, run(expected, cfg=4.0))
    assert all(uncond is None for *_, uncond in rule.seen)
    rows_too = run(guided(model, rule, constant(uncond=(True, False, False))), cfg=4.0)
    assert close(rows_too[:1], result[:1]) and close(rows_too[1:], run(model, cfg=1.0)[1:])


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_policies_see_every_evaluation(sampler):
    model = tiny("unet")
    rule = constant()
    run(guided(model, rule), sampler=sampler)
    stages = 1 if sampler == "euler" else 2
    assert [first for _, first, *_ in rule.seen].count(True) == STEPS
    assert len(rule.seen) == stages * (STEPS - 1) + 1
    assert all(c.shape == u.shape == small(model).shape and not torch.equal(c, u) for *_, c, u in rule.seen)


def test_a_policy_may_narrow_what_was_evaluated():
    model = tiny("unet")
    narrowed = Listed(choices=(Choice(),) * STEPS, revised=Choice(uncond=(False, True, True), terms=(True, True, False)))
    rules = [APG(), pag(model)]
    with counted(model) as rows:
        result = run(guided(model, *rules, narrowed))
    assert rows == [9] * STEPS
    assert close(result[:1], run(guided(model, *rules), cfg=1.0)[:1])
    assert close(result[1:2], run(guided(model, *rules))[1:2])
    assert close(result[2:], run(guided(model, APG()))[2:])


def test_post_cfg_functions_of_other_packs_see_equal_predictions_in_rows_that_are_not_guided():
    seen = []
    model = tiny("unet").clone()
    model.set_model_sampler_post_cfg_function(lambda args: seen.append(args) or args["denoised"])
    run(guided(model, constant(uncond=(True, False, True))))
    run(guided(model, constant(uncond=False)))
    for i, args in enumerate(seen):
        equal = [torch.equal(*pair) for pair in zip(args["cond_denoised"], args["uncond_denoised"], strict=True)]
        assert equal == ([False, True, False] if i < STEPS else [True] * 3)
        assert args["cond_scale"] == 4.0
        assert torch.equal(args["denoised"][1], args["cond_denoised"][1])


# --- several policies ------------------------------------------------------------------------------------------------


def test_the_interval_adds_its_savings():
    model = tiny("unet")
    main = guided(model, GuidanceInterval(end_percent=0.5), constant(uncond=(True, False, True)))
    with counted(model) as rows:
        run(main)
    inside = sum(s > float(model.model.model_sampling.percent_to_sigma(0.5)) for s in log_of(main).sigmas[:-1])
    assert 0 < inside < STEPS
    assert rows == [2, 3] * inside + [3] * (STEPS - inside)
