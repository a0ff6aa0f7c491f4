"""FreCaS's level shift against the authors' numbers, a stage's slice of a scheduler, and the text form of stages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lodestar.guiders.frecas.levels import shift_sigma, shift_time
from lodestar.guiders.frecas.stages import Stage, check_stages, parse_stages, ratio

RATIOS = [(1.5, 2.0), (1.0, 3.0), (2.0, 0.5)]
GAMMAS = [0.0, 1.0, 1.5, 3.0]


def sd_abar() -> np.ndarray:
    """Stable Diffusion's 1000 training levels: betas linear in their roots."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2)


def shift_abar(abar: float, rho: float, gamma: float) -> float:
    """The same law as the authors' code has it: abar_F = k abar / (1 + (k - 1) abar), k = rho^(-gamma), abar = a^2 = 1 - s^2."""
    k = rho**-gamma
    return k * abar / (1 + (k - 1) * abar)


# --- the level shift -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "gamma", "first"),
    [
        pytest.param(100, 3.0, 346, id="SD2.1 to 1024"),
        pytest.param(200, 3.0, 500, id="SD2.1 to 2048, both"),
        pytest.param(200, 1.5, 343, id="SDXL to 2048"),
        pytest.param(400, 2.0, 606, id="SDXL to 4096, first"),
        pytest.param(200, 2.0, 395, id="SDXL to 4096, second"),
    ],
)
def test_the_authors_start_levels(end, gamma, first):
    """They round to the first training timestep that is at least as noisy."""
    abar = sd_abar()
    assert np.flatnonzero(abar <= shift_abar(abar[end], 2.0, gamma))[0] == first
    sigma = np.sqrt(1 / abar - 1)
    assert np.flatnonzero(sigma >= shift_sigma(sigma[end], 2.0, gamma))[0] == first


def test_the_authors_start_level_of_sd3():
    """Index 69 of its unshifted time; with the model's shift of 3, t 0.136 becomes 0.182."""
    assert math.floor(1000 * shift_time(0.05, 2.0, 1.0)) == 69
    with_shift = lambda t: 3 * t / (1 + 2 * t)  # noqa: E731
    assert with_shift(0.05) == pytest.approx(0.136, abs=5e-4)
    assert shift_time(with_shift(0.05), 2.0, 1.0) == pytest.approx(with_shift(shift_time(0.05, 2.0, 1.0)))
    assert shift_time(with_shift(0.05), 2.0, 1.0) == pytest.approx(0.182, abs=6e-4)


SHIFTS = [(shift_abar, 0.3), (shift_sigma, 0.572), (shift_time, 0.136)]


@pytest.mark.parametrize(("shift", "level"), SHIFTS)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("ratios", RATIOS)
def test_shifts_compose(shift, level, gamma, ratios):
    first, second = ratios
    assert shift(shift(level, first, gamma), second, gamma) == pytest.approx(shift(level, first * second, gamma))


@pytest.mark.parametrize(("shift", "level"), SHIFTS)
def test_no_ratio_or_no_gamma_is_no_shift(shift, level):
    assert shift(level, 1.0, 3.0) == pytest.approx(level, rel=1e-15)
    assert shift(level, 2.0, 0.0) == pytest.approx(level, rel=1e-15)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("rho", [1.0, 1.3, 2.0, 4.0])
def test_all_three_are_one_law_of_the_signal_to_noise_ratio(rho, gamma):
    sigma = 0.7
    assert 1 / shift_sigma(sigma, rho, gamma) ** 2 == pytest.approx(rho**-gamma / sigma**2)
    abar = shift_abar(1 / (1 + sigma**2), rho, gamma)
    assert math.sqrt(1 / abar - 1) == pytest.approx(shift_sigma(sigma, rho, gamma))
    t = shift_time(sigma / (1 + sigma), rho, gamma)
    assert t / (1 - t) == pytest.approx(shift_sigma(sigma, rho, gamma))


