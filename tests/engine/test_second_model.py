"""Autoguidance's second model: loaded by the host with the first, on the same noisy point, and never in its way."""

from __future__ import annotations

import gc
import inspect
import weakref
from types import SimpleNamespace

import pytest
import tools
import torch
from conditioning_tools import weight_hooks
from tools import WrappersMP, attach, close, comfy, empty_latent, guided, nodes, pag, sample, tiny
from torch import Tensor

from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.spaces import reparametrise
from lodestar.guiders.terms.autoguidance import Autoguidance, with_own_weights


def run(model, **more):
    return sample(model, **{"steps": 3, "latent": empty_latent(model, 1, 8)} | more)


def attach_node(model, weak_model, scale=2.0):
    node = nodes.NODE_CLASS_MAPPINGS["LodestarAutoguidance"]
    return node.execute(model, weak_model, scale=scale).result[0]


# --- loading ---------------------------------------------------------------------------------------------------------


def in_memory():
    """Ids of the models that the host has loaded. Among them may be some whose patcher is gone, left by other tests."""
    return {id(entry.real_model()) for entry in comfy.model_management.current_loaded_models}


def test_the_host_loads_both_models_together():
    model, weak = tiny("unet"), tiny("unet", seed=7)
    both, loaded = {id(model.model), id(weak.model)}, []

    def note(executor, *args, **kwargs):
        loaded.append(in_memory())
        return executor(*args, **kwargs)

    main = tools.with_wrapper(guided(model, Autoguidance(weak_model=weak)), WrappersMP.SAMPLER_SAMPLE, note)
    comfy.model_management.unload_all_models()
    run(main)
    assert loaded[0] >= both
    comfy.model_management.unload_all_models()
    assert not in_memory() & both
    assert torch.equal(run(main), run(main))


def test_neutral_settings_load_nothing():
    model, weak = tiny("unet"), tiny("unet", seed=7)
    main = guided(model, Autoguidance(weak_model=weak, scale=1.0))
    assert main.get_additional_models() == []


def test_the_weak_model_can_be_sampled_itself_afterwards():
    model, weak = tiny("unet"), tiny("unet", seed=7)
    alone, options = run(weak), repr(weak.model_options)
    run(guided(model, Autoguidance(weak_model=weak)))
    assert torch.equal(run(weak), alone)
    assert repr(weak.model_options) == options


def test_out_of_memory_while_the_weak_model_is_prepared_leaves_nothing_behind(monkeypatch):
    model, weak = tiny("unet"), tiny("unet", seed=7)
    main = guided(model, Autoguidance(weak_model=weak))
    expected, hooks = run(main), dict(weak.hook_patches)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patches, pytest.raises(torch.OutOfMemoryError):
        patches.setattr(weak.model, "extra_conds", full)
        run(main, **weight_hooks(weak))
    assert weak.model.current_patcher is None
    assert weak.hook_patches == hooks and weak.hook_patches_backup is None
    assert torch.equal(run(main), expected)


def test_a_weak_model_with_a_plan_of_its_own_is_evaluated_plainly():
    model, weak = tiny("unet"), tiny("unet", seed=7)
    guided_weak = guided(weak, APG(), pag(weak))
    expected = run(guided(model, Autoguidance(weak_model=weak)))
    assert torch.equal(run(guided(model, Autoguidance(weak_model=guided_weak))), expected)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_another_latent_format_is_refused_by_name():
    with pytest.raises(ValueError, match=r"SD15 \(4 channels\).*SD3 \(16 channels\)"):
        attach_node(tiny("unet"), tiny("mmdit"))


def test_another_latent_format_of_as_many_channels_is_refused_by_name():
    with pytest.raises(ValueError, match=r"SD15.*SDXL"):
        other = tiny("unet")
        other.model.latent_format = comfy.latent_formats.SDXL()
        attach_node(tiny("unet"), other)


def test_the_same_model_twice_is_refused_whatever_its_own_guidance():
    base = tiny("unet")
    patched = lora(base, 1)
    for model, weak in ((base, base), (base, base.clone()), (patched, patched.clone()), (guided(base, APG(), pag(base)), attach(base))):
        with pytest.raises(ValueError, match="are the same model"):
            attach_node(model, weak)
        attach_node(model, weak, scale=1.0)


