"""Random graphs: a few with a fixed seed, and that the checks see what they are there for."""

from __future__ import annotations

import itertools
import logging
import sys
from dataclasses import replace

import pytest


@pytest.fixture(scope="module")
def fuzz(host):
    """The checks, with the host's own nodes loaded."""
    logger, limit = logging.getLogger(), sys.getrecursionlimit()
    level = logger.level
    from lodestar.benchmarks import _tiny
    from lodestar.benchmarks.fuzz import checks

    _tiny.prepare()
    yield checks
    logger.setLevel(level)
    sys.setrecursionlimit(limit)


AG = "LodestarAdaptiveGuidance"
EULER = {"sampler_name": "euler", "scheduler": "normal", "steps": 4, "cfg": 4.0, "seed": 1}


def graph(chain=(), **changes):
    """A small graph with nodes on the model."""
    from lodestar.benchmarks.fuzz.choices import Graph

    whole = Graph(2, "unet", tuple(chain), (), (), {"batch": 2, "height": 8, "width": 8}, ("KSampler", {**EULER, "steps": 3}))
    return replace(whole, **changes)


def test_a_seed_gives_one_graph():
    from lodestar.benchmarks.fuzz.choices import random_graph

    graphs = [random_graph(seed) for seed in range(300)]
    assert graphs == [random_graph(seed) for seed in range(300)]
    assert len({str(one) for one in graphs}) == 300
    nodes = {name for one in graphs for name, _ in one.chain}
    assert {"LodestarAPG", "LodestarPAG", "LodestarAutoguidance", "LodestarAdaptiveGuidance", "FreeU", "HyperTile", "EasyCache"} <= nodes
    assert {one.sampling[0] for one in graphs} == {"KSampler", "KSamplerAdvanced", "guider", "cfgpp", "invert", "frecas", "compare"}


@pytest.mark.parametrize("part", range(3))
def test_random_graphs(fuzz, part):
    """50 at a time: ``python run.py bench fuzz --graph SEED`` shows one."""
    failed = [result for seed in range(50 * part, 50 * part + 50) if (result := fuzz.checked(seed)).kind == fuzz.FAILED]
    assert not failed, "\n".join(f"--graph {result.seed}: {result.text}" for result in failed)


