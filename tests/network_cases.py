"""More networks of the host, in the form of ``network_tools``: those reached by wrappers around modules, and relatives of others.

Hosts that lack a class skip its case.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from network_tools import BUILD as BEFORE
from network_tools import WAN, Case, T, arguments, build_lumina, filled, random, stacked
from torch import Tensor, nn


def module(name: str) -> ModuleType:
    """A module of the host; the test is skipped where an older one lacks it."""
    return pytest.importorskip(f"comfy.ldm.{name}")


def made(name: str, cls: str, **config: Any) -> nn.Module:
    """A network of this class with random weights."""
    return filled(getattr(module(name), cls)(**config, **arguments()))


# --- pictures --------------------------------------------------------------------------------------------------------


def build_pixart() -> Case:
    network = made("pixart.pixartms", "PixArtMS", hidden_size=48, depth=3, num_heads=2, caption_channels=16, model_max_length=5)
    inputs = random(3, 4, 4, 64), T, random(3, 5, 16)  # it divides by the size in units of 64
    return Case(network, inputs, {}, stacked(double=network.blocks), namespace=module("pixart.blocks"))


def build_hunyuan_dit() -> Case:
    network = made(
        "hydit.models", "HunYuanDiT", input_size=8, hidden_size=32, depth=4, num_heads=2, text_states_dim=16,
        text_states_dim_t5=16, text_len=5, text_len_t5=4,
    )  # fmt: skip
    masks = {"text_embedding_mask": torch.ones(3, 5), "text_embedding_mask_t5": torch.ones(3, 4)}
    layers = {name: block.attn1 for name, block in stacked(double=network.blocks).items()}
    inputs = random(3, 4, 8, 8), T, random(3, 5, 16)
    return Case(network, inputs, {"encoder_hidden_states_t5": random(3, 4, 16), **masks}, layers, namespace=module("hydit.attn_layers"))


def build_ernie() -> Case:
    network = made(
        "ernie.model", "ErnieImageModel", hidden_size=32, num_attention_heads=2, num_layers=3, ffn_hidden_size=32, in_channels=4,
        out_channels=4, text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    inputs = random(3, 4, 4, 4), T, random(3, 5, 16)
    return Case(network, inputs, {}, stacked(double=network.layers), (5,), last=True, namespace=module("ernie.model"))


def build_hidream() -> Case:
    """Both experts are always asked, so that rounding decides nothing."""
    network = made(
        "hidream.model", "HiDreamImageTransformer2DModel", patch_size=2, in_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=8, num_routed_experts=2,
        axes_dims_rope=(4, 6, 6), max_resolution=(8, 8), llama_layers=[0, 1, 0, 1],
    )  # fmt: skip
    inputs = random(3, 4, 8, 8), T, random(3, 8), random(3, 4, 16)
    layers = stacked(double=network.double_stream_blocks, single=network.single_stream_blocks)
    return Case(network, inputs, {"encoder_hidden_states_llama3": random(3, 2, 3, 16)}, layers, (10,), last=True)


def build_hidream_o1() -> Case:
    """The first pass keeps keys and values of the text, later ones use them."""
    text = {
        "vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "rope_dims": [4, 2, 2],
    }  # fmt: skip
    vision = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "depth": 1, "num_position_embeddings": 16}
    network = made("hidream_o1.model", "HiDreamO1Transformer", text_config_overrides=text, vision_config_overrides=vision)
    kwargs = {"input_ids": torch.arange(15).reshape(3, 5), "position_ids": torch.arange(11).expand(1, 3, 11), "ar_len": 5}
    return Case(network, (random(3, 3, 64, 96), T * 1000), kwargs, stacked(double=network.language_model.layers), (5,))


OMNIGEN2 = {
    "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1,
    "multiple_of": 8, "axes_dim_rope": (4, 6, 6),
}  # fmt: skip


def build_omnigen2() -> Case:
    network = made("omnigen.omnigen2", "OmniGen2Transformer2DModel", text_feat_dim=16, **OMNIGEN2)
    inputs = random(3, 4, 8, 8), T, random(3, 5, 16), 5
    return Case(network, inputs, {"ref_latents": [random(3, 4, 4, 4)]}, stacked(double=network.layers), (5,))


def build_boogu() -> Case:
    """Blocks of two streams have a second attention, of the image alone."""
    config = OMNIGEN2 | {"num_double_stream_layers": 2, "instruction_feat_dim": 16}
    network = made("boogu.model", "BooguTransformer2DModel", **config)
    layers = stacked(double=network.double_stream_layers, single=network.single_stream_layers)
    return Case(network, (random(3, 4, 8, 8), T, random(3, 5, 16), 5), {}, layers, (5, 0))


def build_ideogram4() -> Case:
    network = made(
        "ideogram4.model", "Ideogram4Transformer2DModel", in_channels=16, num_layers=3, num_attention_heads=2, attention_head_dim=16,
        intermediate_size=32, adaln_dim=16, llm_features_dim=16, mrope_section=(4, 2, 2),
    )  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    inputs = random(3, 16, 4, 4), T, random(3, 5, 16)
    return Case(network, inputs, {"attention_mask": mask}, stacked(double=network.layers), (5,))


def build_ideogram4_without_a_prompt() -> Case:
    case = build_ideogram4()
    return Case(case.network, (*case.args[:2], None), {}, case.layers)


def build_pixeldit() -> Case:
    network = made(
        "pixeldit.model", "PixDiT_T2I", num_groups=2, hidden_size=32, pixel_hidden_size=4, pixel_attn_hidden_size=32,
        pixel_num_groups=2, patch_depth=2, pixel_depth=2, patch_size=4, txt_embed_dim=16, txt_max_length=8,
    )  # fmt: skip
    return Case(network, (random(3, 3, 16, 16), T, random(3, 5, 16)), {}, stacked(double=network.patch_blocks), (5,))


def build_pixeldit_pixels() -> Case:
    """Its last blocks see the image alone."""
    case = build_pixeldit()
    return Case(case.network, case.args, {}, stacked(single=case.network.pixel_blocks))


def build_lens() -> Case:
    network = made(
        "lens.model", "LensTransformer2DModel", in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, enc_hidden_dim=8, axes_dims_rope=(4, 6, 6), multi_layer_encoder_feature=False,
    )  # fmt: skip
    kwargs = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])}
    inputs = random(3, 16, 4, 4), T, random(3, 5, 8)
    return Case(network, inputs, kwargs, stacked(double=network.transformer_blocks), (5,), last=True)


def build_joyimage() -> Case:
    network = made(
        "joyimage.model", "JoyImageTransformer3DModel", in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=16,
        num_layers=3, rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    inputs = random(3, 4, 1, 8, 8), T, random(3, 5, 16)
    layers = stacked(double=network.double_blocks)
    return Case(network, inputs, {"ref_latents": [random(3, 4, 1, 4, 4)]}, layers, (5,), last=True)


def build_mage_flow() -> Case:
    network = made(
        "mage_flow.model", "MageFlowTransformer2DModel", in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return Case(network, (random(3, 4, 4, 4), T, random(3, 5, 16)), {}, stacked(double=network.transformer_blocks), (5,))


def build_cascade() -> Case:
    """Queries are the image's alone; blocks run again where the network repeats them."""
    network = made(
        "cascade.stage_c", "StageC", c_in=4, c_out=4, c_r=8, c_cond=16, c_hidden=[32, 32], nhead=[2, 2], blocks=[[1, 1], [1, 1]],
        block_repeat=[[1, 2], [1, 1]], c_clip_text=16, c_clip_text_pooled=8, c_clip_img=8, c_clip_seq=1,
    )  # fmt: skip
    network.clf[1].weight.data *= 10  # its attention has little to say beside the rest
    kwargs = {"clip_text": random(3, 3, 16), "clip_text_pooled": random(3, 8), "clip_img": random(3, 8)}
    return Case(network, (random(3, 4, 4, 4), T), kwargs, stages(network), (5,), last=True)


