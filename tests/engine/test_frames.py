"""Models whose batch axis is the frames of one video: SVD and SV3D of the host. Such a batch is one sample."""

from __future__ import annotations

import inspect
from typing import ClassVar

import pytest
import tools
import torch
from adaptive_tools import ag, between
from conditioning_tools import windows
from tools import close, comfy, cond, counted, guided, log_of, pag

from comfy_extras.nodes_context_windows import ContextWindowsManualNode  # isort: skip
from lodestar.guiders.learning.runs import Runs
from lodestar.guiders.policies.linear_ag.fit import fit
from lodestar.guiders.shapers.apg import APG
from lodestar.guiders.spaces import Layout, norm_per_sample
from lodestar.guiders.terms.pag import rescaled

FRAMES = 5
STEPS = 5

# The host's fix for causal video models adds a frame to its windows that num_video_frames does not count.
WINDOWS = inspect.signature(ContextWindowsManualNode.execute).parameters
WHOLE_WINDOWS = {"causal_window_fix": False} if "causal_window_fix" in WINDOWS else {}


class TinySVD(comfy.supported_models.SVD_img2vid):
    """The host's video UNet, with temporal layers that need every frame."""

    unet_extra_config: ClassVar = {"num_heads": 4, "num_head_channels": -1, "attn_precision": torch.float32}


def svd():
    config = {
        **tools.UNET, "in_channels": 8, "adm_in_channels": 768, "use_linear_in_transformer": True, "num_classes": "sequential",
        "use_temporal_attention": True, "use_temporal_resblock": True, "extra_ff_mix_layer": True, "use_spatial_context": True,
        "merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1],
    }  # fmt: skip
    return tools.patcher(TinySVD(config).get_model({}, device=torch.device("cpu")))


def noise(frames=FRAMES):
    """Frames of different sizes, so that they would switch at different steps if each were a sample."""
    noise = torch.randn(frames, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return noise * torch.linspace(1, 1.6, frames).reshape(-1, 1, 1, 1)


def run(model, steps=STEPS, frames=FRAMES):
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise(frames), steps, 3.0, "euler", "karras", cond(1), cond(2), torch.zeros(frames, 4, 8, 8), disable_pbar=True, seed=1
        )


def test_one_gamma_and_one_switch_for_the_whole_video():
    model = svd()
    everything = guided(model, ag(1.0))
    plain = run(everything)
    assert torch.equal(plain, run(model))
    (curve,) = (curve for name, curve in tools.curves_of(log_of(everything)).items() if name.startswith("cosine"))
    for step in (2, 3):
        main = guided(model, ag(between([curve[i] for i in range(STEPS)], step)))
        with counted(model) as rows:
            result = run(main)
        assert rows == [2 * FRAMES] * (step + 1) + [FRAMES] * (STEPS - step - 1)
        assert [switch.steps for switch in log_of(main).switches.values()] == [(step + 1,)]
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("threshold", [-1.0, 0.69, 0.9, 0.999])
@pytest.mark.parametrize("more", [{}, {"switch": "same_step"}, {"stop_terms": True}], ids=str)
def test_no_threshold_drops_single_frames(threshold, more):
    model = svd()
    with counted(model) as rows:
        result = run(guided(model, pag(model, 0.5), ag(threshold, **more)), steps=3)
    assert torch.isfinite(result).all()
    assert all(count % FRAMES == 0 for count in rows)


def test_the_norm_of_apg_is_that_of_the_whole_video():
    """One step: the update is written out in float64."""
    model = svd()
    predictions = {}

    def keep(args):
        predictions.update(c=args["cond_denoised"].double(), u=args["uncond_denoised"].double())
        return args["denoised"]

    plain = model.clone()
    plain.set_model_sampler_post_cfg_function(keep)
    run(plain, steps=1)
    c, u = predictions["c"].flatten(), predictions["u"].flatten()
    g = c - u
    threshold = float(g.norm()) / 2
    g = g / 2
    g = g - (g @ c) / (c @ c) * c
    expected = model.model.process_latent_out((c + 2.0 * g).reshape(FRAMES, 4, 8, 8))
    main = guided(model, APG(eta=0.0, norm_threshold=threshold, momentum=0.0))
    assert close(run(main, steps=1), expected.float(), 1e-3)  # the step begins at sigma 700, and x is in float32


@pytest.mark.parametrize("rule", [APG(), ag(0.9)], ids=["APG", "AG"])
def test_context_windows_of_frames(rule):
    """The host gives the network the number of frames in a window; the video stays one sample."""
    model = windows(dim=0, **WHOLE_WINDOWS)(svd())
    with counted(model) as rows:
        result = run(guided(model, rule), steps=3)
    assert torch.isfinite(result).all()
    assert all(count % 3 == 0 for count in rows)


def test_linear_ag_is_fitted_to_whole_videos():
    model = svd()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", STEPS)
    latent = {"samples": torch.zeros(FRAMES, 4, 8, 8)}
    runs = Runs("LinearAG: fit", model, [cond(1)], cond(2), latent, comfy.samplers.sampler_object("euler"), sigmas, 3.0, 0)
    with torch.inference_mode(), counted(model) as rows:
        coefficients = fit(runs, 2)
    assert coefficients.trajectories == 2
    assert rows == [2 * FRAMES] * (2 * STEPS)


def test_a_batch_of_pictures_stays_a_batch():
    model = tools.tiny("unet")
    main = guided(model, ag(2.0), APG())
    tools.sample(main, latent=tools.empty_latent(model, 2, 8), steps=2)
    video, pictures = Layout(one_video=True), Layout()
    x, y = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    assert norm_per_sample(x, video).shape == (1,)
    assert norm_per_sample(x, pictures).shape == (3,)
    assert torch.equal(video.join(video.split(x), x), x)
    whole = rescaled(x.reshape(1, -1), y.reshape(1, -1), 0.7, pictures).reshape(x.shape)
    assert torch.equal(rescaled(x, y, 0.7, video), whole)
