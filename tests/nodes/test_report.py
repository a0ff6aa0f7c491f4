"""Guidance Report: what it says is what the run did."""

from __future__ import annotations

import math

import pytest
import torch


@pytest.fixture
def report(host) -> object:
    """The node's class."""
    from lodestar.nodes.report import LodestarReport

    return LodestarReport


def log(**changes) -> object:
    """A log of a run that never was."""
    from lodestar.guiders.engine.log import RunLog

    sigmas = [14.0, 7.0, 3.0, 1.0, 0.0]
    values = {"steps": 4, "batch": 2, "calls": 5, "rows": 24, "nfe": 12, "seconds": 1.5, "sigmas": sigmas, "curves": {}}
    return RunLog(**values | changes)


def numbers(text: str) -> dict[str, float]:
    """The counters of a table by name."""
    return {line.split()[0]: float(line.split()[1]) for line in text.split("\n\n")[0].splitlines()}


def test_the_table_holds_the_log(host):
    from lodestar.pictures.report import table

    text = table(log(curves={"CFG update": {0: 0.5, 1: 0.25, 3: 0.1}}))
    assert numbers(text) == {"steps": 4, "batch": 2, "NFE": 12, "rows": 24, "calls": 5, "seconds": 1.5}
    assert "3.00 per step" in text and "0.75 per image" in text
    assert text.splitlines()[-1].split() == ["CFG", "update", "0-3", "0.5000", "0.2833", "0.1000"]
    assert "curve" not in table(log())


@pytest.mark.parametrize("rules", ["none", "all"])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_counts_what_torch_counts(report, rules, batch):
    import tools

    model, weak = tools.tiny("unet"), tools.tiny("unet", seed=7)
    from lodestar.guiders.engine.attach import attach
    from lodestar.guiders.shapers.apg import APG
    from lodestar.guiders.terms.autoguidance import Autoguidance

    chosen = [APG(), tools.pag(model), Autoguidance(weak_model=weak)] if rules == "all" else []
    guided = tools.guided(attach(model), *chosen)
    with tools.counted(model, weak) as rows:
        latent = tools.sample(guided, latent=tools.empty_latent(model, batch=batch))
    out, picture, text = report.execute(guided, {"samples": latent}).args
    assert out["samples"] is latent
    counted = numbers(text)
    assert (counted["calls"], counted["rows"], counted["batch"], counted["steps"]) == (len(rows), sum(rows), batch, 6)
    assert counted["NFE"] == sum(rows) / batch == (24 if rules == "all" else 12)
    assert all(rule.name in text for rule in chosen)
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and picture.min() >= 0 and picture.max() == 1


def test_it_shows_the_last_run_of_its_own_model(report):
    import tools

    apg, pag = (tools.guided(tools.tiny("unet"), rule) for rule in (tools.all_rules("unet")[0], tools.pag(tools.tiny("unet"))))
    tools.sample(apg, steps=6)
    tools.sample(pag, steps=4)
    tools.sample(apg, steps=3)
    reported = {name: numbers(report.execute(model, {}).args[2]) for name, model in (("apg", apg), ("pag", pag))}
    assert reported["apg"]["steps"] == 3 and reported["pag"]["steps"] == 4
    assert reported["apg"]["NFE"] == 6 and reported["pag"]["NFE"] == 12


def test_two_nodes_of_one_kind_have_a_curve_each(host):
    import tools

    from lodestar.guiders.engine.attach import attach
    from lodestar.guiders.shapers.apg import APG

    model = attach(attach(tools.tiny("unet"), APG(eta=0.5)), APG(eta=0.2))
    tools.sample(model, steps=2)
    assert {f"{APG.name} 1", f"{APG.name} 2"} <= set(tools.log_of(model).curves)


