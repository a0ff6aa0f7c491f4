"""What users install is what they get: the registry's package, a clone by ComfyUI Manager, and what is left after removing it."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workshop import api, caching, installing, releases, serving

ROOT = Path(__file__).parents[2]
NODE = re.compile(r'node_id="(Lodestar\w+)"')


@pytest.fixture(scope="module")
def tools():
    """Where the Manager and the registry's command line are installed; skips without a network on first use."""
    try:
        return installing.test_packages(Path(sys.executable), "requirements-registry.txt")
    except releases.SetupError as error:
        pytest.skip(f"ComfyUI Manager and comfy-cli cannot be installed: {error}")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A git repository with what is committed here, and a bare one, ready to be served as plain files."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout")
    folder = tmp_path_factory.mktemp("git")
    bare, copy = folder / "lodestar.git", folder / "lodestar"
    git("-C", ROOT, "archive", "--output", folder / "files.zip", "HEAD")  # not a clone of ROOT, which may be a shallow one
    with zipfile.ZipFile(folder / "files.zip") as files:
        files.extractall(copy)
    git("init", "--quiet", copy)
    git("-C", copy, "add", "--all")
    git("-C", copy, "commit", "--quiet", "--message", "As it is")
    git("clone", "--quiet", "--bare", copy, bare)
    git("-C", bare, "update-server-info")
    return bare, copy


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """A ComfyUI of one's own: a copy of the host."""
    host, folder = Path(os.environ["COMFYUI_PATH"]), tmp_path_factory.mktemp("host") / "ComfyUI"
    own = ("tests", "tests-unit", ".git", "custom_nodes", "models", "input", "output", "user", "temp")

    def left_out(place: str, names: list[str]) -> list[str]:
        return [name for name in names if name == "__pycache__" or (Path(place) == host and name in own)]

    shutil.copytree(host, folder, ignore=left_out)
    for name in ("custom_nodes", "models/checkpoints", "input", "output", "user", "temp"):
        (folder / name).mkdir(parents=True)
    return folder


