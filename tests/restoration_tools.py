"""What the tests of restoration share. Importing this needs no host; models and VAEs do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lodestar.guiders.restoration.measurement import Measurement
from lodestar.guiders.restoration.operators import Downscale, Operator


def random(*shape: int, seed: int = 0) -> Tensor:
    """In float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count: int = 1, size: int = 16, seed: int = 5) -> Tensor:
    """Smooth random pictures [count, size, size, 3] in [0, 1]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear").movedim(1, -1)


def measured(count: int = 1, size: int = 16, operator: Operator | None = None) -> Measurement:
    """A measurement of such pictures, a quarter of the size."""
    return Measurement.of_original(pictures(count, size), operator or Downscale(4), 0.0, 0)


def pixel_model(seed: int = 0) -> Any:
    """A tiny UNet of the host's that works on pictures themselves."""
    import tools

    class Pictures(tools.comfy.latent_formats.LatentFormat):
        latent_channels, spacial_downscale_ratio, scale_factor = 3, 1, 2.0

    class Family(tools.TinyUNet):
        latent_format = Pictures

    config = Family(tools.UNET | {"in_channels": 3, "out_channels": 3})
    return tools.patcher(config.get_model({}, device=torch.device("cpu")), seed)


def tiny_vae(channels: int = 4) -> Any:
    """The host's KL autoencoder, small and random: 8x8 pixels for one of the latent; weights that were made in inference mode."""
    import comfy.sd
    import tools

    network = {
        "double_z": True, "z_channels": channels, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.inference_mode():
        vae = comfy.sd.VAE({}, config={"params": {"ddconfig": network, "embed_dim": channels}}, dtype=torch.float32)
        tools.fill(vae.first_stage_model, seed=3)
    vae.latent_channels = channels
    return vae
