"""The guidance interval: which steps it covers, and what it saves in real runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lodestar.guiders.engine.evaluation import Evaluation
from lodestar.guiders.engine.plan import GuidancePlan
from lodestar.guiders.engine.run import Run
from lodestar.guiders.policies.interval import GuidanceInterval


def covered(sigmas: torch.Tensor, high: float, low: float) -> list[int]:
    """The steps that an interval (low, high] of noise levels covers."""
    model_sampling = SimpleNamespace(percent_to_sigma={0.25: high, 0.75: low}.get)
    patcher = SimpleNamespace(get_model_object=lambda name: model_sampling)
    plan = GuidancePlan().plus(GuidanceInterval(start_percent=0.25, end_percent=0.75))
    run = Run(plan, SimpleNamespace(model_patcher=patcher), sigmas, (1, 4, 8, 8), None)
    steps = []
    for index in range(len(sigmas) - 1):
        run.evaluation = Evaluation(index)
        if run.covers(0):
            steps.append(index)
    return steps


def edm(steps: int = 32, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """The schedule of the EDM papers, with the final 0."""
    ramp = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64) ** rho
    return torch.cat([ramp, ramp.new_zeros(1)])


@pytest.mark.parametrize(
    ("low", "high", "first", "last"), [(0.19, 1.61, 17, 22), (0.60, 5.00, 13, 19)], ids=["EDM2-XXL FID", "EDM2-XXL FD_DINOv2"]
)
def test_the_papers_intervals_cover_the_papers_steps(host, low, high, first, last):
    assert covered(edm(), high, low) == list(range(first, last + 1))


def test_the_upper_end_belongs_to_the_interval_and_the_lower_does_not(host):
    sigmas = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    assert covered(sigmas, 3.0, 1.0) == [1, 2]
    assert covered(sigmas, 9.0, 0.0) == [0, 1, 2, 3]
    assert covered(sigmas, 1.0, 1.0) == []


def test_only_the_whole_schedule_is_neutral():
    assert GuidanceInterval().neutral
    assert not GuidanceInterval(start_percent=0.1).neutral and not GuidanceInterval(end_percent=0.9).neutral


# --- in real runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "unet_v", "mmdit"])
def test_the_whole_schedule_is_cfg_and_an_empty_interval_is_the_conditional_model(host, kind):
    import tools

    model = tools.tiny(kind)
    assert tools.sample(tools.guided(model, GuidanceInterval())).equal(tools.sample(model))
    nothing = tools.guided(model, GuidanceInterval(start_percent=1.0, end_percent=1.0))
    assert tools.sample(nothing).equal(tools.sample(model, cfg=1.0))


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize(("sampler", "stages"), [("euler", 1), ("heun", 2)])
def test_outside_it_the_weight_is_1_and_uncond_is_not_evaluated(host, kind, sampler, stages):
    """Both stages of a Heun step get the weight of the noise level at which the step starts."""
    import tools

    model = tools.tiny(kind)
    guided = tools.guided(model, GuidanceInterval(start_percent=0.3, end_percent=0.6))
    high, low = (model.get_model_object("model_sampling").percent_to_sigma(percent) for percent in (0.3, 0.6))
    seen = []
    guided.set_model_sampler_post_cfg_function(lambda args: seen.append(args["cond_scale"]) or args["denoised"])
    with tools.counted(model) as rows:
        tools.sample(guided, sampler=sampler, steps=10)
    sigmas = tools.log_of(guided).sigmas
    inside = [low < sigma <= high for sigma in sigmas[:-1] for _ in range(stages)]
    inside = inside[: len(seen)]  # the last step of heun has one stage
    assert 0 < sum(inside) < len(inside)
    assert seen == [4.0 if within else 1.0 for within in inside]
    assert sum(rows) == len(inside) + sum(inside)
    assert tools.log_of(guided).nfe == sum(rows)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("cfg", [0.6, 2.0])
def test_outside_it_a_sampler_of_cfgpp_is_the_conditional_model(host, kind, cfg):
    """Such samplers read the unconditional prediction themselves, whatever the weight: D_c takes its place."""
    import tools

    model = tools.tiny(kind)
    nothing = tools.guided(model, GuidanceInterval(start_percent=1.0, end_percent=1.0))
    with tools.counted(model) as rows:
        out = tools.sample(nothing, sampler="euler_cfg_pp", cfg=cfg)
    assert rows == [1] * 6 and tools.log_of(nothing).nfe == 6 and tools.log_of(nothing).saved == 6
    assert tools.close(out, tools.sample(model, cfg=1.0), 1e-5)


def test_every_sampler_of_cfgpp_without_guidance_is_what_it_is_on_one_prompt(host):
    import tools

    model, prompt = tools.tiny("unet"), tools.cond(1)
    nothing = tools.guided(model, GuidanceInterval(start_percent=1.0, end_percent=1.0))
    names = [name for name in tools.comfy.samplers.SAMPLER_NAMES if name.endswith("_cfg_pp")]
    assert len(names) > 5
    for name in names:
        run = {"sampler": name, "cfg": 0.6, "steps": 4}
        with tools.counted(model) as rows:
            out = tools.sample(nothing, **run)
        assert set(rows) == {1}, name
        assert tools.close(out, tools.sample(model, negative=prompt, **run)), name


def test_inside_it_a_sampler_of_cfgpp_is_guided(host):
    import tools

    model = tools.tiny("unet")
    guided = tools.guided(model, GuidanceInterval(start_percent=0.3, end_percent=0.7))
    out = tools.sample(guided, sampler="euler_cfg_pp", cfg=0.6, steps=10)
    log = tools.log_of(guided)
    inside = [step for step, evaluations in log.evaluations.items() if evaluations == 2]
    assert log.nfe == 10 + len(inside) and 0 < len(inside) < 10
    assert not tools.close(out, tools.sample(model, steps=10, cfg=1.0), 1e-2)