def git(*args):
    """Run git."""
    settings = ("-c", "safe.directory=*", "-c", "user.name=Tests", "-c", "user.email=tests@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *settings, *map(str, args)], check=True, capture_output=True, text=True)


def python_with(folder, tools):
    """An environment that packages may be installed into, with this one's packages and the tools' in reach."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    reach = [str(tools), *(entry for entry in sys.path if entry.endswith("site-packages"))]
    next(folder.rglob("site-packages")).joinpath("reach.pth").write_text("\n".join(reach), encoding="utf-8")
    return installing.python_in(folder)


def run(python, *args, cwd=ROOT, **environment):
    """What a tool prints; fails with it."""
    variables = {**os.environ, "DO_NOT_TRACK": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment}
    variables.pop("PYTHONPATH", None)
    done = subprocess.run([python, *map(str, args)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def started(comfy, folder):
    """A client of the copied host's own main.py, which finds the pack in this folder of its custom_nodes as it would anybody's."""
    port = serving.free_port()
    options = [*serving.host_options(comfy, comfy, False), "--listen", "127.0.0.1", "--port", str(port)]
    options += ["--whitelist-custom-nodes", folder]
    address = serving.ServerAddress(f"http://127.0.0.1:{port}")
    address.log = comfy / "user" / "server.log"
    command = [sys.executable, comfy / "main.py", *options, "--disable-auto-launch", "--disable-api-nodes"]
    with serving.child(command, comfy, address.log, echo=False) as address.process:
        serving.wait_until_it_answers(address, 300)
        yield api.Client(address)


def nodes_of_the_pack():
    """The ids of all nodes, as the sources have them."""
    return {name for file in (ROOT / "nodes").rglob("*.py") for name in NODE.findall(file.read_text(encoding="utf-8"))}


def check_that_it_works(comfy, folder):
    """All nodes are there, a workflow from the template browser runs, help and translations and blueprints are served."""
    with started(comfy, folder) as client:
        assert nodes_of_the_pack() <= set(client.node_types)
        workflow = client.get_json(f"/api/workflow_templates/{folder}/apg.json")
        prompt = api.to_prompt(workflow, client.node_types)
        prompt[api.find(prompt, "KSampler")[0]]["inputs"]["steps"] = 4
        outputs = client.run(prompt)
        for file in client.images(outputs[api.find(prompt, "PreviewImage")[0]]):
            assert np.asarray(Image.open(io.BytesIO(file)), dtype=float).std() > 5
        assert client.get(f"/extensions/{folder}/docs/LodestarAPG.md").startswith(b"# APG (Adaptive Projected Guidance)")
        assert "LodestarAPG" in client.get_json("/i18n")["zh"]["nodeDefs"]
        assert "Guided KSampler" in {entry["name"] for entry in client.get_json("/global_subgraphs").values()}


def files(comfy):
    """Everything in a ComfyUI but what any run of it leaves."""
    passing = ("__pycache__", "user", "temp", "input", "output", "model_paths.yaml")
    return {path for path in comfy.rglob("*") if not set(passing) & set(path.relative_to(comfy).parts)}


@contextlib.contextmanager
def served(folder):
    """The address of a folder over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_manager_installs_and_removes_it(comfy, repository, tools, tmp_path):
    """By the Manager's command line and a git address; what it clones works; nothing is left of it."""
    bare, _ = repository
    places = {"COMFYUI_PATH": str(comfy), "HOME": str(tmp_path), "UV_CACHE_DIR": str(caching.cache_root() / "uv")}
    manager = functools.partial(run, python_with(tmp_path / "python", tools), "-m", "cm_cli", **places)
    before = files(comfy)
    with served(bare.parent) as address:
        manager("install", f"{address}/lodestar.git", "--mode", "local", "--exit-on-fail")
    assert (comfy / "custom_nodes" / "lodestar" / ".git").is_dir()
    check_that_it_works(comfy, "lodestar")
    assert "UNINSTALLED" in manager("uninstall", "lodestar", "--mode", "local")
    assert files(comfy) == before


@pytest.mark.slow
def test_a_plain_clone_works(comfy, repository):
    """In a folder of another name than the pack's, and gone with that folder."""
    bare, _ = repository
    before, folder = files(comfy), comfy / "custom_nodes" / "lodestar-by-hand"
    git("clone", "--quiet", bare, folder)
    try:
        check_that_it_works(comfy, folder.name)
    finally:
        shutil.rmtree(folder)
    assert files(comfy) == before


@pytest.mark.slow
def test_registrys_package_works_and_leaves_the_workshop_out(comfy, repository, tools, tmp_path):
    """What `comfy node pack` packs of a clean checkout, unpacked where the Manager unpacks it: in a folder named as the project."""
    _, clone = repository
    cli = functools.partial(run, python_with(tmp_path / "python", tools), "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry")
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    assert "validation checks passed" in cli("node", "validate", cwd=clone, **home)
    cli("node", "pack", cwd=clone, **home)
    folder = comfy / "custom_nodes" / re.search(r'^name = "(.+)"', (clone / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    with zipfile.ZipFile(clone / "node.zip") as package:
        package.extractall(folder)
    (clone / "node.zip").unlink()
    for name in ("tests", "benchmarks/cost.py", ".ci", ".github", "docs/icon.png", "workshop/train.py", "requirements-test.txt"):
        assert not (folder / name).exists(), name
    for name in ("LICENSE", "CHANGELOG.md", "js/docs", "workflows", "subgraphs", "locales/zh", "demo/weights"):
        assert (folder / name).exists(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (folder / "README.md").read_text(encoding="utf-8")):
        assert (folder / link).exists(), link
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20e6
    try:
        check_that_it_works(comfy, folder.name)
    finally:
        shutil.rmtree(folder)


def test_metadata_is_complete():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, registry = about["project"], about["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,98}", project["name"]) and re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"file": "LICENSE"} and project["dependencies"] == []
    assert registry["PublisherId"] and registry["DisplayName"] == "Lodestar" and (ROOT / "docs" / "icon.png").is_file()
    assert registry["requires-comfyui"] == f">={releases.OLDEST.comfyui}"
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first and first[1] in (project["version"], "Unreleased")