def after_prediction(model):
    """A clone on which other packs have claimed what comes after the predictions: nothing that a weak model would see."""
    clone = model.clone()
    clone.set_model_sampler_cfg_function(lambda args: args["cond"], disable_cfg1_optimization=True)
    clone.set_model_sampler_pre_cfg_function(lambda args: args["conds_out"])
    clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    return clone


def test_the_same_model_is_refused_where_only_the_combination_differs():
    base = tiny("unet")
    for model, weak in ((after_prediction(base), base), (base, after_prediction(base))):
        with pytest.raises(ValueError, match="are the same model"):
            attach_node(model, weak)


def blurred(model):
    """A clone with a degrading patch of another pack, which leaves the weights alone."""
    clone = model.clone()
    clone.set_model_attn1_output_patch(lambda attended, options: 0.5 * attended)
    return clone


def wrapped(model):
    """The same by a wrapper."""
    return tools.with_wrapper(model, "diffusion_model", lambda executor, x, *args, **more: 0.5 * executor(x, *args, **more))


@pytest.mark.parametrize("degraded", [blurred, wrapped])
def test_the_same_weights_under_a_patch_of_another_pack_are_a_weak_model(degraded):
    model, twin = tiny("unet"), tiny("unet")
    both = attach_node(model, degraded(model))
    assert torch.equal(run(both), run(attach_node(tiny("unet"), degraded(twin))))
    assert not close(run(both), run(model), 1e-3)


def other_schedule(model):
    """A clone with an object patch: another object in the place of the host's."""
    clone = model.clone()
    clone.add_object_patch("model_sampling", tiny("unet_v").get_model_object("model_sampling"))
    return clone


def bypass(model, scale: float = 1.5):
    """A clone with a change of one of its layers, as the host's LoRA loader makes it in bypass mode."""
    clone, layer = model.clone(), model.model.diffusion_model.middle_block[0].in_layers[2]
    forward = type(layer).forward
    inject = lambda patcher: setattr(layer, "forward", lambda x: scale * forward(layer, x))  # noqa: E731
    eject = lambda patcher: layer.__dict__.pop("forward", None)  # noqa: E731
    clone.set_injections("bypass_lora", [comfy.model_patcher.PatcherInjection(inject=inject, eject=eject)])
    return clone


PATCHES = {"a LoRA": lambda model: lora(model, 1), "an object": other_schedule, "an injection": bypass}


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_patches_of_the_model_behind_the_node_are_refused(patch):
    """They would reach a weak model that is the same loaded file."""
    model = tiny("unet")
    before = attach_node(patch(model), blurred(model))
    with pytest.raises(ValueError, match="put the patch before Autoguidance"):
        run(patch(attach_node(model, blurred(model))))
    run(patch(guided(model, Autoguidance(weak_model=model, scale=1.0))))
    run(before)


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_patches_of_the_model_before_the_node_do_not_reach_the_weak_model(patch):
    model = tiny("unet")
    expected = run(attach_node(patch(tiny("unet")), tiny("unet")))
    assert torch.equal(run(attach_node(patch(model), model)), expected)


def test_an_injection_into_a_weak_model_of_the_same_file_is_refused():
    model = tiny("unet")
    with pytest.raises(ValueError, match="bypass mode"):
        attach_node(model, bypass(model))


# --- one file, two sets of LoRAs -------------------------------------------------------------------------------------


def lora(model, seed: int):
    """A clone with a random patch in its weights."""
    clone = model.clone()
    key = next(name for name in model.model.state_dict() if name.endswith(("middle_block.0.in_layers.2.weight", "attn.qkv.weight")))
    patch = 0.3 * torch.randn(model.model.state_dict()[key].shape, generator=torch.Generator().manual_seed(seed))
    clone.add_patches({key: (patch,)}, 1.0)
    return clone


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
@pytest.mark.parametrize("which", ["main", "weak", "both"])
def test_one_file_with_two_sets_of_loras(which, kind):
    """As two separately loaded files would do it, and without leaving anything in the main model."""

    def pair(first, second):
        return (lora(first, 1) if which != "weak" else first), (lora(second, 2) if which != "main" else second)

    expected = run(attach_node(*pair(tiny(kind), tiny(kind))))
    base = tiny(kind)
    plain = run(base)
    main, weak = pair(base, base)
    patched = run(main)
    both = attach_node(main, weak)
    assert torch.equal(run(both), expected)
    assert torch.equal(run(main), patched)
    assert torch.equal(run(base), plain)
    assert not close(expected, patched, 1e-3)
    assert torch.equal(run(both), expected)


