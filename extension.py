"""What the host registers. Every module is imported on its own: what one of them lacks takes no other node away."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence

from comfy_api.latest import ComfyExtension, io

NODES = {  # the modules in nodes/, with their node classes, in the order in which the host lists them
    "shapers.apg": ["LodestarAPG"],
    "terms.pag": ["LodestarPAG"],
    "terms.autoguidance": ["LodestarAutoguidance"],
    "policies.interval": ["LodestarGuidanceInterval"],
    "policies.adaptive": ["LodestarAdaptiveGuidance"],
    "policies.linear_ag": ["LodestarLinearAGFit", "LodestarLinearAG", "LodestarSaveCoefficients", "LodestarLoadCoefficients"],
    "policies.guidance_policy": ["LodestarPolicySearch", "LodestarGuidancePolicy", "LodestarSavePolicy", "LodestarLoadPolicy"],
    "cfgpp": ["LodestarCFGPP", "LodestarCFGPPInvert"],
    "shapers.frequency": ["LodestarFrequencyGuidance"],
    "frecas": ["LodestarFreCaS", "LodestarStageTransition"],
    "restoration": ["LodestarMeasure", "LodestarMeasurement", "LodestarRestoration"],
    "report": ["LodestarReport"],
    "comparison": ["LodestarCompare"],
    "demo_model": ["LodestarDemoModel"],
}


class Lodestar(ComfyExtension):
    """The pack, or the part of it that this host can run."""

    def __init__(self, modules: Mapping[str, Sequence[str]] = NODES) -> None:
        self.modules = modules

    async def on_load(self) -> None:
        """Before the nodes are there: the server's part of the live charts."""
        if not self.modules:
            return
        try:
            from . import charts

            charts.install()
        except Exception as error:
            logging.warning("Lodestar: live charts do not work in this ComfyUI: %s", _in_one_line(error))

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All node classes whose modules can be imported; the log names the others and the reason."""
        classes: list[type[io.ComfyNode]] = []
        for module, names in self.modules.items():
            try:
                imported = importlib.import_module(f".nodes.{module}", __package__)
                classes += [getattr(imported, name) for name in names]
            except Exception as error:
                logging.warning("Lodestar: this ComfyUI cannot offer %s: %s", ", ".join(names), _in_one_line(error))
        return classes


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
