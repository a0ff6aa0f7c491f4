"""A VAE with gradients: latents of the sampler to pictures in [-1, 1] and back, in one piece and without clipping."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..learning.checkpoints import checkpointed
from ..learning.gradients import gradients, ordinary_weights, training_kernels

_IN_TRAINING = 2  # at least this many times the memory of a decode: what checkpoints keep, and one block's insides


class Codec:
    """Of one evaluation. ``vae`` None: the latents are pictures.

    spend: called with "decodes" or "encodes", and how many pictures.
    """

    def __init__(self, model: Any, vae: Any, spend: Callable[[str, int], None]) -> None:
        self.format = _with_ordinary_tensors(model.latent_format)
        self.vae, self.spend = vae, spend
        if vae is not None:  # the values that its network has for black and white
            self.black, self.white = (float(vae.process_input(torch.tensor(value))) for value in (0.0, 1.0))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, ``decode`` and ``encode`` work and have gradients, also in inference mode."""
        if self.vae is None:
            with gradients():
                yield
            return
        network = self.vae.first_stage_model
        with gradients(), training_kernels(), ordinary_weights(network), checkpointed(network):
            yield

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, (1,) h, w] to pictures [B, 3, H, W]."""
        latents = self.format.process_out(latents)
        if self.vae is None:
            return latents
        self.spend("decodes", len(latents))
        comfy.model_management.throw_exception_if_processing_interrupted()
        out = self.vae.first_stage_model.decode(latents.to(self.vae.device, self.vae.vae_dtype))
        out = out.to(latents.device, latents.dtype)
        out = out.squeeze(2) if out.ndim == 5 else out
        return (out - self.black) * (2 / (self.white - self.black)) - 1

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] to latents."""
        if self.vae is None:
            return self.format.process_in(pictures)
        self.spend("encodes", len(pictures))
        inputs = (pictures + 1) * ((self.white - self.black) / 2) + self.black
        inputs = inputs.unsqueeze(2) if self.vae.latent_dim == 3 else inputs
        latents = self.vae.first_stage_model.encode(inputs.to(self.vae.device, self.vae.vae_dtype))
        return self.format.process_in(latents.to(pictures.device, pictures.dtype))


def _with_ordinary_tensors(latent_format: Any) -> Any:
    """A copy whose constants autograd can save."""
    own = copy.copy(latent_format)
    with torch.inference_mode(False):
        for name, value in vars(latent_format).items():
            if isinstance(value, Tensor):
                setattr(own, name, value.clone())
    return own


# --- what cannot work ------------------------------------------------------------------------------------------------


def is_pixel_space(model: Any) -> bool:
    """Whether a host's model works on pictures themselves."""
    latent_format = model.latent_format
    return latent_format.latent_channels == 3 and getattr(latent_format, "spacial_downscale_ratio", 8) == 1


def check_vae(name: str, model: Any, vae: Any) -> None:
    """Raise ValueError for a VAE that is missing, or does not belong to the host's model."""
    latent_format = model.latent_format
    if vae is None:
        if not is_pixel_space(model):
            raise ValueError(f"{name}: this model works on latents, and measurements are made of pictures; connect its VAE to vae.")
        return
    channels, output = vae.latent_channels, getattr(vae, "output_channels", 3)
    if channels != latent_format.latent_channels or output != 3:
        raise ValueError(
            f"{name}: the model's latents ({type(latent_format).__name__}) have {latent_format.latent_channels} channels, and this VAE "
            f"makes {output} colours out of {channels}; connect the VAE that belongs to the model."
        )


def compression(vae: Any) -> int:
    """Pixels of a picture for one of the latent, along a side."""
    return 1 if vae is None else vae.spacial_compression_decode()


def check_memory(name: str, vae: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError where a latent [B, C, ...] of this shape would need tiles, through which gradients do not go."""
    if vae is None or getattr(vae, "latent_dim", 2) != 2:  # the estimates for videos count what no tile would change
        return
    needed = _IN_TRAINING * shape[0] * vae.memory_used_decode(shape, vae.vae_dtype)
    there = comfy.model_management.get_total_memory(vae.device)
    if needed > there:
        side, pictures = compression(vae), "a picture" if shape[0] == 1 else f"{shape[0]} pictures"
        raise ValueError(
            f"{name}: gradients through the decoder for {pictures} of {shape[-1] * side}x{shape[-2] * side} pixels need about "
            f"{needed / 2**30:.1f} GiB without tiles, and the device has {there / 2**30:.1f}; take a smaller picture."
        )
