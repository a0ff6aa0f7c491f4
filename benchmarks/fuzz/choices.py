"""Random graphs: a seed gives a ``Graph``, which is plain data. Needs no host."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

Piece = tuple[str, dict[str, Any]]  # a node id and its inputs; "@..." stands for what only a built graph has (see building.py)
WEAK, NEGATIVE, MASK, FIT, POLICY, EMPTY = "@weak", "@negative", "@mask", "@coefficients", "@policy", "@empty"
OURS = "Lodestar"
KINDS = ("unet", "unet_v", "mmdit", "flux", "wan", "svd")
# Between these cosines the images of a batch switch at different steps.
COSINES = {
    "unet": (0.86, 0.95), "unet_v": (0.55, 0.85), "mmdit": (0.82, 0.95), "flux": (0.86, 0.96), "wan": (0.88, 0.95), "svd": (0.4, 0.6),
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """chain: nodes on the MODEL. positive, negative: changes of the two prompts. latent: shape and mask. sampling: how it is sampled."""

    seed: int
    kind: str
    chain: tuple[Piece, ...]
    positive: tuple[Piece, ...]
    negative: tuple[Piece, ...]
    latent: dict[str, Any]
    sampling: Piece

    def __str__(self) -> str:
        parts = [self.kind, *map(_named, self.chain)]
        parts += [f"{name}: {_named(piece)}" for name in ("positive", "negative") for piece in getattr(self, name)]
        return " > ".join([*parts, f"latent {_values(self.latent)}", _named(self.sampling)])

    @property
    def guided(self) -> bool:
        """Whether a node of ours is on the MODEL."""
        return any(name.startswith(OURS) for name, _ in self.chain)


def _named(piece: Piece) -> str:
    return f"{piece[0]}({_values(piece[1])})"


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def random_graph(seed: int) -> Graph:
    """The graph of a seed."""
    rng = Random(seed)
    kind = rng.choices(KINDS, (5, 2, 4, 4, 2, 1.5))[0]
    length = rng.choices(range(7), (2, 4, 5, 4, 3, 2, 1))[0]
    chain = tuple(_ours(rng, kind) if rng.random() < 0.6 else _host(rng, kind) for _ in range(length))
    latent = _latent(rng, kind)
    return Graph(
        seed,
        kind,
        chain,
        tuple(_conditioning(rng, kind, 0.35)),
        tuple(_conditioning(rng, kind, 0.12)),
        latent,
        _sampling(rng, kind, latent),
    )


# --- nodes on the MODEL ----------------------------------------------------------------------------------------------


def _window(rng: Random) -> dict[str, float]:
    if rng.random() < 0.6:
        return {}
    start = rng.choice((0.0, 0.2, 0.4))
    return {"start_percent": start, "end_percent": rng.choice([end for end in (0.3, 0.6, 0.9, 1.0) if end >= start])}


def _ours(rng: Random, kind: str) -> Piece:
    name = rng.choices(
        ("APG", "PAG", "Autoguidance", "GuidanceInterval", "AdaptiveGuidance", "FrequencyGuidance", "LinearAG", "GuidancePolicy"),
        (6, 6, 4, 5, 5, 3, 1, 0.4),
    )[0]
    inputs: dict[str, Any] = {
        "APG": lambda: {
            "eta": rng.choice((0.0, 0.5, 1.0)), "norm_threshold": rng.choice((0.0, 2.5, 15.0)), "momentum": rng.choice((-0.75, 0.0, 0.3)),
            **_window(rng),
        },
        "PAG": lambda: {
            "scale": rng.choice((0.0, 0.5, 2.0)), "layers": _layers(rng, kind), "rescale": rng.choice((0.0, 0.0, 0.7)),
            "joint_attention": rng.choice(("masked", "passthrough")), **_window(rng),
        },
        "Autoguidance": lambda: {"weak_model": WEAK, "scale": rng.choice((1.0, 1.5, 2.0)), **_window(rng)},
        "GuidanceInterval": lambda: {"start_percent": 0.2, "end_percent": 0.7, **_window(rng)},
        "AdaptiveGuidance": lambda: {
            "threshold": rng.choice((-1.0, 1.001, *[round(rng.uniform(*COSINES[kind]), 3)] * 4)),
            "space": rng.choice(("denoised", "denoised", "noise", "velocity")),
            "switch": rng.choice(("next_step", "same_step")), "stop_terms": rng.random() < 0.3,
        },
        "FrequencyGuidance": lambda: {"low_scale": rng.choice((1.0, 4.0)), "high_scale": 6.0, "low_width": 32, "low_height": 32},
        "LinearAG": lambda: {"coefficients": FIT, "second_half": rng.choice(("conditional", "cfg"))},
        "GuidancePolicy": lambda: {"policy": POLICY},
    }[name]()  # fmt: skip
    return OURS + name, inputs


def _layers(rng: Random, kind: str) -> str:
    if rng.random() < 0.02:
        return "double:99"  # there is none
    if kind in ("unet", "unet_v", "svd"):
        return rng.choice(("auto", "middle", "input:1", "output:0, output:2", "middle, output:1"))
    return rng.choice(("auto", "auto", "double:1", "double:0-1", *(("single:0",) if kind == "flux" else ())))


def neutral(rng: Random) -> Piece:
    """A node of ours with settings that are to change nothing."""
    return rng.choice(
        (
            ("LodestarAPG", {"eta": 1.0, "norm_threshold": 0.0, "momentum": 0.0}),
            ("LodestarPAG", {"scale": 0.0, "layers": "auto"}),
            ("LodestarAutoguidance", {"weak_model": WEAK, "scale": 1.0}),
            ("LodestarAdaptiveGuidance", {"threshold": 1.001}),
            ("LodestarGuidanceInterval", {"start_percent": 0.0, "end_percent": 1.0}),
        )
    )


def _host(rng: Random, kind: str) -> Piece:
    skipped = {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": rng.choice((0.5, 1.0))}
    cached = {"reuse_threshold": rng.choice((0.1, 3.0)), "start_percent": 0.1, "end_percent": 0.95}
    free_u = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
    window = {
        "context_length": 2,
        "context_overlap": 1,
        "fuse_method": rng.choice(("pyramid", "relative")),
        "dim": 2 if kind == "wan" else 0,
    }
    anywhere: list[Piece] = [
        ("RescaleCFG", {"multiplier": 0.7}),
        ("CFGZeroStar", {}),
        ("CFGNorm", {"strength": 0.8, "pre_cfg": rng.random() < 0.3}),
        ("TCFG", {}),
        ("Mahiro", {}),
        ("Epsilon Scaling", {"scaling_factor": 1.02}),
        ("TemporalScoreRescaling", {"tsr_k": 0.7}),
        ("RenormCFG", {"renorm_cfg": 1.0}),
        ("FreSca", {"scale_high": 1.5, "freq_cutoff": 2}),
        ("APG", {"eta": 0.5, "norm_threshold": 2.0, "momentum": 0.0}),  # the host's takes its momentum from a stopped run into the next
        ("CFGOverride", {"cfg": rng.choice((1.0, 2.0)), "start_percent": 0.0, "end_percent": 0.6}),
        ("EasyCache", cached),
        ("LazyCache", cached),
        ("NAGuidance", {}),
        ("DifferentialDiffusion", {}),
        ("PerpNeg", {"empty_conditioning": EMPTY}),
        ("VideoLinearCFGGuidance", {"min_cfg": 1.5}),
        ("ContextWindowsManual", window),
        ("ModelNoiseScale", {"noise_scale": 0.9}),
        ("lora", {"seed": rng.randrange(9)}),
        ("deepcopy", {}),
        ("SkipLayerGuidanceDiTSimple", skipped),
        ("SkipLayerGuidanceDiT", {**skipped, "scale": 1.5}),
    ]
    unet: list[Piece] = [
        ("FreeU", free_u),
        ("FreeU_V2", free_u),
        ("HyperTile", {"tile_size": 32, "swap_size": 1, "scale_depth": rng.random() < 0.5}),
        ("PerturbedAttentionGuidance", {"scale": 1.0}),
        ("SelfAttentionGuidance", {"scale": 0.5, "blur_sigma": 2.0}),
        ("TomePatchModel", {"ratio": 0.3}),
        ("PatchModelAddDownscale", {"block_number": 1, "end_percent": 0.4}),
        ("ModelSamplingDiscrete", {"sampling": rng.choice(("eps", "v_prediction", "lcm")), "zsnr": rng.random() < 0.3}),
        ("UNetSelfAttentionMultiply", {"q": 1.1}),
        ("UNetCrossAttentionMultiply", {"v": 0.9}),
    ]
    flow: list[Piece] = [
        ("ModelSamplingSD3", {"shift": 2.0}),
        ("ModelSamplingFlux", {"width": 64, "height": 64}),
        ("SkipLayerGuidanceSD3", {"layers": "1", "scale": 1.5, "start_percent": 0.0, "end_percent": 0.6}),
        ("ScaleROPE", {"scale_x": 1.1}),
    ]
    return rng.choice(anywhere + (2 * unet if kind in ("unet", "unet_v", "svd") else flow))


# --- prompts, latents ------------------------------------------------------------------------------------------------


def _conditioning(rng: Random, kind: str, share: float) -> list[Piece]:
    if rng.random() > share:
        return []
    seed, start = {"seed": rng.randrange(20, 30)}, rng.choice((0.0, 0.3))
    found: list[Piece] = [
        ("area", {**seed, "width": 32, "height": rng.choice((32, 64)), "x": rng.choice((0, 16)), "y": 0, "strength": 0.8}),
        ("percentage", {**seed, "width": 0.5, "height": 0.5, "x": 0.25, "y": 0.25, "strength": 1.0}),
        ("mask", {**seed, "strength": 0.7, "set_cond_area": rng.choice(("default", "mask bounds"))}),
        ("times", {**seed, "at": rng.choice((0.3, 0.6))}),
        ("window", {"start": start, "end": 1.0}),
        ("combine", seed),
        ("concat", seed),
        ("average", seed),
        ("hooks", seed),
        ("zero", {}),
    ]
    if kind == "wan":  # areas and masks are for pictures
        found = found[3:]
    if kind == "unet":
        found += [("control", {"strength": 0.5, "end_percent": rng.choice((0.5, 1.0))})] * 2 + [("gligen", {})] * 2
    if kind == "flux":
        found.append(("flux_guidance", {"guidance": 2.0}))
    return rng.sample(found, rng.choice((1, 1, 2)))


def _latent(rng: Random, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": rng.choices((1, 2, 3, 4), (5, 5, 2, 1))[0]}
    found["height"], found["width"] = rng.choice(((8, 8), (8, 8), (8, 12), (12, 8), (16, 16), (9, 7), (10, 6)))
    if kind == "wan":
        found.update(batch=min(found["batch"], 2), frames=rng.choice((1, 2, 4)), height=4, width=rng.choice((4, 6)))
    if kind == "svd":
        found.update(batch=4, height=8, width=8)
    if rng.random() < 0.35:
        found["filled"] = True
        if rng.random() < 0.7:
            found["mask"] = rng.choice(("half", "ones", "soft", "each"))
    elif rng.random() < 0.1 and found["batch"] > 1:
        found["batch_index"] = True
    return found


# --- sampling --------------------------------------------------------------------------------------------------------

SAMPLERS = (
    "euler", "euler", "euler", "euler_ancestral", "heun", "heunpp2", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral",
    "lms", "dpm_fast", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "ddpm", "lcm",
    "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_ancestral", "gradient_estimation", "er_sde", "seeds_2", "seeds_3",
    "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2", "euler_cfg_pp", "dpmpp_2m_cfg_pp",
)  # fmt: skip
SAMPLER_NODES = ("SamplerLCMUpscale", "SamplerEulerCFGpp", "SamplerLMS", "SamplerDPMPP_2S_Ancestral", "SamplerER_SDE")
SCHEDULERS = (
    "normal",
    "normal",
    "simple",
    "karras",
    "exponential",
    "sgm_uniform",
    "ddim_uniform",
    "beta",
    "linear_quadratic",
    "kl_optimal",
)


def _sampling(rng: Random, kind: str, latent: dict[str, Any]) -> Piece:
    name = rng.choices(("KSampler", "KSamplerAdvanced", "guider", "cfgpp", "invert", "frecas", "compare"), (50, 6, 18, 10, 4, 4, 3))[0]
    if name == "frecas" and kind in ("wan", "svd"):  # their VAEs are another matter
        name = "KSampler"
    inputs: dict[str, Any] = {
        "sampler_name": rng.choice(SAMPLERS), "scheduler": rng.choice(SCHEDULERS), "steps": rng.randint(2, 4),
        "cfg": rng.choices((0.0, 1.0, 2.5, 5.0), (1, 3, 8, 6))[0], "seed": rng.randrange(100),
    }  # fmt: skip
    if name in ("KSampler", "compare") and latent.get("filled"):
        inputs["denoise"] = rng.choice((0.4, 0.7, 1.0))
    elif name == "KSamplerAdvanced":
        inputs.update(start_at_step=rng.choice((0, 1)), end_at_step=rng.choice((2, 10)), steps=4)
    elif name == "guider":
        inputs["sampler_name"] = rng.choice((*SAMPLERS, *SAMPLER_NODES))
        inputs["guider"] = rng.choice(("CFGGuider", "CFGGuider", "DualCFGGuider", "BasicGuider", "PerpNegGuider"))
        inputs["split"] = rng.random() < 0.2
    elif name == "cfgpp":
        inputs["solver"] = rng.choice(("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2s_ancestral", "dpmpp_2m_sde"))
        inputs.update(lambda_=rng.choice((0.0, 0.3, 0.6, 1.0)), history=rng.choice(("unconditional", "guided")))
        inputs["repeated"] = rng.random() < 0.1
    elif name == "invert":
        inputs["lambda_"] = rng.choice((0.0, 0.4, 1.0))
    elif name == "frecas":
        inputs.update(high_scale=rng.choice((inputs["cfg"], 7.0)), map_weight=rng.choice((0.0, 0.6)), third=rng.random() < 0.1)
    return name, inputs
