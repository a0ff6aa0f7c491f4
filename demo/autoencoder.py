"""The demo models' latent space: a small KL autoencoder, 8x8 pixels to one latent pixel of 4 channels. Needs torch alone.

Most of its work is done at 16x16 and 32x32 for a picture of 128x128; pixel shuffles do the rest.
"""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = 4
SCALE = 8
_WIDTHS = (128, 64, 32)  # at 1/8, 1/4 and 1/2 of the picture's resolution


class Block(nn.Module):
    """A residual block; begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def _encoder() -> nn.Sequential:
    wide, middle, _ = _WIDTHS
    return nn.Sequential(
        nn.PixelUnshuffle(4), nn.Conv2d(48, middle, 3, padding=1), Block(middle),
        nn.PixelUnshuffle(2), nn.Conv2d(4 * middle, wide, 1), Block(wide), Block(wide),
        nn.SiLU(), nn.Conv2d(wide, 2 * CHANNELS, 1),
    )  # fmt: skip


def _decoder() -> nn.Sequential:
    wide, middle, narrow = _WIDTHS
    return nn.Sequential(
        nn.Conv2d(CHANNELS, wide, 3, padding=1), Block(wide), Block(wide),
        nn.Conv2d(wide, 4 * middle, 1), nn.PixelShuffle(2), Block(middle), Block(middle),
        nn.Conv2d(middle, 4 * narrow, 1), nn.PixelShuffle(2), Block(narrow),
        nn.SiLU(), nn.Conv2d(narrow, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip


class Autoencoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to latents [B, 4, H/8, W/8] of about unit variance, and back. H, W: multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _encoder(), _decoder()
        self.register_buffer("mean", torch.zeros(CHANNELS))  # of what the encoder gives, per channel
        self.register_buffer("spread", torch.ones(CHANNELS))

    def posterior(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the latents, as the encoder gives them."""
        mean, logvar = self.encoder(pictures).chunk(2, dim=1)
        return mean, logvar.clamp(-20, 4)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """The posterior's mean, scaled: the host's form of a first stage."""
        return (self.posterior(pictures)[0] - self.mean[:, None, None]) / self.spread[:, None, None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of latents."""
        return self.decoder(latents * self.spread[:, None, None] + self.mean[:, None, None])


def psnr(restored: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio [B] in decibels of pictures in [-1, 1]."""
    error = ((restored.clamp(-1, 1) - pictures) / 2).square().mean(dim=(1, 2, 3))
    return -10 * error.log10()
