"""All of the host's samplers: where in the schedule a run stands, and that guidance works and costs no waiting for the GPU."""

from __future__ import annotations

import collections
import itertools
from dataclasses import dataclass, field

import pytest
import tools
import torch
from tools import close, comfy, custom, empty_latent, guided, log_of, pag, reference, sample, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from lodestar.guiders.engine.choice import Choice
from lodestar.guiders.engine.host import reads_uncond
from lodestar.guiders.engine.plan import Policy
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
OWN_LEVELS = ("dpm_fast", "dpm_adaptive")  # these choose noise levels themselves
STAGES = {
    "heun": 2, "heunpp2": 3, "dpm_2": 2, "dpm_2_ancestral": 2, "dpmpp_sde": 2, "dpmpp_2s_ancestral": 2, "seeds_2": 2, "seeds_3": 3,
    "exp_heun_2_x0": 2, "exp_heun_2_x0_sde": 2,
}  # fmt: skip
STAGES = {name: stages for name, stages in STAGES.items() if name in SAMPLERS}
SMALL = {
    "unet": {"channel_mult": (1,), "num_res_blocks": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1]},
    "mmdit": {"num_blocks": 2},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Probe(Policy):
    """Notes the steps inside its window."""

    name = "Probe"
    neutral = False
    seen: list = field(default_factory=list)

    def choose(self, step):
        """Nothing but the note."""
        if step.covered:
            self.seen.append((step.index, step.first))
        return Choice()


def small(kind, seed=0):
    return tiny(kind, seed, **SMALL[kind])


def run(model, sampler, steps=4, **more):
    return sample(model, sampler=sampler, steps=steps, latent=empty_latent(model, 1, 8), **more)


# --- where a run stands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_of_the_schedule_begins_once_and_in_order(sampler, kind):
    probe, steps = Probe(), 4
    run(guided(small(kind), probe), sampler, steps)
    indices = [index for index, _ in probe.seen]
    begun = [index for index, first in probe.seen if first]
    assert begun == sorted(set(indices))
    assert set(indices) <= set(range(steps))
    if sampler not in OWN_LEVELS:
        assert begun == list(range(steps))
    if sampler != "dpm_adaptive":  # which takes steps back
        assert indices == sorted(indices)
    if sampler in STAGES:
        assert collections.Counter(indices)[0] == STAGES[sampler]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in OWN_LEVELS])
def test_windows_are_decided_once_per_step(sampler):
    """A step whose start lies inside is inside with all its stages."""
    inside, everywhere = Probe(start_percent=0.2, end_percent=0.6), Probe()
    main = guided(small("unet"), inside, everywhere)
    run(main, sampler, steps=6)
    sampling = main.get_model_object("model_sampling")
    high, low = (float(sampling.percent_to_sigma(percent)) for percent in (0.2, 0.6))
    levels = log_of(main).sigmas
    expected = [note for note in everywhere.seen if low < levels[note[0]] <= high]
    assert inside.seen == expected
    assert 0 < len(expected) < len(everywhere.seen)


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", *(name for name in STAGES if name != "heunpp2")])  # whose stages get fewer
def test_momentum_advances_once_per_step(sampler, kind):
    model = small(kind)
    rule = APG(momentum=-0.5, norm_threshold=2.0)
    result = run(guided(model, rule), sampler)
    assert close(result, run(reference(model, rule, stages=STAGES.get(sampler, 1)), sampler))
    if sampler in STAGES:
        assert not close(result, run(reference(model, rule), sampler))


def test_samplers_that_start_over_start_afresh():
    """Autoregressive video: the same schedule for each block of frames, and no momentum from the last one."""

    def twice(model, x, sigmas, extra_args, callback, disable):
        blocks = [comfy.k_diffusion.sampling.sample_euler(model, x, sigmas, extra_args, callback, disable) for _ in range(2)]
        assert torch.equal(*blocks)
        return blocks[1]

    model = small("unet")
    main, sigmas = guided(model, APG()), torch.tensor([5.0, 2.0, 1.0, 0.0])
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        comfy.sample.sample_custom(
            main, noise, 4.0, comfy.samplers.KSAMPLER(twice), sigmas, tools.cond(1), tools.cond(2), noise * 0, disable_pbar=True
        )


# --- samplers that use the unconditional prediction themselves -------------------------------------------------------


def samplers_of_nodes(model):
    """Every SAMPLER that a node of the host makes from its defaults, with each of its choices in turn: (what made it, SAMPLER)."""
    from comfy_api.latest import io
    from comfy_extras import nodes_advanced_samplers as advanced
    from comfy_extras import nodes_void as void

    for module in (custom, advanced, void):
        for node in vars(module).values():
            if not (isinstance(node, type) and issubclass(node, io.ComfyNode) and node is not io.ComfyNode):
                continue
            schema = node.define_schema()
            if [output.io_type for output in schema.outputs] != ["SAMPLER"]:
                continue
            values = [[model] if v.io_type == "MODEL" else getattr(v, "options", None) or [v.default] for v in schema.inputs]
            for chosen in itertools.product(*values):
                settings = dict(zip((value.id for value in schema.inputs), chosen, strict=True))
                yield f"{schema.node_id} {chosen}", node.execute(**settings).result[0]


