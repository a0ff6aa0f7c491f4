"""Train the 128-pixel demo models' autoencoder: ``python run.py python workshop/train_autoencoder.py [--decoder] [--steps N]``.

Seeded and resumable: a batch depends on its number alone. Stop it with Ctrl-C, start it again, and it goes on. One thread by default: on a
machine with other work, more threads wait for each other and are slower. With --decoder the encoder stays as it is, and so do the latents:
models that were trained on them remain valid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lodestar.demo import autoencoder, scenes
from workshop import trainer

HERE = Path(__file__).resolve().parents[1] / "demo"
FILES = trainer.Files(HERE / "training" / "autoencoder.pt", HERE / "weights" / "latent" / "autoencoder.safetensors")
ENDS = ("encoder.1.weight", "encoder.8.weight", "decoder.0.weight", "decoder.11.weight")  # their scale matters, so Muon is not for them
PLAN = trainer.Plan(steps=1_900, muon=0.012, adam=2e-3, ends=ENDS)
DECODER_STEPS = 4_000  # those of the whole run included
WINDOW, WINDOWS, WHOLE = 64, 32, 8  # three steps of four: 32 windows of 64x64 on objects; the fourth: 8 whole pictures
KL = 1e-3
HELD_OUT = 64


def batch(step: int, seed: int) -> torch.Tensor:
    """Pictures, or windows on objects, of one step, in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    whole = step % 4 == 0
    drawn = scenes.random_scenes(WHOLE if whole else WINDOWS, generator)
    plan = scenes.layout(drawn, generator)
    if whole:
        return scenes.render(plan) * 2 - 1
    rows = torch.arange(len(drawn))
    index = (torch.rand(len(drawn), generator=generator) * drawn.count).long()
    away = torch.rand(len(drawn), 2, generator=generator) * 2 - 1
    middle = plan.centre[rows, index] + away * plan.radius[rows, index, None]
    corner = (((middle + 1) * scenes.SIZE - WINDOW) / 2).round().clamp(0, scenes.SIZE - WINDOW)
    return scenes.render(plan, window=corner, side=WINDOW) * 2 - 1


def held_out(count: int = HELD_OUT) -> torch.Tensor:
    """Pictures in [-1, 1] that no run is trained on."""
    generator = torch.Generator().manual_seed(2**40)
    return scenes.draw(scenes.random_scenes(count, generator), generator) * 2 - 1


def loss(net: autoencoder.Autoencoder, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Absolute and squared error of the pictures, and the latents' divergence from unit normals."""
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = (part.float() for part in net.posterior(pictures))
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        error = net.decoder(latents).float() - pictures
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 8 * error.square().mean() + KL * kl


@torch.no_grad()
def measure(net: autoencoder.Autoencoder) -> dict[str, float]:
    """Held-out quality in decibels. Sets the latents' mean and spread as well, unless the encoder is kept."""
    pictures = held_out()
    mean, logvar = (torch.cat(parts) for parts in zip(*map(net.posterior, pictures.split(16)), strict=True))
    restored = torch.cat([net.decoder(part) for part in mean.split(16)])
    if net.encoder[1].weight.requires_grad:
        net.mean.copy_(mean.mean(dim=(0, 2, 3)))
        net.spread.copy_(mean.std(dim=(0, 2, 3)))
    noise = ((0.5 * logvar).exp().mean(dim=(0, 2, 3)) / net.spread).mean().item()
    return {"psnr": round(autoencoder.psnr(restored, pictures).mean().item(), 2), "noise": round(noise, 4)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", action="store_true", help="train the decoder alone, from the weights in the repository on")
    parser.add_argument("--steps", type=int, help="the length of the whole run, which the learning rate follows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    run(arguments.decoder, arguments.steps, arguments.seed).run()


def run(decoder: bool, steps: int | None, seed: int) -> trainer.Trainer:
    """The run, begun or gone on with. steps: another length than the plan's."""
    net = autoencoder.Autoencoder().to(memory_format=torch.channels_last)
    net.encoder.requires_grad_(not decoder)

    def step_loss(step: int) -> torch.Tensor:
        pictures = batch(step, seed).contiguous(memory_format=torch.channels_last)
        return loss(net, pictures, torch.Generator().manual_seed(seed * 1_000_003 + step))

    plan = PLAN._replace(steps=steps or (DECODER_STEPS if decoder else PLAN.steps))
    files = FILES._replace(state=FILES.state.with_stem("decoder")) if decoder else FILES
    return trainer.Trainer(net, step_loss, plan, files, measure)


if __name__ == "__main__":
    main()
