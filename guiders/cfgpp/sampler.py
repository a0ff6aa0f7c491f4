"""CFG++ in the host: takes both predictions out of a guider's evaluation and hands them to the solvers of solvers.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from statistics import mean
from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
import torch
from comfy.utils import model_trange
from torch import Tensor

from ..engine.checks import refuse_foreign_cfg, refuse_lambda, refuse_own_combination
from ..engine.curves import Quantity
from ..engine.host import POST_CFG
from ..engine.plan import Shaper, plan_of
from ..engine.run import announcing_steps, run_of
from ..engine.telemetry import Trace, tracing
from ..spaces import Level, is_flow, levels_of
from .solvers import SOLVERS, Schedule, equivalent_cfg

SAMPLER, INVERSION = "CFG++ Sampler", "CFG++ Inversion"
CURVE = Quantity("equivalent cfg (CFG++)", "weight")
LARGEST_LAMBDA = 2.0


def cfgpp_sampler(
    solver: str, lambda_: float, eta: float = 1.0, history: str = "unconditional", node: str | None = None
) -> comfy.samplers.KSAMPLER:
    """The SAMPLER, of a node of the graph if one is named. Raises ValueError for a ``lambda_`` outside of [0, 2]."""
    check_lambda(SAMPLER, lambda_)
    return comfy.samplers.KSAMPLER(sample_cfgpp, {"solver": solver, "lambda_": lambda_, "eta": eta, "history": history, "node": node})


@torch.no_grad()
def sample_cfgpp(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    solver: str,
    lambda_: float,
    eta: float,
    history: str,
    node: str | None = None,
) -> Tensor:
    """CFG++ in the form of the host's k-diffusion samplers. Raises ValueError, before any evaluation, for what cannot work."""
    inpaint, guider = _unwrapped(model)
    check_guider(SAMPLER, guider)
    model_sampling = guider.model_patcher.get_model_object("model_sampling")
    levels = levels_of(sigmas.tolist(), is_flow(model_sampling))
    _check_start(x, levels)
    solve, split = SOLVERS[solver]
    split = partial(split, eta=eta)
    weights = {
        i: equivalent_cfg(lambda_, now, Level(then.a, split(now, then)[0]))
        for i, (now, then) in enumerate(pairwise(levels))
        if then != now  # a repeated level is no step
    }
    _announce(guider, lambda_, tuple(weights.values()))
    both = Predictor(model, guider, extra_args, lambda_)

    def predict(x: Tensor, sigma: Tensor, i: int | None) -> tuple[Tensor, Tensor]:
        if i is not None:
            at_step(i)
        guided, uncond = both(x, sigma)
        if i is not None:
            _record(guider, trace, i, weights[i] if both.guides else 1.0)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": guided})
        return guided, _masked(inpaint, uncond, sigma, extra_args)

    steps = (i for i in model_trange(len(levels) - 1, disable=disable) if i in weights)
    noise = _noise(x, sigmas, extra_args.get("seed"), solver, getattr(model_sampling, "noise_scale", 1.0))
    with announcing_steps(guider.model_options, sigmas) as at_step, tracing(node, CURVE, len(levels) - 1) as trace:
        return solve(predict, x, Schedule(sigmas, levels, steps, split, noise, history))


sample_cfgpp.reads_uncond = SAMPLER  # see engine/host.py


class Predictor:
    """Both predictions of one evaluation: D_lambda with everything that others add to it, and the plain D_u.

    The cfg of the guider is lambda meanwhile. At exactly 1 the host, and whoever sets it so for a while (a guidance interval), means the
    conditional prediction alone: that then takes the place of D_u. A lambda of 1 is told from it by a rest that float32 rounds away.
    """

    def __init__(self, model: Callable[..., Tensor], guider: Any, extra_args: dict[str, Any], lambda_: float) -> None:
        options = extra_args["model_options"]
        self.model, self.guider = model, guider
        self.arguments = extra_args | {"model_options": options | {POST_CFG: [self._capture, *options.get(POST_CFG, [])]}}
        self.cfg = 1 + 1e-8 if lambda_ == 1 else lambda_
        self.guides = True
        self.uncond: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(D_lambda, D_u), both [B, ...], at x [B, ...] and sigma []. ``guides`` tells whether D_u was there."""
        self.uncond, saved, self.guider.cfg = None, self.guider.cfg, self.cfg
        try:
            guided = self.model(x, sigma.expand(len(x)), **self.arguments)
        finally:
            self.guider.cfg = saved
        if self.uncond is None:
            raise RuntimeError(f"{SAMPLER} saw no prediction: another node replaces the host's combination of them.")
        return guided, self.uncond

    def _capture(self, args: dict[str, Any]) -> Tensor:
        """The first post-CFG function. Packs that replace the host's sampling function do not tell it the weight; the guider has it."""
        self.guides = self.guider.cfg != 1
        self.uncond = args["uncond_denoised"] if self.guides else args["cond_denoised"]
        return args["denoised"]


