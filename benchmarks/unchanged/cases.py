"""What is recorded: named functions that return tensors. Uses the node ids, the host and nothing of this pack's modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _tiny import KINDS, TinyVAE, call, cond, latent, tiny
from rules import COMBINED, SINGLE, fitted, guided, searched
from torch import Tensor

Case = Callable[[], Any]
SAMPLERS = (
    "heun", "dpm_2", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_2s_ancestral", "uni_pc", "uni_pc_bh2", "euler_ancestral", "lcm",
    "dpm_fast", "ddim", "res_multistep", "deis", "ipndm", "heunpp2", "lms",
)  # fmt: skip
FEW_SAMPLERS = ("heun", "dpmpp_2m_sde", "dpmpp_2s_ancestral", "uni_pc", "euler_ancestral", "dpm_fast")
SOLVERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2s_ancestral", "dpmpp_2m_sde")
ALL = "apg+pag+auto+interval+ag"


def cases() -> dict[str, Case]:
    """All cases by name; the unet has the most."""
    found: dict[str, Case] = {}
    for kind in KINDS:
        whole = kind == "unet"
        for names in ("", *SINGLE, *(COMBINED if kind in ("unet", "flux") else COMBINED[:6]), "pag_layers"):
            found[f"rules/{kind}/euler/{names or 'none'}"] = functools.partial(sampled, kind, names)
        for sampler in SAMPLERS if whole else FEW_SAMPLERS:
            for names in ("interval+ag", "apg_window+pag_window+auto+ag_same")[0 if whole else 1 :]:
                found[f"samplers/{kind}/{sampler}/{names}"] = functools.partial(sampled, kind, names, sampler)
        for sampler in ("ddim", "dpmpp_2m"):
            found[f"learned/{kind}/{sampler}/linear"] = functools.partial(sampled, kind, "linear_cfg+pag", sampler)
        found[f"learned/{kind}/dpmpp_2m/policy"] = functools.partial(sampled, kind, "policy+apg", "dpmpp_2m")
        setups = _setups(("", "fa+pag+ag", ALL) if whole else (ALL,) if kind != "unet_v" else ())
        large = _large() if kind != "unet_v" else {}
        for name, case in (setups | _cfgpp(SOLVERS if kind in ("unet", "flux") else SOLVERS[:1]) | large).items():
            group, _, rest = name.partition("/")
            found[f"{group}/{kind}/{rest}"] = functools.partial(case, kind)
    return found


def sampled(
    kind: str, names: str, sampler: str = "euler", *, steps: int = 6, size: tuple[int, int] = (8, 8), batch: int = 2, **inputs: Any
) -> Tensor:
    """KSampler's latent; the rules of ``names`` on the model."""
    model = guided(inputs.pop("model", tiny(kind)), kind, names, sampler, steps)
    settings = {
        "positive": cond(1), "negative": cond(2), "latent_image": latent(model, batch, *size), "seed": 3, "steps": steps, "cfg": 4.0,
        "sampler_name": sampler, "scheduler": "normal", "denoise": 1.0,
    }  # fmt: skip
    return call("KSampler", model=model, **settings | inputs)[0]["samples"]


# --- what is around the rules ----------------------------------------------------------------------------------------


