"""The policy search: its relaxation, its gradients through the host's samplers, what it finds; and policies in real runs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch

STEPS, CFG = 4, 6.0
CHOICES = 5


@pytest.fixture(scope="module")
def search(host):
    """The module under test."""
    from lodestar.guiders.policies import search as policy_search

    return policy_search


@pytest.fixture(scope="module")
def relaxation(host):
    """Its maths."""
    from lodestar.guiders.policies import relaxation

    return relaxation


# --- the relaxation --------------------------------------------------------------------------------------------------


def test_the_options_and_what_they_cost(search, relaxation):
    weights = relaxation.options(7.5)
    assert weights == (0.0, 1.0, 3.75, 7.5, 15.0)
    assert [search.evaluations(weight) for weight in weights] == [1, 1, 2, 2, 2]
    assert relaxation.options(2.0) == (0.0, 1.0, 2.0, 4.0)  # s / 2 is the conditional prediction


def test_relaxed_weights_and_cost_are_expectations(relaxation):
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = relaxation.options(7.5)
    expected, cost = relaxation.relax(logits, weights)
    for t in range(3):
        chances = [float(logits[t, j].exp() / logits[t].exp().sum()) for j in range(5)]
        assert float(expected[t]) == pytest.approx(sum(p * w for p, w in zip(chances, weights, strict=True)))
    chances = logits.softmax(1)
    assert float(cost) == pytest.approx(float((chances[:, :2].sum() + 2 * chances[:, 2:].sum()) / 6))


def test_certain_logits_are_the_discrete_policy(relaxation):
    weights = relaxation.options(7.5)
    logits = torch.full((4, 5), -500.0)
    for t, j in enumerate((3, 4, 1, 0)):
        logits[t, j] = 500.0
    expected, cost = relaxation.relax(logits, weights)
    assert relaxation.discretise(logits, weights) == tuple(expected.tolist()) == (7.5, 15.0, 1.0, 0.0)
    assert float(cost) == pytest.approx((2 + 2 + 1 + 1) / 8)


def test_the_distance_is_relative_and_per_image(relaxation):
    target = torch.stack([torch.ones(3, 2, 2), 10 * torch.ones(3, 2, 2)])
    assert float(relaxation.distance(target, target)) == 0
    assert float(relaxation.distance(1.1 * target, target)) == pytest.approx(0.01)


def test_the_temperature_falls_from_1_to_a_tenth(relaxation):
    assert [relaxation.temperature(i, 3) for i in range(3)] == pytest.approx([1, 0.1**0.5, 0.1])
    assert relaxation.temperature(0, 1) == 1


# --- gradients through the host --------------------------------------------------------------------------------------


def runs(model, **changes):
    """What a search samples: one or two rows of a tiny model."""
    import tools

    from lodestar.guiders.learning.runs import Runs

    sigmas = tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", changes.pop("steps", STEPS))
    latent = {"samples": tools.empty_latent(model, batch=changes.pop("batch", 1), size=8)}
    sampler = tools.comfy.samplers.sampler_object(changes.pop("sampler", "euler"))
    settings = {
        "positive": [tools.cond(1)], "negative": tools.cond(2), "latent": latent, "sampler": sampler, "sigmas": sigmas,
        "cfg": CFG, "seed": 5,
    }  # fmt: skip
    return Runs(name="Guidance policy search", model=model, **settings | changes)


def gradient(search, model, logits, sampler="euler", cost_weight=0.1):
    """Loss and gradient of one run."""
    from lodestar.guiders.learning.gradients import gradients

    these = runs(model, sampler=sampler)
    with gradients():
        logits = logits.clone().requires_grad_()
        searcher = search.SearchSampler(these.sampler, logits, search.options(CFG), cost_weight)
        these.sample(these.guider(0, model), 0, searcher)
    return searcher.loss, logits.grad


def some_logits(seed: int = 0) -> torch.Tensor:
    """[STEPS, CHOICES]."""
    return torch.randn(STEPS, CHOICES, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_the_gradient_is_that_of_finite_differences(search, kind):
    """Along the gradient itself, and along one logit."""
    import tools

    model, logits = tools.tiny(kind), some_logits()
    _, grad = gradient(search, model, logits)
    single = torch.zeros_like(logits)
    single[1, 3] = 1.0
    for direction in (grad / grad.norm(), single):
        ahead, behind = (gradient(search, model, logits + step * direction)[0] for step in (0.02, -0.02))
        assert (ahead - behind) / 0.04 == pytest.approx(float((grad * direction).sum()), rel=0.02, abs=1e-5)


@pytest.mark.parametrize(
    "name", ["euler", "heun", "heunpp2", "dpm_2", "lms", "dpmpp_2m", "ipndm", "ipndm_v", "gradient_estimation", "ddim"]
)
def test_every_listed_sampler_is_differentiable(search, name):
    import tools

    from lodestar.guiders.learning.samplers import SAMPLERS

    assert name in (*SAMPLERS, "ddim")
    model, logits = tools.tiny("unet"), some_logits()
    _, grad = gradient(search, model, logits, name)
    direction = grad / grad.norm()
    ahead, behind = (gradient(search, model, logits + step * direction, name)[0] for step in (0.02, -0.02))
    assert (ahead - behind) / 0.04 == pytest.approx(float(grad.norm()), rel=0.02)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_checkpoints_change_no_gradient_and_keep_only_latents(search, kind, monkeypatch):
    """What autograd holds after the forward pass is a few latents per step, however large the network is."""
    import tools

    model, logits = tools.tiny(kind), some_logits()
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with_checkpoints = gradient(search, model, logits)
    latent = tools.empty_latent(model, size=8).numel()
    assert max(kept) <= latent
    few = sum(kept)
    assert few < 12 * STEPS * latent

    kept.clear()
    monkeypatch.setattr(search, "checkpointed", contextlib.nullcontext)
    monkeypatch.setattr(search, "checkpointed_call", lambda function, *args: function(*args))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        without = gradient(search, model, logits)
    assert with_checkpoints[0] == pytest.approx(without[0], rel=1e-5)
    assert tools.close(with_checkpoints[1], without[1], 1e-4)
    assert sum(kept) > 50 * few


def test_blocks_are_the_residual_and_transformer_blocks(host):
    import tools

    from lodestar.guiders.learning.checkpoints import blocks

    of = {kind: [type(block).__name__ for block in blocks(tools.tiny(kind).model.diffusion_model)] for kind in ("unet", "mmdit", "wan")}
    assert of["unet"].count("ResBlock") == 8 and of["unet"].count("BasicTransformerBlock") == 8
    assert sum("JointBlock" in name for name in of["mmdit"]) == 3
    assert of["wan"].count("WanAttentionBlock") == 3


def test_patches_of_other_packs_see_their_block_again_in_the_second_run(search):
    """The host goes on writing into transformer_options between blocks."""
    import tools

    seen = []

    def patch(q, k, v, extra_options):
        seen.append(extra_options["block"])
        return q, k, v

    model = tools.tiny("unet")
    model.set_model_attn1_patch(patch)
    gradient(search, model, some_logits())
    times = {block: seen.count(block) for block in dict.fromkeys(seen)}
    assert len(times) > 3 and len({count / (2 if block[0] == "middle" else 1) for block, count in times.items()}) == 1


def test_inference_tensors_are_seen_as_ordinary_ones_on_the_same_memory(host):
    from lodestar.guiders.learning.gradients import gradients, ordinary_weights

    with torch.inference_mode():
        layer = torch.nn.Linear(3, 2).requires_grad_(False)
        layer.register_buffer("table", torch.arange(4.0)[1:])
    before = layer.weight, layer.table
    with gradients(), ordinary_weights(layer):
        assert not layer.weight.is_inference() and not layer.weight.requires_grad and layer.weight.data_ptr() == before[0].data_ptr()
        assert layer.table.tolist() == [1, 2, 3]
        x = torch.randn(1, 3, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad is not None
    assert layer.weight is before[0] and layer.table is before[1]


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "dpm_adaptive", "res_multistep", "uni_pc"])
def test_samplers_that_cannot_be_differentiated_are_refused(search, name):
    import tools

    with pytest.raises(ValueError, match=r"the sampler .* cannot be differentiated; use one of euler, heun, .*, or ddim\.$"):
        search.search(runs(tools.tiny("unet"), sampler=name), 1, 0.1)


def test_a_sampler_that_adds_noise_is_refused(search):
    import tools

    sampler = tools.comfy.samplers.ksampler("euler", {"s_churn": 1.0})
    with pytest.raises(ValueError, match="the sampler euler adds noise"):
        search.search(replace(runs(tools.tiny("unet")), sampler=sampler), 1, 0.1)


# --- the search ------------------------------------------------------------------------------------------------------


def planted(gaps):
    """A model of which the best policy is known: D_u is 0 and D_c - D_u a constant on pixels of the step's own, of norm ``gaps[t]``.

    A step's weight then moves these pixels and no others, so that the distance is a sum over the steps.
    """
    import tools

    model = tools.tiny("mmdit")
    sigmas = runs(model, steps=len(gaps)).sigmas

    def network(apply_model, args):
        x, t = args["input"], args["timestep"]
        step = int((sigmas[:-1] - float(t[0])).abs().argmin())
        push = torch.zeros_like(x)
        push[:, step] = gaps[step] / (sigmas[step] - sigmas[step + 1])  # of the score, so that one step moves the pixels by the gap
        labels = args["cond_or_uncond"]
        d = torch.cat([part * (label == 0) for label, part in zip(labels, push.chunk(len(labels)), strict=True)])
        return x - t.reshape(-1, 1, 1, 1) * d

    model.set_model_unet_function_wrapper(network)
    return model


def test_it_finds_the_planted_policy(search):
    """Steps with a large gap are worth two evaluations, those without a gap are not."""
    import tools

    gaps = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    with torch.inference_mode():
        model = planted(gaps)
        policy, report = search.search(runs(model, steps=len(gaps)), 60, 0.05)
    assert all(weight == CFG if gap else weight in (0, 1) for weight, gap in zip(policy.weights, gaps, strict=True))
    assert policy.nfe == 9
    assert report.splitlines()[-1].split()[-1] == "9"
    assert policy.setting.steps == 6 and policy.setting.cfg == CFG and policy.setting.sampler == "euler"
    assert tools.sample(model, steps=1).isfinite().all()


def test_without_cost_and_with_nothing_but_cost(search):
    """Free evaluations: CFG everywhere. Dear ones: one evaluation everywhere."""
    with torch.inference_mode():
        model = planted([1.0] * 3)
        assert search.search(runs(model, steps=3), 60, 0.0)[0].weights == (CFG,) * 3
        assert search.search(runs(model, steps=3), 60, 100.0)[0].nfe == 3


def test_searching_twice_finds_the_same_and_leaves_the_model_alone(search):
    import tools

    with torch.inference_mode():
        model = tools.tiny("unet")
    before = tools.sample(model)
    blocks = [name for name, module in model.model.diffusion_model.named_modules() if "forward" in vars(module)]
    with torch.inference_mode():
        first, second = (search.search(runs(model, positive=[tools.cond(1), tools.cond(3)]), 3, 0.1) for _ in range(2))
    assert first == second
    assert tools.sample(model).equal(before)
    assert [name for name, module in model.model.diffusion_model.named_modules() if "forward" in vars(module)] == blocks == []
    assert all(parameter.is_inference() for parameter in model.model.diffusion_model.parameters())


@pytest.mark.parametrize("moment", [2, 9])
def test_an_interrupted_search_leaves_nothing(search, moment):
    """In the CFG run, and in the run with gradients."""
    import comfy.model_management as management
    import tools

    with torch.inference_mode():
        model = tools.tiny("unet")
    before = tools.sample(model)
    stopping, _ = tools.interrupted_at(model, moment)
    with torch.inference_mode(), pytest.raises(management.InterruptProcessingException):
        search.search(runs(stopping), 2, 0.1)
    assert tools.sample(model).equal(before)
    assert not any("forward" in vars(module) for module in model.model.diffusion_model.modules())


def test_a_model_with_other_guidance_is_refused(search):
    import tools

    model = tools.tiny("unet")
    with pytest.raises(ValueError, match="needs plain CFG at every step; bypass Perturbed-Attention Guidance"):
        search.search(runs(tools.guided(model, tools.pag(model))), 1, 0.1)
    with pytest.raises(ValueError, match="cfg 1 is none"):
        search.search(runs(model, cfg=1.0), 1, 0.1)


# --- policies in runs ------------------------------------------------------------------------------------------------


def policy_for(model, weights, **changes):
    """A policy with these weights for the run that ``sample`` does."""
    import tools

    from lodestar.guiders.learning.recognition import setting_of
    from lodestar.guiders.policies.weights_per_step import StepWeights

    these = runs(model, steps=len(weights), **changes)
    setting = setting_of(these.guider(0, model), these.sampler, these.sigmas)
    assert setting.steps == len(weights) and tools
    return StepWeights(setting, tuple(weights))


def applied(model, policy):
    """The model with the policy."""
    import tools

    from lodestar.guiders.policies.weights_per_step import StepwiseCFG

    return tools.guided(model, StepwiseCFG(policy=policy))


def sample(model, **more):
    """The run that the policies are for."""
    import tools

    return tools.sample(model, **{"steps": STEPS, "cfg": CFG, "sampler": "euler", "scheduler": "normal", **more})


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
def test_every_step_gets_its_weight_and_pays_for_it(host, kind):
    """Against the host's own guidance with the weight set from outside."""
    import tools

    model, weights = tools.tiny(kind), (12.0, 1.0, 0.0, 3.0)
    guided = applied(model, policy_for(model, weights))
    with tools.counted(model) as rows:
        result = sample(guided)
    assert sum(rows) == tools.log_of(guided).nfe == 2 + 1 + 1 + 2 == policy_for(model, weights).nfe
    assert [tools.log_of(guided).evaluations[i] for i in range(4)] == [2, 1, 1, 2]

    reference, steps = model.clone(), iter(weights)

    def combine(args):
        weight = next(steps)
        return args["input"] - (args["uncond_denoised"] + weight * (args["cond_denoised"] - args["uncond_denoised"]))

    reference.set_model_sampler_cfg_function(combine, disable_cfg1_optimization=True)
    assert tools.close(result, sample(reference))


