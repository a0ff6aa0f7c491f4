"""Facts about the host: its samplers, guiders, slots and latents, each asked in one way."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

CFG_SLOT = "sampler_cfg_function"  # in model_options: the one function that replaces the host's combination
PRE_CFG = "sampler_pre_cfg_function"  # in model_options: the list of functions before it
POST_CFG = "sampler_post_cfg_function"  # in model_options: the list of functions after it
_IN_MODEL = ("object_patches", "injections")  # attributes of a MODEL: what else than LoRAs the host puts into the one loaded model
_AROUND_MODEL = ("wrappers", "callbacks", "hook_patches")  # and what each clone has for itself, besides its options
_AROUND_SAMPLER = ("disable_cfg1_optimization", "denoise_mask_function", "multigpu_options")  # options that leave predictions as they are
CFG_WEIGHTS = ("cfg", "cfg1", "cfg2")  # attributes of the host's guiders
_CFGPP = ("sample_euler_pp",)  # the host's samplers of CFG++ whose names do not say so
_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # in a LATENT that is empty: what its size was computed for


def reads_uncond(sampler: Any) -> str | None:
    """The name of a sampler whose steps use the unconditional prediction itself (CFG++); None for all others.

    The host's and other packs' have ``cfg_pp`` in their names, but for _CFGPP. One of this pack, or its function, has its name in
    ``reads_uncond``.
    """
    function = getattr(sampler, "sampler_function", sampler)
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    known = name.removeprefix("sample_") if "cfg_pp" in name or "cfgpp" in name.lower() or name in _CFGPP else None
    return getattr(function, "reads_uncond", known)


def combines_itself(guider: Any) -> bool:
    """Whether a guider has a way of its own from the conds to the denoised prediction; one of another pack may use the host's in it."""
    import comfy.samplers  # here, because maths that needs no host asks other things of this module

    return type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise


def is_known_to_combine(guider: Any) -> bool:
    """Whether that way is one of the host's (Perp-Neg, dual model ...), which do not use its sampling function."""
    import comfy.samplers

    defining = [cls for cls in type(guider).__mro__ if "predict_noise" in vars(cls) and cls is not comfy.samplers.CFGGuider]
    return any(_is_hosts(cls.__module__) for cls in defining)


def _is_hosts(module: str) -> bool:
    """Whether a module is one of the host's. It loads its own nodes by their files, which the names of these modules are then."""
    return module.startswith("comfy.") or ("comfy_extras" in module and "custom_nodes" not in module)


def is_dual_cfg(guider: Any) -> bool:
    """Whether a guider has two weights and two negative prompts, combined by the host's CFG function."""
    return any(cls.__name__ == "Guider_DualCFG" for cls in type(guider).__mro__)


def keeps_attention_of_uncond(model_options: Mapping[str, Any]) -> bool:
    """Whether a node on the model looks at the self-attention of D_u after every evaluation, as the host's Self-Attention Guidance does."""
    replaced = model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1")
    return bool(replaced and model_options.get("disable_cfg1_optimization"))


def leaves_out_forward_passes(model_options: Mapping[str, Any]) -> bool:
    """Whether the host's EasyCache is on the model, which guesses some forward passes from earlier ones."""
    holder = model_options.get("transformer_options", {}).get("easycache")  # LazyCache's too, which works around the samplers' calls
    return getattr(holder, "name", None) == "EasyCache"


def cfg_slot_owner(model_options: Mapping[str, Any]) -> str | None:
    """What has claimed the CFG slot of a model, by the name of its class or function; None if it is free."""
    function = model_options.get(CFG_SLOT)
    return None if function is None else owner_of(function)


def owner_of(function: Any) -> str:
    """Whose a function in the host's options is, by the name of its class or its own."""
    return getattr(function, "__qualname__", type(function).__name__).split(".")[0]


def has_frames_for_rows(model: Any) -> bool:
    """Whether every latent batch of a MODEL is the frames of one video (SVD, SV3D), as ``is_one_video`` sees it in a run."""
    import comfy.model_base  # here, because maths that needs no host asks other things of this module

    return isinstance(model.model, comfy.model_base.SVD_img2vid)


def is_one_video(guider: Any, batch: int) -> bool:
    """Whether the rows of a batch are the frames of one video (SVD, SV3D). Known once the host has encoded the conds of a run."""
    conds = [cond for conds in guider.conds.values() for cond in conds or ()]
    frames = [cond.get("model_conds", {}).get("num_video_frames") for cond in conds]
    return any(constant is not None and constant.cond == batch for constant in frames)


def with_all_channels(model: Any, latent: Mapping[str, Any]) -> Any:
    """The samples [B, C, ...] of a LATENT as the host's sampler nodes prepare them for a MODEL: an empty one gets its channels and size."""
    import comfy.sample  # here, because maths that needs no host asks other things of this module

    ratios = {name: latent[name] for name in _RATIOS if latent.get(name)}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


def same_latent(a: Any, b: Any) -> bool:
    """Whether two MODELs work on one kind of latent."""
    first, second = a.model.latent_format, b.model.latent_format
    return type(first).__name__ == type(second).__name__ and first.latent_channels == second.latent_channels


def same_weights(a: Any, b: Any) -> bool:
    """Whether two MODELs are clones of one loaded model with the same patches of all kinds that the host puts into it."""
    return a.model is b.model and a.patches_uuid == b.patches_uuid and all(_same(getattr(a, name), getattr(b, name)) for name in _IN_MODEL)


def same_predictions(a: Any, b: Any) -> bool:
    """Whether two MODELs are clones whose predictions nothing tells apart. They may differ in what is done with the predictions."""
    return (
        same_weights(a, b)
        and all(_same(getattr(a, name), getattr(b, name)) for name in _AROUND_MODEL)
        and _same(_of_predictions(a.model_options), _of_predictions(b.model_options))
    )


def _of_predictions(model_options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model_options.items() if not key.startswith("sampler_") and key not in _AROUND_SAMPLER}


def _same(a: Any, b: Any) -> bool:
    """Whether two nested dicts and lists hold the very same things, as clones do."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b


def describe_latent(model: Any) -> str:
    """The kind of latent a MODEL works on, for messages."""
    latent_format = model.model.latent_format
    return f"{type(latent_format).__name__} ({latent_format.latent_channels} channels)"