def test_own_weights_only_where_they_are_needed():
    base, other = tiny("unet"), tiny("unet")
    assert with_own_weights(other, base) is other
    clone = base.clone()
    assert with_own_weights(clone, base) is clone
    assert with_own_weights(lora(base, 1), base).model is not base.model


def own_model(both):
    """The weights of the weak model of a guided one."""
    return both.get_additional_models()[0].model


def test_weights_are_copied_once_for_all_scales_and_freed_with_the_weak_model():
    base = tiny("unet")
    main, weak = lora(base, 1), base.clone()
    both = attach_node(main, weak)
    other = attach_node(lora(base, 2), weak, scale=3.0)
    copied = weakref.ref(own_model(both))
    assert own_model(other) is copied() is not base.model
    assert torch.equal(run(other), run(attach_node(lora(tiny("unet"), 2), tiny("unet"), scale=3.0)))
    del both, other
    gc.collect()
    assert own_model(attach_node(main, weak, scale=1.5)) is copied()
    assert [entry.real_model() is copied() for entry in comfy.model_management.current_loaded_models].count(True) == 1
    del weak
    gc.collect()
    assert copied() is None


def test_two_weak_models_of_one_file_have_a_set_of_weights_each():
    base = tiny("unet")
    both = attach_node(attach_node(base, lora(base, 1)), lora(base, 2), scale=1.5)
    assert len({id(model.model) for model in both.get_additional_models()} | {id(base.model)}) == 3
    first = attach_node(tiny("unet"), lora(tiny("unet"), 1))
    assert torch.equal(run(both), run(attach_node(first, lora(tiny("unet"), 2), scale=1.5)))


# --- dynamic VRAM ----------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamic(monkeypatch):
    """Loads a tiny model as the host does where dynamic VRAM is on: in its own class for that, without the driver's buffers."""
    if "disable_dynamic" not in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters:
        pytest.skip("this host cannot load a file once more")
    import comfy_aimdo.host_buffer

    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", lambda *_: SimpleNamespace(size=0, truncate=lambda *_, **__: None))

    class Dynamic(comfy.model_patcher.ModelPatcherDynamic):
        """The host's class makes an ordinary one of itself on the CPU."""

        def __new__(cls, *_, **__):
            return object.__new__(cls)

    def load(kind, disable_dynamic=False):
        plain = tiny(kind)
        model = plain if disable_dynamic else Dynamic(plain.model, plain.load_device, plain.offload_device)
        model.cached_patcher_init = (load, (kind,))
        return model

    return load


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_under_dynamic_vram_the_file_is_loaded_once_more(dynamic, kind):
    base, twin = dynamic(kind), tiny(kind)
    weak = lora(base, 1)
    assert base.is_dynamic() and weak.is_dynamic()
    both = attach_node(base, weak)
    assert own_model(both) is not base.model
    assert not both.get_additional_models()[0].is_dynamic()
    assert own_model(attach_node(base, weak, scale=3.0)) is own_model(both)
    assert close(run(both), run(attach_node(twin, lora(tiny(kind), 1))))
    assert close(run(base), run(twin))


def test_under_dynamic_vram_the_model_keeps_its_lora_to_itself(dynamic):
    """Checked by the weights: on the CPU the host's class leaves LoRAs to a driver that is not there."""
    base = dynamic("unet")
    main = lora(base, 1)
    weak = attach_node(main, base).get_additional_models()[0]
    assert weak.model is not main.model and not weak.is_dynamic()
    assert main.patches and not weak.patches
    loaded, expected = weak.model.state_dict(), tiny("unet").model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_under_dynamic_vram_a_file_that_cannot_be_loaded_once_more_is_refused(dynamic):
    base = dynamic("unet")
    base.cached_patcher_init = None
    with pytest.raises(ValueError, match="Autoguidance and dynamic VRAM"):
        attach_node(base, lora(base, 1))
    run(attach_node(base, blurred(base)))


# --- another parametrisation -----------------------------------------------------------------------------------------