# --- the text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "1024x1024: 40 steps, end 0.57; 2048x2048: 10 steps",
        " 1024 X 1024 :40 step , END 0.57\n2048×2048: 10 steps;",
    ],
)
def test_stages_are_read(text):
    assert parse_stages(text) == (Stage(1024, 1024, 40, 0.57), Stage(2048, 2048, 10))


def test_stages_are_written_as_they_are_read():
    stages = parse_stages("1024x768: 40 steps, end 0.57, windows 2x1; 2048x1536: 10 steps; 4096x3072: 5 steps, WINDOWS 4×3")
    assert parse_stages("; ".join(map(str, stages))) == stages
    assert [stage.windows for stage in stages] == [(2, 1), (1, 1), (4, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            r"stages is empty; write, for example, '1024x1024: 40 steps, end 0\.57; 2048x2048: 10 steps' or 'auto 2048x2048'",
        ),
        ("1024: 40 steps", "'1024: 40 steps' is not a stage; write, for example"),
        ("1024x1024: 40 steps, end half", "is not a stage"),
        ("1024x1000: 40 steps, end 1; 2048x2048: 9 steps", "1024x1000 is not a multiple of 16 pixels; the nearest valid size is 1024x1008"),
        ("7x1024: 40 steps, end 1; 2048x2048: 9 steps", "7x1024 is not a multiple of 16 pixels; the nearest valid size is 16x1024"),
        ("1024x1024: 40 steps; 2048x2048: 9 steps", "stage 1 needs 'end' with the noise level at which the next stage takes over"),
        ("1024x1024: 40 steps, end 1; 2048x2048: 9 steps, end 1", "the last stage goes to the end of the schedule; leave 'end 1' out"),
        ("1024x1024: 1 steps, end 1; 2048x2048: 9 steps", "stage 1 has 1 steps; two are the least"),
        ("1024x1024: 0 steps", "stage 1 has 0 steps; one is the least"),
        ("1024x1024: 9 steps, end 1; 2048x512: 9 steps", "stage 2 is 2048x512, smaller than the 1024x1024 before it; stages may only grow"),
    ],
)
def test_wrong_stages_are_one_sentence(text, message):
    with pytest.raises(ValueError, match=rf"^FreCaS Cascade: .*{message}[^\n]*$"):
        check_stages(parse_stages(text), 16)


def test_the_ratio_is_that_of_the_axis_that_grows_most():
    assert ratio(Stage(1024, 1024, 1), Stage(1536, 2048, 1)) == 2.0


# --- in the host -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
def test_a_whole_range_is_the_schedulers_own_list(host, kind):
    import tools

    from lodestar.guiders.frecas.levels import stage_sigmas

    sampling = tools.tiny(kind).get_model_object("model_sampling")
    for scheduler in tools.comfy.samplers.SCHEDULER_NAMES:
        assert stage_sigmas(sampling, scheduler, 12).equal(tools.comfy.samplers.calculate_sigmas(sampling, scheduler, 12))


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
def test_a_slice_of_any_scheduler_begins_and_ends_where_it_should(host, kind):
    import tools

    from lodestar.guiders.frecas.levels import stage_sigmas

    sampling = tools.tiny(kind).get_model_object("model_sampling")
    for scheduler in tools.comfy.samplers.SCHEDULER_NAMES:
        for steps, start, end in [(9, None, 0.4), (5, 0.7, 0.3), (6, 0.7, 0.0), (1, 0.7, 0.0)]:
            sigmas = stage_sigmas(sampling, scheduler, steps, start, end)
            assert len(sigmas) == steps + 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all(), (scheduler, steps)
            whole = tools.comfy.samplers.calculate_sigmas(sampling, scheduler, 1000)
            assert float(sigmas[0]) == pytest.approx(start or float(whole[0]))
            assert float(sigmas[-2]) == (pytest.approx(end) if end else pytest.approx(float(sigmas[-2])))


