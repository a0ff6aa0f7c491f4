"""The measuring instrument: its measures against oracles, its cache, its verdicts, and a small run from end to end."""

from __future__ import annotations

import colorsys
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def effects(host):
    """The modules of the benchmark, by name."""
    from lodestar.benchmarks.effects import __main__, cells, claims, method, metrics, report

    return {"main": __main__, "cells": cells, "claims": claims, "method": method, "metrics": metrics, "report": report}


@pytest.fixture
def metrics(effects):
    return effects["metrics"]


def drawn(count):
    """Scenes and pictures of them."""
    from lodestar.benchmarks.effects.cells import scenes_for
    from lodestar.demo.shapes import draw

    scenes = scenes_for(count)
    return scenes, draw(scenes, torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------------ measures


def test_frechet_distance_of_known_sets(metrics):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 6, generator=generator, dtype=torch.double) @ torch.randn(6, 6, generator=generator).double() for _ in "ab")
    b = b + 1
    found = metrics.frechet_distance(a, metrics.Moments.of(b))
    first, second = (np.cov(part.numpy(), rowvar=False) for part in (a, b))
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    assert found == pytest.approx(gap + np.trace(first + second - 2 * sqrtm(first @ second).real), rel=1e-6)
    assert metrics.frechet_distance(a, metrics.Moments.of(a)) == pytest.approx(0, abs=1e-6)


def test_covered_is_the_union_of_the_balls(metrics):
    generator = torch.Generator().manual_seed(1)
    support, points = torch.randn(30, 2, generator=generator).double(), 2 * torch.randn(50, 2, generator=generator).double()
    radius = [sorted(np.linalg.norm(support - center, axis=1))[3] for center in support]
    expected = [any(np.linalg.norm(point - center) <= r for center, r in zip(support, radius, strict=True)) for point in points]
    assert metrics.covered(points, support).tolist() == expected


def test_measures_of_pictures(metrics):
    scenes, pictures = drawn(32)
    made = metrics.Pictures(pictures, scenes)
    first = pictures[0].movedim(0, -1).reshape(-1, 3).tolist()
    assert made.saturation[0] == pytest.approx(np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in first]), rel=1e-5)
    grey = np.array(first) @ [0.299, 0.587, 0.114]
    assert made.contrast[0] == pytest.approx(grey.std(), rel=1e-5)
    assert made.right.mean() == 1
    a, b, c, d = made.features[:4]
    assert made.spread[0] == pytest.approx(np.mean([(a - other).norm() for other in (b, c, d)]))


def test_similarity(metrics):
    _, pictures = drawn(32)
    assert metrics.similarity(pictures, pictures) == pytest.approx(np.ones(32))
    near, far = ((pictures + size * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2))) for size in (0.02, 0.2))
    assert (metrics.similarity(pictures, far) < metrics.similarity(pictures, near)).all()


def test_real_pictures_are_near_each_other(effects, metrics):
    real = metrics.Real.of_captions(effects["cells"].scenes_for(64))
    everything = np.arange(64)
    values = {metric.name: metric.of(real.fresh, real)(everything) for metric in metrics.METRICS}
    assert values["accuracy"] == 1 and values["precision"] > 0.8 and values["recall"] == 1
    assert values["saturation error"] < 0.02 and values["contrast error"] < 0.01
    noisy = replace(real.fresh, pictures=(real.fresh.pictures + 0.3 * torch.rand(real.fresh.pictures.shape)).clamp(0, 1))
    assert metrics.FRECHET.of(noisy, real)(everything) > 2 * values["Fréchet distance"]


def test_resamples_draw_whole_captions(metrics):
    resamples = metrics.Resamples.of(32)
    assert resamples.everything.tolist() == list(range(32))
    for rows in resamples.rows[:20]:
        assert (rows.reshape(-1, 4) % 4 == np.arange(4)).all()
        assert (rows.reshape(-1, 4) // 4 == rows[::4, None] // 4).all()
    assert len({tuple(rows) for rows in resamples.rows}) == metrics.RESAMPLES


# ------------------------------------------------------------------------------------------------------------ verdicts


def test_interval_is_that_of_the_mean(effects):
    values = np.random.default_rng(3).normal(5, 2, 400)
    draws = np.random.default_rng(4).integers(400, size=(2000, 400))
    effect = effects["claims"].interval(values.mean(), values[draws].mean(axis=1) + 0.7)  # what shifts all resamples alike is taken out
    spread = 1.96 * values.std() / np.sqrt(400)
    assert (effect.low, effect.high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.02)


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [(0.1, 0.3, 0, "holds"), (-0.1, 0.3, 0, "undecided"), (-0.3, -0.1, 0, "fails"), (-0.1, 0.3, 0.2, "holds"), (-0.5, -0.3, 0.2, "fails")],
)
def test_verdict(effects, low, high, margin, expected):
    claims = effects["claims"]
    claim = claims.Claim("", None, None, None, margin)
    assert claims.verdict(claim, claims.Effect((low + high) / 2, low, high)) == expected


# --------------------------------------------------------------------------------------------------------------- cells


