"""Which self-attention layers a model has, and what users call them.

Names, in a comma-separated list:
    middle, input:7, output:3.1, input:4-8.0-1   UNet: stack, block (the host's number) and transformer sub-block
    m0, d2.2-9, u0.4, d0-3                       UNet: d/m/u count the encoder's/middle/decoder's attention blocks
    double:7, double:4-9, single:12              DiT: stack and block
    down:3, up:0-8                               Stable Cascade: stack and number of the attention in it
    auto, middle                                 UNet: its middle block. DiT: the block in the middle of its depth
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal


@dataclass(frozen=True)
class Architecture:
    """How self-attention is reached in one class of diffusion model.

    hook: how a layer is reached.
        attn1: the UNet's own replacement of self-attention.
        block: a replacement around ("double_block", i) or ("single_block", i), inside which attention is overridden.
        index: the same override in every block, told apart by ``transformer_options["block_index"]``.
        pairs: likewise, but older hosts leave the index out: there the calls are counted, two in a block.
        module: the same override, inside a wrapper around the block.
        call: a wrapper around the block's attention, which calls the host's attention without the options that carry an override.
    joint: text and image tokens share one attention. Otherwise a block begins with its self-attention.
    stacks: the names of the stacks of blocks and the attributes of the model that hold them.
    image_first: the image's tokens come before the text's.
    image_asks: the queries are the image's tokens alone, the keys those of both.
    measured: what is counted before the blocks, "text" or "image", and the module whose results are counted.
    attention: where a block has its attention, for ``call``.
    only: the class of the blocks, where a stack holds others too.
    """

    hook: Literal["attn1", "block", "index", "pairs", "module", "call"]
    joint: bool
    stacks: tuple[tuple[str, str], ...]
    image_first: bool = False
    image_asks: bool = False
    measured: tuple[str, str] | None = None
    attention: str = ""
    only: str = ""


_UNET_STACKS = (("input", "input_blocks"), ("middle", "middle_block"), ("output", "output_blocks"))
UNET = Architecture("attn1", False, _UNET_STACKS)
_STREAMS = Architecture("block", True, (("double", "double_blocks"), ("single", "single_blocks")))
_TRANSFORMER_BLOCKS = (("double", "transformer_blocks"),)
_BLOCKS, _LAYERS = (("double", "blocks"),), (("double", "layers"),)
_CASCADE = Architecture("module", True, (("down", "down_blocks"), ("up", "up_blocks")), True, image_asks=True, only="AttnBlock")
_TEXT = ("text", "time_caption_embed.caption_embedder")

# Class names of the host, looked up along the inheritance of a diffusion model.
ARCHITECTURES: dict[str, Architecture] = {
    "UNetModel": UNET,
    "StageC": _CASCADE,  # Stable Cascade
    "StageB": _CASCADE,
    "OpenAISignatureMMDITWrapper": Architecture("block", True, (("double", "joint_blocks"),)),
    "Flux": _STREAMS,
    "Chroma": _STREAMS,
    "HunyuanVideo": _STREAMS,
    "QwenImageTransformer2DModel": Architecture("block", True, _TRANSFORMER_BLOCKS),
    "MageFlowTransformer2DModel": Architecture("block", True, _TRANSFORMER_BLOCKS),
    "LensTransformer2DModel": Architecture("block", True, _TRANSFORMER_BLOCKS, image_first=True),
    "JoyImageTransformer3DModel": Architecture("block", True, (("double", "double_blocks"),), image_first=True),
    "AsymmDiTJoint": Architecture("block", True, _BLOCKS, image_first=True),  # Mochi
    "WanModel": Architecture("block", False, _BLOCKS),
    "LTXVModel": Architecture("block", False, _TRANSFORMER_BLOCKS),  # with LTX-AV, whose blocks begin with the video's
    "Kandinsky5": Architecture("index", False, (("double", "visual_transformer_blocks"),)),
    "MMDiT": Architecture("block", True, (("double", "double_layers"), ("single", "single_layers"))),  # AuraFlow
    "NextDiT": Architecture("index", True, _LAYERS),  # Lumina 2, Z-Image
    "SingleStreamDiT": Architecture("index", True, (("single", "blocks"),)),  # Krea 2
    "HiDreamO1Transformer": Architecture("index", True, (("double", "language_model.layers"),), image_asks=True),
    "MiniTrainDIT": Architecture("pairs", False, _BLOCKS),  # Cosmos-Predict2, Anima
    "GeneralDIT": Architecture("module", False, _BLOCKS),  # Cosmos 1
    "HiDreamImageTransformer2DModel": Architecture(
        "module", True, (("double", "double_stream_blocks"), ("single", "single_stream_blocks")), True, measured=("image", "x_embedder")
    ),
    "OmniGen2Transformer2DModel": Architecture("module", True, _LAYERS, measured=_TEXT),
    "BooguTransformer2DModel": Architecture(
        "module", True, (("double", "double_stream_layers"), ("single", "single_stream_layers")), measured=_TEXT
    ),
    "Ideogram4Transformer2DModel": Architecture("module", True, _LAYERS, measured=("text", "llm_cond_proj")),
    "PixDiT_T2I": Architecture("module", True, (("double", "patch_blocks"), ("single", "pixel_blocks")), measured=("image", "s_embedder")),
    "CogVideoXTransformer3DModel": Architecture("module", True, _BLOCKS, measured=("text", "patch_embed.text_proj")),
    "ErnieImageModel": Architecture("call", True, _LAYERS, True, measured=("image", "x_embedder"), attention="self_attention"),
    "PixArtMS": Architecture("call", False, _BLOCKS, attention="attn"),
    "HunYuanDiT": Architecture("call", False, _BLOCKS, attention="attn1"),
}

_SOUND = "it makes sound, and perturbed attention is for pictures and video"
_SHAPES = "it makes shapes, and perturbed attention is for pictures and video"
# Classes that are refused, also where a base class of theirs is in the table, and why.
REFUSED: dict[str, str] = {
    "CausalWanModel": "its memory of earlier frames has no room for another branch",
    "NaDiT": "it reads its batch as one positive and one negative prompt, and has no room for another branch",
    "MiniMaxH3Model": "it takes one row at a time, and another branch is a second one",
    "AudioDiffusionTransformer": _SOUND,
    "ACEStepTransformer2DModel": _SOUND,
    "AceStepConditionGenerationModel": _SOUND,
    "Hunyuan3Dv2": _SHAPES,
    "HunYuanDiTPlain": _SHAPES,
    "LatentSeqMMFlowModel": _SHAPES,
}


@dataclass(frozen=True)
class Layer:
    """One self-attention layer: block number ``block`` of a stack and, in a UNet, its transformer sub-block ``sub``."""

    architecture: Architecture
    stack: str
    block: int
    sub: int = 0
    video: bool = False  # UNet: a temporal attention under the same name follows this spatial one


def architecture_of(diffusion_model: Any) -> Architecture:
    """The architecture of a model, through its base classes; ValueError if its attention cannot be reached."""
    own = type(diffusion_model).__name__
    name = next((cls.__name__ for cls in type(diffusion_model).__mro__ if cls.__name__ in ARCHITECTURES or cls.__name__ in REFUSED), own)
    architecture = ARCHITECTURES.get(name)
    if architecture is None or not all(_has(diffusion_model, attribute) for _, attribute in architecture.stacks):
        reason = REFUSED.get(name, "no known hook of ComfyUI reaches its self-attention")
        raise ValueError(f"Perturbed attention is not available for this model ({own}): {reason}.")
    return architecture


def blocks_of(diffusion_model: Any, architecture: Architecture, stack: str) -> list[Any]:
    """The modules of one stack of a transformer, in their order."""
    held = attrgetter(dict(architecture.stacks)[stack])(diffusion_model)
    if architecture.only:
        return [module for module in held.modules() if type(module).__name__ == architecture.only and module.self_attn]
    return list(held.values() if hasattr(held, "values") else held)


def module_of(diffusion_model: Any, layer: Layer) -> Any:
    """The block of a transformer's layer or, where the architecture says so, the attention in it."""
    block = blocks_of(diffusion_model, layer.architecture, layer.stack)[layer.block]
    return getattr(block, layer.architecture.attention) if layer.architecture.attention else block