def _masked(inpaint: Any, denoised: Tensor, sigma: Tensor, extra_args: dict[str, Any]) -> Tensor:
    """The inpainting mask applied as the host applies it to what it returns (KSamplerX0Inpaint)."""
    mask = extra_args.get("denoise_mask")
    if mask is None:
        return denoised
    function = extra_args["model_options"].get("denoise_mask_function")
    if function is not None:
        sigma = sigma.expand(len(denoised))
        mask = function(sigma, mask, extra_options={"model": inpaint.inner_model, "sigmas": inpaint.sigmas})
    return denoised * mask + inpaint.latent_image * (1 - mask)


def _noise(x: Tensor, sigmas: Tensor, seed: int | None, solver: str, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The noise that the host's sampler of that name would add, made when it is first asked for."""

    @cache
    def sampler() -> Callable[[Tensor, Tensor], Tensor]:
        if solver != "dpmpp_2m_sde":
            return comfy.k_diffusion.sampling.default_noise_sampler(x, seed=seed)
        return comfy.k_diffusion.sampling.BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed=seed, cpu=True)

    return lambda sigma, sigma_next: scale * sampler()(sigma, sigma_next)


def _announce(guider: Any, lambda_: float, weights: Sequence[float]) -> None:
    """Tell the log what cfg lambda is worth here, and notice one that is not used."""
    if weights:
        logging.info("%s: lambda_ %g is worth cfg %.3g on this schedule (mean over the steps).", SAMPLER, lambda_, mean(weights))
    if guider.cfg != 1:
        logging.info("%s: the guider's cfg %g is not used.", SAMPLER, guider.cfg)


def _record(guider: Any, trace: Trace | None, i: int, weight: float) -> None:
    """What cfg step ``i`` is worth, for the report and the chart."""
    run = run_of(guider.model_options)
    if run is not None:
        run.record(CURVE, torch.tensor(weight))
    if trace is not None:
        trace.add(i, weight)


# --- what cannot work ------------------------------------------------------------------------------------------------


def check_lambda(node: str, lambda_: float) -> None:
    """Raise ValueError outside of [0, 2], warn above 1."""
    if not 0 <= lambda_ <= LARGEST_LAMBDA:
        raise ValueError(
            f"{node}: lambda_ is {lambda_:g}; it lies between 0 and 1, or up to {LARGEST_LAMBDA:g} for experiments (no cfg value)."
        )
    if lambda_ > 1:
        logging.warning("%s: lambda_ %g is above 1, where CFG++ extrapolates like plain CFG and leaves the data again.", node, lambda_)


def check_guider(node: str, guider: Any) -> None:
    """Raise ValueError if the guider, a rule or another pack's node on its model does not leave both predictions to CFG++."""
    refuse_own_combination(node, guider)
    if not guider.conds.get("negative"):
        raise ValueError(
            f"{node} needs a negative prompt (it may be empty), and this {type(guider).__name__} has none: CFG++ carries the unconditional "
            "noise from step to step. Use SamplerCustom or CFGGuider."
        )
    plan = plan_of(guider.model_options)
    for _, rule in plan.active(Shaper) if plan is not None else ():
        refuse_lambda(rule.name, node)
    refuse_foreign_cfg(node, guider.model_options)


def _check_start(x: Tensor, levels: Sequence[Level]) -> None:
    if any(now.s < then.s for now, then in pairwise(levels)):
        raise ValueError(f"{SAMPLER} needs falling sigmas; to go from a picture to noise use {INVERSION}.")
    if len(levels) > 1 and not x.any():
        raise ValueError(
            f"{SAMPLER} starts from nothing but zeros: turn add_noise on. After {INVERSION}, whose latent is the noise, "
            "use that node's sigmas as well."
        )


def _unwrapped(model: Any) -> tuple[Any, Any]:
    """The host's KSamplerX0Inpaint and the guider in it, which other packs may have wrapped."""
    while not isinstance(model.inner_model, comfy.samplers.CFGGuider):
        model = model.inner_model
    return model, model.inner_model
