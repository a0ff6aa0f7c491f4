"""Identity attention: its maths against explicit masks, and its effect in tiny random instances of the host's own models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lodestar.guiders.network import identity_attention as attention
from lodestar.guiders.network.identity_attention import IdentityAttention, masked_attention
from lodestar.guiders.network.layers import ARCHITECTURES, Layer, resolve_layers


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small lose most of their time to the threads' waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the maths, without a host ---------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def explicit(q: Tensor, k: Tensor, v: Tensor, text: int, masked: bool, mask: Tensor | None, scale: float) -> Tensor:
    """The oracle [B, H, N, d]: full attention in float64 in which an image token sees of the image only itself.

    Without ``masked`` no token sees any other. mask: additive or boolean, [B|1, H|1, N|1, N].
    """
    q, k, v = q.double(), k.double(), v.double()
    seen = torch.eye(q.shape[2], dtype=torch.bool)
    if masked:
        seen[:text] = True
        seen[:, :text] = True
    logits = q @ k.mT * scale
    if mask is not None:
        logits = logits + (mask.double().log() if mask.dtype == torch.bool else mask.double())
    return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def qkv(text: int = 3, image: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [random(2, 2, text + image, 4, seed=i, dtype=dtype) for i in range(3)]


@pytest.mark.parametrize("limit", [1, 2**26])
@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("kind", ["none", "keys", "full", "bool"])
def test_cheap_form_equals_explicit_mask(kind, scale, limit, monkeypatch):
    monkeypatch.setattr(attention, "_LOGITS", limit)
    mask = {
        "none": None,
        "keys": random(2, 1, 1, 8, seed=7, dtype=torch.float64),
        "full": random(2, 2, 8, 8, seed=7, dtype=torch.float64),
        "bool": (random(2, 1, 8, 8, seed=7) > -1) | torch.eye(8, dtype=torch.bool),
    }[kind]
    q, k, v = qkv()
    expected = explicit(q, k, v, 3, True, mask, 0.5 if scale is None else scale)[:, :, 3:]
    torch.testing.assert_close(masked_attention(q, k, v, 3, mask, scale), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_cheap_form_in_the_models_dtype(dtype, tolerance):
    q, k, v = qkv(dtype=dtype)
    out = masked_attention(q, k, v, 3)
    assert out.dtype == dtype
    expected = explicit(q, k, v, 3, True, None, 0.5)[:, :, 3:]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_without_text_the_value_returns():
    q, k, v = qkv(text=0)
    assert torch.equal(masked_attention(q, k, v, 0), v)


def test_image_tokens_see_themselves_and_the_text_only():
    q, k, v = qkv()
    out = masked_attention(q, k, v, 3)
    for x in (q, k, v):
        x[:, :, 3 + 2] += 1
    changed = masked_attention(q, k, v, 3) != out
    assert changed.any(-1).any(0).any(0).tolist() == [False, False, True, False, False]
    out = masked_attention(q, k, v, 3)
    k[:, :, 1] += 1
    assert (masked_attention(q, k, v, 3) != out).all()


# --- the host's models, tiny -----------------------------------------------------------------------------------------


@dataclass
class Case:
    """A network of the host with random weights, its inputs for three rows, and what an independent look at it says.

    layers: the names of some layers and, for each, the module inside which its attention runs. In that module, attention call
    number i is the one to perturb if i < len(texts), and has texts[i] text tokens in front.
    """

    network: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    layers: dict[str, nn.Module]
    texts: Sequence[int] = (0,)
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, rows: Sequence[int] = (0, 1, 2), **options: Any) -> Tensor:
        """The network's output for these rows with these transformer options."""

        def pick(x: Any) -> Any:
            return x[list(rows)].clone() if isinstance(x, Tensor) and len(x) == 3 else x

        kwargs = {name: pick(x) for name, x in self.kwargs.items()}
        options = {"cond_or_uncond": list(range(len(rows))), **self.options, **options}
        with torch.inference_mode():
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
            return explicit_call(*args, text=self.texts[state.calls - 1], masked=joint == "masked", **kwargs)

        for name in layers:
            module = self.layers[name]

            def forward(*args: Any, inner: Callable = module.forward, **kwargs: Any) -> Any:
                state.calls = 0
                try:
                    return inner(*args, **kwargs)
                finally:
                    state.calls = None

            monkeypatch.setattr(module, "forward", forward)
        out = self.run(optimized_attention_override=override, **options)
        monkeypatch.undo()
        return out