def test_it_works_under_a_guider_without_negative(report):
    import comfy.samplers
    import comfy_extras.nodes_custom_sampler
    import tools

    model = tools.tiny("unet")
    guided = tools.guided(model, tools.pag(model))
    guider = comfy_extras.nodes_custom_sampler.Guider_Basic(guided)
    guider.set_conds(tools.cond(1))
    latent = tools.empty_latent(model)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    with torch.inference_mode():
        guider.sample(torch.randn(latent.shape), latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    text = report.execute(guided, {}).args[2]
    assert numbers(text)["NFE"] == 8
    assert "CFG update" not in text and tools.pag(model).name in text


def test_a_model_without_our_nodes_is_an_error(report):
    import tools

    with pytest.raises(ValueError, match=r"Guidance Report: this model carries no Lodestar node"):
        report.execute(tools.tiny("unet"), {})


def test_a_model_that_was_not_sampled_is_an_error(report):
    import tools

    with pytest.raises(ValueError, match=r"Guidance Report: this model has not been sampled yet"):
        report.execute(tools.guided(tools.tiny("unet"), tools.all_rules("unet")[0]), {})


CURVES = {
    "nothing": {},
    "one step": {"CFG update": {0: 0.1}, "cosine of cond and uncond": {0: 1.0}},
    "zeros": {"CFG update": {0: 0.0, 1: 0.0}},
    "gap": {"CFG update": {0: 0.1, 1: 0.2, 3: 0.3}},
    "far apart": {"CFG update": {0: 0.5, 1: 0.4}, "Autoguidance": {0: 1e-6, 1: 1e-3}},
    "not finite": {"CFG update": {0: 0.5, 1: math.inf, 2: math.nan}},
    "constant cosine": {"cosine of cond and uncond": dict.fromkeys(range(4), 0.999)},
    "many": {f"a rule with a long name, number {i}": {0: 0.1 * i, 1: 0.2} for i in range(1, 12)},
}


@pytest.mark.parametrize("curves", CURVES.values(), ids=CURVES.keys())
@pytest.mark.parametrize("steps", [1, 4, 1000])
def test_every_log_can_be_drawn(host, curves, steps):
    from lodestar.pictures.report import draw, table

    of_run = log(
        steps=steps, sigmas=[1.0] * steps + [0.0], curves={k: {s: v for s, v in c.items() if s < steps} for k, c in curves.items()}
    )
    picture = draw(of_run)
    assert picture.dtype == torch.float32 and picture.shape[-2] >= 900 and table(of_run)
    assert (picture < 0.5).any() and picture.mean() > 0.9  # dark on light
    if curves and curves is not CURVES["zeros"]:
        assert not picture.equal(draw(log(steps=steps, sigmas=of_run.sigmas)))


def test_cosines_have_an_axis_of_their_own(host):
    from lodestar.pictures.report import draw

    alone = draw(log(curves={"CFG update": {0: 0.1, 1: 0.2}}))
    both = draw(log(curves={"CFG update": {0: 0.1, 1: 0.2}, "cosine of cond and uncond": {0: 0.99, 1: 0.999}}))
    assert both.shape[1] > alone.shape[1]


def test_switches_are_told_and_drawn(report):
    import tools

    from lodestar.guiders.engine.curves import COSINE
    from lodestar.guiders.engine.log import Switch
    from lodestar.guiders.policies.adaptive import AdaptiveGuidance
    from lodestar.pictures.report import draw, table

    curve = {COSINE: {0: 0.9, 1: 0.95, 2: 0.99}}
    text = table(log(nfe=17 / 3, saved=7 / 3, switches={"AG": Switch(COSINE, 0.97, (3, None, 2))}, curves=curve))
    assert numbers(text)["NFE"] == 5.67 and numbers(text)["saved"] == 2.33 and "29%" in text
    assert text.splitlines()[-1] == "AG, threshold 0.97: first step without CFG, for each image: 3, -, 2"
    assert "saved" not in table(log())
    plain = draw(log(curves=curve))
    pictures = [draw(log(curves=curve, switches={"AG": Switch(COSINE, 0.97, steps)})) for steps in ((None,), (3,), (3, 2, 2))]
    for i, picture in enumerate(pictures):
        assert picture.shape == plain.shape
        assert not any(picture.equal(other) for other in (plain, *pictures[:i]))

    model = tools.tiny("unet")
    main = tools.guided(model, AdaptiveGuidance(threshold=-1.0), tools.pag(model))
    latent = tools.sample(main, steps=4)
    text = report.execute(main, {"samples": latent}).args[2]
    assert numbers(text)["NFE"] == 9 and numbers(text)["saved"] == 3
    assert "Adaptive Guidance (AG), threshold -1: first step without CFG, for each image: 1" in text


def test_what_an_interval_saves(host):
    import tools

    from lodestar.guiders.policies.interval import GuidanceInterval

    main = tools.guided(tools.tiny("unet"), GuidanceInterval(end_percent=0.0))
    for cfg, saved in ((4.0, 3), (1.0, 0)):
        tools.sample(main, steps=3, cfg=cfg)
        assert tools.log_of(main).nfe == 3 and tools.log_of(main).saved == saved
