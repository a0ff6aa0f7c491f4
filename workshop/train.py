"""Train the embedded demo models: ``python run.py python workshop/train.py [--only NAME ...] [--pictures N]``.

Seeded and resumable: a batch depends on its number alone, and the state is saved every minute. Stop it with Ctrl-C, start it
again with the same arguments, and it goes on. Exponential averages of the weights go to ``demo/weights`` at each save.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, safe_open, save_file
from tqdm import tqdm

from lodestar.demo import classifier, models, shapes, text

STATE = Path(__file__).resolve().parents[1] / "demo" / "training"
CAPTION_DROPOUT = 0.15
EMA_POWER = 12.0  # power-function average (EDM2, Karras et al. 2024, eq. 4): covers about the last tenth of the run


class Recipe(NamedTuple):
    """How one network is trained: pictures in all, rows per step, peak learning rate."""

    pictures: int
    batch: int
    rate: float


RECIPES = {
    "unet_main": Recipe(125_000, 16, 1.5e-3),
    "unet_weak": Recipe(12_000, 16, 1e-3),
    "mmdit_main": Recipe(84_000, 16, 1e-3),
    "mmdit_weak": Recipe(16_000, 16, 1e-3),
    "classifier": Recipe(60_000, 32, 2e-3),
}


class Diffusion(torch.nn.Module):
    """The training loss of one demo model, in the host's own parametrisation (eps or flow)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.host = models.build(*name.split("_"))
        self.net = self.host.diffusion_model
        self.encoder = text.CaptionEncoder()
        self.encoder.load_sd(text.word_table())

    def loss(self, scenes: shapes.Scenes, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Weighted mean squared error of the noise (eps) or the velocity (flow): both are (x - D) / sigma."""
        sampling = self.host.model_sampling
        keep = torch.rand(len(scenes), generator=generator) >= CAPTION_DROPOUT
        words = [caption if kept else "" for caption, kept in zip(shapes.captions(scenes), keep, strict=True)]
        context, pooled = self.encoder.encode(words)
        latent = self.host.process_latent_in(pictures * 2 - 1)
        spread = torch.randn(len(scenes), generator=generator)
        if self.host.model_type is models.comfy.model_base.ModelType.EPS:
            timestep = sampling.timestep((1.2 * spread).exp()).float()
        else:
            timestep = 1000 * torch.sigmoid(spread).clamp(1e-3)
        sigma = sampling.sigma(timestep)
        noise = torch.randn(latent.shape, generator=generator)
        level = sigma[:, None, None, None]
        x = sampling.noise_scaling(level, noise, latent)
        out = self.net(sampling.calculate_input(sigma, x), sampling.timestep(sigma).float(), context=context, y=pooled)
        error = (sampling.calculate_denoised(sigma, out, x) - latent) / level
        return (error.square() * self.weight(level)).mean()

    def weight(self, level: torch.Tensor) -> torch.Tensor:
        """Loss weight per noise level: makes the error of the network's own output count alike at every level."""
        return 1.0 + level**2 if self.host.model_type is models.comfy.model_base.ModelType.EPS else torch.ones_like(level)


class Attributes(torch.nn.Module):
    """The training loss of the attribute classifier (one object per picture)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier.AttributeClassifier()

    def loss(self, scenes: shapes.Scenes, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Cross-entropy over the four attributes, on pictures with a little noise so that samples are not out of its range."""
        noise = 0.03 * torch.rand(len(scenes), 1, 1, 1, generator=generator) * torch.randn(pictures.shape, generator=generator)
        return classifier.loss(self.net(pictures + noise), scenes)


def initialise(net: torch.nn.Module, seed: int) -> None:
    """Fill the host's uninitialised layers: fan-in uniform, unit norms, and zero for layers that end a residual branch."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            bound = math.sqrt(3 / parameter[0].numel())
            parameter.data.uniform_(-bound, bound, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    for name, parameter in net.named_parameters():
        if any(part in name for part in ("proj_out.", "out_layers.3.", "out.2.", "adaLN_modulation.1.", "final_layer.linear.")):
            parameter.data.zero_()


class Trainer:
    """One network's training run: model, average, optimizers, and where they are kept."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed, self.recipe = name, seed, RECIPES[name]
        self.task = Attributes() if name == "classifier" else Diffusion(name)
        self.net = self.task.net
        self.net.train().requires_grad_(True)
        if name != "classifier":
            initialise(self.net, seed)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=self.recipe.rate, betas=(0.9, 0.99), fused=True)
        self.average = {key: value.clone() for key, value in self.net.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.path = STATE / f"{name}.safetensors"
        if self.path.exists():
            self.load()

    def train_step(self) -> float:
        """One batch; everything random in it follows from the seed and the step number."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        scenes = shapes.random_scenes(self.recipe.batch, generator, pairs=0.0 if self.name == "classifier" else 0.15)
        loss = self.task.loss(scenes, shapes.draw(scenes, generator), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.step += 1
        progress = self.step * self.recipe.batch / self.recipe.pictures
        rate = self.recipe.rate * min(1.0, self.step / 100) * min(1.0, 0.02 + 2 * max(0.0, 1 - progress))
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        keep = (1 - 1 / self.step) ** (EMA_POWER + 1)
        for key, value in self.net.state_dict().items():
            self.average[key].lerp_(value, 1 - keep)
        return loss.item()

    def run(self) -> None:
        """Train to the recipe's end with a progress bar, saving every minute."""
        total = self.recipe.pictures
        smooth, saved = None, time.monotonic()
        with tqdm(total=total, initial=self.step * self.recipe.batch, desc=self.name, unit="pic", mininterval=10) as bar:
            while self.step * self.recipe.batch < total:
                began = time.monotonic()
                loss = self.train_step()
                self.seconds += time.monotonic() - began
                smooth = loss if smooth is None else 0.99 * smooth + 0.01 * loss
                bar.update(self.recipe.batch)
                bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
                if time.monotonic() - saved > 60:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write the resumable state, then the averaged weights in half precision for use."""
        tensors = {f"net.{key}": value for key, value in self.net.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{slot}": value for slot, value in slots.items()}
        metadata = {"step": str(self.step), "seconds": f"{self.seconds:.0f}"}
        _write(tensors, self.path, metadata)
        metadata |= {"pictures": str(self.step * self.recipe.batch), "seed": str(self.seed)}
        _write({key: value.half() for key, value in self.average.items()}, models.WEIGHTS / self.path.name, metadata)

    def load(self) -> None:
        """Go on from the saved state."""
        tensors = load_file(self.path)
        self.net.load_state_dict({key[4:]: value for key, value in tensors.items() if key.startswith("net.")})
        self.average = {key[8:]: value for key, value in tensors.items() if key.startswith("average.")}
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, slot = key.split(".")
                state.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        with safe_open(self.path, "pt") as file:
            self.step, self.seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])


def _write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half_done = path.with_suffix(".partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, half_done, metadata)
    half_done.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="train these networks alone")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _write(text.word_table(), models.WEIGHTS / "words.safetensors", {})
    for name in arguments.only:
        Trainer(name, arguments.seed).run()


if __name__ == "__main__":
    main()
