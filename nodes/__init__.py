"""The nodes: schemas, tooltips, and one call each into the guiders."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import charts
from .adaptive import LodestarAdaptiveGuidance
from .apg import LodestarAPG
from .autoguidance import LodestarAutoguidance
from .cfgpp import LodestarCFGPP, LodestarCFGPPInvert
from .compare import LodestarCompare
from .demo_model import LodestarDemoModel
from .frecas import LodestarFreCaS, LodestarStageTransition
from .frequency import LodestarFrequencyGuidance
from .guidance_policy import LodestarGuidancePolicy, LodestarLoadPolicy, LodestarPolicySearch, LodestarSavePolicy
from .interval import LodestarGuidanceInterval
from .linear_ag import LodestarLinearAG, LodestarLinearAGFit, LodestarLoadCoefficients, LodestarSaveCoefficients
from .pag import LodestarPAG
from .report import LodestarReport


class Lodestar(ComfyExtension):
    """What the host registers."""

    async def on_load(self) -> None:
        """Before the nodes are there."""
        charts.install()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All node classes."""
        return [
            LodestarAPG,
            LodestarPAG,
            LodestarAutoguidance,
            LodestarGuidanceInterval,
            LodestarAdaptiveGuidance,
            LodestarLinearAGFit,
            LodestarLinearAG,
            LodestarSaveCoefficients,
            LodestarLoadCoefficients,
            LodestarPolicySearch,
            LodestarGuidancePolicy,
            LodestarSavePolicy,
            LodestarLoadPolicy,
            LodestarCFGPP,
            LodestarCFGPPInvert,
            LodestarFrequencyGuidance,
            LodestarFreCaS,
            LodestarStageTransition,
            LodestarReport,
            LodestarCompare,
            LodestarDemoModel,
        ]
