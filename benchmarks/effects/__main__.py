"""Whether each method's claim holds on the demo models: ``python run.py bench effects [--method M] [--samples N] [--device D]``.

Samples every setting through the host's own samplers, measures the pictures against fresh data, and prints one line per claim with
its 95 % bootstrap interval. Stop it with Ctrl-C, start it again, and it goes on: finished cells are kept in the cache until the code
or the weights that made them change.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from comfy.model_management import get_torch_device
from tqdm import tqdm

from lodestar.benchmarks.effects import pictures, report
from lodestar.benchmarks.effects.cells import PACK, PER_CAPTION, Cache, Cell
from lodestar.benchmarks.effects.claims import Results
from lodestar.benchmarks.effects.method import Method, methods
from workshop.caching import cache_folder

RESULTS = PACK / "benchmarks" / "results"
MADE, DONE = "lodestar-made", "lodestar-done"  # a worker's lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. ``--device`` is an option of ``run.py bench`` itself, because the host decides on its device when it is loaded."""
    known = methods()
    parser = argparse.ArgumentParser(prog="run.py bench effects", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=known, metavar="M", help=f"one of {', '.join(known)}; may be repeated")
    parser.add_argument("--samples", type=whole_captions, default=256, metavar="N", help="pictures per setting (default: 256)")
    parser.add_argument(
        "--workers", type=int, default=default_workers(), metavar="N", help="processes (default: one per core, one on a GPU)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder for effects.json and the pictures")
    parser.add_argument("--cache", type=Path, default=cache_folder("effects"), metavar="DIR", help="folder of finished cells")
    parser.add_argument("--readme", action="store_true", help="only write RESULTS.md and the README's sentence")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.readme:
        report.write(report.Report.load(args.out / "effects.json"), {name: method.title for name, method in known.items()})
        return 0

    chosen = {name: known[name] for name in args.method or known}
    cache = Cache(args.cache.resolve(), args.samples)
    if args.worker:
        return work(chosen, cache)
    make(chosen, cache, args.workers)
    results = Results.of(cache)
    found = report.Report.of(results, chosen)
    print(found.table())
    args.out.mkdir(parents=True, exist_ok=True)
    found.save(args.out / "effects.json")
    for name, method in chosen.items():
        pictures.draw(method, results, args.out / f"{name}.png")
    print(f"\n{args.out / 'effects.json'} and a picture per method beside it")
    return 0


def whole_captions(text: str) -> int:
    """A number of samples that is a number of captions."""
    samples = int(text)
    if samples < 8 * PER_CAPTION or samples % PER_CAPTION:
        raise argparse.ArgumentTypeError(f"{text}: a multiple of {PER_CAPTION}, {8 * PER_CAPTION} or more, is wanted")
    return samples


def default_workers() -> int:
    """One process per core, or one that feeds a GPU."""
    return (os.cpu_count() or 1) if get_torch_device().type == "cpu" else 1


# --- making cells ----------------------------------------------------------------------------------------------------


def all_cells(chosen: dict[str, Method]) -> list[Cell]:
    """Every method's cells, once each."""
    return list(dict.fromkeys(cell for method in chosen.values() for cell in method.cells))


def make(chosen: dict[str, Method], cache: Cache, workers: int) -> None:
    """Make the cells that are missing, with a progress bar."""
    cells = all_cells(chosen)
    missing = cache.missing(cells)
    if not missing:
        return
    workers = min(workers, len(missing))
    with tqdm(total=len(missing) * cache.samples, unit="picture", desc=f"{len(missing)} of {len(cells)} settings") as bar:
        if workers == 1:
            for cell in missing:
                for count in cache.make(cell):
                    bar.update(count)
            return
        queue: SimpleQueue[Cell] = SimpleQueue()
        for cell in missing:
            queue.put(cell)
        with ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(feed, number, list(chosen), cells, queue, cache, bar.update) for number in range(workers)]
            for task in tasks:
                task.result()


def feed(
    number: int, names: Iterable[str], cells: Sequence[Cell], queue: SimpleQueue[Cell], cache: Cache, progress: Callable[[int], object]
) -> None:
    """Give one worker process a cell after another until none is left."""
    command = [sys.executable, str(PACK / "workshop" / "launching.py"), "python", __file__, "--worker"]
    command += ["--samples", str(cache.samples), "--cache", str(cache.folder), *(f"--method={name}" for name in names)]
    cache.folder.mkdir(parents=True, exist_ok=True)
    log = cache.folder / f"worker-{number}.log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        try:
            while True:
                cell = queue.get_nowait()
                print(cells.index(cell), file=child.stdin, flush=True)
                while (line := child.stdout.readline().split())[:1] != [DONE]:
                    if not line:
                        raise RuntimeError(f"{cell.label} failed; the end of {log}:\n{log.read_text(errors='replace')[-2000:]}")
                    if line[0] == MADE:
                        progress(int(line[1]))
        except Empty:
            pass
        finally:
            child.stdin.close()


def work(chosen: dict[str, Method], cache: Cache) -> int:
    """A worker: reads numbers of cells from its input, makes them, says how far it is."""
    torch.set_num_threads(1)
    cells = all_cells(chosen)
    for line in sys.stdin:
        for count in cache.make(cells[int(line)]):
            print(MADE, count, flush=True)
        print(DONE, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
