"""The nodes: schemas, tooltips, and one call each into the guiders."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import charts
from .nodes.cfgpp import LodestarCFGPP, LodestarCFGPPInvert
from .nodes.comparison import LodestarCompare
from .nodes.demo_model import LodestarDemoModel
from .nodes.frecas import LodestarFreCaS, LodestarStageTransition
from .nodes.policies.adaptive import LodestarAdaptiveGuidance
from .nodes.policies.guidance_policy import LodestarGuidancePolicy, LodestarLoadPolicy, LodestarPolicySearch, LodestarSavePolicy
from .nodes.policies.interval import LodestarGuidanceInterval
from .nodes.policies.linear_ag import LodestarLinearAG, LodestarLinearAGFit, LodestarLoadCoefficients, LodestarSaveCoefficients
from .nodes.report import LodestarReport
from .nodes.shapers.apg import LodestarAPG
from .nodes.shapers.frequency import LodestarFrequencyGuidance
from .nodes.terms.autoguidance import LodestarAutoguidance
from .nodes.terms.pag import LodestarPAG


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
