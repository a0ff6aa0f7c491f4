"""CFG with a weight of its own at every step. Castillo et al., AAAI 2025, arXiv 2312.12487, call the list of weights a guidance policy."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..engine.checks import refuse_dual_cfg, refuse_uncond_readers
from ..engine.choice import Choice
from ..engine.plan import Policy
from ..engine.start import Start
from ..engine.step import Step
from ..learning.recognition import setting_of
from ..learning.setting import Setting

FORMAT = "lodestar guidance policy 1"
UNCOND, COND = 0.0, 1.0
_WORDS = {"unconditional": UNCOND, "conditional": COND}


def evaluations(weight: float) -> int:
    """What a step of this weight costs: D_u + w (D_c - D_u) needs one prediction at w = 0 and 1, and two at others."""
    return 1 if weight in (UNCOND, COND) else 2


@dataclass(frozen=True)
class StepWeights:
    """A guidance policy, kept as JSON that people can read.

    weights: one for every step; 0 is the unconditional prediction alone, 1 the conditional one. setting: what they were found for.
    """

    setting: Setting
    weights: tuple[float, ...]

    @property
    def nfe(self) -> int:
        """Evaluations of a run with one per step."""
        return sum(map(evaluations, self.weights))

    def to_json(self) -> str:
        """Readable, with one word or weight per step."""
        words = {weight: word for word, weight in _WORDS.items()}
        steps = [words.get(weight, f"cfg {weight:g}") for weight in self.weights]
        about = {"format": FORMAT, "evaluations": self.nfe, "choices": steps}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in (about | self.setting.to_json()).items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, name: str = "the policy") -> StepWeights:
        """Undo ``to_json``. Raises ValueError saying what is wrong with any other text."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Guidance policy: {name} is not JSON ({error}).") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"Guidance policy: {name} does not say that its format is {FORMAT!r}.")
        try:
            weights = tuple(_weight(choice) for choice in values["choices"])
            setting = Setting.from_json(values)
        except KeyError as error:
            raise ValueError(f"Guidance policy: {name} has no {error.args[0]!r}.") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"Guidance policy: {name} is wrong: {error}.") from None
        if len(weights) != setting.steps:
            raise ValueError(f"Guidance policy: {name} has {len(weights)} choices for {setting.steps} steps.")
        return cls(setting, weights)

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> StepWeights:
        """From a JSON file."""
        return cls.from_json(path.read_text(encoding="utf-8"), path.name)


def _weight(choice: Any) -> float:
    if choice in _WORDS:
        return _WORDS[choice]
    word, _, number = str(choice).partition(" ")
    try:
        if word != "cfg":
            raise ValueError
        return float(number)
    except ValueError:
        raise ValueError(f"a choice is 'conditional', 'unconditional' or 'cfg' and a number, not {choice!r}") from None


@dataclass(frozen=True, kw_only=True)
class StepwiseCFG(Policy):
    """Every step uses the weight that the policy has for it, whatever the sampler's cfg says, and pays for what that weight needs."""

    name: ClassVar[str] = "Guidance policy: apply"
    short: ClassVar[str] = "Guidance policy"
    claims: ClassVar[str] = "what every step evaluates"
    policy: StepWeights

    @property
    def neutral(self) -> bool:
        """The sampler's own cfg at every step."""
        return all(weight == self.policy.setting.cfg for weight in self.policy.weights)

    def check(self, start: Start) -> None:
        """Sampler, schedule and cfg must be those of the search; model and prompt are the user's to choose."""
        refuse_dual_cfg(self.name, start.guider)
        refuse_uncond_readers(self.name, start.sampler)
        found, run = self.policy.setting, setting_of(start.guider, start.sampler, start.sigmas)
        replace(found, model=run.model, space=run.space, negative=run.negative).refuse_other(self.name, "this policy was", run)

    def choose(self, step: Step) -> Choice:
        """The step's weight."""
        return Choice(weight=self.policy.weights[step.index])