def _setups(combinations: Sequence[str]) -> dict[str, Callable[[str], Any]]:
    """Functions of the kind of model, by "group/name"."""
    found: dict[str, Callable[[str], Any]] = {}
    for names in combinations:
        label = names or "none"
        found |= {
            f"setups/{label}/cfg1": functools.partial(sampled, names=names, cfg=1.0),
            f"setups/{label}/one_row": functools.partial(sampled, names=names, batch=1, size=(8, 12)),
            f"setups/{label}/three_rows": functools.partial(sampled, names=names, batch=3, sampler="dpmpp_2m"),
            f"setups/{label}/denoise": functools.partial(_from_picture, names=names),
            f"setups/{label}/mask": functools.partial(_masked, names=names),
            f"setups/{label}/mask_dpm_fast": functools.partial(_masked, names=names, sampler="dpm_fast"),
            f"setups/{label}/areas": functools.partial(_regional, names=names),
            f"setups/{label}/times": functools.partial(_timed, names=names),
            f"setups/{label}/dual_cfg": functools.partial(_guider, names=names, guider="DualCFGGuider"),
            f"setups/{label}/basic": functools.partial(_guider, names=names, guider="BasicGuider"),
            f"setups/{label}/perp_neg": functools.partial(_guider, names=names, guider="PerpNegGuider"),
            f"setups/{label}/rescale_cfg": functools.partial(_patched, names=names, node="RescaleCFG", inputs={"multiplier": 0.7}),
            f"setups/{label}/host_pag": functools.partial(_patched, names=names, node="PerturbedAttentionGuidance", inputs={"scale": 1.0}),
            f"setups/{label}/cfg_zero": functools.partial(_patched, names=names, node="CFGZeroStar", inputs={}),
            f"setups/{label}/skip_last": functools.partial(_advanced, names=names),
            f"setups/{label}/split": functools.partial(_split, names=names),
        }
    found["setups/compare"] = _compared
    found["setups/linear_fit"] = lambda kind: fitted(kind, "dpmpp_2m", 8)[1].encode()
    found["setups/policy_search"] = lambda kind: searched(kind, "heun", 3)[1].encode()
    return found


def _from_picture(kind: str, names: str) -> Tensor:
    return sampled(kind, names, "dpmpp_2m", latent_image=latent(tiny(kind), 2, seed=8), denoise=0.6)


def _masked(kind: str, names: str, sampler: str = "euler") -> Tensor:
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1.0
    (picture,) = call("SetLatentNoiseMask", samples=latent(tiny(kind), 2, seed=8), mask=mask)
    return sampled(kind, names, sampler, latent_image=picture)


def _regional(kind: str, names: str) -> Tensor:
    (left,) = call("ConditioningSetArea", conditioning=cond(4), width=32, height=64, x=0, y=0, strength=1.0)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 24:] = 1.0
    (right,) = call("ConditioningSetMask", conditioning=cond(5), mask=mask, strength=0.8, set_cond_area="default")
    (both,) = call("ConditioningCombine", conditioning_1=left, conditioning_2=right)
    (positive,) = call("ConditioningCombine", conditioning_1=both, conditioning_2=cond(1))
    return sampled(kind, names, positive=positive)


def _timed(kind: str, names: str) -> Tensor:
    (early,) = call("ConditioningSetTimestepRange", conditioning=cond(4), start=0.0, end=0.5)
    (late,) = call("ConditioningSetTimestepRange", conditioning=cond(5), start=0.5, end=1.0)
    (positive,) = call("ConditioningCombine", conditioning_1=early, conditioning_2=late)
    return sampled(kind, names, "dpmpp_2m", positive=positive)


def _patched(kind: str, names: str, node: str, inputs: dict[str, Any]) -> Tensor:
    return sampled(kind, names, model=call(node, model=tiny(kind), **inputs)[0])


def _sigmas(model: Any, steps: int = 6) -> Tensor:
    return call("BasicScheduler", model=model, scheduler="normal", steps=steps, denoise=1.0)[0]


def _guider(kind: str, names: str, guider: str) -> list[Tensor]:
    model = guided(tiny(kind), kind, names)
    inputs = {
        "DualCFGGuider": {"cond1": cond(1), "cond2": cond(4), "negative": cond(2), "cfg_conds": 4.0, "cfg_cond2_negative": 2.0},
        "BasicGuider": {"conditioning": cond(1)},
        "PerpNegGuider": {"positive": cond(1), "negative": cond(2), "empty_conditioning": cond(6), "cfg": 4.0, "neg_scale": 1.0},
    }[guider]
    return advanced(model, call(guider, model=model, **inputs)[0], "euler", _sigmas(model))