def test_a_cell_depends_on_its_settings_and_its_code(effects):
    cells = effects["cells"]
    plain, other = (cells.guided("unet", "", w) for w in (2.0, 3.0))
    apg, threshold = (cells.guided("unet", "", 2.0, cells.node("LodestarAPG", **more)) for more in ({}, {"norm_threshold": 3.0}))
    keys = [cell.key(32) for cell in (plain, other, apg, threshold)]
    assert len({*keys, plain.key(64)}) == 5
    assert keys == [cell.key(32) for cell in (plain, other, apg, threshold)]

    def version(*names):
        return {line.split()[0] for line in cells.code_version(names)}

    engine = {"guiders/engine/wrappers.py", "guiders/engine/plan.py", "guiders/engine/run.py", "guiders/spaces.py"}
    assert {"nodes/shapers/apg.py", "guiders/shapers/apg.py"} | engine <= version("lodestar.nodes.shapers.apg")
    assert "guiders/terms/pag.py" not in version("lodestar.nodes.shapers.apg")
    assert not version("lodestar.benchmarks.effects.cells") & engine
    assert "demo/models.py" in version("lodestar.benchmarks.effects.cells")


def small(effects, steps=2):
    """A method with two cells of a few steps."""
    cells, metrics, methods = effects["cells"], effects["metrics"], effects["method"]
    plain = cells.guided("unet", "CFG 3", 3.0, steps=steps)
    shaped = cells.guided("unet", "APG 3", 3.0, cells.node("LodestarAPG"), steps=steps)
    claim = effects["claims"].Claim("saturates less", shaped, plain, metrics.SATURATION, why="a run this small says nothing")
    curves = tuple(methods.Curve(cell.label, "unet", ((3.0, cell),)) for cell in (plain, shaped))

    def claims(results):
        return [claim, replace(claim, metric=metrics.similarity_to(results.pictures(plain), "CFG"))]

    return methods.Method(title="Small", axis="cfg", claims=claims, curves=curves, strips=(plain,), panels=(metrics.ACCURACY,))


@pytest.mark.slow
def test_cells_are_made_once_and_the_same_again(effects, tmp_path):
    cells = effects["cells"]
    weak = cells.guided("unet", "", 1.0, cells.node("LodestarAutoguidance", weak_model=cells.WEAK), steps=2)
    alone = cells.guided("unet", "", 1.0, steps=2, prompts=False)
    made = []
    for folder in ("a", "b"):
        cache = cells.Cache(tmp_path / folder, 32, batch=16)
        for cell in cache.missing([weak, alone, weak]):
            assert list(cache.make(cell)) == [16, 16]
        assert cache.missing([weak, alone]) == []
        made.append([cache.load(cell) for cell in (weak, alone)])
    for first, second in zip(*made, strict=True):
        assert torch.equal(first.pictures, second.pictures) and (first.nfe, first.flops) == (second.nfe, second.flops)
    assert [result.nfe for result in made[0]] == [4, 2]
    assert made[0][1].flops < made[0][0].flops < 1.5 * made[0][1].flops
    assert made[0][0].pictures.shape == (32, 3, 32, 32)


@pytest.mark.slow
def test_a_small_run_from_end_to_end(effects, tmp_path, monkeypatch, capsys):
    main = effects["main"]
    monkeypatch.setattr(main, "methods", lambda: {"small": small(effects)})
    options = ["--samples", "32", "--workers", "1", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main.main(options) == 0
    first = (tmp_path / "out" / "effects.json").read_text(encoding="utf-8")
    output = capsys.readouterr().out
    found = json.loads(first)["small"]
    assert [cell["label"] for cell in found["cells"]] == ["CFG 3", "APG 3"]
    assert all(cell["nfe"] == 4 and cell["flops"] > 1e8 for cell in found["cells"])
    assert [claim["verdict"] in output for claim in found["claims"]] == [True, True]
    for claim in found["claims"]:
        assert claim["low"] <= claim["value"] <= claim["high"]
    assert found["claims"][1]["metric"] == "SSIM to CFG" and found["claims"][1]["value"] < 0
    assert (tmp_path / "out" / "small.png").stat().st_size > 5_000

    monkeypatch.setattr(effects["cells"].Cache, "make", None)  # nothing is left to make
    assert main.main(options) == 0
    again = json.loads((tmp_path / "out" / "effects.json").read_text(encoding="utf-8"))
    assert again == json.loads(first)


@pytest.mark.slow
def test_two_workers_share_the_cells_and_one_that_fails_says_why(effects, tmp_path):
    main, cells, method = effects["main"], effects["cells"], effects["method"]
    autoguidance, cache = method.methods()["autoguidance"], cells.Cache(tmp_path, 32)
    first, second, broken = method.cfg("unet", 1.0), method.cfg("mmdit", 1.0), method.cfg("unet", 1.4)
    for cell in set(autoguidance.cells) - {first, second, broken}:
        cache.path(cell).touch()
    cache.path(broken).mkdir()  # so that it cannot be written
    with pytest.raises(RuntimeError, match=rf"{broken.label} failed; the end of .*worker-\d\.log:(.|\n)*Error"):
        main.make({"autoguidance": autoguidance}, cache, 2)
    assert cache.missing(autoguidance.cells) == [broken]
    assert cache.load(first).pictures.shape == cache.load(second).pictures.shape == (32, 3, 32, 32)


# ------------------------------------------------------------------------------------------------------------- results


def test_the_results_are_of_the_methods_at_hand(effects):
    results = effects["report"].Report.load(ROOT / "benchmarks" / "results" / "effects.json").methods
    known = effects["method"].methods()
    assert set(results) <= set(known)
    for name, found in results.items():
        assert found["title"] == known[name].title
        assert [(cell["model"], cell["label"]) for cell in found["cells"]] == [(cell["model"], cell.label) for cell in known[name].cells]
        assert (ROOT / "benchmarks" / "results" / f"{name}.png").is_file()


@pytest.mark.parametrize("text", ["30", "0", "4"])
def test_samples_are_whole_captions(effects, text):
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}: a multiple of 4"):
        effects["main"].whole_captions(text)
