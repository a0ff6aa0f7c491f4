#!/usr/bin/env python3
"""Lodestar's commands: demo, test, serve, bench, python. Standard library only; `python run.py` lists them.

ComfyUI is set up on first use: the one that COMFYUI_PATH names, or else a pinned release in a per-user cache.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("Lodestar needs Python 3.10 or newer; this is Python " + sys.version.split()[0] + ".")

sys.dont_write_bytecode = True  # nothing is written outside the cache

from workshop.caching import cache_folder, cache_root  # noqa: E402
from workshop.hosting import find_host  # noqa: E402
from workshop.releases import NEWEST, OLDEST, RELEASES, ROOT, Host, SetupError  # noqa: E402
from workshop.serving import ServerError, patient_threads, server  # noqa: E402

COMMANDS = {  # what each does, and an example
    "demo": ("make a comparison picture with all guidance methods", 'demo --prompt "a small red disc on a grey background"'),
    "serve": ("start ComfyUI with this pack, on this machine only", "serve --port 8188"),
    "test": ("run the tests; other arguments go to pytest", "test tests/shapers -q"),
    "bench": ("measure: {benchmarks}", "bench cost --steps 4"),
    "python": ("run a script in ComfyUI's Python, with this pack loaded", "python workshop/thumbnails.py apg"),
}


def main(argv: list[str]) -> int:
    if not argv:
        print(overview())
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command, args, rest = parse(argv)
    try:
        return {"demo": demo, "test": test, "serve": serve, "bench": bench, "python": python}[command](args, rest)
    except (SetupError, ServerError, OSError) as error:
        print(f"lodestar: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def overview() -> str:
    """What this can do, with an example line for each command."""
    lines = ["Lodestar's commands, each with an example:", ""]
    for command, (_, example) in COMMANDS.items():
        lines += textwrap.wrap(about(command), 100, initial_indent=f"  {command:<8}", subsequent_indent=" " * 10)
        lines += [f"          python run.py {example}", ""]
    return "\n".join([*lines, "Options: python run.py -h, python run.py demo -h, python run.py bench cost -h"])


def about(command: str) -> str:
    """What a command does."""
    return COMMANDS[command][0].format(benchmarks=", ".join(benchmarks()))


def parse(argv: list[str]) -> tuple[str, argparse.Namespace, list[str]]:
    """The command, its options, and what is handed on untouched."""
    parser = argparse.ArgumentParser(
        prog="run.py",
        description=__doc__.partition("\n\n")[2],
        epilog=f"Tested with ComfyUI {OLDEST.comfyui} to {NEWEST.comfyui}.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    host = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    versions = ", ".join(release.comfyui for release in RELEASES)
    host.add_argument("--host", metavar="VERSION", help=f"ComfyUI version to use: {versions}")

    demo = commands.add_parser("demo", parents=[host], help=about("demo"))
    demo.add_argument("--checkpoint", type=existing_file, metavar="FILE", help="a checkpoint to use instead of the demo model")
    demo.add_argument("--weak", type=existing_file, metavar="FILE", help="a weaker version of it, for autoguidance")
    demo.add_argument("--prompt", action="append", metavar="TEXT", help="what to show; may be repeated, one row each")
    demo.add_argument("--cfg", type=float, metavar="W", help="guidance scale")
    demo.add_argument("--seed", type=int, metavar="N", help="seed of the noise")
    demo.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (default: in the cache)")

    commands.add_parser("test", parents=[host], help=about("test"), allow_abbrev=False, add_help=False)

    serve = commands.add_parser("serve", parents=[host], help=about("serve"))
    serve.add_argument("--port", type=int, default=8188, metavar="N", help="port to listen on (default: 8188)")

    bench = commands.add_parser("bench", help=about("bench"), add_help=False)
    bench.add_argument("name", choices=benchmarks(), metavar="NAME")
    bench.add_argument("arguments", nargs=argparse.REMAINDER)

    script = commands.add_parser("python", help=about("python"), add_help=False)
    script.add_argument("file", type=existing_file, metavar="FILE")
    script.add_argument("arguments", nargs=argparse.REMAINDER)

    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "test":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args.command, args, rest


def benchmarks() -> dict[str, Path]:
    """Benchmarks by name: files, and folders with a __main__.py."""
    files = [*(ROOT / "benchmarks").glob("[!_]*.py"), *(ROOT / "benchmarks").glob("*/__main__.py")]
    return dict(sorted((file.parent.name if file.stem == "__main__" else file.stem, file) for file in files))


def existing_file(name: str) -> Path:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path


def demo(args: argparse.Namespace, _: list[str]) -> int:
    out = (args.out or cache_root() / "demo").expanduser().resolve()
    options = ["--out", str(out)]
    for name in ("checkpoint", "weak", "cfg", "seed"):
        value = getattr(args, name)
        if value is not None:
            options += [f"--{name}", str(value)]
    for prompt in args.prompt or ():
        options += ["--prompt", prompt]
    return launch(find_host(args.host), "script", ROOT / "workshop" / "compare.py", *options)


def test(args: argparse.Namespace, rest: list[str]) -> int:
    os.chdir(ROOT)
    return launch(find_host(args.host, tests=True), "pytest", *rest)


def bench(args: argparse.Namespace, _: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    options, rest = parser.parse_known_args(args.arguments)
    if options.device == "cpu":
        os.environ["LODESTAR_DEVICE"] = "cpu"
    elif options.device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = options.device
    return launch(find_host(tests=True), "python", benchmarks()[args.name], *rest)


def python(args: argparse.Namespace, _: list[str]) -> int:
    return launch(find_host(), "python", args.file, *args.arguments)


def serve(args: argparse.Namespace, _: list[str]) -> int:
    host = find_host(args.host)
    print(f"Starting ComfyUI {host.version} ...", flush=True)
    try:
        with server(host.comfy, host.python, base=cache_folder("base", str(ROOT)), port=args.port, echo=True) as url:
            print(f"\nComfyUI {host.version} with Lodestar: {url}\nCtrl-C stops it.\n", flush=True)
            return url.process.wait()
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)
        return 0


def launch(host: Host, mode: str, *args: str | Path) -> int:
    """Go on in the host's Python, in workshop/launching.py."""
    environment = {**os.environ, **host_environment(host)}
    command = [str(part) for part in (host.python, ROOT / "workshop" / "launching.py", mode, *args)]
    sys.stdout.flush()
    if os.name == "posix":
        os.execve(command[0], command, environment)
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the child got it as well, and says how it ends
            continue


def host_environment(host: Host) -> dict[str, str]:
    variables = {"COMFYUI_PATH": str(host.comfy), "LODESTAR_CACHE": str(cache_root()), "PYTHONDONTWRITEBYTECODE": "1", **patient_threads()}
    if host.extra:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(host.extra), os.environ.get("PYTHONPATH"))))
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):  # glibc: keep freed memory, or every large tensor is paged in anew
        variables[name] = os.environ.get(name, str(2**30))
    return variables


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