def test_the_samplers_that_read_uncond_are_known():
    """D is D_c here, whatever the negative prompt says: what it changes all the same is read by the sampler itself."""
    model = small("unet").clone()
    model.set_model_sampler_cfg_function(lambda args: args["input"] - args["cond_denoised"], disable_cfg1_optimization=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)

    def result(solver, negative):
        torch.manual_seed(0)  # lcm's noise comes from here
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model, noise, 2.0, solver, sigmas.clone(), tools.cond(1), negative, noise * 0, disable_pbar=True, seed=0
            )

    readers, negatives = set(), (tools.cond(2), tools.cond(3))
    for made, solver in samplers_of_nodes(model):
        first, second = (result(solver, negative) for negative in negatives)
        assert first.isfinite().all(), made
        reader = reads_uncond(solver)
        assert close(first, second, 1e-3) == (reader is None), made
        readers.add(reader)
    assert {"euler_cfg_pp", "euler_pp"} <= readers and len(readers) > 7


# --- samplers without a loop that can be read, and with unusual ones -------------------------------------------------


def foreign(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler in another pack's words."""
    levels = iter(sigmas)
    level = next(levels)
    for lower in levels:
        denoised = model(x, level * x.new_ones(len(x)), **extra_args)
        x = denoised + (x - denoised) * lower / level
        level = lower
    return x


def with_mask(model, sampler, mask, steps=6):
    """A run of a solver function or of one of the host's samplers, with a noise mask or without."""
    solver = comfy.samplers.KSAMPLER(sampler) if callable(sampler) else comfy.samplers.sampler_object(sampler)
    noise = torch.randn(empty_latent(model, 1, 8).shape, generator=torch.Generator().manual_seed(0))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, 4.0, solver, sigmas, tools.cond(1), tools.cond(2), noise * 0, noise_mask=mask, disable_pbar=True, seed=0
        )


@pytest.mark.parametrize("sampler", [*OWN_LEVELS, foreign])
def test_a_mask_of_ones_changes_no_step(sampler):
    """The host's own code that calls a sampler also has variables named i and sigmas, where there is a mask."""
    for rule in (APG(norm_threshold=2.0), GuidanceInterval(start_percent=0.3, end_percent=0.7), AdaptiveGuidance(threshold=0.9)):
        main = guided(small("unet"), rule)
        plain = with_mask(main, sampler, None)
        steps = log_of(main).choices
        masked = with_mask(main, sampler, torch.ones(1, 1, 8, 8))
        assert torch.equal(masked, plain)
        assert log_of(main).choices == steps
        assert len(steps) > 2


@pytest.mark.parametrize("inserted", [0, 1])
def test_a_loop_with_an_inserted_level(inserted):
    """RES4LYF counts ``step`` along ``sigmas``, into which it may insert the model's lowest level before the last."""

    def two_stages(model, x, sigmas, extra_args=None, callback=None, disable=None):
        sigmas = torch.cat([sigmas[:-1], *[sigmas[-2:-1] / 2] * inserted, sigmas[-1:]])
        for step in range(len(sigmas) - 1):
            for level in (sigmas[step], max(sigmas[step + 1], sigmas[step] / 4)):  # by its level, the second belongs to the next step
                denoised = model(x, level * x.new_ones(len(x)), **extra_args)
            x = denoised + (x - denoised) * sigmas[step + 1] / sigmas[step]
        return x

    probe = Probe()
    with_mask(guided(small("unet"), probe), two_stages, None, steps=4)
    expected = [(step, first) for step in range(4) for first in (True, False)] + [(3, False)] * 2 * inserted
    assert probe.seen == expected


# --- no waiting for the GPU ------------------------------------------------------------------------------------------


class ValuesRead(TorchDispatchMode):
    """Counts the operations that hand a tensor's value to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        self.count += name in ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "unique", "masked_select", "allclose")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde", "uni_pc"])
def test_steps_read_no_values_off_the_device(sampler, kind):
    counts = []
    model = small(kind)
    rules = [*tools.all_rules(kind), GuidanceInterval(start_percent=0.1, end_percent=0.8)]
    solver = comfy.samplers.sampler_object(sampler)
    inner = solver.sampler_function

    def observed(*args, **kwargs):
        with ValuesRead() as mode:
            result = inner(*args, **kwargs)
        counts.append(mode.count)
        return result

    solver.sampler_function = observed
    noise = torch.randn(empty_latent(model, 1, 8).shape, generator=torch.Generator().manual_seed(0))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 4)
    for main in (model, guided(model, *rules)):
        with torch.inference_mode():
            comfy.sample.sample_custom(main, noise, 4.0, solver, sigmas, tools.cond(1), tools.cond(2), noise * 0, disable_pbar=True, seed=0)
    plain, ours = counts
    assert ours == plain


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_samplers_and_schedulers(sampler, kind):
    model = small(kind)
    shapers = [] if "cfg_pp" in sampler else [APG(norm_threshold=2.0)]  # those are refused there
    main = guided(model, *shapers, pag(model, 1.0))
    neutral = guided(model, APG(eta=1.0, norm_threshold=0.0, momentum=0.0), pag(model, 0.0), GuidanceInterval())
    for scheduler in ("normal", "karras", "beta"):
        plain = run(model, sampler, steps=3, scheduler=scheduler)
        assert torch.equal(run(neutral, sampler, steps=3, scheduler=scheduler), plain)
        result = run(main, sampler, steps=3, scheduler=scheduler)
        assert torch.isfinite(result).all()
        assert not torch.equal(result, plain)