def resolve_layers(model: Any, text: str) -> tuple[Layer, ...]:
    """The layers of a ModelPatcher that ``text`` names, in the model's order; ValueError with one clear sentence."""
    diffusion_model = model.get_model_object("diffusion_model")
    architecture = architecture_of(diffusion_model)
    layers = tuple(layer for layer, _ in _layers(diffusion_model, architecture) if layer is not None)
    counted = _counted(diffusion_model, architecture)
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"Name at least one layer to perturb; this model has {listing(layers)}.")
    chosen = {layer for name in names for layer in _named(name, layers, counted)}
    return tuple(layer for layer in layers if layer in chosen)


def cross_attention_blocks(diffusion_model: Any) -> list[tuple[str, int, int]]:
    """(stack, block, sub-block) of every cross-attention of pictures to a text in a UNet; none for other models."""
    if not any(cls.__name__ == "UNetModel" for cls in type(diffusion_model).__mro__):
        return []
    return [block for block, inner, video in _unet_blocks(diffusion_model) if inner.attn2 is not None and not video]


def joint_patch_size(diffusion_model: Any) -> int | None:
    """The patch size of an SD3 transformer, whose attention is joint, text first; None for other models."""
    if not any(cls.__name__ == "OpenAISignatureMMDITWrapper" for cls in type(diffusion_model).__mro__):
        return None
    return diffusion_model.patch_size


