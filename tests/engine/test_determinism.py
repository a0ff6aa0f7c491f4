"""The same seed gives the same bits: twice, after an interruption, and in another process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tools
import torch
from tools import close, comfy, empty_latent, guided, sample, tiny

from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG

KINDS = ["unet", "mmdit"]
SAMPLERS = ["euler", "heun", "dpm_2", "dpmpp_sde"]
NEUTRAL = APG(eta=1.0, norm_threshold=0.0, momentum=0.0)


def chain(kind):
    """Everything at once."""
    return guided(tiny(kind), *tools.all_rules(kind), GuidanceInterval(end_percent=0.7))


def run(model, sampler="euler", **more):
    return sample(model, sampler=sampler, **{"steps": 4, "latent": empty_latent(model, 1, 8)} | more)


# --- the four properties of APG that no port has together ------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", tools.KINDS)
def test_neutral_apg_is_cfg(kind, sampler):
    model = tiny(kind)
    assert torch.equal(run(guided(model, NEUTRAL), sampler), run(model, sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", tools.KINDS)
def test_apg_continues_into_cfg(kind, sampler):
    """Close to neutral is close to CFG: w is the sampler's own, not w + 1."""
    model = tiny(kind)
    assert close(run(guided(model, APG(eta=1.0, norm_threshold=0.0, momentum=1e-9)), sampler), run(model, sampler))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
@pytest.mark.parametrize("kind", tools.KINDS)
def test_apg_on_a_batch_of_two_is_two_single_runs(kind, sampler):
    """(dpmpp_sde draws the noise of a batch from one generator, so that single runs have other noise.)"""
    model = guided(tiny(kind), APG(norm_threshold=2.0))
    noise = torch.randn(empty_latent(model, 2, 8).shape, generator=torch.Generator().manual_seed(3))

    def from_noise(noise):
        with torch.inference_mode():
            conds = tools.cond(1), tools.cond(2)
            return comfy.sample.sample(model, noise, 4, 4.0, sampler, "normal", *conds, noise * 0, disable_pbar=True, seed=1)

    both = from_noise(noise)
    assert all(close(both[i : i + 1], from_noise(noise[i : i + 1])) for i in range(2))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", tools.KINDS)
def test_apg_with_the_same_seed_twice(kind, sampler):
    model = guided(tiny(kind), APG())
    assert torch.equal(run(model, sampler), run(model, sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", tools.KINDS)
def test_apg_is_computed_on_denoised_predictions(kind, sampler):
    """With eta 0 the update is orthogonal to D_c, and as long as the threshold: only in x0 space."""
    model, radius, w = tiny(kind), 1.5, 4.0
    main = guided(model, APG(eta=0.0, norm_threshold=radius, momentum=0.0))
    measured = []

    def note(args):
        c, d = (args[name].flatten(1).double() for name in ("cond_denoised", "denoised"))
        u = args["uncond_denoised"].flatten(1).double()
        g = c - u
        g = g * (radius / g.norm()).clamp(max=1)
        expected = g - (g * c).sum() / (c * c).sum() * c
        update = (d - c) / (w - 1)
        measured.append((float((update * c).sum() / update.norm() / c.norm()), float((update - expected).norm() / expected.norm())))
        return args["denoised"]

    main.set_model_sampler_post_cfg_function(note)
    run(main, sampler, cfg=w)
    assert measured
    assert all(abs(cosine) < 1e-4 and error < 1e-3 for cosine, error in measured)


# --- repeated, interrupted, elsewhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_runs(kind, sampler):
    model = chain(kind)
    assert torch.equal(run(model, sampler), run(model, sampler))
    assert torch.equal(run(chain(kind), sampler), run(model, sampler))


def raise_at_once(step):
    raise comfy.model_management.InterruptProcessingException


def ask_the_host(step):
    comfy.model_management.interrupt_current_processing()
    comfy.model_management.throw_exception_if_processing_interrupted()


@pytest.mark.parametrize("interrupt", [raise_at_once, ask_the_host])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_repeated(kind, interrupt):
    model = chain(kind)
    expected = run(chain(kind), "heun")
    for at in (0, 2):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(model, "heun", callback=lambda step, *_, at=at: interrupt(step) if step == at else None)
        assert torch.equal(run(model, "heun"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_between_two_others_changes_neither(kind):
    model = chain(kind)
    first = run(model)
    run(model, seed=5)
    run(model, latent=empty_latent(model, 2, 8))
    run(model, cfg=1.0)
    assert torch.equal(run(model), first)


def digests() -> list[str]:
    results = [run(chain(kind), sampler) for kind in KINDS for sampler in SAMPLERS]
    return [hashlib.sha256(result.numpy().tobytes()).hexdigest() for result in results]


def test_two_processes():
    """Another process, another hash seed, the same bits."""
    code = "import sys; sys.path += sys.argv[1:]; import test_determinism; print(*test_determinism.digests(), sep='\\n')"
    root = Path(__file__).parents[2]
    program = f"import sys; sys.path[:0] = [{str(root)!r}]; from workshop import launching as l; l.settle_path(); l.load_pack(); {code}"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, Path(__file__).parents[:2])],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == digests()
