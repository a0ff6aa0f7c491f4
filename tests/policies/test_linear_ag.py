"""LinearAG in real runs: fits, what they see and refuse, sampling with them, and files. Spec (h) of adaptive_guidance.md."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tools
import torch
from safetensors.torch import load_file, safe_open, save_file

from lodestar.guiders.learning.recognition import model_id
from lodestar.guiders.learning.runs import Runs
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.policies.linear_ag.coefficients import Coefficients
from lodestar.guiders.policies.linear_ag.fit import fit
from lodestar.guiders.policies.linear_ag.regression import Gram, score
from lodestar.guiders.policies.linear_ag.rule import LinearAG
from lodestar.guiders.shapers.apg import APG
from lodestar.nodes.policies.linear_ag import LodestarLinearAG, LodestarLinearAGFit, LodestarLoadCoefficients, LodestarSaveCoefficients

A, B = 0.7, 0.35  # of the synthetic u_k = A c_k + B u_{k-1}
STEPS, CFG = 8, 4.0


def runs(model, **changes):
    """What a fit samples: three rows of a tiny model."""
    sigmas = tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", changes.pop("steps", STEPS))
    settings = {
        "positive": [tools.cond(1)], "negative": tools.cond(2), "latent": {"samples": tools.empty_latent(model, batch=3)},
        "sampler": tools.comfy.samplers.sampler_object("euler"), "sigmas": sigmas, "cfg": CFG, "seed": 5,
    }  # fmt: skip
    return Runs(name="LinearAG: fit", model=model, **settings | changes)


def fitted(model, trajectories: int = 6, **changes):
    """Coefficients of a tiny model."""
    with torch.inference_mode():
        return fit(runs(model, **changes), trajectories)


def applied(model, coefficients, **more):
    """The model with LinearAG."""
    return tools.guided(model, LinearAG(coefficients=coefficients, **more))


def sample(model, **more):
    """The run that the coefficients are for."""
    return tools.sample(model, **{"steps": STEPS, "cfg": CFG, "sampler": "euler", "scheduler": "normal", **more})


@pytest.fixture(scope="module", params=["unet", "unet_v", "mmdit"])
def tiny(request, host):
    """A tiny model with its coefficients."""
    model = tools.tiny(request.param)
    return SimpleNamespace(model=model, coefficients=fitted(model), kind=request.param)


def synthetic(kind: str = "unet"):
    """A model whose scores obey u_k = A c_k + B u_{k-1}, whatever is asked for, c_k a function of x and sigma; and what was asked for."""
    state, asked = {}, []

    def network(apply_model, args):
        x, t = args["input"], args["timestep"]
        labels = args["cond_or_uncond"]
        asked.extend(labels)
        sigma = t.reshape(-1, 1, 1, 1)
        c = torch.sin(x / (1 + sigma)) + 0.3 * torch.roll(x, 1, dims=-1) / (1 + sigma)
        first = c.chunk(len(labels))[0]
        level = float(t[0])
        if level >= state.get("level", 0):  # a new run
            state.clear()
        if state.get("level") != level:
            before = state.get("u")
            state.update(level=level, u=A * first + (B * before if before is not None else 0.1))
        out = [state["u"] if label == 1 else part for label, part in zip(labels, c.chunk(len(labels)), strict=True)]
        return x - sigma * torch.cat(out)

    model = tools.tiny(kind)
    model.set_model_unet_function_wrapper(network)
    return model, asked


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_a_linear_model_recovers_cfg(host, kind):
    """Predicted steps included, sampling is CFG up to rounding, with fewer evaluations."""
    model, asked = synthetic(kind)
    coefficients = fitted(model, trajectories=3)
    assert min(r2[0] for r2 in coefficients.r2.values()) > 1 - 1e-9
    guided = applied(model, coefficients, second_half="cfg")
    latent = tools.empty_latent(model, batch=3)
    plain = sample(model, latent=latent)
    asked.clear()
    assert tools.close(sample(guided, latent=latent), plain, 1e-3)
    assert asked.count(0) == STEPS and asked.count(1) == STEPS - 2


def test_the_training_r2_is_at_least_that_of_trivial_predictors(tiny):
    assert list(tiny.coefficients.betas) == [1, 3]
    for fitted_r2, *trivial in tiny.coefficients.r2.values():
        assert 1 >= fitted_r2 >= max(trivial)


def test_the_fit_sees_what_the_host_predicts(tiny):
    """The Gram matrix of one trajectory, from a run of the host with a hook instead of the engine."""
    seen = ([], [])

    def hook(args):
        for kept, name in zip(seen, ("cond_denoised", "uncond_denoised"), strict=True):
            kept.append(score(args["input"], args[name], args["sigma"]))
        return args["denoised"]

    model = tiny.model.clone()
    model.set_model_sampler_post_cfg_function(hook)
    sample(model, latent=tools.empty_latent(model, batch=3), seed=5)
    gram = Gram(STEPS)
    gram.add(*seen)
    expected = Coefficients.of(gram, tiny.coefficients.setting)
    found = fitted(tiny.model, trajectories=3)
    for k in expected.betas:
        torch.testing.assert_close(found.betas[k], expected.betas[k], rtol=1e-3, atol=1e-3)


def test_25_of_40_evaluations(host):
    """T = 20: five steps with two, five predicted ones and ten conditional ones."""
    model = tools.tiny("unet")
    guided = applied(model, fitted(model, trajectories=1, steps=20))
    with tools.counted(model) as rows:
        sample(guided, steps=20)
    assert tools.log_of(guided).nfe == 5 * 2 + 5 * 1 + 10 * 1 == 25 == sum(rows)


def test_evaluated_steps_are_cfg_and_the_second_half_is_conditional(tiny):
    """The weights and predictions that the host's CFG sees."""
    seen = []
    guided = applied(tiny.model, tiny.coefficients)
    guided.set_model_sampler_post_cfg_function(
        lambda args: seen.append((args["cond_scale"], args["uncond_denoised"].clone(), args["cond_denoised"].clone())) or args["denoised"]
    )
    plain = []
    model = tiny.model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: plain.append(args["uncond_denoised"].clone()) or args["denoised"])
    sample(guided), sample(model)
    assert [weight for weight, *_ in seen] == [CFG] * 4 + [1.0] * 4
    assert tools.close(seen[0][1], plain[0])
    error = (seen[1][1] - plain[1]).norm() / (seen[1][2] - plain[1]).norm()
    assert error < 1  # closer to D_u than D_c is


