"""``host``: the real ComfyUI in this process, with the pack loaded as it loads it. Maths tests do without."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import launch

sys.path.append(str(Path(__file__).parent))  # for tools.py
launch.alias_pack_without_host()


@pytest.fixture(scope="session")
def host() -> object:
    """The pack, loaded by the host; ``comfy`` and ``nodes`` can be imported from here on."""
    return launch.load_pack()
