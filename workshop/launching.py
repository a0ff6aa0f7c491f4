"""Runs inside the host's Python: makes the host importable and loads the pack into it.

`run.py` starts it as `launching.py MODE ...`; tests import it. Importing it does nothing. The environment says where the
host is (COMFYUI_PATH) and, if it is to last, the folder for what the host writes (LODESTAR_BASE).

The pack is always one package, `lodestar`. When the host loads the repository under the name it makes up from the
folder's path, the submodules it imports are those of `lodestar`, so that no module exists twice.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import runpy
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
MOST_WORKERS = 4  # of the tests; each has a host of its own in memory


def main(argv: Sequence[str]) -> int:
    mode, *rest = argv
    if mode == "probe":
        return 0 if torch_accelerates() else 1
    if mode == "pytest":
        return run_pytest(rest)
    if mode == "host":
        run_host(rest)
    elif mode == "script":  # `lodestar` can be imported; the host is not loaded
        alias_pack_without_host()
        run_script(*rest)
    else:  # "python"
        from workshop.caching import cache_folder

        os.environ.setdefault("LODESTAR_BASE", str(cache_folder("base", str(ROOT))))
        load_pack()
        run_script(*rest)
    return 0


# --------------------------------------------------------------------------------------------------- for scripts, tests


@functools.cache
def load_host() -> Path:
    """Make the host's modules importable, its options set and its folders in the cache. Returns the host's folder."""
    from workshop.serving import host_options, may_have_accelerator, prepare_base

    host, base = host_path(), default_base()
    prepare_base(base)
    sys.path.insert(0, str(host))
    given, sys.argv = sys.argv, ["main.py", *host_options(host, base, may_have_accelerator() and torch_accelerates())]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = given
    from utils.extra_config import load_extra_path_config

    for config in (host / "extra_model_paths.yaml", base / "model_paths.yaml"):
        if config.is_file():
            load_extra_path_config(str(config))
    return host


@functools.cache
def alias_pack_without_host() -> ModuleType:
    """Import this repository as the package `lodestar`, whatever its folder is called. Needs no host."""
    from workshop.releases import PACK

    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def load_pack() -> ModuleType:
    """Have the host load this repository, so that its nodes are in `nodes.NODE_CLASS_MAPPINGS`. Returns `lodestar`."""
    load_host()
    pack = alias_pack_without_host()
    link = default_base() / "custom_nodes" / pack.__name__
    sys.meta_path.insert(0, Alias(str(link).replace(".", "_x_"), pack.__name__))
    import nodes

    with warnings_of_host() as warnings:
        asyncio.run(nodes.init_public_apis())
        if not asyncio.run(nodes.load_custom_node(str(link), module_parent="custom_nodes")):
            raise RuntimeError("The host could not load the pack:\n" + "\n".join(warnings))
    return pack


class Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Importing `name.x.y` gives the module `target.x.y` itself."""

    def __init__(self, name: str, target: str) -> None:
        self.prefix, self.target = name + ".", target

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname.startswith(self.prefix) else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = importlib.import_module(f"{self.target}.{name.removeprefix(self.prefix)}")


def host_path() -> Path:
    if "COMFYUI_PATH" not in os.environ:
        raise RuntimeError("COMFYUI_PATH is not set: run this by `python run.py`.")
    return Path(os.environ["COMFYUI_PATH"])


@functools.cache
def default_base() -> Path:
    """The folder that the host may write to: $LODESTAR_BASE, else one for this process, removed at its end."""
    if "LODESTAR_BASE" in os.environ:
        return Path(os.environ["LODESTAR_BASE"])
    from workshop.serving import temporary_base

    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(temporary_base())


def torch_accelerates() -> bool:
    """Whether torch finds something faster than the CPU."""
    import torch

    anything = getattr(torch, "accelerator", torch.cuda)
    return torch.cuda.is_available() or torch.backends.mps.is_available() or anything.is_available()


@contextlib.contextmanager
def warnings_of_host() -> Iterator[list[str]]:
    """What the host logs meanwhile as warnings: it reports a pack's errors there, and goes on."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger().removeHandler(handler)


# ---------------------------------------------------------------------------------------------------------------- modes


def run_host(options: Sequence[str]) -> None:
    """The host's own main.py, ended when the process that asked for it is gone."""
    if "LODESTAR_PARENT" in os.environ:
        threading.Thread(target=end_with, args=(int(os.environ["LODESTAR_PARENT"]),), daemon=True).start()
    main_file = str(host_path() / "main.py")
    sys.path.insert(0, str(host_path()))
    sys.argv = [main_file, *options]
    runpy.run_path(main_file, run_name="__main__")


def end_with(parent: int) -> None:
    if os.name == "posix":
        while os.getppid() == parent:
            time.sleep(0.5)
    else:
        import psutil

        while psutil.pid_exists(parent):
            time.sleep(0.5)
    os._exit(1)


def run_pytest(args: Sequence[str]) -> int:
    """Unless ``args`` name tests: all files, one at a time on each core, as most of the networks are too small for more than one thread."""
    import pytest

    from workshop.caching import cache_folder

    if not any(Path(arg.partition("::")[0]).exists() for arg in args):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        args = ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "loadfile", "--no-loadscope-reorder", *args]
    return int(pytest.main(["-o", f"cache_dir={cache_folder('pytest', str(ROOT))}", *args]))


def run_script(file: str, *args: str) -> None:
    """`file` as Python would run it, except that its folder comes after the host's on the path."""
    sys.path.insert(1, str(Path(file).resolve().parent))
    sys.argv = [file, *args]
    runpy.run_path(file, run_name="__main__")


def settle_path() -> None:
    """Put this repository's root at the end of the path: the host has a module `nodes` too, and that comes first."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() not in (ROOT, ROOT / "workshop")]
    extra = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # some builds of Python for Windows ignore it
    sys.path += [entry for entry in extra if entry and entry not in sys.path]
    sys.path.append(str(ROOT))


if __name__ == "__main__":
    settle_path()
    from workshop.launching import main

    sys.exit(main(sys.argv[1:]))