def advanced(model: Any, guider: Any, sampler: Any, sigmas: Tensor, picture: dict | None = None) -> list[Tensor]:
    """Both latents of SamplerCustomAdvanced."""
    if isinstance(sampler, str):
        (sampler,) = call("KSamplerSelect", sampler_name=sampler)
    out = call(
        "SamplerCustomAdvanced", noise=call("RandomNoise", noise_seed=3)[0], guider=guider, sampler=sampler, sigmas=sigmas,
        latent_image=picture or latent(model, 2),
    )  # fmt: skip
    return [one["samples"] for one in out]


def _advanced(kind: str, names: str) -> Tensor:
    """KSampler (Advanced) for the middle of a schedule, with what is left of the noise."""
    model = guided(tiny(kind), kind, names)
    return call(
        "KSamplerAdvanced", model=model, add_noise="enable", noise_seed=3, steps=8, cfg=4.0, sampler_name="euler", scheduler="normal",
        positive=cond(1), negative=cond(2), latent_image=latent(model, 2), start_at_step=2, end_at_step=6,
        return_with_leftover_noise="enable",
    )[0]["samples"]  # fmt: skip


def _split(kind: str, names: str) -> list[Tensor]:
    """Two samplers in a row with one MODEL."""
    model = guided(tiny(kind), kind, names)
    (guider,) = call("CFGGuider", model=model, positive=cond(1), negative=cond(2), cfg=4.0)
    high, low = call("SplitSigmas", sigmas=_sigmas(model, 8), step=4)
    first = advanced(model, guider, "heun", high)
    return first + advanced(model, guider, "euler", low, {"samples": first[0]})


def _compared(kind: str) -> None:
    """Only the latents that it samples count: the picture shows seconds."""
    columns = ("", "apg", "apg+pag+auto", "ag_terms+pag")
    call(
        "LodestarCompare", models={f"model{i}": guided(tiny(kind), kind, names) for i, names in enumerate(columns)}, positive=cond(1),
        negative=cond(2), latent_image=latent(tiny(kind), 2), vae=TinyVAE(tiny(kind).model.latent_format.latent_channels), steps=5, cfg=4.0,
    )  # fmt: skip


# --- CFG++ -----------------------------------------------------------------------------------------------------------


def _cfgpp(solvers: Sequence[str]) -> dict[str, Callable[[str], Any]]:
    found: dict[str, Callable[[str], Any]] = {}
    for solver in solvers:
        for names in ("pag+auto", "interval"):
            found[f"cfgpp/{solver}/{names or 'none'}"] = functools.partial(_cfgpp_sampled, names=names, sampler=solver)
        found[f"cfgpp/{solver}/mask"] = functools.partial(_cfgpp_sampled, names="", sampler=solver, masked=True)
        found[f"cfgpp/{solver}/lambda1"] = functools.partial(_cfgpp_sampled, names="pag", sampler=solver, lambda_=1.0, eta=0.3)
        found[f"cfgpp/{solver}/history"] = functools.partial(_cfgpp_sampled, names="", sampler=solver, lambda_=0.3, history="guided")
    found["cfgpp/apg"] = functools.partial(_cfgpp_sampled, names="apg", sampler="euler")
    found["cfgpp/inversion"] = functools.partial(_inverted, names="")
    found["cfgpp/inversion_pag"] = functools.partial(_inverted, names="pag+auto")
    return found


def _cfgpp_sampled(kind: str, names: str, masked: bool = False, **inputs: Any) -> list[Tensor]:
    model = guided(tiny(kind), kind, names)
    (sampler,) = call("LodestarCFGPP", **inputs)
    picture = latent(model, 2)
    if masked:
        mask = torch.zeros(1, 64, 64)
        mask[:, 16:48] = 1.0
        (picture,) = call("SetLatentNoiseMask", samples=latent(model, 2, seed=8), mask=mask)
    out = call(
        "SamplerCustom", model=model, add_noise=True, noise_seed=3, cfg=1.0, positive=cond(1), negative=cond(2), sampler=sampler,
        sigmas=_sigmas(model, 7), latent_image=picture,
    )  # fmt: skip
    return [one["samples"] for one in out]


