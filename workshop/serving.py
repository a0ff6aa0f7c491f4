"""Run the host's real server as a child process, this repository its only custom node. Standard library only."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from workshop.caching import cache_root
from workshop.releases import PACK, ROOT, SetupError

# Linux has an accelerator only with one of these in /dev.
DEVICES = ("nvidiactl", "dxg", "kfd", "dri", "davinci_manager", "accel")
PATIENCE = 1.0  # seconds for each of the signals that end a server
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server did not come up; the message has the end of its log."""


class ServerAddress(str):
    """The base URL of a running server, such as `http://127.0.0.1:8188`, with what else is known about it."""

    process: subprocess.Popen[bytes]
    log: Path
    base: Path


@contextlib.contextmanager
def server(
    comfy_path: Path | str | None = None,
    python: Path | str | None = None,
    extra_args: Sequence[str] = (),
    *,
    checkpoints: Sequence[Path] = (),
    base: Path | None = None,
    port: int = 0,
    echo: bool = False,
    boot_seconds: float = 300,
) -> Iterator[ServerAddress]:
    """Start the host's server with the pack, yield its base URL once it answers, and stop it in the end.

    comfy_path, python: the host and the Python that runs it. Left out, those this process runs with (below `run.py`).
    extra_args: more of the host's own command line options.
    checkpoints: files from anywhere, offered by CheckpointLoaderSimple as `checkpoint_names(checkpoints)`.
    base: folder for what the host writes, kept. Left out, a temporary one, removed in the end.
    port: left out, a free one. The server listens on the loopback address only.
    echo: copy the server's log to standard output as well.
    boot_seconds: how long it may take until it answers.

    The value yielded is a string with the attributes `process`, `log` (a file) and `base` (a folder with `output` in
    it). A server that does not come up raises ServerError with the end of its log. The server has no other custom
    nodes and no API nodes, and ends with this process, however this process ends.
    """
    comfy = Path(comfy_path or os.environ["COMFYUI_PATH"])
    if port and not port_is_free(port):
        raise SetupError(f"Port {port} is in use: choose another with --port.")
    with contextlib.ExitStack() as stack:
        base = base or stack.enter_context(temporary_base())
        prepare_base(base)
        link_checkpoints(checkpoints, base)
        port = port or free_port()
        interpreter = Path(python or sys.executable)
        args = [*host_options(comfy, base, may_have_accelerator() and torch_finds_accelerator(interpreter))]
        args += [
            "--listen",
            "127.0.0.1",
            "--port",
            str(port),
            "--disable-auto-launch",
            "--disable-api-nodes",
            *extra_args,
        ]
        address = ServerAddress(f"http://127.0.0.1:{port}")
        address.base, address.log = base, base / "server.log"
        address.process = stack.enter_context(
            child([interpreter, ROOT / "workshop" / "launching.py", "host", *args], comfy, address.log, echo)
        )
        wait_until_it_answers(address, boot_seconds)
        yield address


# ---------------------------------------------------------------------------------------------------------- base folder


@contextlib.contextmanager
def temporary_base() -> Iterator[Path]:
    runs = cache_root() / "runs"
    runs.mkdir(exist_ok=True)
    for old in runs.iterdir():  # left by processes that were killed
        if time.time() - old.stat().st_mtime > 86400:
            remove_base(old)
    base = Path(tempfile.mkdtemp(dir=runs))
    try:
        yield base
    finally:
        remove_base(base)


def remove_base(base: Path) -> None:
    unlink(base / "custom_nodes" / PACK)
    shutil.rmtree(base, ignore_errors=True)


def prepare_base(base: Path) -> Path:
    """Make `base` a folder for the host to write to, with this repository as a custom node; returns the node's path."""
    for name in ("models", "custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK
    if link.resolve() != ROOT:
        unlink(link)
        link_folder(link, ROOT)
    return link


def link_folder(link: Path, target: Path) -> None:
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))  # needs no privilege, unlike a symbolic link
    else:
        link.symlink_to(target, target_is_directory=True)