def test_without_replaced_steps_it_is_cfg(tiny):
    """And with the second half left to others it is what they are: here plain CFG, bit by bit."""
    nothing = replace(tiny.coefficients, betas={}, r2={})
    assert sample(applied(tiny.model, nothing, second_half="cfg")).equal(sample(tiny.model))
    half = applied(tiny.model, nothing)
    sample(half)
    assert tools.log_of(half).nfe == STEPS + STEPS // 2


@pytest.mark.parametrize("threshold", [-1.0, 0.9, 1.01])
def test_with_adaptive_guidance(tiny, threshold):
    """Without replaced steps it is AG; with them, AG's criterion ends CFG, and what it leaves is predicted all the same."""
    rule = AdaptiveGuidance(threshold=threshold)
    alone = tools.guided(tiny.model, rule)
    nothing = replace(tiny.coefficients, betas={}, r2={})
    expected = sample(alone)
    assert sample(applied(alone, nothing, second_half="cfg")).equal(expected)
    assert sample(tools.guided(applied(tiny.model, nothing, second_half="cfg"), rule)).equal(expected)
    both = applied(alone, tiny.coefficients, second_half="cfg")
    assert sample(both).isfinite().all()
    evaluations = tools.log_of(both).evaluations
    assert evaluations[0] == 2
    if threshold > 1:
        assert [evaluations[i] for i in range(STEPS)] == [2, 1, 2, 1, 2, 2, 2, 2]
    if threshold < 0:
        assert [evaluations[i] for i in range(STEPS)] == [2] + [1] * (STEPS - 1)


def test_two_runs_are_equal_and_so_are_fits(tiny):
    guided = applied(tiny.model, tiny.coefficients)
    assert sample(guided).equal(sample(guided))
    assert fitted(tiny.model).hash == tiny.coefficients.hash