def _inverted(kind: str, names: str) -> list[Tensor]:
    model = guided(tiny(kind), kind, names)
    noise, sigmas = call(
        "LodestarCFGPPInvert", model=model, positive=cond(1), negative=cond(2), latent_image=latent(model, 2, seed=8),
        sigmas=_sigmas(model), lambda_=0.4,
    )  # fmt: skip
    (sampler,) = call("LodestarCFGPP", lambda_=0.4)
    out = call(
        "SamplerCustom", model=model, add_noise=False, noise_seed=3, cfg=1.0, positive=cond(4), negative=cond(2), sampler=sampler,
        sigmas=sigmas, latent_image=noise,
    )  # fmt: skip
    return [noise["samples"], sigmas, out[0]["samples"]]


# --- FreCaS ----------------------------------------------------------------------------------------------------------


def _large() -> dict[str, Callable[[str], Any]]:
    found: dict[str, Callable[[str], Any]] = {}
    for names in ("", "apg+pag", "auto+ag", "interval"):
        found[f"frecas/{names or 'none'}"] = functools.partial(_cascade, names=names)
    for sampler in ("heun", "dpmpp_2m", "euler_ancestral", "dpm_fast", "uni_pc"):
        found[f"frecas/{sampler}"] = functools.partial(_cascade, names="pag", sampler=sampler)
    found["frecas/maps_alone"] = functools.partial(_cascade, names="", map_weight=1.0, high_scale=4.0)
    found["frecas/no_maps"] = functools.partial(_cascade, names="", map_weight=0.0, gamma=2.0, resize="bicubic")
    found["frecas/three"] = functools.partial(_cascade, names="apg", third=True, scheduler="simple")
    found["frecas/cfg1"] = functools.partial(_cascade, names="pag", cfg=1.0)
    found["frecas/mask"] = functools.partial(_cascade, names="apg", masked=True)
    found["frecas/parts"] = _parts
    return found


def _cascade(kind: str, names: str, third: bool = False, masked: bool = False, **inputs: Any) -> list[Tensor]:
    model = guided(tiny(kind), kind, names)
    end = 0.9 if kind.startswith("unet") else 0.4
    stages = f"64x64: 4 steps, end {end}; 128x96: 3 steps" + (f", end {end}; 128x128: 2 steps" if third else "")
    if masked:
        mask = torch.zeros(1, 128, 128)
        mask[:, :64] = 1.0
        (inputs["latent"],) = call("SetLatentNoiseMask", samples=latent(model, 2, 16, 16, seed=8), mask=mask)
        stages = f"64x64: 4 steps, end {end}; 128x128: 3 steps"
    settings = {"seed": 3, "cfg": 4.0, "high_scale": 7.0, "batch_size": 2, "stages": stages, "vae": _vae(model)}
    last, every = call("LodestarFreCaS", model=model, positive=cond(1), negative=cond(2), **settings | inputs)
    return [last["samples"], *(one["samples"] for one in every)]


def _vae(model: Any) -> TinyVAE:
    return TinyVAE(model.model.latent_format.latent_channels)


def _parts(kind: str) -> list[Tensor]:
    """Two stages made of the host's samplers and Stage Transition."""
    model = guided(tiny(kind), kind, "apg+pag")
    end = 0.9 if kind.startswith("unet") else 0.4
    common = {"model": model, "vae": _vae(model), "seed": 3, "batch_size": 2}
    picture, sigmas, seed = call("LodestarStageTransition", width=64, height=64, steps=4, end=end, stage=0, **common)
    results = []
    for stage in (0, 1):
        if stage:
            picture, sigmas, seed = call(
                "LodestarStageTransition", width=128, height=96, steps=3, end=0.0, stage=1, denoised=picture, sigmas=sigmas, **common
            )
        _, picture = call(
            "SamplerCustom", model=model, add_noise=stage == 0, noise_seed=seed, cfg=4.0, positive=cond(1), negative=cond(2),
            sampler=call("KSamplerSelect", sampler_name="euler")[0], sigmas=sigmas, latent_image=picture,
        )  # fmt: skip
        results += [sigmas, picture["samples"]]
    return results