def test_the_samplers_own_weight_everywhere_is_cfg(host):
    import tools

    model = tools.tiny("unet")
    guided = applied(model, policy_for(model, (CFG,) * STEPS))
    assert sample(guided).equal(sample(model))
    assert tools.log_of(guided).nfe == 2 * STEPS


def test_what_is_searched_is_what_is_sampled(search, relaxation):
    """With certain logits, the search's own run is the policy's run on the host."""
    import tools

    model, weights = tools.tiny("unet"), (12.0, 6.0, 1.0, 0.0)
    options = relaxation.options(CFG)
    logits = torch.tensor([[50.0 * (option == weight) for option in options] for weight in weights])
    loss, _ = gradient(search, model, logits, cost_weight=0.0)
    latent = tools.empty_latent(model, size=8)
    far = relaxation.distance(
        sample(applied(model, policy_for(model, weights)), latent=latent, seed=5), sample(model, latent=latent, seed=5)
    )
    assert loss == pytest.approx(float(far), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 6}, "4 steps, not 6"),
        ({"scheduler": "karras"}, "the schedule [0-9a-f]{12}, not [0-9a-f]{12}"),
        ({"sampler": "dpmpp_2m"}, "the sampler euler, not dpmpp_2m"),
        ({"cfg": 5.0}, "cfg 6, not 5"),
    ],
)
def test_another_schedule_is_refused(host, change, words):
    import tools

    guided = applied(tools.tiny("unet"), policy_for(tools.tiny("unet"), (6.0, 6.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match=rf"^Guidance policy: apply: this policy was made for {words}\.$"):
        sample(guided, **change)


def test_model_and_prompt_are_free(host):
    import tools

    policy = policy_for(tools.tiny("unet"), (6.0, 6.0, 1.0, 1.0))
    assert sample(applied(tools.tiny("unet", seed=3), policy), negative=tools.cond(8)).isfinite().all()


def test_samplers_that_read_uncond_are_refused(host):
    import tools

    policy = policy_for(tools.tiny("unet"), (6.0, 6.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="and the sampler euler_cfg_pp exclude each other"):
        sample(applied(tools.tiny("unet"), policy), sampler="euler_cfg_pp")


def test_two_rules_that_decide_the_same_are_refused(host):
    import tools

    model = tools.tiny("unet")
    policy = policy_for(model, (6.0, 6.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="both decide what every step evaluates; bypass one of the two nodes"):
        applied(applied(model, policy), policy)


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_a_policy_is_readable_json(host, tmp_path):
    import tools

    from lodestar.guiders.policies.weights_per_step import StepWeights

    policy = policy_for(tools.tiny("unet"), (12.0, 7.25, 1.0, 0.0))
    text = policy.to_json()
    values = json.loads(text)
    assert values["choices"] == ["cfg 12", "cfg 7.25", "conditional", "unconditional"]
    assert (values["evaluations"], values["steps"], values["cfg"], values["sampler"]) == (6, 4, 6.0, "euler")
    assert text.count("\n") == len(values) + 2  # one line each
    path = tmp_path / "policy.json"
    path.write_text(text, encoding="utf-8")
    assert StepWeights.load(path) == policy


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.pop("format"), "does not say that its format is"),
        (lambda values: values.pop("cfg"), "has no 'cfg'"),
        (lambda values: values["choices"].pop(), "has 3 choices for 4 steps"),
        (lambda values: values["choices"].insert(0, "cfg lots"), "'cfg' and a number, not 'cfg lots'"),
        (lambda values: values.update(choices=[1, 2, 3, 4]), "'cfg' and a number, not 1"),
        (lambda values: values.update(sigmas=None), "of the wrong type"),
        (lambda values: values["sigmas"].pop(), "its 4 sigmas are not those of its 4 steps"),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(host, change, words):
    import tools

    from lodestar.guiders.policies.weights_per_step import StepWeights

    values = json.loads(policy_for(tools.tiny("unet"), (6.0, 6.0, 1.0, 1.0)).to_json())
    change(values)
    with pytest.raises(ValueError, match=f"^Guidance policy: p.json .*{words}"):
        StepWeights.from_json(json.dumps(values), "p.json")


def test_what_is_not_json_is_refused(host):
    from lodestar.guiders.policies.weights_per_step import StepWeights

    with pytest.raises(ValueError, match=r"^Guidance policy: p\.json is not JSON"):
        StepWeights.from_json("{", "p.json")


def test_the_nodes_search_save_and_load(host):
    """A search of the node is the search; its file is its JSON."""
    import tools

    from lodestar.nodes.policies.guidance_policy import LodestarGuidancePolicy, LodestarLoadPolicy, LodestarPolicySearch, LodestarSavePolicy

    model = tools.tiny("unet")
    these = runs(model)
    inputs = {
        "model": [model], "positive": these.positive, "negative": [these.negative], "latent_image": [these.latent],
        "sampler": [these.sampler], "sigmas": [these.sigmas], "cfg": [CFG], "iterations": [2], "cost_weight": [0.1], "seed": [5],
    }  # fmt: skip
    with torch.inference_mode():
        policy, text, report = LodestarPolicySearch.execute(**inputs).args
    assert text == policy.to_json() and "NFE" in report
    name = LodestarSavePolicy.execute(policy=policy, filename_prefix="tests/policy").args[0]
    assert LodestarLoadPolicy.execute(name).args == (policy, text)
    assert len(LodestarLoadPolicy.fingerprint_inputs(name)) == 64
    assert sample(LodestarGuidancePolicy.execute(model, policy).args[0]).isfinite().all()


# --- the strip in the report -----------------------------------------------------------------------------------------


def test_the_report_draws_a_cell_for_every_step(host):
    """Colours of the cells at the places of the steps; none where no policy acted."""
    import tools

    from lodestar.pictures import policy_strip
    from lodestar.pictures import report as report_picture

    model, weights = tools.tiny("unet"), (12.0, 1.0, 0.0, 3.0)
    guided = applied(model, policy_for(model, weights))
    sample(guided)
    log = tools.log_of(guided)
    assert [policy_strip.kind_of(log.choices[i]) for i in range(4)] == ["CFG", "conditional", "unconditional", "CFG"]
    picture = (report_picture.draw(log)[0] * 255).round().int()
    row = report_picture._TOP + 8 + policy_strip._ABOVE + 3
    for i in range(4):
        pixel = picture[row, round(report_picture._x(i, 4))].tolist()
        assert pixel == list(bytes.fromhex(policy_strip._KINDS[policy_strip.kind_of(log.choices[i])][1:]))
    plain = tools.attach(model)
    sample(plain)
    assert report_picture.draw(tools.log_of(plain)).shape[1] == len(picture) - policy_strip.HEIGHT


def test_a_cell_shows_how_many_rows_are_guided(host):
    from lodestar.guiders.engine.choice import Choice
    from lodestar.pictures import policy_strip

    assert policy_strip.guided(Choice(uncond=(True, False, False, False))) == 0.25
    assert policy_strip.kind_of(Choice(uncond=(True, False))) == "CFG" and policy_strip.kind_of(Choice(uncond=False)) == "conditional"
    assert policy_strip.kind_of(Choice(predicted=True)) == "predicted"
    assert not policy_strip.wanted({0: Choice()}) and policy_strip.wanted({0: Choice(), 1: Choice(weight=1.0)})
