"""Names of layers: what they mean on real networks of the host, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lodestar.guiders.network.layers import ARCHITECTURES, REFUSED, Layer, resolve_layers

# The host's own configurations of SD 1.5 and SDXL, built without memory on the meta device.
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4), "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768, "num_heads": 8,
    "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
SDXL = SD15 | {
    "num_res_blocks": [2, 2, 2], "channel_mult": (1, 2, 4), "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 2048,
}  # fmt: skip


def model(network: Any) -> Any:
    return SimpleNamespace(get_model_object={"diffusion_model": network}.get)


def unet(config: dict[str, Any]) -> Any:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return model(UNetModel(**config, dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init))


@pytest.fixture(scope="module")
def sd15(host: object) -> Any:
    return unet(SD15)


@pytest.fixture(scope="module")
def sdxl(host: object) -> Any:
    return unet(SDXL)


def named(name: str, **stacks: int) -> Any:
    """A stand-in for a network: a class of this name with stacks of so many blocks."""
    return model(type(name, (), {attribute: [None] * length for attribute, length in stacks.items()})())


def short(layers: tuple[Layer, ...]) -> list[str]:
    return [f"{layer.stack}:{layer.block}.{layer.sub}" for layer in layers]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("middle", ["middle:0.0"]),
        ("auto", ["middle:0.0"]),
        (" Middle:0 ", ["middle:0.0"]),
        ("m0", ["middle:0.0"]),
        ("input:7", ["input:7.0"]),
        ("output:3", ["output:3.0"]),
        ("output:11, input:1,", ["input:1.0", "output:11.0"]),
        ("d0", ["input:1.0"]),
        ("d5", ["input:8.0"]),
        ("u0", ["output:3.0"]),
        ("u8", ["output:11.0"]),
        ("d2-3,m0", ["input:4.0", "input:5.0", "middle:0.0"]),
        ("m0,middle,middle:0", ["middle:0.0"]),
        ("input:1-4", ["input:1.0", "input:2.0", "input:4.0"]),
    ],
)
def test_names_on_sd15(sd15, text, expected):
    assert short(resolve_layers(sd15, text)) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("middle", [f"middle:0.{i}" for i in range(10)]),
        ("middle:0.3", ["middle:0.3"]),
        ("m0.3", ["middle:0.3"]),
        ("d2.2-9,u0.4", [*(f"input:7.{i}" for i in range(2, 10)), "output:0.4"]),
        ("d0", ["input:4.0", "input:4.1"]),
        ("u5.1", ["output:5.1"]),
        ("output:1.8-9", ["output:1.8", "output:1.9"]),
    ],
)
def test_names_on_sdxl(sdxl, text, expected):
    assert short(resolve_layers(sdxl, text)) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("double:7", ["double:7.0"]),
        ("double:1", ["double:1.0"]),  # and not 10 to 18
        ("double:4-6, single:12", ["double:4.0", "double:5.0", "double:6.0", "single:12.0"]),
        ("single:37", ["single:37.0"]),
        ("middle", ["single:9.0"]),
        ("auto", ["single:9.0"]),
    ],
)
def test_names_on_flux(text, expected):
    assert short(resolve_layers(named("Flux", double_blocks=19, single_blocks=38), text)) == expected


@pytest.mark.parametrize(
    "text",
    ["input:0", "input:3", "input:12", "middle:1", "middle:0.1", "u9", "d6", "m1", "d2.1", "double:3", "auto:0", "input:1-3",
     "input:4-1", "input:7.0-1", "7", "input", "x0", "input:-1", "input:1 2"],
)  # fmt: skip
def test_a_wrong_name_lists_what_the_model_has(sd15, text):
    with pytest.raises(ValueError) as error:
        resolve_layers(sd15, f"middle,{text}")
    assert str(error.value) == (
        f"This model has no self-attention layer '{text}'; it has input:1, input:2, input:4, input:5, input:7, input:8, "
        "middle:0, output:3, output:4, output:5, output:6, output:7, output:8, output:9, output:10, output:11."
    )


def test_the_list_is_short(sdxl):
    with pytest.raises(ValueError, match=r"has input:4.0-1, input:5.0-1, input:7.0-9, input:8.0-9, middle:0.0-9, output:0.0-9, "):
        resolve_layers(sdxl, "input:1")
    with pytest.raises(ValueError, match=r"layer 'double:19'; it has double:0-18, single:0-37\.$"):
        resolve_layers(named("Flux", double_blocks=19, single_blocks=38), "double:19")


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_no_name_at_all(text):
    with pytest.raises(ValueError, match=r"^Name at least one layer to perturb; this model has double:0-29\.$"):
        resolve_layers(named("WanModel", blocks=30), text)


def test_disabled_self_attention_does_not_count(host):
    """The names d0, d1 … still count these blocks, as they do elsewhere."""
    changes = {"channel_mult": (1, 2), "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4}
    network = unet(SD15 | changes | {"disable_self_attentions": [True, False]})
    assert short(resolve_layers(network, "d1,u0")) == ["input:3.0", "output:0.0"]
    for text in ("d0", "input:1"):
        with pytest.raises(ValueError, match="it has input:3, middle:0, output:0, output:1"):
            resolve_layers(network, text)


def test_without_a_middle_there_is_no_middle(host):
    """SSD-1B and its like."""
    network = unet(SDXL | {"transformer_depth_middle": -1})
    for text in ("middle", "auto", "m0"):
        with pytest.raises(ValueError, match=f"no self-attention layer '{text}'"):
            resolve_layers(network, text)


def test_video_unets_are_known_by_their_temporal_attention(host):
    network = unet(SD15 | {"use_temporal_attention": True, "use_temporal_resblock": False, "merge_strategy": "fixed"})
    assert all(layer.video for layer in resolve_layers(network, "m0,d0-5"))


def test_blocks_in_other_forms(host):
    """Blocks under a longer path, in a dict, between others and with compressed keys."""
    from network_cases import build_cascade, build_cosmos, build_hidream_o1

    def found(network: Any, text: str) -> list[str]:
        return short(resolve_layers(model(network), text))

    assert found(build_cosmos().network, "auto") == ["double:1.0"]
    assert found(build_cascade().network, "auto, down:0-1") == ["down:0.0", "down:1.0", "up:0.0"]
    assert found(build_hidream_o1().network, "double:0-2") == ["double:0.0", "double:1.0", "double:2.0"]
    blocks = [SimpleNamespace(attn=SimpleNamespace(sr_ratio=ratio)) for ratio in (1, 1, 1, 2)]
    pixart = type("PixArtMS", (), {"blocks": blocks})()
    assert found(pixart, "auto") == ["double:1.0"]
    with pytest.raises(ValueError, match=r"layer 'double:3'; it has double:0-2\.$"):
        found(pixart, "double:3")


@pytest.mark.parametrize("name, reason", [("SomeNewModel", "no known hook of ComfyUI reaches its self-attention"), *REFUSED.items()])
def test_other_architectures_are_refused_by_name(name, reason):
    with pytest.raises(ValueError, match=rf"^Perturbed attention is not available for this model \({name}\): {reason}\.$"):
        resolve_layers(named(name, blocks=30), "auto")


def test_subclasses_count_and_their_exceptions_too():
    wan = type("WanModel", (), {"blocks": [None] * 4})
    assert short(resolve_layers(model(type("CameraWanModel", (wan,), {})()), "auto")) == ["double:2.0"]
    with pytest.raises(ValueError, match="CausalWanModel"):
        resolve_layers(model(type("CausalWanModel", (wan,), {})()), "auto")


def test_the_table_for_developers_says_what_the_code_does(host):
    """ARCHITECTURE.md: classes, hooks, joint attention, and that a case of that class is tested."""
    from network_cases import BUILD

    text = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = [
        line.strip("| ").split(" | ")
        for line in text.splitlines()
        if re.match(r"\| `\w+`.* \| `\w+` \| (no|text first|image first) ", line)
    ]
    told = {name: (hook.strip("`"), joint) for first, hook, joint, *_ in rows for name in re.findall(r"`(\w+)`", first)}
    order = {name: "image first" if value.image_first else "text first" for name, value in ARCHITECTURES.items() if value.joint}
    assert told == {name: (value.hook, order.get(name, "no")) for name, value in ARCHITECTURES.items()}
    assert sorted(case for row in rows for case in re.findall(r"`(\w+)`", " ".join(row[3:]))) == sorted(BUILD)


SINCE = {
    "SingleStreamDiT", "CausalWanModel", "MageFlowTransformer2DModel", "LensTransformer2DModel", "JoyImageTransformer3DModel",
    "HiDreamO1Transformer", "BooguTransformer2DModel", "Ideogram4Transformer2DModel", "PixDiT_T2I", "CogVideoXTransformer3DModel",
    "ErnieImageModel", "NaDiT", "MiniMaxH3Model", "LatentSeqMMFlowModel",
}  # fmt: skip


def test_every_architecture_of_the_table_is_a_class_of_the_host(host):
    """A renamed class would silently be refused. Some are not in older hosts."""
    import sys

    import comfy.model_base  # imports them all

    classes = {name for module in sys.modules.values() if module.__name__.startswith("comfy.ldm.") for name in vars(module)}
    assert comfy.model_base and {*ARCHITECTURES, *REFUSED} - classes <= SINCE


def test_every_diffusion_model_of_the_host_is_in_the_table_or_refused_with_a_reason(host):
    """Those that make nothing aside: they detect and measure."""
    import inspect

    import comfy.model_base

    text = inspect.getsource(comfy.model_base)
    names = {name.rpartition(".")[2] for name in re.findall(r"unet_model=([\w.]+)", text)} - {"unet_model", *DETECT}
    classes = {cls.__name__: cls for cls in subclasses(torch.nn.Module) if cls.__module__.startswith("comfy.ldm.")}
    unknown = [name for name in names if not {base.__name__ for base in classes[name].__mro__} & {*ARCHITECTURES, *REFUSED}]
    assert len(names) > 25 and unknown == []


DETECT = {"RTv4", "DepthAnything3Net", "SAM3Model"}


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(below) for below in type.__subclasses__(cls)))