def build_cascade_decoder() -> Case:
    network = made(
        "cascade.stage_b", "StageB", c_r=8, c_cond=16, c_hidden=[32], nhead=[2], blocks=[[1], [1]], block_repeat=[[1], [1]],
        level_config=["CTA"], c_effnet=4, c_clip=8, c_clip_seq=2, dropout=[0.0],
    )  # fmt: skip
    kwargs = {"effnet": random(3, 4, 2, 2), "clip": random(3, 8)}
    return Case(network, (random(3, 4, 8, 8), T), kwargs, stages(network), (2,), last=True)


def stages(network: nn.Module) -> dict[str, nn.Module]:
    """The attention of a stage of Stable Cascade, one in each level."""
    return stacked(down=[level[-1] for level in network.down_blocks], up=[level[-1] for level in network.up_blocks])


def build_z_image_pixels() -> Case:
    """Its relative in pixel space."""
    if not hasattr(module("lumina.model"), "NextDiTPixelSpace"):
        pytest.skip("this host does not have it")
    latent = build_lumina()
    network = made(
        "lumina.model", "NextDiTPixelSpace", patch_size=2, in_channels=4, dim=32, n_layers=3, n_heads=2, n_kv_heads=1, qk_norm=True,
        cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64], decoder_hidden_size=16, decoder_num_res_blocks=1,
    )  # fmt: skip
    return Case(network, latent.args, {}, stacked(double=network.layers), (5,))


