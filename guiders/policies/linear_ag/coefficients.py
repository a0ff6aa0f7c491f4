"""Coefficients: what a LinearAG fit found, for which setting, and how well it predicts. Kept as safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...learning.setting import Setting
from .regression import Gram, previous, replaced_steps, shifted

FORMAT = "lodestar linear_ag coefficients 1"


@dataclass(frozen=True, eq=False)
class Coefficients:
    """betas: [2k + 1] in float64 for every replaced step k. r2: the fit's and the trivial predictors' R^2 by step."""

    setting: Setting
    betas: Mapping[int, Tensor]
    r2: Mapping[int, tuple[float, float, float]]
    trajectories: int

    @classmethod
    def of(cls, gram: Gram, setting: Setting) -> Coefficients:
        """Solve for every replaced step."""
        betas = {k: gram.solve(k) for k in replaced_steps(gram.steps)}
        r2 = {k: (gram.r2(k, beta), gram.r2(k, previous(k)), gram.r2(k, shifted(k))) for k, beta in betas.items()}
        return cls(setting, betas, r2, gram.trajectories)

    @cached_property
    def hash(self) -> str:
        """Twelve characters that stand for the setting and the coefficients."""
        parts = hashlib.sha256(json.dumps(self.setting.to_json(), sort_keys=True).encode())
        for k in sorted(self.betas):
            parts.update(f"{k}".encode() + self.betas[k].numpy().tobytes())
        return parts.hexdigest()[:12]

    def report(self) -> str:
        """What was fitted, and R^2 of every replaced step next to the trivial predictors, as aligned text."""
        setting = self.setting
        lines = [
            f"LinearAG coefficients {self.hash}: {self.trajectories} trajectories",
            f"model {setting.model}, {setting.sampler}, {setting.steps} steps, cfg {setting.cfg:g}, {setting.space} predictions",
            f"{2 * setting.steps - len(self.betas) - (setting.steps + 1) // 2} NFE instead of {2 * setting.steps}",
            "",
            "R² of the predicted unconditional prediction (1 - R² in brackets)",
            f"{'step':>4}  {'fit':<20}{'previous uncond':<20}{'previous, shifted':<20}",
        ]
        for k, values in self.r2.items():
            lines.append(f"{k:>4}  " + "".join(f"{f'{value:.6f} ({1 - value:.1e})':<20}" for value in values).rstrip())
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Write a safetensors file: a tensor for every step, the rest in its metadata."""
        tensors = {f"beta.{k}": beta for k, beta in self.betas.items()} | {
            f"r2.{k}": torch.tensor(r2, dtype=torch.float64) for k, r2 in self.r2.items()
        }
        about = {"setting": json.dumps(self.setting.to_json()), "trajectories": str(self.trajectories), "hash": self.hash}
        save_file(tensors, path, metadata={"format": FORMAT, **about})

    @classmethod
    def load(cls, path: Path) -> Coefficients:
        """Read a file that ``save`` wrote. Raises ValueError saying what is wrong with any other."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except (SafetensorError, OSError) as error:
            raise ValueError(f"LinearAG: {path.name} is not a safetensors file that can be read ({error}).") from None
        if about.get("format") != FORMAT:
            raise ValueError(f"LinearAG: {path.name} holds no LinearAG coefficients.")
        try:
            setting = Setting.from_json(json.loads(about["setting"]))
            steps = sorted(int(name.removeprefix("beta.")) for name in tensors if name.startswith("beta."))
            betas = {k: tensors[f"beta.{k}"] for k in steps}
            r2 = {k: tuple(tensors[f"r2.{k}"].tolist()) for k in steps}
            coefficients = cls(setting, betas, r2, int(about["trajectories"]))
        except KeyError as error:
            raise ValueError(f"LinearAG: {path.name} is damaged: it has no {error.args[0]!r}.") from None
        except ValueError as error:
            raise ValueError(f"LinearAG: {path.name} is damaged: {error}.") from None
        if coefficients.hash != about.get("hash") or any(len(beta) != 2 * k + 1 for k, beta in betas.items()):
            raise ValueError(f"LinearAG: {path.name} is damaged: its coefficients are not those that were saved.")
        return coefficients