FOUR = {"batch": 4, "height": 8, "width": 8, "filled": True}
WITH_GUIDER = {**EULER, "guider": "CFGGuider", "split": False}
SKIPPED = {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
FOUND = {  # what random graphs found, each by itself
    "frames in the batch axis": lambda: graph([(AG, {"threshold": 0.52})], kind="svd", latent=FOUR, sampling=("KSampler", EULER)),
    "gligen has a row for every image": lambda: graph(
        [(AG, {"threshold": 0.93})], positive=(("gligen", {}),), latent=FOUR | {"filled": False}, sampling=("KSampler", EULER)
    ),
    "a mask with a sampler that has no loop": lambda: graph(
        [("LodestarAPG", {"norm_threshold": 3.0}), ("LodestarGuidanceInterval", {"start_percent": 0.3, "end_percent": 0.8})],
        latent=FOUR | {"mask": "ones"},
        sampling=("KSampler", {**EULER, "sampler_name": "dpm_fast"}),
    ),
    "options copied deeply": lambda: graph([("LodestarAutoguidance", {"weak_model": "@weak"}), ("deepcopy", {})]),
    "repeated noise levels": lambda: graph(
        sampling=("cfgpp", {**EULER, "solver": "dpmpp_2m", "lambda_": 0.6, "history": "unconditional", "repeated": True})
    ),
    "no gradient through a kernel": lambda: graph(
        [("LodestarGuidancePolicy", {"policy": "@policy"})], kind="flux", sampling=("KSampler", EULER)
    ),
    "attention maps of fewer rows": lambda: graph(
        [
            ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
            (AG, {"threshold": 0.97, "space": "noise", "switch": "same_step", "stop_terms": True}),
        ],
        latent=FOUR | {"batch": 3, "filled": False},
        sampling=("KSampler", {**EULER, "sampler_name": "sa_solver_pece", "scheduler": "ddim_uniform", "cfg": 1.0, "seed": 9}),
    ),
    "a fit without uncond": lambda: graph(
        [
            ("CFGOverride", {"cfg": 1.0, "start_percent": 0.0, "end_percent": 0.6}),
            ("LodestarLinearAG", {"coefficients": "@coefficients", "second_half": "cfg"}),
        ],
        sampling=("KSampler", {**EULER, "steps": 4}),
    ),
    "no attention maps in the first step": lambda: graph(
        [
            ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
            ("LodestarGuidanceInterval", {"start_percent": 0.2, "end_percent": 0.7}),
        ],
        sampling=("cfgpp", {**EULER, "solver": "euler", "lambda_": 0.6, "history": "unconditional", "repeated": False}),
    ),
    "a latent that grows": lambda: graph(
        [("LodestarAPG", {"norm_threshold": 3.0})], sampling=("guider", {**WITH_GUIDER, "sampler_name": "SamplerLCMUpscale"})
    ),
    "cond and uncond in two calls": lambda: graph(
        [("SkipLayerGuidanceDiTSimple", SKIPPED), ("LodestarLinearAG", {"coefficients": "@coefficients"})],
        kind="mmdit",
        sampling=("KSampler", EULER),
    ),
    "a search behind EasyCache": lambda: graph(
        [
            ("EasyCache", {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.95}),
            ("LodestarGuidancePolicy", {"policy": "@policy"}),
        ],
        kind="flux",
        sampling=("KSampler", {**EULER, "scheduler": "sgm_uniform", "steps": 2}),
    ),
    "a layer that there is not": lambda: graph([("LodestarPAG", {"layers": "double:99"})]),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_by_random_graphs(fuzz, name):
    result = fuzz.outcome(FOUND[name]())
    assert result.kind in (fuzz.OK, fuzz.REFUSED), result.text


def test_refusals_are_told_apart(fuzz):
    two = (("LodestarAdaptiveGuidance", {}), ("LodestarAdaptiveGuidance", {}))
    refused = fuzz.outcome(graph(two))
    assert refused.kind == fuzz.REFUSED and refused.text.startswith("AG (Adaptive Guidance) and AG (Adaptive Guidance) both decide")
    by_host = fuzz.outcome(graph((("LodestarAPG", {}), ("TemporalScoreRescaling", {}))))  # it knows one image at a time
    assert by_host.kind == fuzz.HOST and "ambiguous" in by_host.text
    pieces = [
        ("PatchModelAddDownscale", {"block_number": 1, "end_percent": 0.4}),
        ("LodestarGuidanceInterval", {"start_percent": 0.2, "end_percent": 0.7}),
    ]
    area = ("area", {"seed": 24, "width": 32, "height": 32, "x": 16, "y": 0, "strength": 0.8})
    latent = {"batch": 1, "height": 16, "width": 16}
    single = graph(pieces, kind="unet_v", positive=(area,), latent=latent, sampling=("KSampler", {**EULER, "cfg": 0.0}))
    by_host = fuzz.outcome(single)  # a norm of one value: it takes two prompts in a call, or another size
    assert by_host.kind == fuzz.HOST and "more than 1 value" in by_host.text


def test_what_the_checks_see(fuzz, monkeypatch):
    """A node of ours that leaves things, changes results, counts wrongly or raises is found."""
    import torch

    import nodes

    apg = nodes.NODE_CLASS_MAPPINGS["LodestarAPG"]
    execute = apg.EXECUTE_NORMALIZED
    chain = (("LodestarAPG", {"norm_threshold": 3.0}),)
    assert fuzz.outcome(graph(chain)).kind == fuzz.OK

    def found_with(change):
        def changed(**inputs):
            result = execute(**inputs)
            change(result.result[0])
            return result

        monkeypatch.setattr(apg, "EXECUTE_NORMALIZED", changed)
        result = fuzz.outcome(graph(chain))
        monkeypatch.setattr(apg, "EXECUTE_NORMALIZED", execute)
        assert result.kind == fuzz.FAILED
        return result.text

    calls = itertools.count()

    def noisy(args):
        return args["denoised"] + next(calls)

    def infinite(args):
        return args["denoised"] / 0

    def impolite(args):
        raise KeyError("input")

    def uncounted(args):
        args["model"].apply_model(args["input"], args["sigma"], c_crossattn=torch.zeros(2, 5, 32))
        return args["denoised"]

    assert "module of all of the model" in found_with(lambda model: setattr(model.model, "left", 1))
    assert "a second run: another result" in found_with(lambda model: model.set_model_sampler_post_cfg_function(noisy))
    assert "not finite" in found_with(lambda model: model.set_model_sampler_post_cfg_function(infinite))
    assert "KeyError" in found_with(lambda model: model.set_model_sampler_post_cfg_function(impolite))
    assert "weights" in found_with(lambda model: model.model.diffusion_model.out[2].bias.data.fill_(1.0))
    assert "the report says 3 calls" in found_with(lambda model: model.set_model_sampler_post_cfg_function(uncounted))
    assert fuzz.outcome(graph(chain)).kind == fuzz.OK