# --- video -----------------------------------------------------------------------------------------------------------


def build_mochi() -> Case:
    """Of five text tokens four are used."""
    network = made(
        "genmo.joint_model.asymm_models_joint", "AsymmDiTJoint", hidden_size_x=32, hidden_size_y=16, depth=3, num_heads=2,
        mlp_ratio_x=384.0, use_t5=True, t5_feat_dim=16, learn_sigma=False, qk_norm=True,
    )  # fmt: skip
    inputs = random(3, 4, 2, 4, 4), T, random(3, 5, 16), torch.ones(3, 5)
    return Case(network, inputs, {"num_tokens": 4}, stacked(double=network.blocks), (4,), last=True)


def build_cogvideo() -> Case:
    network = made(
        "cogvideo.model", "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=16, num_layers=3, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return Case(network, (random(3, 4, 2, 4, 4), T, random(3, 5, 16)), {}, stacked(double=network.blocks), (5,))


def build_cosmos() -> Case:
    """As many text tokens as video tokens."""
    network = made(
        "cosmos.model", "GeneralDIT", max_img_h=16, max_img_w=16, max_frames=8, in_channels=4, out_channels=4, patch_spatial=2,
        patch_temporal=1, concat_padding_mask=False, model_channels=32, num_blocks=3, num_heads=2, block_x_format="THWBD",
        crossattn_emb_channels=16, pos_emb_cls="rope3d", extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable",
    )  # fmt: skip
    return Case(network, (random(3, 4, 2, 4, 4), T, random(3, 8, 16)), {}, stacked(double=list(network.blocks.values())))


class FirstOfTwo(nn.Module):
    """A network of video and sound as one of video."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.transformer_blocks = network.transformer_blocks

    def forward(self, video: Tensor, sound: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.network([video, sound], *args, **kwargs)[0]


def build_ltxav() -> Case:
    """As many tokens of sound and of text as of video: lengths do not tell the six attentions of a block apart."""
    network = made(
        "lightricks.av_model", "LTXAVModel", in_channels=4, cross_attention_dim=32, attention_head_dim=16, num_attention_heads=2,
        audio_cross_attention_dim=32, audio_attention_head_dim=16, audio_num_attention_heads=2, caption_channels=32, num_layers=3,
        connector_attention_head_dim=16, connector_num_attention_heads=2, connector_num_layers=1,
    )  # fmt: skip
    inputs = random(3, 4, 2, 2, 2), random(3, 8, 8, 16), T, random(3, 8, 64), None
    case = Case(FirstOfTwo(network), inputs, {}, stacked(double=network.transformer_blocks))
    case.rule = Case(network, (), {}, {}).rule
    return case


def wan(cls: str, name: str = "wan.model", text: int = 8, without: str = "", config: dict[str, Any] | None = None, **kwargs: Any) -> Case:
    """A relative of Wan, with as many text tokens as video tokens. without: a large part, in whose place inputs go as they are."""
    if not hasattr(module(name), cls):
        pytest.skip("this host does not have it")
    network = getattr(module(name), cls)(**WAN | (config or {}), **arguments())
    if without:
        setattr(network, without, nn.Identity())
    return Case(filled(network), (random(3, 4, 2, 4, 4), T, random(3, text, 16)), kwargs, stacked(double=network.blocks))


def build_wan_camera() -> Case:
    return wan("CameraWanModel", config={"model_type": "t2v", "in_dim_control_adapter": 3}, camera_conditions=random(3, 3, 2, 32, 32))


def build_wan_humo() -> Case:
    """Its blocks have a third attention, to sound."""
    return wan("HumoWanModel", text=12, without="audio_proj", reference_latent=random(3, 4, 1, 4, 4), audio_embed=random(3, 2, 16, 1536))


def build_wan_scail() -> Case:
    return wan("SCAILWanModel", text=16, pose_latents=random(3, 4, 2, 4, 4))


def build_wan_s2v() -> Case:
    config = {"audio_dim": 8, "audio_inject_layers": [0, 1]}
    return wan("WanModel_S2V", config=config, text=12, reference_latent=random(3, 4, 1, 4, 4))


def build_wan_dancer() -> Case:
    config = {"audio_inject_layers": [0, 1], "music_dim": 16, "music_heads": 2, "music_latent_dim": 16}
    return wan("WanDancerModel", "wan.model_wandancer", config=config)


def build_wan_animate() -> Case:
    return wan("AnimateWanModel", "wan.model_animate", without="motion_encoder", pose_latents=random(3, 16, 1, 4, 4))


NEW = {name.removeprefix("build_"): build for name, build in globals().items() if name.startswith("build_")}
NEW.pop("lumina")
BUILD = BEFORE | NEW