def explicit_call(q, k, v, heads, mask=None, attn_precision=None, *, text, masked, **kw):
    """The oracle behind the signature of the host's attention functions."""
    assert attn_precision is None
    if not kw.get("skip_reshape"):
        width = q.shape[-1] // heads
        q, k, v = (x.reshape(*x.shape[:2], -1, width).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    masked = masked and text > 0
    out = explicit(q, k, v, text, masked, mask if masked else None, kw.get("scale", q.shape[-1] ** -0.5)).to(q.dtype)
    return out if kw.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


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


@pytest.fixture(params=BUILD)
def case(request: pytest.FixtureRequest, host: object) -> Case:
    return BUILD[request.param]()


close = {"rtol": 1e-4, "atol": 1e-5}  # float32 networks of unit gain


@pytest.mark.parametrize("joint", ["masked", "passthrough"])
def test_perturbed_rows_equal_the_oracle_and_the_others_do_not_change(case, joint, monkeypatch):
    clean = case.run()
    for layers in (*([name] for name in case.layers), list(case.layers)[:2]):
        rule = case.rule(",".join(layers), joint)
        out = case.perturbed(rule, [False, True, False])
        oracle = case.oracle(layers, joint, monkeypatch)
        assert torch.equal(out[[0, 2]], clean[[0, 2]]), layers
        torch.testing.assert_close(out[1], oracle[1], **close)
        assert (oracle[1] - clean[1]).abs().max() > 1e-3, f"the perturbation of {layers} changes nothing"
    torch.testing.assert_close(case.perturbed(rule, [True, True, True]), oracle, **close)
    assert torch.equal(case.perturbed(rule, [False, False, False]), clean)


@pytest.mark.parametrize("name", ["unet", "svd", "mmdit", "flux", "lumina", "wan", "cosmos_predict2"])
def test_rules_for_different_chunks_go_together(name, host):
    """Two perturbations in one batch, one of them chained to the other, and nobody's dictionary changes."""
    case = BUILD[name]()
    first, second = (case.rule(layers, joint) for layers, joint in zip(list(case.layers)[:2], ("masked", "passthrough"), strict=True))
    alone = case.perturbed(first, [True, False, False])[0], case.perturbed(second, [False, False, True])[2]
    inner = first.patch({"cond_or_uncond": [0, 1, 0]}, [True, False, False])
    before = {kind: dict(patches) for kind, patches in inner["patches_replace"].items()}
    both = case.run(**second.patch(inner, [False, False, True]))
    assert inner["patches_replace"] == before
    torch.testing.assert_close(both[0], alone[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[2], alone[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(both[1], case.run()[1])


@pytest.mark.parametrize("name", ["unet", "mmdit", "flux", "wan", "lumina"])
def test_an_override_that_is_there_computes_everything_that_is_left(name, host):
    """Sage and flash attention nodes keep their place, see only the rows that need attention, and are told which."""
    case = BUILD[name]()
    seen = []

    def other(func: Callable, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((len(q), kwargs["transformer_options"]["cond_or_uncond"]))
        return func(q, *args, **kwargs) * 0.5

    given = {"optimized_attention_override": other, "cond_or_uncond": [0, 1, 0]}
    clean = case.run(**given)
    calls, seen = len(seen), []
    layer = list(case.layers)[1]
    out = case.run(**case.rule(layer, "passthrough").patch(given, [False, True, False]))
    assert given == {"optimized_attention_override": other, "cond_or_uncond": [0, 1, 0]}
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert len(seen) == calls and seen.count((2, [0, 0])) == 1
    seen = []
    case.run(**case.rule(layer, "passthrough").patch(given, [True] * 3))
    assert len(seen) == calls - 1, "attention was computed for perturbed rows"


# --- the UNet's own invariants ---------------------------------------------------------------------------------------


def layer_output(case: Case, flags: Sequence[bool], run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """Input and output of the first attention layer of the case during ``run``."""
    module = next(iter(case.layers.values()))
    found: list[Tensor] = []
    handles = [
        module.to_v.register_forward_hook(lambda _, args, __: found.append(args[0].clone())),
        module.to_out.register_forward_hook(lambda _, __, out: found.append(out.clone())),
    ]
    run()
    for handle in handles:
        handle.remove()
    return found[0], found[1]


def test_unet_layer_is_its_value_projection(host):
    """to_out(to_v(x)), whatever W_q and W_k are, each token by itself."""
    case = build_unet()
    name, module = next(iter(case.layers.items()))
    options = case.rule(name).patch({}, [True] * 3)

    def run() -> tuple[Tensor, Tensor]:
        return layer_output(case, [True] * 3, lambda: case.run(**options))

    x, out = run()
    with torch.inference_mode():
        assert torch.equal(out, module.to_out(module.to_v(x)))
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
        replaced = options["patches_replace"]["attn1"][("input", 1, 0)]
        extra = {"n_heads": module.heads, "attn_precision": None}
        q, k, v = module.to_q(x), module.to_k(x), module.to_v(x)
        permuted = replaced(q[:, order], k[:, order], v[:, order], extra)
        torch.testing.assert_close(permuted, replaced(q, k, v, extra)[:, order], rtol=0, atol=0)
    for projection in (module.to_q, module.to_k):
        projection.weight.data.mul_(-3)
    assert torch.equal(run()[1], out)


def test_one_token_has_nothing_to_lose(host):
    """In the middle block of a 2x2 latent there is one token: softmax and identity coincide."""
    case = build_unet()
    case.args = (random(3, 4, 2, 2), T)
    torch.testing.assert_close(case.perturbed(case.rule("middle"), [True] * 3), case.run(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(case.perturbed(case.rule("input:1"), [True] * 3), case.run())


@pytest.mark.parametrize("key", [("middle", 0), ("middle", 0, 1)])
def test_a_replacement_that_is_there_keeps_the_clean_rows(key, host):
    """Keyed by block or by sub-block, it goes on in the clean rows and in the sub-blocks that are not perturbed."""
    case = build_unet()
    seen = []

    def other(q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        seen.append((len(q), extra_options["cond_or_uncond"], extra_options["uuids"]))
        return v.roll(1, dims=1) * 2

    given = {"patches_replace": {"attn1": {key: other}}, "cond_or_uncond": [0, 1, 0], "uuids": ["a", "b", "c"]}
    clean = case.run(**given)
    whole, seen = list(seen), []
    out = case.run(**case.rule("middle:0.1").patch(given, [False, True, False]))
    assert given["patches_replace"] == {"attn1": {key: other}}
    assert seen == [*whole[:-1], (2, [0, 0], ["a", "c"])]
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert not torch.allclose(out[1], clean[1])


def test_other_attention_and_other_layers_are_left_alone(host):
    """attn2 and the layers that were not named never meet a replacement."""
    options = build_unet().rule("middle:0.1,output:0").patch({"patches_replace": {"attn2": {}}}, [True])
    assert set(options["patches_replace"]["attn1"]) == {("middle", 0, 1), ("output", 0, 0), ("output", 0, 1)}
    assert options["patches_replace"]["attn2"] == {}
    assert "optimized_attention_override" not in options


def test_queries_that_are_not_the_values_are_left_alone(host):
    """Token merging and reference attention give other numbers of queries and values: no identity there, no broken shape."""
    replaced = build_unet().rule("middle:0.1").patch({}, [True])["patches_replace"]["attn1"][("middle", 0, 1)]
    q, k, v = random(1, 3, 8), random(1, 6, 8), random(1, 6, 8)
    assert replaced(q, k, v, {"n_heads": 2, "attn_precision": None}).shape == q.shape


# --- the calls that a DiT makes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", ["masked", "passthrough"])
@pytest.mark.parametrize("kind", ["none", "2d", "keys", "per row", "bool"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_layouts_masks_and_grouped_heads(skip_reshape, skip_output_reshape, groups, kind, joint, host):
    """Every form in which the host's attention functions are called, in a chosen block of a joint model."""
    import comfy.ops
    from comfy.ldm.modules.attention import attention_pytorch

    if groups > 1 and not hasattr(comfy.ops, "repeat_kv_for_gqa"):
        pytest.skip("this host has no grouped heads")
    joint_rule = IdentityAttention((Layer(ARCHITECTURES["Flux"], "double", 1),), joint)
    q, k, v = random(3, 4, 8, 6), random(3, 4 // groups, 8, 6, seed=1), random(3, 4 // groups, 8, 6, seed=2)
    if not skip_reshape:
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    mask = {
        "none": None,
        "2d": random(8, 8, seed=3),
        "keys": random(3, 1, 8, seed=3),
        "per row": random(3, 1, 8, 8, seed=3),
        "bool": (random(3, 8, 8, seed=3) > -1) | torch.eye(8, dtype=torch.bool),
    }[kind]
    form = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, "enable_gqa": groups > 1}
    clean = attention_pytorch(q, k, v, 4, mask=mask, **form)
    options = joint_rule.patch({}, [False, True, False])

    def block(_: dict[str, Any]) -> Tensor:
        return attention_pytorch(q, k, v, 4, mask=mask, transformer_options=options, **form)

    args = {"txt": torch.empty(3, 3, 1), "img": torch.empty(3, 5, 1)}
    out = options["patches_replace"]["dit"][("double_block", 1)](args, {"original_block": block})
    expected = explicit_call(q, k, v, 4, mask, text=3, masked=joint == "masked", **form)
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    torch.testing.assert_close(out[1], expected[1], rtol=1e-5, atol=1e-5)


def test_self_attention_in_parts_and_cross_attention_of_equal_length():
    """LTXV's guide frames split the queries; a context as long as the image is still a context."""
    block = attention._RunningBlock()
    assert [block.own(*lengths) for lengths in ((3, 8), (4, 8), (1, 8), (8, 8), (8, 5))] == [
        slice(0, 3), slice(3, 7), slice(7, 8), None, None,
    ]  # fmt: skip


def test_a_block_that_is_skipped_or_fails_leaves_no_mark(host):
    """Skip-layer guidance may leave the block out; an error in it does not perturb what runs next."""
    case = build_mmdit(num_blocks=3)
    skip = {"patches_replace": {"dit": {("double_block", 1): lambda args, _: args}}}
    assert torch.equal(case.run(**case.rule("double:1").patch(skip, [True] * 3)), case.run(**skip))

    options = case.rule("double:1").patch({}, [True] * 3)

    def fail(_: Any) -> None:
        raise RuntimeError("out of memory")

    args = {"txt": torch.empty(3, 3, 1), "img": torch.empty(3, 5, 1)}
    with pytest.raises(RuntimeError, match="out of memory"):
        options["patches_replace"]["dit"][("double_block", 1)](args, {"original_block": fail})
    assert options["optimized_attention_override"].block is None


def test_rules_are_values(host):
    case = build_mmdit(num_blocks=3)
    assert case.rule("double:1,double:2") == case.rule("double:1-2, double:2")
    assert len({case.rule("double:1"), case.rule("middle"), case.rule("double:1", "passthrough")}) == 2