def unlink(link: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(link) if os.name == "nt" else link.unlink()


def checkpoint_names(files: Sequence[Path]) -> list[str]:
    """The names under which a server with these `checkpoints` offers them: their own, numbered where two are alike."""
    names: list[str] = []
    for number, file in enumerate(files, 1):
        names.append(f"{number}-{file.name}" if file.name in names else file.name)
    return names


def link_checkpoints(files: Sequence[Path], base: Path) -> None:
    folder = base / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for file, name in zip(files, checkpoint_names(files), strict=True):
        for place in (os.symlink, os.link, shutil.copyfile):  # what the system and the disk allow
            try:
                place(file.resolve(), folder / name)
                break
            except OSError:
                if place is shutil.copyfile:
                    raise


# --------------------------------------------------------------------------------------------------------- host options


def host_options(comfy: Path, base: Path, accelerator: bool) -> list[str]:
    """The host's options for writing to `base`, with its own models in reach and no custom node but ours."""
    paths = base / "model_paths.yaml"
    models = comfy / "models"
    folders = {folder.name: str(folder) for folder in sorted(models.iterdir()) if folder.is_dir()} if models.is_dir() else {}
    paths.write_text(json.dumps({"host": folders}), encoding="utf-8")  # JSON is YAML
    options = ["--base-directory", str(base), "--extra-model-paths-config", str(paths)]
    options += ["--database-url", f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"]
    options += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK]
    return options if accelerator else [*options, "--cpu", "--use-pytorch-cross-attention"]


def may_have_accelerator() -> bool:
    """False where there is certainly none, which saves asking torch, and where LODESTAR_DEVICE asks for the CPU."""
    if os.environ.get("LODESTAR_DEVICE") == "cpu":
        return False
    return sys.platform != "linux" or any((Path("/dev") / name).exists() for name in DEVICES)


def torch_finds_accelerator(python: Path) -> bool:
    return subprocess.run([python, ROOT / "workshop" / "launching.py", "probe"], capture_output=True).returncode == 0


# -------------------------------------------------------------------------------------------------------------- process


@contextlib.contextmanager
def child(command: Sequence[Path | str], comfy: Path, log: Path, echo: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own group, its output copied to `log`; the whole group is ended in the end."""
    environment = {
        **os.environ,
        "COMFYUI_PATH": str(comfy),
        "LODESTAR_PARENT": str(os.getpid()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        **patient_threads(),
    }
    group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        **group,
    )
    copier = threading.Thread(target=copy_output, args=(process, log, echo), daemon=True)
    copier.start()
    try:
        yield process
    finally:
        stop(process)
        copier.join(5)


def patient_threads() -> dict[str, str]:
    """Variables for torch on a CPU that other programs use too; the user's own come first.

    By default its threads spin while they wait for each other, and so take the time that the others need. On two cores that other
    programs kept busy, the demo took twenty times as long as with threads that sleep; one thread alone was no faster than these.
    """
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


def copy_output(process: subprocess.Popen[bytes], log: Path, echo: bool) -> None:
    with process.stdout as output, log.open("wb", buffering=0) as file:
        while chunk := os.read(output.fileno(), 65536):
            file.write(chunk)
            if echo:
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started: politely, then by force. The host heeds an interrupt at once; its threads may outlive it."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
        process.wait()
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None and number != signal.SIGKILL:
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def wait_until_it_answers(address: ServerAddress, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if address.process.poll() is not None:
            time.sleep(0.2)  # let the last of its output arrive
            raise ServerError(f"The ComfyUI server ended before it answered. The end of its log:\n{tail(address.log)}")
        with contextlib.suppress(OSError), NO_PROXY.open(f"{address}/system_stats", timeout=5) as answer:
            answer.read()
            return
        time.sleep(0.2)
    raise ServerError(f"The ComfyUI server did not answer within {seconds:.0f} s. The end of its log:\n{tail(address.log)}")


def tail(log: Path, lines: int = 30) -> str:
    if not log.exists():
        return "(empty)"
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(collections.deque(file, lines))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