# --- what a model has ------------------------------------------------------------------------------------------------


def _layers(diffusion_model: Any, architecture: Architecture) -> Iterator[tuple[Layer | None, tuple[str, int]]]:
    """Every self-attention layer in the model's order with its (stack, block); None where it is disabled."""
    if architecture is UNET:
        for (stack, i, sub), inner, video in _unet_blocks(diffusion_model):
            yield (None if inner.disable_self_attn else Layer(architecture, stack, i, sub, video)), (stack, i)
        return
    for stack, _ in architecture.stacks:
        for i, block in enumerate(blocks_of(diffusion_model, architecture, stack)):
            attention = getattr(block, architecture.attention, block)
            compressed = getattr(attention, "sr_ratio", 1) > 1  # PixArt: fewer keys than queries
            yield (None if compressed else Layer(architecture, stack, i)), (stack, i)


def _has(diffusion_model: Any, path: str) -> bool:
    try:
        attrgetter(path)(diffusion_model)
    except AttributeError:
        return False
    return True


def _unet_blocks(diffusion_model: Any) -> Iterator[tuple[tuple[str, int, int], Any, bool]]:
    """Every transformer block of a UNet in its order: (stack, block, sub-block), the module, whether a temporal one follows it."""
    for stack, attribute in _UNET_STACKS:
        blocks = getattr(diffusion_model, attribute)
        for i, block in enumerate([blocks] if stack == "middle" else blocks):
            for transformer in (module for module in block or () if hasattr(module, "transformer_blocks")):
                for sub, inner in enumerate(transformer.transformer_blocks):
                    yield (stack, i, sub), inner, hasattr(transformer, "time_stack")


def _counted(diffusion_model: Any, architecture: Architecture) -> dict[str, list[tuple[str, int]]]:
    """The attention blocks of a UNet as d0, m0, u0 count them: with those that have no self-attention."""
    if architecture is not UNET:
        return {}
    blocks = dict.fromkeys(block for _, block in _layers(diffusion_model, architecture))
    letters = {"d": "input", "m": "middle", "u": "output"}
    return {letter: [block for block in blocks if block[0] == stack] for letter, stack in letters.items()}


def listing(layers: Sequence[Layer]) -> str:
    """All layers in the grammar of their names: ``input:1,2,4.0-1 middle:0``."""
    parts = []
    for stack, members in groupby(layers, lambda layer: layer.stack):
        if layers[0].architecture is not UNET:
            parts.append(f"{stack}:{_span([layer.block for layer in members])}")
            continue
        for block, subs in groupby(members, lambda layer: layer.block):
            numbers = [layer.sub for layer in subs]
            parts.append(f"{stack}:{block}" + (f".{_span(numbers)}" if numbers != [0] else ""))
    return ", ".join(parts) or "no self-attention layers"


def _span(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


# --- what a name means -----------------------------------------------------------------------------------------------

_RANGE = r"(\d+)(?:-(\d+))?"
_NAME = re.compile(rf"(?:([a-z]+):|([dmu])){_RANGE}(?:\.{_RANGE})?")


def _named(name: str, layers: Sequence[Layer], counted: dict[str, list[tuple[str, int]]]) -> Sequence[Layer]:
    """The layers that one name of the list stands for; every number of a range of names has to be in the model."""
    if name in ("auto", "middle"):
        half = len(layers) // 2
        found = [layer for layer in layers if layer.stack == "middle"] if counted else layers[half : half + 1]
    else:
        found = _numbered(name, layers, counted)
    if not found:
        raise ValueError(f"This model has no self-attention layer '{name}'; it has {listing(layers)}.")
    return found


def _numbered(name: str, layers: Sequence[Layer], counted: dict[str, list[tuple[str, int]]]) -> list[Layer]:
    match = _NAME.fullmatch(name)
    if match is None:
        return []
    stack, letter, *numbers = match.groups()
    blocks, subs = _numbers(*numbers[:2]), _numbers(*numbers[2:])
    if letter:
        order = counted.get(letter, [])
        wanted = [order[i] for i in blocks] if blocks and blocks[-1] < len(order) else []
    else:
        wanted = [(stack, i) for i in blocks]
    found = [layer for layer in layers if (layer.stack, layer.block) in wanted and (subs is None or layer.sub in subs)]
    present = {(layer.stack, layer.block) for layer in found}
    ends_present = wanted and wanted[0] in present and wanted[-1] in present
    subs_present = subs is None or len(found) == len(present) * len(subs)
    return found if ends_present and subs_present else []


def _numbers(first: str | None, last: str | None) -> range | None:
    """``3`` or ``3-7``, ends included; None if there is no number."""
    return None if first is None else range(int(first), int(last or first) + 1)