@pytest.mark.parametrize("moment", [3, 11])
def test_interrupted_fits_and_runs_leave_nothing(host, moment):
    """In the middle of a run; the next one is as if nothing had been."""
    model = tools.tiny("unet")
    before = fitted(model)
    stopping, calls = tools.interrupted_at(model, moment)
    with pytest.raises(tools.comfy.model_management.InterruptProcessingException):
        fitted(stopping)
    assert len(calls) == moment
    assert fitted(model).hash == before.hash
    guided = applied(model, before)
    first = sample(guided)
    broken = guided.clone()
    broken.set_model_unet_function_wrapper(lambda apply_model, args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample(broken)
    assert sample(guided).equal(first)


def test_prompts_take_turns_and_the_last_batch_is_cut(host):
    model = tools.tiny("unet")
    with tools.counted(model) as rows:
        coefficients = fitted(model, trajectories=7, positive=[tools.cond(1), tools.cond(3)])
    assert coefficients.trajectories == 7
    assert sum(rows) == 7 * 2 * STEPS
    assert coefficients.hash != fitted(model, trajectories=7).hash


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 10}, "8 steps, not 10"),
        ({"scheduler": "karras"}, "the schedule [0-9a-f]{12}, not [0-9a-f]{12}"),
        ({"sampler": "dpmpp_2m"}, "the sampler euler, not dpmpp_2m"),
        ({"cfg": 5.0}, "cfg 4, not 5"),
        ({"negative": 9}, "another negative prompt"),
    ],
)
def test_another_setting_is_refused_by_name(host, change, words):
    model = tools.tiny("unet")
    guided = applied(model, fitted(model, trajectories=1))
    if "negative" in change:
        change = {"negative": tools.cond(9)}
    with tools.counted(model) as rows, pytest.raises(ValueError, match=rf"^LinearAG: apply: these coefficients were made for {words}\.$"):
        sample(guided, **change)
    assert not rows


def test_another_model_is_refused(host):
    coefficients = fitted(tools.tiny("unet"), trajectories=1)
    with pytest.raises(ValueError, match=r"made for the model UNetModel [0-9a-f]{12}, not UNetModel [0-9a-f]{12}\.$"):
        sample(applied(tools.tiny("unet", seed=1), coefficients))
    with pytest.raises(ValueError, match=r"for the model UNetModel .*; for a model that predicts noise, not velocity"):
        sample(applied(tools.tiny("mmdit"), coefficients))


def test_a_lora_makes_another_model(host):
    """Whether or not it has been worked into the weights of a loaded model."""
    model = tools.tiny("unet")
    plain = model_id(model)
    key = "diffusion_model.input_blocks.0.0.weight"
    patched = model.clone()
    patched.add_patches({key: (torch.ones_like(model.model.state_dict()[key]),)}, 0.5)
    other = model_id(patched)
    assert other != plain
    sample(patched)
    assert model_id(patched) == other and model_id(model) == plain


def test_a_little_difference_in_the_encoding_is_the_same_prompt(host):
    model = tools.tiny("unet")
    negative = tools.cond(2)
    guided = applied(model, fitted(model, trajectories=1, negative=negative))
    nearly = [[negative[0][0] * (1 + 1e-3), negative[0][1]]]
    assert sample(guided, negative=nearly).isfinite().all()


def test_samplers_that_evaluate_twice_read_uncond_or_upscale_are_refused(host):
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    object_ = tools.comfy.samplers.sampler_object
    model = tools.tiny("unet")
    with pytest.raises(ValueError, match=r"^LinearAG: fit needs a sampler that evaluates the model once per step"):
        fitted(model, sampler=object_("heun"))
    with pytest.raises(ValueError, match=r"^LinearAG: fit cannot work with the sampler euler_cfg_pp"):
        fitted(model, sampler=object_("euler_cfg_pp"))
    upscaling = SamplerLCMUpscale.execute(2.0, -1, "bilinear").result[0]
    with pytest.raises(ValueError, match=r"^LinearAG: fit cannot work with a sampler that changes the latent's size between steps; use "):
        fitted(model, sampler=upscaling)


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_ancestral", "ddim", "lms", "dpmpp_2m_sde"])
def test_every_sampler_with_one_evaluation_works(host, name):
    model = tools.tiny("unet")
    guided = applied(model, fitted(model, trajectories=3, sampler=tools.comfy.samplers.sampler_object(name)))
    assert sample(guided, sampler=name).isfinite().all()
    assert tools.log_of(guided).nfe == 6 + 4


def test_runs_that_nothing_can_be_learnt_from(host):
    model = tools.tiny("unet")
    with pytest.raises(ValueError, match="at least 4 steps; these sigmas have 3"):
        fitted(model, steps=3)
    with pytest.raises(ValueError, match="cfg 1 is none"):
        fitted(model, cfg=1.0)
    with pytest.raises(ValueError, match="needs plain CFG at every step; bypass Guidance Interval"):
        fitted(tools.guided(model, GuidanceInterval(end_percent=0.5)))


