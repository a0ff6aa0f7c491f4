"""Tiny random instances of the host's own networks, and identity attention by full attention under an explicit mask.

Importing this needs no host; building a network does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lodestar.guiders.engine.keys import AROUND
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import resolve_layers

torch.set_num_threads(1)  # networks this small lose most of their time to threads that wait for each other


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def explicit(q: Tensor, k: Tensor, v: Tensor, text: int, masked: bool, mask: Tensor | None, scale: float, last: bool = False) -> Tensor:
    """The oracle [B, H, N, d]: full attention in float64 in which an image token sees of the image only itself.

    Without ``masked`` no token sees any other. mask: additive or boolean, [B|1, H|1, N|1, N]. last: the text comes last. Fewer
    queries than keys are the image's.
    """
    q, k, v = q.double(), k.double(), v.double()
    seen = torch.eye(k.shape[2], dtype=torch.bool)
    words = slice(k.shape[2] - text, None) if last else slice(0, text)
    if masked:
        seen[words] = True
        seen[:, words] = True
    if q.shape[2] < k.shape[2]:
        seen = seen[: q.shape[2]] if last else seen[text:]
    logits = q @ k.mT * scale
    if mask is not None:
        logits = logits + (mask.double().log() if mask.dtype == torch.bool else mask.double())
    return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def explicit_call(q, k, v, heads, mask=None, attn_precision=None, *, text, masked, last=False, **kw):
    """The oracle behind the signature of the host's attention functions."""
    assert attn_precision is None
    if not kw.get("skip_reshape"):
        width = q.shape[-1] // heads
        q, k, v = (x.reshape(*x.shape[:2], -1, width).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    masked = masked and text > 0
    out = explicit(q, k, v, text, masked, mask if masked else None, kw.get("scale", q.shape[-1] ** -0.5), last).to(q.dtype)
    return out if kw.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


# --- networks --------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A network of the host with random weights, its inputs for three rows, and what an independent look at it says.

    layers: the names of some layers and, for each, the module inside which its attention runs. In that module, attention call
    number i is the one to perturb if i < len(texts), and has texts[i] text tokens in front or, with ``last``, behind.
    namespace: the module of the host that holds the name of its attention function, where that gets no transformer options.
    """

    network: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    layers: dict[str, nn.Module]
    texts: Sequence[int] = (0,)
    options: dict[str, Any] = field(default_factory=dict)
    last: bool = False
    namespace: Any = None

    def run(self, rows: Sequence[int] = (0, 1, 2), **options: Any) -> Tensor:
        """The network's output for these rows with these transformer options."""

        def pick(x: Any) -> Any:
            if isinstance(x, list):
                return [pick(part) for part in x]
            return x[list(rows)].clone() if isinstance(x, Tensor) and len(x) == 3 else x

        kwargs = {name: pick(x) for name, x in self.kwargs.items()}
        options = {"cond_or_uncond": list(range(len(rows))), **self.options, **options}
        with torch.inference_mode(), ExitStack() as stack:
            for around in options.get(AROUND, ()):
                stack.enter_context(around(self.network))
            return self.network(*map(pick, self.args), **kwargs, transformer_options=options)

    def rule(self, layers: str, joint: str = "masked") -> IdentityAttention:
        model = SimpleNamespace(get_model_object={"diffusion_model": self.network}.get)
        return IdentityAttention(resolve_layers(model, layers), joint)

    def perturbed(self, rule: IdentityAttention, flags: Sequence[bool], **options: Any) -> Tensor:
        """The fused batch with the rule applied to the flagged rows."""
        return self.run(**rule.patch({"cond_or_uncond": [0, 1, 0], **options}, flags))

    def oracle(self, layers: Sequence[str], joint: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Tensor:
        """All rows perturbed, by full attention under an explicit mask, in layers found by their module and not by a hook."""
        state = SimpleNamespace(calls=None)

        def override(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
            if state.calls is None or state.calls >= len(self.texts):
                return func(*args, **kwargs)
            state.calls += 1
            return explicit_call(*args, text=self.texts[state.calls - 1], masked=joint == "masked", last=self.last, **kwargs)

        for name in layers:
            module = self.layers[name]

            def forward(*args: Any, inner: Callable = module.forward, **kwargs: Any) -> Any:
                state.calls = 0
                try:
                    return inner(*args, **kwargs)
                finally:
                    state.calls = None

            monkeypatch.setattr(module, "forward", forward)
        if self.namespace is not None:
            ordinary = self.namespace.optimized_attention
            monkeypatch.setattr(self.namespace, "optimized_attention", partial(override, ordinary))
        out = self.run(optimized_attention_override=override, **options)
        monkeypatch.undo()
        return out


def filled(network: nn.Module) -> nn.Module:
    """Random weights for every parameter (the host leaves them uninitialised): unit gain, norms and biases off their defaults."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        bound = math.sqrt(3 / parameter[0].numel()) if parameter.ndim > 1 else 0.3
        offset = 1.0 if parameter.ndim == 1 else 0.0
        parameter.data.uniform_(offset - bound, offset + bound, generator=generator)
    return network.eval().requires_grad_(False)


def arguments() -> dict[str, Any]:
    import comfy.ops

    return {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


def stacked(**stacks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    return {f"{stack}:{i}": block for stack, blocks in stacks.items() for i, block in enumerate(blocks)}


T = torch.tensor([0.3, 0.6, 0.9])


def unet(**changes: Any) -> nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {
        "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": (1, 2), "transformer_depth": [1, 2], "transformer_depth_output": [1, 1, 2, 2],
        "transformer_depth_middle": 2, "use_spatial_transformer": True, "context_dim": 16, "num_heads": 2, "legacy": False,
    }  # fmt: skip
    return filled(UNetModel(**{**config, **changes}, **arguments()))


def transformers(block: nn.Module) -> nn.Module:
    return next(module for module in block if hasattr(module, "transformer_blocks")).transformer_blocks


def build_unet() -> Case:
    network = unet()
    layers = {
        "input:1": transformers(network.input_blocks[1])[0].attn1,
        "middle:0.1": transformers(network.middle_block)[1].attn1,
        "output:0.0": transformers(network.output_blocks[0])[0].attn1,
    }
    return Case(network, (random(3, 4, 8, 8), T), {"context": random(3, 5, 16)}, layers)


def build_svd() -> Case:
    """Five frames of five tokens in the middle: spatial and temporal attention have the same shape but for the batch."""
    network = unet(
        in_channels=8, use_temporal_attention=True, use_temporal_resblock=True, time_context_dim=16, adm_in_channels=24,
        extra_ff_mix_layer=True, use_spatial_context=True, merge_strategy="learned_with_images", merge_factor=0.0,
        video_kernel_size=[3, 1, 1], num_classes="sequential",
    )  # fmt: skip
    layers = {"middle:0.1": transformers(network.middle_block)[1].attn1, "input:1": transformers(network.input_blocks[1])[0].attn1}

    class Videos(nn.Module):
        """Rows are videos here; to the network they are frames."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = network

        def forward(self, x: Tensor, context: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
            frames = x.flatten(0, 1)
            return network(
                frames, T[:1].expand(len(frames)), context.flatten(0, 1), y.flatten(0, 1), num_video_frames=4,
                image_only_indicator=torch.zeros(len(x), 4), **kwargs,
            ).unflatten(0, x.shape[:2])  # fmt: skip

    case = Case(Videos(), (random(3, 4, 8, 4, 4), random(3, 1, 1, 16).expand(3, 4, 1, 16), random(3, 4, 24)), {}, layers)
    case.rule = Case(network, (), {}, layers).rule
    return case


def build_mmdit(**changes: Any) -> Case:
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    config = {
        "input_size": None, "patch_size": 2, "in_channels": 4, "depth": 1, "num_blocks": 12, "num_patches": None,
        "pos_embed_max_size": 8, "adm_in_channels": 8, "context_size": 16, "qk_norm": "rms",
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}},
    }  # fmt: skip
    network = filled(OpenAISignatureMMDITWrapper(**{**config, **changes}, **arguments()))
    inputs = random(3, 4, 8, 8), T
    return Case(network, inputs, {"context": random(3, 5, 16), "y": random(3, 8)}, stacked(double=network.joint_blocks), (5,))


def build_mmdit_dual() -> Case:
    """SD3.5 medium: a second, image-only attention in some blocks."""
    case = build_mmdit(num_blocks=4, x_block_self_attn_layers=[0, 1])
    case.texts = (5, 0)
    return case


STREAMS = {
    "in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2,
    "depth": 2, "depth_single_blocks": 3, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "guidance_embed": False, "txt_ids_dims": [],
}  # fmt: skip


def build_flux() -> Case:
    from comfy.ldm.flux.model import Flux

    network = filled(Flux(**STREAMS, **arguments()))
    layers = stacked(double=network.double_blocks, single=network.single_blocks)
    return Case(network, (random(3, 4, 8, 8), T, random(3, 5, 16), random(3, 8)), {}, layers, (5,))


def build_flux_references() -> Case:
    """Reference latents are image tokens too."""
    case = build_flux()
    case.kwargs["ref_latents"] = [random(3, 4, 4, 4)]
    return case


CHROMA = {name: value for name, value in STREAMS.items() if name != "guidance_embed"} | {
    "in_dim": 64,
    "out_dim": 32,
    "hidden_dim": 32,
    "n_layers": 1,
}


def build_chroma() -> Case:
    from comfy.ldm.chroma.model import Chroma

    network = filled(Chroma(**{**CHROMA, "in_channels": 16, "out_channels": 16}, **arguments()))
    layers = stacked(double=network.double_blocks, single=network.single_blocks)
    kwargs = {"guidance": torch.zeros(3), "attention_mask": random(3, 1, 21, 21)}
    return Case(network, (random(3, 4, 8, 8), T, random(3, 5, 16)), kwargs, layers, (5,))


def build_radiance() -> Case:
    from comfy.ldm.chroma_radiance.model import ChromaRadiance

    nerf = {
        "nerf_hidden_size": 8, "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 0,
        "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32, "use_x0": False,
    }  # fmt: skip
    extra = {"use_sequential_txt_ids": False}
    config = {**CHROMA, **nerf, "in_channels": 3, "out_channels": 3}
    try:
        network = ChromaRadiance(**config, **extra, **arguments())
    except TypeError:  # an older host
        network = ChromaRadiance(**config, **arguments())
    layers = stacked(double=network.double_blocks, single=network.single_blocks)
    return Case(filled(network), (random(3, 3, 8, 8), T, random(3, 5, 16)), {"guidance": torch.zeros(3)}, layers, (5,))


def build_hunyuan_video() -> Case:
    from comfy.ldm.hunyuan_video.model import HunyuanVideo

    params = {
        **STREAMS, "patch_size": [1, 2, 2], "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
        "vision_in_dim": None, "meanflow_sum": False,
    }  # fmt: skip
    del params["txt_ids_dims"]
    network = filled(HunyuanVideo(**params, **arguments()))
    layers = stacked(double=network.double_blocks, single=network.single_blocks)
    kwargs = {"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    return Case(network, (random(3, 4, 2, 4, 4), T, random(3, 5, 16), random(3, 8)), kwargs, layers, (5,))


def build_qwen_image() -> Case:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    network = filled(
        QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(4, 6, 6), **arguments(),
        )
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    kwargs = {"attention_mask": mask, "ref_latents": [random(3, 4, 1, 4, 4)]}
    return Case(network, (random(3, 4, 1, 8, 8), T, random(3, 5, 16)), kwargs, stacked(double=network.transformer_blocks), (5,))


WAN = {"in_dim": 4, "out_dim": 4, "dim": 32, "ffn_dim": 32, "freq_dim": 16, "text_dim": 16, "num_heads": 2, "num_layers": 3}


def build_wan() -> Case:
    """As many text tokens as video tokens: lengths do not tell self- from cross-attention."""
    from comfy.ldm.wan.model import WanModel

    network = filled(WanModel(**WAN, **arguments()))
    return Case(network, (random(3, 4, 2, 4, 4), T, random(3, 8, 16)), {}, stacked(double=network.blocks))


def build_wan_image() -> Case:
    """Image-to-video: two cross-attentions in a block."""
    from comfy.ldm.wan.model import WanModel

    network = filled(WanModel(**WAN, model_type="i2v", **arguments()))
    kwargs = {"clip_fea": random(3, 8, 1280)}
    return Case(network, (random(3, 4, 2, 4, 4), T, random(3, 8, 16)), kwargs, stacked(double=network.blocks))


def build_wan_vace() -> Case:
    """VACE's own blocks run under the block number of the main ones; they are not among the chosen."""
    from comfy.ldm.wan.model import VaceWanModel

    network = filled(VaceWanModel(**WAN, vace_layers=3, vace_in_dim=4, **arguments()))
    kwargs = {"vace_context": random(3, 1, 4, 2, 4, 4), "vace_strength": [1.0]}
    return Case(network, (random(3, 4, 2, 4, 4), T, random(3, 8, 16)), kwargs, stacked(double=network.blocks))


def build_lumina(**changes: Any) -> Case:
    from comfy.ldm.lumina.model import NextDiT

    config = {
        "patch_size": 2, "in_channels": 4, "dim": 32, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "qk_norm": True,
        "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [64, 64, 64],
    }  # fmt: skip
    network = filled(NextDiT(**{**config, **changes}, **arguments()))
    inputs = random(3, 4, 8, 8), T, random(3, 5, 16), 5
    return Case(network, inputs, {}, stacked(double=network.layers), (5,))


def build_z_image() -> Case:
    """Text and image are padded to multiples."""
    case = build_lumina(dim=256, n_heads=16, n_kv_heads=16, z_image_modulation=True, pad_tokens_multiple=8)
    case.texts = (8,)
    return case


def build_krea2() -> Case:
    SingleStreamDiT = pytest.importorskip("comfy.ldm.krea2.model").SingleStreamDiT
    sizes = {"features": 32, "tdim": 16, "txtdim": 16, "heads": 2, "kvheads": 1, "txtlayers": 2, "txtheads": 2, "txtkvheads": 2}
    network = filled(SingleStreamDiT(**sizes, multiplier=2, layers=3, channels=4, **arguments()))
    return Case(network, (random(3, 4, 8, 8), T, random(3, 5, 32)), {}, stacked(single=network.blocks), (5,))


def build_aura_flow() -> Case:
    """Eight register tokens come with the text."""
    from comfy.ldm.aura.mmdit import MMDiT

    network = MMDiT(dim=32, n_layers=4, n_double_layers=2, n_heads=2, global_conddim=32, cond_seq_dim=16, max_seq=64, **arguments())
    layers = stacked(double=filled(network).double_layers, single=network.single_layers)
    return Case(network, (random(3, 4, 8, 8), T, random(3, 5, 16)), {}, layers, (13,))


def build_ltxv() -> Case:
    from comfy.ldm.lightricks.model import LTXVModel

    network = LTXVModel(
        in_channels=4, cross_attention_dim=32, attention_head_dim=16, num_attention_heads=2, caption_channels=16, num_layers=3,
        **arguments(),
    )  # fmt: skip
    inputs = random(3, 4, 2, 2, 2), T, random(3, 8, 16), None
    return Case(filled(network), inputs, {}, stacked(double=network.transformer_blocks))


def build_kandinsky5() -> Case:
    from comfy.ldm.kandinsky5.model import Kandinsky5

    network = Kandinsky5(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=32,
        visual_embed_dim=16, num_visual_blocks=3, axes_dims=(4, 6, 6), **arguments(),
    )  # fmt: skip
    inputs = random(3, 4, 2, 4, 4), T, random(3, 8, 16), random(3, 8)
    return Case(filled(network), inputs, {}, stacked(double=network.visual_transformer_blocks))


def build_cosmos_predict2() -> Case:
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    network = MiniTrainDIT(
        max_img_h=16, max_img_w=16, max_frames=8, in_channels=4, out_channels=4, patch_spatial=2, patch_temporal=1,
        concat_padding_mask=False, model_channels=32, num_blocks=3, num_heads=2, crossattn_emb_channels=16,
        pos_emb_cls="rope3d", **arguments(),
    )  # fmt: skip
    return Case(filled(network), (random(3, 4, 2, 4, 4), T, random(3, 8, 16)), {}, stacked(double=network.blocks))


BUILD = {name.removeprefix("build_"): build for name, build in globals().items() if name.startswith("build_")}
