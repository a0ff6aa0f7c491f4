"""Guidance policies: CFG with a weight of its own at every step, in real runs and as JSON."""

from __future__ import annotations

import json

import pytest
import tools
import torch
from policy_tools import CFG, STEPS, applied, policy_for, runs, sample

from lodestar.guiders.policies.weights_per_step import StepWeights
from lodestar.nodes.policies.guidance_policy import LodestarGuidancePolicy, LodestarLoadPolicy, LodestarPolicySearch, LodestarSavePolicy


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
def test_every_step_gets_its_weight_and_pays_for_it(kind):
    """Against the host's own guidance with the weight set from outside."""
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


def test_the_samplers_own_weight_everywhere_is_cfg():
    model = tools.tiny("unet")
    guided = applied(model, policy_for(model, (CFG,) * STEPS))
    assert sample(guided).equal(sample(model))
    assert tools.log_of(guided).nfe == 2 * STEPS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 6}, "4 steps, not 6"),
        ({"scheduler": "karras"}, "the schedule [0-9a-f]{12}, not [0-9a-f]{12}"),
        ({"sampler": "dpmpp_2m"}, "the sampler euler, not dpmpp_2m"),
        ({"cfg": 5.0}, "cfg 6, not 5"),
    ],
)
def test_another_schedule_is_refused(change, words):
    guided = applied(tools.tiny("unet"), policy_for(tools.tiny("unet"), (6.0, 6.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match=rf"^Guidance policy: apply: this policy was made for {words}\.$"):
        sample(guided, **change)


def test_model_and_prompt_are_free():
    policy = policy_for(tools.tiny("unet"), (6.0, 6.0, 1.0, 1.0))
    assert sample(applied(tools.tiny("unet", seed=3), policy), negative=tools.cond(8)).isfinite().all()


def test_samplers_that_read_uncond_are_refused():
    policy = policy_for(tools.tiny("unet"), (6.0, 6.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="cannot work with the sampler euler_cfg_pp: "):
        sample(applied(tools.tiny("unet"), policy), sampler="euler_cfg_pp")


def test_two_rules_that_decide_the_same_are_refused():
    model = tools.tiny("unet")
    policy = policy_for(model, (6.0, 6.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="both decide what every step evaluates; bypass one of the two nodes"):
        applied(applied(model, policy), policy)


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_a_policy_is_readable_json(tmp_path):
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
def test_what_is_wrong_with_a_policy_is_said(change, words):
    values = json.loads(policy_for(tools.tiny("unet"), (6.0, 6.0, 1.0, 1.0)).to_json())
    change(values)
    with pytest.raises(ValueError, match=f"^Guidance policy: p.json .*{words}"):
        StepWeights.from_json(json.dumps(values), "p.json")


def test_what_is_not_json_is_refused():
    with pytest.raises(ValueError, match=r"^Guidance policy: p\.json is not JSON"):
        StepWeights.from_json("{", "p.json")


def test_the_nodes_search_save_and_load():
    """A search of the node is the search; its file is its JSON."""
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
