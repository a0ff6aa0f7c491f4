"""Train the classifier of the 128-pixel demo pictures: ``python run.py python workshop/train_classifier.py [--steps N]``.

Seeded and resumable like the autoencoder: a batch depends on its number alone.
"""

from __future__ import annotations

import argparse

import torch

from lodestar.demo import scene_classifier, scenes
from workshop import trainer
from workshop.train_latent import STATE

BATCH = 32
HELD_OUT = 1_000
PLAN = trainer.Plan(steps=2_500, muon=0.02, adam=2e-3, ends=("body.1.0.weight", "looks.weight"))


def loss(net: scene_classifier.SceneClassifier, step: int, seed: int) -> torch.Tensor:
    """Cross-entropy on fresh pictures, with a little noise so that samples are not out of its range."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    drawn = scenes.random_scenes(BATCH, generator)
    pictures = scenes.draw(drawn, generator)
    noise = 0.03 * torch.rand(BATCH, 1, 1, 1, generator=generator) * torch.randn(pictures.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net((pictures + noise).contiguous(memory_format=torch.channels_last))
    return scene_classifier.loss({name: value.float() for name, value in logits.items()}, drawn)


@torch.no_grad()
def measure(net: scene_classifier.SceneClassifier) -> dict[str, float]:
    """Share of pictures that no run is trained on in which it reads everything of a kind right."""
    generator = torch.Generator().manual_seed(2**40)
    parts = []
    for _ in range(HELD_OUT // 50):
        drawn = scenes.random_scenes(50, generator)
        parts.append(scene_classifier.correct(net(scenes.draw(drawn, generator)), drawn))
    return {name: round(torch.cat([part[name] for part in parts]).double().mean().item(), 4) for name in parts[0]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=PLAN.steps, help="the length of the whole run, which the learning rate follows")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    net = scene_classifier.SceneClassifier().to(memory_format=torch.channels_last)
    plan = PLAN._replace(steps=arguments.steps)
    files = trainer.Files(STATE / "classifier.pt", scene_classifier.PATH)
    trainer.Trainer(net, lambda step: loss(net, step, arguments.seed), plan, files, measure).run()


if __name__ == "__main__":
    main()
