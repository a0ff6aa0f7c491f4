"""A second model in the same sampling run."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..spaces import is_flow, reparametrise
from .choice import Rows
from .evaluation import FusedCall
from .keys import PLAN, RUN
from .plan import GuidancePlan
from .rows import apply_model, outermost
from .run import Run


class WeakModel:
    """A second model in the same run: its conditioning is the positive one, encoded for it as positive."""

    def __init__(
        self,
        patcher: Any,
        run: Run,
        extra_args: dict[str, Any],
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        **_: Any,
    ) -> None:
        """The arguments after ``run`` are those of the host's SAMPLER_SAMPLE wrappers."""
        guider = run.guider
        self.run = run
        self.patcher = patcher
        self.model = patcher.model
        self.flow = is_flow(patcher.get_model_object("model_sampling"))
        self.main_flow = is_flow(run.model_sampling)
        self.shared = patcher.model is guider.model_patcher.model
        conds = {name: [cond.copy() for cond in conds] for name, conds in guider.original_conds.items()}
        self.options = self._prepared(conds, extra_args["model_options"])
        try:
            if not self.shared:
                patcher.pre_run()
            conds = comfy.samplers.process_conds(
                self.model, noise, conds, patcher.load_device, latent_image, denoise_mask, extra_args.get("seed"),
                latent_shapes=run.latent_shapes,
            )  # fmt: skip
        except BaseException:
            self.finish()
            raise
        self.conds = conds["positive"]

    def _prepared(self, conds: dict[str, list], main: dict[str, Any]) -> dict[str, Any]:
        """The model options for this run, with the hooks of the conds, as the host prepares its own (``main``)."""
        patcher, options = self.patcher, comfy.model_patcher.create_model_options_clone(self.patcher.model_options)
        transformer_options = options.setdefault("transformer_options", {})
        transformer_options["sample_sigmas"] = main["transformer_options"].get("sample_sigmas")
        handler = self.run.guider.model_options.get("context_handler")
        if handler is not None:
            options["context_handler"] = handler.handler  # the host's own, inside ours
        comfy.samplers.preprocess_conds_hooks(conds)
        comfy.sampler_helpers.prepare_model_patcher(patcher, conds, options)
        comfy.samplers.filter_registered_hooks_on_conds(conds, options)
        comfy.samplers.cast_to_load_options(options, device=patcher.load_device, dtype=patcher.model_dtype())
        transformer_options[PLAN], transformer_options[RUN] = GuidancePlan(), self.run
        wrappers = transformer_options.setdefault("wrappers", {})
        wrappers[WrappersMP.APPLY_MODEL] = outermost(wrappers.get(WrappersMP.APPLY_MODEL, {}), [apply_model])
        return options

    def finish(self) -> None:
        """Undo what the preparation did to the patcher."""
        comfy.samplers.cast_to_load_options(self.options, device=self.patcher.offload_device)
        self.patcher.restore_hook_patches()
        if not self.shared:
            self.patcher.cleanup()

    def predict(self, x: Tensor, sigma: Tensor, rows: Rows) -> Tensor:
        """The weak model's denoised prediction [B, ...] at the main model's noisy point, for some rows of the batch."""
        x, sigma = reparametrise(x, sigma, self.main_flow, self.flow)
        with self.run.evaluation.calling(FusedCall(rows=(rows,))):
            return comfy.samplers.calc_cond_batch(self.model, [self.conds], x, sigma, self.options)[0]
