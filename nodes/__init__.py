"""The nodes: schemas, tooltips, and one call each into the guiders."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .apg import LodestarAPG
from .autoguidance import LodestarAutoguidance
from .demo_model import LodestarDemoModel
from .frecas import LodestarFreCaS, LodestarStageTransition
from .frequency import LodestarFrequencyGuidance
from .interval import LodestarGuidanceInterval
from .pag import LodestarPAG
from .report import LodestarReport


class Lodestar(ComfyExtension):
    """What the host registers."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All node classes."""
        return [
            LodestarAPG,
            LodestarPAG,
            LodestarAutoguidance,
            LodestarGuidanceInterval,
            LodestarFrequencyGuidance,
            LodestarFreCaS,
            LodestarStageTransition,
            LodestarReport,
            LodestarDemoModel,
        ]
