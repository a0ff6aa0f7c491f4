"""DDIM inversion with CFG++. Chung et al., ICLR 2025, arXiv 2406.08070, from the authors' code: from a picture to its noise.

The roles of the predictions are swapped: the clean estimate is the unconditional one, and the noise is guided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.utils import model_trange
from torch import Tensor

from ..engine.curves import Quantity
from ..engine.run import announcing_steps
from ..engine.telemetry import tracing
from ..spaces import Level, is_flow, levels_of
from .sampler import INVERSION, Predictor, check_guider, check_lambda
from .solvers import cfgpp_step

NOISE = Quantity("strength of the noise that is found", "noise")
LARGEST_TIME = 0.9999  # of a flow model's t: at 1 nothing is left of a latent in which the host could be handed the noise


def inversion_step(x: Tensor, guided: Tensor, uncond: Tensor, now: Level, then: Level) -> Tensor:
    """a' D_u + s' eps_lambda, from the less noisy level ``now``, where D_lambda and D_u [B, ...] are evaluated, to ``then``."""
    return cfgpp_step(x, uncond, guided, now, then)


def first_step(x: Tensor, scaled: Tensor, guided: Tensor) -> Tensor:
    """The same from a clean x, whose noise D cannot tell: the network's output is that of the next level, as in the authors' code.

    scaled: x times the number that makes the network's input there what it is here. guided: D_lambda at ``scaled``. What the network
    says is (scaled - D) / s', a noise on eps models and a velocity on flow models, where x + s' v is (1 - s') x + s' (x + v).
    """
    return x + scaled - guided


def noise_strength(x: Tensor, clean: Tensor, level: Level) -> Tensor:
    """Root mean square [] of the noise in x = a ``clean`` + s noise at a level. Noise from which a sampler could have started has 1."""
    return ((x - level.a * clean) / level.s).float().square().mean().sqrt()


def invert(
    model: Any, positive: list, negative: list, latent: dict[str, Any], sigmas: Tensor, lambda_: float, node: str | None = None
) -> tuple[dict[str, Any], Tensor]:
    """(LATENT, SIGMAS) from which sampling without added noise leads back to ``latent``. ``node``: that of the graph which asks for it.

    The mask of an inpainting latent is dropped: sampling would paste the noise, not the picture, into what it protects.
    Raises ValueError for a schedule that does not fall.
    """
    from comfy_extras.nodes_custom_sampler import Noise_EmptyNoise  # here, so that a change of the host's nodes stops this one alone

    check_lambda(INVERSION, lambda_)
    if len(sigmas) < 2 or not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(f"{INVERSION} takes sigmas that fall from noise to picture, as a scheduler makes them, not {sigmas.tolist()}.")
    if is_flow(model.get_model_object("model_sampling")):
        sigmas = sigmas.clamp(max=LARGEST_TIME)
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    samples = guider.sample(
        Noise_EmptyNoise().generate_noise({"samples": samples}),
        samples,
        Inversion(lambda_, node),
        sigmas,
        callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio") and key != "noise_mask"}
    return kept | {"samples": samples.to(comfy.model_management.intermediate_device())}, sigmas


def _input_scale(model_sampling: Any, sigma: Tensor) -> Tensor:
    """What the host multiplies x by, before the network gets it."""
    return model_sampling.calculate_input(sigma, torch.ones_like(sigma))


class Inversion(comfy.samplers.Sampler):
    """The way from the last level of a schedule up to its first, as something that the host's guiders can run."""

    reads_uncond = INVERSION  # see engine/host.py

    def __init__(self, lambda_: float, node: str | None = None) -> None:
        self.lambda_, self.node = lambda_, node

    def predictor(self, guider: Any, extra_args: dict[str, Any]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """What is asked for the prediction behind the noise (D_lambda) and the one behind the clean estimate (D_u)."""
        return Predictor(guider, guider, extra_args, self.lambda_)

    @torch.no_grad()
    def sample(
        self,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[[int, Tensor, Tensor, int], None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """The latent to which ``noise_scaling`` adds no noise. Step i of sampling goes from level i to i + 1; here it is undone."""
        check_guider(INVERSION, guider)
        model_sampling = guider.inner_model.model_sampling
        levels = levels_of(sigmas.tolist(), is_flow(model_sampling))
        both = self.predictor(guider, extra_args)
        x = model_sampling.noise_scaling(sigmas[-1], noise, latent_image)
        steps = len(sigmas) - 1
        with announcing_steps(guider.model_options, sigmas) as at_step, tracing(self.node, NOISE, steps) as trace:
            for done in model_trange(steps, disable=disable_pbar):
                i = steps - 1 - done  # the step of sampling that is undone
                at_step(i)
                now, then = levels[i + 1], levels[i]
                if now.s > 0:
                    guided, clean = both(x, sigmas[i + 1])
                    x = inversion_step(x, guided, clean, now, then)
                else:
                    scaled = x * _input_scale(model_sampling, sigmas[i + 1]) / _input_scale(model_sampling, sigmas[i])
                    guided, _ = both(scaled, sigmas[i])
                    clean, x = x, first_step(x, scaled, guided)
                if trace is not None:
                    trace.add(done, noise_strength(x, clean, then))
                if callback is not None:
                    callback(done, guided, x, steps)
        return model_sampling.inverse_noise_scaling(sigmas[0], x)
