"""Lodestar: guidance methods for ComfyUI. The host calls ``comfy_entrypoint`` and serves WEB_DIRECTORY."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./js"


async def comfy_entrypoint() -> ComfyExtension:
    """The pack's nodes. Imported here so that the maths can be used without a host."""
    from .extension import Lodestar

    return Lodestar()