def test_it_combines_with_other_rules(host):
    """PAG's branch is evaluated at every step; APG shapes the predicted update too; an interval leaves its steps unguided."""
    model = tools.tiny("unet")
    coefficients = fitted(model)
    with_pag = tools.guided(applied(model, coefficients), tools.pag(model))
    sample(with_pag)
    assert tools.log_of(with_pag).nfe == 6 + 4 + STEPS
    both = tools.guided(applied(model, coefficients), APG())
    assert not tools.close(sample(both), sample(applied(model, coefficients)), 1e-3)
    late = tools.guided(applied(model, coefficients), GuidanceInterval(start_percent=0.5))  # nothing to predict from
    assert sample(late).isfinite().all()


def test_rows_do_not_depend_on_their_batch(tiny):
    guided = applied(tiny.model, tiny.coefficients)
    latent = tools.empty_latent(tiny.model, batch=3)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))

    def run(rows):
        with torch.inference_mode():
            return tools.comfy.sample.sample(
                guided, noise[rows], STEPS, CFG, "euler", "normal", tools.cond(1), tools.cond(2), latent[rows], disable_pbar=True, seed=1
            )

    together = run(slice(None))
    assert tools.close(torch.cat([run(slice(i, i + 1)) for i in range(3)]), together, 1e-3)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_brings_everything_back(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    tiny.coefficients.save(path)
    loaded = Coefficients.load(path)
    assert loaded.hash == tiny.coefficients.hash and loaded.setting == tiny.coefficients.setting
    assert loaded.report() == tiny.coefficients.report() and "3  0." in loaded.report()
    assert all(loaded.betas[k].equal(tiny.coefficients.betas[k]) for k in (1, 3))
    assert sample(applied(tiny.model, loaded)).equal(sample(applied(tiny.model, tiny.coefficients)))


def test_other_files_are_refused(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match=r"a\.safetensors is not a safetensors file"):
        Coefficients.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no LinearAG coefficients"):
        Coefficients.load(path)
    tiny.coefficients.save(path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    save_file(tensors | {"beta.3": tensors["beta.3"] + 1}, path, metadata=about)
    with pytest.raises(ValueError, match="damaged: its coefficients are not those that were saved"):
        Coefficients.load(path)
    save_file({"r2.1": tensors["r2.1"]} | {"beta.1": tensors["beta.1"], "beta.3": tensors["beta.3"]}, path, metadata=about)
    with pytest.raises(ValueError, match=r"damaged: it has no 'r2\.3'"):
        Coefficients.load(path)
    save_file(tensors, path, metadata=about | {"setting": about["setting"].replace('"steps": 8', '"steps": 9')})
    with pytest.raises(ValueError, match="damaged: its 9 sigmas are not those of its 9 steps"):
        Coefficients.load(path)


def test_the_nodes_save_and_load(tiny):
    """In the host's folder, never over another file, and nowhere else."""
    save = {"coefficients": tiny.coefficients, "filename_prefix": f"tests/{tiny.kind}"}
    names = [LodestarSaveCoefficients.execute(**save).args[0] for _ in range(2)]
    assert len(set(names)) == 2
    (file,) = (entry for entry in LodestarLoadCoefficients.define_schema().inputs if entry.id == "file")
    assert set(names) <= set(file.options)
    loaded, report = LodestarLoadCoefficients.execute(names[0]).args
    assert loaded.hash == tiny.coefficients.hash and loaded.hash in report and "NFE instead of" in report
    fingerprint = LodestarLoadCoefficients.fingerprint_inputs(names[0])
    assert fingerprint == LodestarLoadCoefficients.fingerprint_inputs(names[0])
    assert sample(LodestarLinearAG.execute(tiny.model, coefficients=loaded).args[0]).isfinite().all()
    for bad in ("../x", "/tmp/x"):
        with pytest.raises(ValueError, match="leads out of models/guidance"):
            LodestarSaveCoefficients.execute(**save | {"filename_prefix": bad})


def test_the_fit_node_takes_lists(host):
    model = tools.tiny("unet")
    these = runs(model)
    inputs = {
        "model": [model], "positive": [tools.cond(1), tools.cond(3)], "negative": [these.negative], "latent_image": [these.latent],
        "sampler": [these.sampler], "sigmas": [these.sigmas], "cfg": [CFG], "trajectories": [6], "seed": [5],
    }  # fmt: skip
    assert LodestarLinearAGFit.define_schema().is_input_list
    coefficients, report = LodestarLinearAGFit.execute(**inputs).args
    assert coefficients.hash == fitted(model, positive=inputs["positive"]).hash
    assert "8 steps, cfg 4" in report and "12 NFE" not in report and "10 NFE instead of 16" in report
    with pytest.raises(ValueError, match="LinearAG: fit: only positive may be a list; cfg holds 2 values"):
        LodestarLinearAGFit.execute(**inputs | {"cfg": [4.0, 5.0]})
