"""Train the 128-pixel diffusion models: ``python run.py python workshop/train_latent.py [--only NAME ...]``.

Three strengths: ``main``; ``medium``, the same run at a quarter of its way; ``weak``, smaller and shorter, with the same data and captions.
Seeded and resumable like the autoencoder, whose weights in ``demo/weights/latent`` it needs: a batch depends on its number alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import comfy.model_base
import torch

from lodestar.demo import latent_models, scenes
from workshop import latents, trainer
from workshop.train import initialise

STATE = Path(__file__).resolve().parents[1] / "demo" / "training"
BATCH = 64
CAPTION_DROPOUT = 0.12
HELD_OUT = 1_000_000  # number of the shard that no run is trained on


class Recipe(NamedTuple):
    """Steps of 64 pictures, and the peak rates of Muon and Adam."""

    steps: int
    muon: float = 0.02
    adam: float = 2e-3


RECIPES = {
    "mmdit_main": Recipe(6_000),
    "unet_main": Recipe(6_000),
    "mmdit_weak": Recipe(600),
    "unet_weak": Recipe(600),
}
# First and last layers: their scale matters, so Muon is not for them.
_ENDS = {
    "mmdit": ("x_embedder.proj.weight", "context_embedder.weight", "final_layer.linear.weight"),
    "unet": ("input_blocks.0.0.weight", "out.2.weight"),
}


class Diffusion:
    """The training loss of one model, in the host's own parametrisation (eps or flow)."""

    def __init__(self, model: str, strength: str) -> None:
        self.host = latent_models.build(model, strength)
        self.net = self.host.diffusion_model
        self.encoder = latent_models.SceneEncoder()
        self.encoder.load_sd(latent_models.word_table())

    def loss(self, data: latents.Encoded, generator: torch.Generator) -> torch.Tensor:
        """Weighted mean squared error of the noise (eps) or the velocity (flow): both are (x - D) / sigma."""
        count, sampling = len(data.latents), self.host.model_sampling
        keep = torch.rand(count, generator=generator) >= CAPTION_DROPOUT
        words = [caption if kept else "" for caption, kept in zip(scenes.captions(data.scenes), keep, strict=True)]
        context, pooled = self.encoder.encode(words)
        spread = torch.randn(count, generator=generator)
        eps = self.host.model_type is comfy.model_base.ModelType.EPS
        timestep = sampling.timestep((1.2 * spread).exp()).float() if eps else 1000 * torch.sigmoid(spread).clamp(1e-3)
        sigma = sampling.sigma(timestep)
        level = sigma[:, None, None, None]
        x = sampling.noise_scaling(level, torch.randn(data.latents.shape, generator=generator), data.latents)
        with torch.autocast("cpu", torch.bfloat16):
            out = self.net(sampling.calculate_input(sigma, x), sampling.timestep(sigma).float(), context=context, y=pooled)
        error = (sampling.calculate_denoised(sigma, out.float(), x) - data.latents) / level
        return (error.square() * (1 + level**2 if eps else 1)).mean()  # eps: the network's own output counts alike at every level


def trainer_of(name: str, seed: int, steps: int | None = None) -> trainer.Trainer:
    """One network's run, begun or gone on with. steps: another length than the recipe's."""
    model, strength = name.split("_")
    recipe, task = RECIPES[name], Diffusion(model, strength)
    initialise(task.net.requires_grad_(True), seed)
    store = latents.Store(STATE / "latents", latent_models.WEIGHTS / "autoencoder.safetensors")
    stream = latents.Stream(store)
    steps = steps or recipe.steps
    weights = latent_models.WEIGHTS / f"{name}.safetensors"
    return trainer.Trainer(
        task.net,
        _step_loss(task, stream, seed),
        trainer.Plan(steps, recipe.muon, recipe.adam, _ENDS[model]),
        trainer.Files(STATE / f"{name}.pt", weights),
        _measure(task, store),
        {steps // 4: weights.with_stem(f"{model}_medium")} if strength == "main" else None,
    )


def _step_loss(task: Diffusion, stream: latents.Stream, seed: int) -> Callable[[int], torch.Tensor]:
    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return task.loss(stream.batch(step * BATCH, BATCH, generator), generator)

    return loss


def _measure(task: Diffusion, store: latents.Store) -> Callable[[torch.nn.Module], dict[str, float]]:
    """The loss on pictures that no run is trained on, always with the same noise."""

    @torch.no_grad()
    def measure(net: torch.nn.Module) -> dict[str, float]:
        shard = store.shard(HELD_OUT)
        generator = torch.Generator().manual_seed(0)
        parts = [slice(start, start + 4 * BATCH) for start in range(0, 8 * BATCH, 4 * BATCH)]
        losses = [task.loss(latents.Encoded(shard.scenes[part], shard.latents[part]), generator).item() for part in parts]
        return {"held_out": round(sum(losses) / len(losses), 5)}

    return measure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="train these networks alone")
    parser.add_argument("--steps", type=int, help="another length of the whole run, which the learning rate follows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.only:
        trainer_of(name, arguments.seed, arguments.steps).run()


if __name__ == "__main__":
    main()
