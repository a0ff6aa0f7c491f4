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


def named(curves) -> dict:
    """Curves by what they show, whose kind is "update" unless their name begins with another kind."""
    from lodestar.guiders.engine.curves import Quantity

    return {Quantity(name, "cosine" if name.startswith("cosine") else "update"): points for name, points in curves.items()}


def numbers(text: str) -> dict[str, float]:
    """The counters of a table by name."""
    return {line.split()[0]: float(line.split()[1]) for line in text.split("\n\n")[0].splitlines()}


def test_the_table_holds_the_log(host):
    from lodestar.pictures.report import table

    text = table(log(curves=named({"CFG update": {0: 0.5, 1: 0.25, 3: 0.1}})))
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
    assert {f"{APG.name} 1", f"{APG.name} 2"} <= set(tools.curves_of(tools.log_of(model)))


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
        steps=steps, sigmas=[1.0] * steps + [0.0], curves=named({k: {s: v for s, v in c.items() if s < steps} for k, c in curves.items()})
    )
    picture = draw(of_run)
    assert picture.dtype == torch.float32 and picture.shape[-2] >= 900 and table(of_run)
    assert (picture < 0.5).any() and picture.mean() > 0.9  # dark on light
    if curves and curves is not CURVES["zeros"]:
        assert not picture.equal(draw(log(steps=steps, sigmas=of_run.sigmas)))


@pytest.mark.parametrize("kind", ["cosine", "weight"])
def test_other_kinds_than_updates_have_an_axis_of_their_own(host, kind):
    """Whatever the curve is called."""
    from lodestar.guiders.engine.curves import CFG_UPDATE, Quantity
    from lodestar.pictures.report import draw

    update, other = {0: 0.1, 1: 0.2}, {0: 0.99, 1: 0.999}
    alone = draw(log(curves={CFG_UPDATE: update}))
    together = draw(log(curves={CFG_UPDATE: update, Quantity("some curve", "update"): other}))
    apart = draw(log(curves={CFG_UPDATE: update, Quantity("some curve", kind): other}))
    assert together.shape == alone.shape and apart.shape[1] > alone.shape[1]


def test_the_log_as_plain_values(report):
    """What programs read from the host's history is what the log says, and JSON."""
    import json

    import tools

    from lodestar.guiders.policies.adaptive import AdaptiveGuidance

    model = tools.tiny("unet")
    main = tools.guided(model, AdaptiveGuidance(threshold=-1.0), tools.pag(model))
    out = report.execute(main, {"samples": tools.sample(main, steps=4)})
    (plain,) = out.ui["lodestar_report"]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    of_run = tools.log_of(main)
    counters = ("steps", "batch", "nfe", "rows", "calls", "saved", "seconds", "sigmas")
    assert {name: plain[name] for name in counters} == {name: getattr(of_run, name) for name in counters}
    assert plain["nfe"] == 9 and plain["evaluations"] == [[0, 3], [1, 2], [2, 2], [3, 2]]
    curves = {curve["name"]: curve for curve in plain["curves"]}
    assert {name: dict(map(tuple, curve["points"])) for name, curve in curves.items()} == tools.curves_of(of_run)
    kinds = {"CFG update": "update", "cosine of cond and uncond": "cosine", "PAG (Perturbed-Attention Guidance)": "update"}
    assert {name: curve["kind"] for name, curve in curves.items()} == kinds
    name = "AG (Adaptive Guidance)"
    assert plain["switches"] == [{"rule": name, "curve": "cosine of cond and uncond", "threshold": -1.0, "steps": [1]}]
    assert log(curves=named({"x": {0: math.nan, 1: 0.5}})).to_json()["curves"][0]["points"] == [[0, None], [1, 0.5]]


def test_switches_are_written_and_drawn(report):
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
    assert "AG (Adaptive Guidance), threshold -1: first step without CFG, for each image: 1" in text


def test_what_an_interval_saves(host):
    import tools

    from lodestar.guiders.policies.interval import GuidanceInterval

    main = tools.guided(tools.tiny("unet"), GuidanceInterval(end_percent=0.0))
    for cfg, saved in ((4.0, 3), (1.0, 0)):
        tools.sample(main, steps=3, cfg=cfg)
        assert tools.log_of(main).nfe == 3 and tools.log_of(main).saved == saved