def test_normal_is_evenly_spaced_in_time_as_the_authors_have_it(host):
    import tools

    from lodestar.guiders.frecas.levels import stage_sigmas

    sampling = tools.tiny("unet").get_model_object("model_sampling")
    sigmas = stage_sigmas(sampling, "normal", 10, float(sampling.sigma(torch.tensor(343.0))), 0.0)
    times = np.interp(sigmas[:-1].log().tolist(), sampling.log_sigmas.tolist(), np.arange(1000))
    np.testing.assert_allclose(times, np.linspace(343, 0, 10), atol=0.02)


def test_what_a_scheduler_leaves_free_before_0_stays_free_in_a_slice(host):
    """``simple`` takes whole spacings down to 0, also when it begins in the middle."""
    import tools

    from lodestar.guiders.frecas.levels import stage_sigmas

    sampling = tools.tiny("mmdit").get_model_object("model_sampling")
    t = stage_sigmas(sampling, "simple", 8, 0.5)
    time = t / (3 - 2 * t) if float(sampling.shift) == 3 else t
    np.testing.assert_allclose((-time.diff()).tolist(), float(time[0]) / 8, rtol=0.03)


@pytest.mark.parametrize(
    ("kind", "prediction", "size", "expected"),
    [
        ("SDXL", "EPS", "2048x2048", "1024x1024: 40 steps, end 0.572; 2048x2048: 10 steps"),
        ("SDXL", "EPS", "4096x4096", "1024x1024: 30 steps, end 1.164; 2048x2048: 5 steps, end 0.572; 4096x4096: 15 steps"),
        ("SD20", "EPS", "1024x1024", "512x512: 40 steps, end 0.344; 1024x1024: 10 steps"),
        ("SD20", "EPS", "2048x2048", "512x512: 30 steps, end 0.572; 1024x1024: 10 steps, end 0.572; 2048x2048: 10 steps"),
        ("SD20", "V_PREDICTION", "1536x1536", "768x768: 40 steps, end 0.344; 1536x1536: 10 steps"),
        ("SD3", "FLOW", "2048x2048", "1024x1024: 20 steps, end 0.136; 2048x2048: 8 steps"),
        ("SDXL", "EPS", "2688x1536", "1352x776: 40 steps, end 0.572; 2688x1536: 10 steps"),
        ("SDXL", "EPS", "1024x1024", "1024x1024: 50 steps"),
        ("SDXL", "EPS", "8192x8192",
         "1024x1024: 30 steps, end 1.164; 2048x2048: 5 steps, end 0.572; 4096x4096: 5 steps, end 0.572; 8192x8192: 15 steps"),
    ],
)  # fmt: skip
def test_automatic_stages(host, kind, prediction, size, expected):
    import tools

    from lodestar.guiders.frecas.stages import read_stages

    model = tools.tiny("mmdit" if kind == "SD3" else "unet")
    if kind != "SD3":
        model.model.model_config = type("Config", (getattr(tools.comfy.supported_models, kind),), {})({"num_res_blocks": [1, 1]})
        model.model.model_type = tools.comfy.model_base.ModelType[prediction]
    assert "; ".join(map(str, read_stages(f"auto {size}", model, 8))) == expected


def test_automatic_stages_of_the_demo_models(host):
    from lodestar.demo.models import load_model
    from lodestar.guiders.frecas.stages import read_stages

    assert [stage.width for stage in read_stages("auto 128x128", load_model("unet", "weak"), 1)] == [32, 64, 128]
    windows = [stage.windows for stage in read_stages("auto 128x128, windows 4x3", load_model("unet", "weak"), 1)]
    assert windows == [(1, 1), (2, 2), (4, 3)]
    with pytest.raises(ValueError, match="66x64 is not a multiple of 4 pixels; the nearest valid size is 68x64"):
        read_stages("auto 66x64", load_model("unet", "weak"), 1)


def test_a_transformers_patch_counts(host):
    import tools

    from lodestar.guiders.frecas.stages import size_multiple

    assert size_multiple(tools.tiny("mmdit"), 8) == 16
    assert size_multiple(tools.tiny("wan"), 8) == 16
    assert size_multiple(tools.tiny("unet"), 8) == 8