class Gaussian(torch.nn.Module):
    """The exact network for data N(mean, 1): posterior mean in closed form, in any parametrisation."""

    def __init__(self, sampling, mean: float) -> None:
        super().__init__()
        self.sampling, self.mean, self.dtype = sampling, mean, torch.float32

    def denoised(self, x: Tensor, sigma: Tensor, flow: bool) -> Tensor:
        """E[x0 | x] on x = x0 + sigma n, or x = (1 - sigma) x0 + sigma n."""
        a = 1 - sigma if flow else torch.ones_like(sigma)
        return self.mean + a / (a**2 + sigma**2) * (x - a * self.mean)

    def forward(self, x: Tensor, timesteps: Tensor, **_) -> Tensor:
        raise NotImplementedError


class Eps(Gaussian):
    def forward(self, x: Tensor, timesteps: Tensor, **_) -> Tensor:
        sigma = self.sampling.sigma(timesteps).reshape(-1, 1, 1, 1)
        x = x * (sigma**2 + 1) ** 0.5
        return (x - self.denoised(x, sigma, False)) / sigma


class V(Gaussian):
    def forward(self, x: Tensor, timesteps: Tensor, **_) -> Tensor:
        sigma = self.sampling.sigma(timesteps).reshape(-1, 1, 1, 1)
        scaled = x * (sigma**2 + 1) ** 0.5
        return (scaled / (sigma**2 + 1) - self.denoised(scaled, sigma, False)) * (sigma**2 + 1) ** 0.5 / sigma


class Flow(Gaussian):
    def forward(self, x: Tensor, timesteps: Tensor, **_) -> Tensor:
        sigma = (timesteps / self.sampling.multiplier).reshape(-1, 1, 1, 1)
        return (x - self.denoised(x, sigma, True)) / sigma


def gaussian(kind: str, mean: float):
    """A model of the host around an exact network; all have one latent format, so that they can be mixed."""
    model = tiny("mmdit" if kind == "flow" else {"eps": "unet", "v": "unet_v"}[kind])
    base = model.model
    base.diffusion_model = {"eps": Eps, "v": V, "flow": Flow}[kind](base.model_sampling, mean)
    base.latent_format = comfy.latent_formats.LatentFormat()
    base.latent_format.latent_channels = 4
    return model


@pytest.mark.parametrize("weak_kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("main_kind", ["eps", "v", "flow"])
def test_models_of_any_two_parametrisations(main_kind, weak_kind):
    """D_c + (w - 1)(D_c - D_weak) for two Gaussians: both posterior means at one point, in closed form."""
    main_mean, weak_mean, w = 1.0, -0.5, 2.5
    main, weak = gaussian(main_kind, main_mean), gaussian(weak_kind, weak_mean)
    flow, level = main_kind == "flow", float(tiny("unet").model.model_sampling.sigmas[600])  # one of the levels that eps models know
    level = level / (1 + level) if flow else level
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([level, 0.0])
    with torch.inference_mode():
        result = comfy.sample.sample_custom(
            attach_node(main, weak, w), noise, 1.0, comfy.samplers.sampler_object("euler"), sigmas, tools.cond(1), tools.cond(2),
            torch.zeros(1, 4, 8, 8), disable_pbar=True, seed=0,
        )  # fmt: skip
    x = main.get_model_object("model_sampling").noise_scaling(sigmas[0], noise, torch.zeros_like(noise), False)
    cond, poor = (Gaussian(None, mean).denoised(x, sigmas[0], flow) for mean in (main_mean, weak_mean))
    assert close(result, cond + (w - 1) * (cond - poor), 5e-4 if weak_kind == main_kind else 2e-3)


@pytest.mark.parametrize("to_flow", [True, False])
def test_reparametrisation_keeps_the_point_and_comes_back(to_flow):
    x0, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64).unbind()
    level = torch.tensor([0.3, 0.8, 0.95], dtype=torch.float64)
    t = level.reshape(-1, 1, 1, 1)
    flow_point, eps_point = (1 - t) * x0 + t * noise, x0 + t / (1 - t) * noise
    source, target = (eps_point, flow_point) if to_flow else (flow_point, eps_point)
    sigma = level / (1 - level) if to_flow else level
    moved, moved_level = reparametrise(source, sigma, not to_flow, to_flow)
    torch.testing.assert_close(moved, target)
    torch.testing.assert_close(moved_level, level if to_flow else level / (1 - level))
    torch.testing.assert_close(reparametrise(moved, moved_level, to_flow, not to_flow)[0], source)
