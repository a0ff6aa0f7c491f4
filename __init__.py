"""Lodestar: guidance methods for ComfyUI. The host calls ``comfy_entrypoint`` and serves WEB_DIRECTORY."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./js"
OLDEST_HOST = "0.16.3"


async def comfy_entrypoint() -> ComfyExtension:
    """The pack's nodes; none on a host that is too old. Imported here so that the maths can be used without a host."""
    from comfyui_version import __version__ as version

    from .extension import Lodestar

    if _numbers(version) >= _numbers(OLDEST_HOST):
        return Lodestar()
    logging.warning("Lodestar needs ComfyUI %s or newer; this is %s.", OLDEST_HOST, version)
    return Lodestar(modules={})


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
