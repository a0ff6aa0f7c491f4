"""What the host gets: all nodes, or those that it can run, and one sentence about the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from workshop.hosting import OLDEST
from workshop.interface import recorded

ROOT = Path(__file__).resolve().parents[2]
LOADED = """
import builtins, json, logging, sys

settings = json.loads(sys.argv[1])
said, imported, real = [], set(), builtins.__import__


class Broken:
    # Modules that another version of the host, or a machine, does not have.
    def find_spec(self, name, path=None, target=None):
        if name in settings["broken"]:
            raise ImportError(f"there is no {name}\\nin this version")


def noted(name, globals=None, *more, **named):
    # What our modules import of the host while they are loaded.
    if (globals or {}).get("__name__", "").startswith("lodestar"):
        imported.add(name)
    return real(name, globals, *more, **named)


handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: said.append([record.getMessage(), record.exc_info is not None])
logging.getLogger().addHandler(handler)
sys.meta_path.insert(0, Broken())
builtins.__import__ = noted

from workshop import launching

launching.load_host()
import comfyui_version

comfyui_version.__version__ = settings.get("version", comfyui_version.__version__)
launching.load_pack()
import nodes

names = [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Lodestar")]
print("RESULT", json.dumps({"nodes": names, "said": [text for text in said if "odestar" in text[0]], "imported": sorted(imported)}))
"""


def loaded(tmp_path, **settings) -> dict:
    """The pack in a fresh process of the real host: its nodes, what the log says of it, and the modules that it imports."""
    script = tmp_path / "loaded.py"
    script.write_text(LOADED, encoding="utf-8")
    command = [sys.executable, ROOT / "workshop" / "launching.py", "script", script, json.dumps({"broken": []} | settings)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8", timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr
    return json.loads(lines[-1].removeprefix("RESULT "))


def test_the_versions_are_those_that_are_tested(host):
    assert OLDEST.comfyui == host.OLDEST_HOST
    assert f'requires-comfyui = ">={host.OLDEST_HOST}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", ["0.16.2", "0.9.10"])
def test_on_an_older_host_the_log_says_so_and_there_are_no_nodes(tmp_path, version):
    result = loaded(tmp_path, version=version)
    assert result["nodes"] == []
    assert result["said"] == [[f"Lodestar needs ComfyUI 0.16.3 or newer; this is {version}.", False]]
    assert not any(name.startswith("comfy.") for name in result["imported"])


def test_what_the_pack_imports_of_the_host_and_does_without(tmp_path):
    """No import of networks and extra nodes, which change often; and a module that is not there takes only its own nodes away."""
    result = loaded(tmp_path, broken=["lodestar.guiders.shapers.apg", "lodestar.guiders.cfgpp.inversion", "lodestar.charts"])
    gone = {"LodestarAPG", "LodestarCFGPP", "LodestarCFGPPInvert"}
    assert result["nodes"] == [node for node in recorded() if node not in gone]
    assert [text for text, _ in result["said"]] == [
        "Lodestar: live charts do not work in this ComfyUI: ImportError: there is no lodestar.charts in this version",
        "Lodestar: this ComfyUI cannot offer LodestarAPG: ImportError: there is no lodestar.guiders.shapers.apg in this version",
        "Lodestar: this ComfyUI cannot offer LodestarCFGPP, LodestarCFGPPInvert: "
        "ImportError: there is no lodestar.guiders.cfgpp.inversion in this version",
    ]
    assert not any(traceback for _, traceback in result["said"])
    assert "comfy.samplers" in result["imported"]
    assert not [name for name in result["imported"] if name.startswith(("comfy.ldm", "comfy_extras"))]


def test_nothing_is_said_where_everything_works(tmp_path):
    result = loaded(tmp_path)
    assert result["nodes"] == list(recorded()) and result["said"] == []
    assert not [name for name in result["imported"] if name.startswith(("comfy.ldm", "comfy_extras"))]


def test_the_demo_node_offers_the_demo_models(host):
    from lodestar.demo import models
    from lodestar.nodes import demo_model

    assert (demo_model.MODELS, demo_model.STRENGTHS) == (models.MODELS, models.STRENGTHS)
