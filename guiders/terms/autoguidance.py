"""Autoguidance: guide with a worse version of the model. Karras et al., NeurIPS 2024, arXiv 2406.02507, eq. 3 and appendix."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor

from ..engine.branches import Branch
from ..engine.host import describe_latent, same_latent, same_predictions, same_weights
from ..engine.keys import OWN_WEIGHTS
from ..engine.plan import Term
from ..engine.start import Start
from ..engine.step import Step


def autoguidance_update(cond: Tensor, weak: Tensor, w: float) -> Tensor:
    """(w - 1)(D_1 - D_0): what D_0 + w (D_1 - D_0) adds to D_1."""
    return (w - 1) * (cond - weak)


@dataclass(frozen=True, kw_only=True)
class Autoguidance(Term):
    """D + (w - 1)(D_c - D_weak); with CFG this is the paper's form for several guides."""

    name: ClassVar[str] = "Autoguidance"
    short: ClassVar[str] = "Autoguidance"
    weak_model: Any
    scale: float = 2.0

    @property
    def neutral(self) -> bool:
        """Scale 1 is the main model alone."""
        return self.scale == 1

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The positive conditioning on the weak model."""
        return (Branch(model=self.weak_model),)

    def check(self, start: Start) -> None:
        """Refuse patches that came onto the model after this rule, and reach the weak model too."""
        model = start.guider.model_patcher
        if self.weak_model.model is model.model and not same_weights(self.weak_model, model):
            raise ValueError(
                "Autoguidance and a LoRA or another patch of the model behind it: weak_model is the same loaded file and would be patched "
                "too; put the patch before Autoguidance."
            )

    def add(self, denoised: Tensor, cond: Tensor, others: Mapping[Branch, Tensor], step: Step) -> Tensor:
        """See autoguidance_update."""
        return denoised + autoguidance_update(cond, others[self.branches[0]], self.scale)


def check_weak_model(model: Any, weak_model: Any) -> None:
    """Raise ValueError if the two models do not work on the same kind of latent."""
    if not same_latent(model, weak_model):
        raise ValueError(
            f"Autoguidance needs two models of one latent format: model has {describe_latent(model)}, "
            f"weak_model has {describe_latent(weak_model)}."
        )


def refuse_same_model(model: Any, weak_model: Any) -> None:
    """Raise ValueError if two models without our plans are one and the same."""
    if same_predictions(model, weak_model):
        raise ValueError(
            "Autoguidance: model and weak_model are the same model, so that there is nothing to guide away from; give it a weaker version "
            "as weak_model, and put LoRAs and other patches of the model before Autoguidance instead of behind it."
        )


def with_own_weights(weak_model: Any, model: Any) -> Any:
    """The weak model, with weights of its own where both are clones of one loaded model that differ in their patches.

    The host's cache hands out one instance however often a file is loaded, and one instance cannot hold two sets of patches at a time.
    The second set of weights is kept on the weak model, for the next run with other settings, and is freed with it.
    """
    if weak_model.model is not model.model or same_weights(weak_model, model):
        return weak_model
    if weak_model.injections:  # they hold modules of this very instance
        raise ValueError(
            "Autoguidance and a LoRA that is loaded in bypass mode: weak_model is the same loaded file as model, and its LoRA would reach "
            "both; use the ordinary LoRA loader for weak_model."
        )
    own = getattr(weak_model, OWN_WEIGHTS, None)
    if own is None:
        own = _reloaded(weak_model) if weak_model.is_dynamic() else _copied(weak_model)
        own.hook_backup = {}  # clones share it with what they come from, as long as they share their weights
        own.parent = None  # whose place the host would let it take when it is gone
        own.clone_base_uuid = uuid.uuid4()
        setattr(weak_model, OWN_WEIGHTS, own)
    return own


def _copied(weak_model: Any) -> Any:
    """A clone on a copy of the weights."""
    import comfy.model_management

    comfy.model_management.unload_all_models()  # takes applied patches out of the weights before they are copied
    own = weak_model.clone()
    config = weak_model.model.model_config  # answers to every name, which copy takes for methods
    own.model = copy.deepcopy(weak_model.model, {id(config): config})
    own.backup, own.backup_buffers, own.object_patches_backup, own.pinned = {}, {}, {}, set()
    return own


def _reloaded(weak_model: Any) -> Any:
    """A clone without dynamic VRAM, which the host loads from the file once more: there weights stay in their file until they are used."""
    if getattr(weak_model, "cached_patcher_init", None) is None or "disable_dynamic" not in signature(weak_model.clone).parameters:
        raise ValueError(
            "Autoguidance and dynamic VRAM: model and weak_model are the same loaded file with different patches, and what has loaded "
            "weak_model cannot load it twice; use one of ComfyUI's own loaders, copy the file under another name and load that as "
            "weak_model, or start ComfyUI with --disable-dynamic-vram."
        )
    return weak_model.clone(disable_dynamic=True)
