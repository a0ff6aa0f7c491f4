"""Runs a graph and says what is wrong with it, if anything."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random
from types import FrameType
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

import nodes
from lodestar.benchmarks._tiny import call, counted
from lodestar.benchmarks.fuzz import material
from lodestar.benchmarks.fuzz.building import Built, build, plain, without_us
from lodestar.benchmarks.fuzz.choices import OURS, Graph, neutral, random_graph

OK, REFUSED, HOST, FAILED = "ok", "refused", "refused by the host", "failed"
_last: dict[str, list[dict[str, Any]]] = {}  # the state of the models after the last graph of a kind
NOT_KEPT = {"current_patcher"}  # of a model: whoever sampled last


@dataclass(frozen=True)
class Outcome:
    """How a graph ended. text: the refusal or what is wrong."""

    seed: int
    kind: str
    text: str = ""
    seconds: float = 0.0


class Failure(Exception):
    """What must not be."""


def checked(seed: int) -> Outcome:
    """Make the graph of a seed and check it."""
    return outcome(random_graph(seed))


def outcome(graph: Graph) -> Outcome:
    """Run all checks on a graph."""
    began = time.perf_counter()
    before = _last.pop(graph.kind, None) or _states(graph.kind)
    try:
        with torch.inference_mode():
            kind, text = _checked(graph)
    except Failure as error:
        kind, text = (FAILED, str(error)) if "another result" not in str(error) or _repeats_without_us(graph) else (OK, "")
    after = _states(graph.kind)
    left = list(_differences(before, after))
    if left:
        material.forget_models()
    else:
        _last[graph.kind] = after
    if left and kind != FAILED:
        kind, text = FAILED, f"left on the model: {'; '.join(left[:3])}"
    return Outcome(graph.seed, kind, text, time.perf_counter() - began)


def _checked(graph: Graph) -> tuple[str, str]:
    """What the graph ends in. Raises Failure."""
    try:
        built = build(graph)
        options = signature(built.model.model_options)
        with counted(*_models(graph)) as rows:
            first = built.sample()
        seen = len(rows), sum(rows)
    except Exception as error:
        return _refusal(graph, error)
    if signature(built.model.model_options) != options:
        raise Failure("left on the MODEL: other options than before")
    _check_finite(graph, first)
    _check_count(graph, built, first, seen)
    _check_repeats(graph, built, first)
    rng = Random(graph.seed)
    added = neutral(rng)
    chain = list(graph.chain)
    chain.insert(rng.randint(0, len(chain)), added)
    _check_equal(lambda: build(replace(graph, chain=tuple(chain))).sample(), first, f"with a neutral {added[0]}")
    if graph.latent.get("mask") == "ones" and graph.guided:
        _check_mask(graph, first)
    return OK, ""


def _check_equal(sample: Callable[[], list[Tensor]], first: list[Tensor], when: str) -> None:
    try:
        again = sample()
    except Exception as error:
        raise Failure(f"{when}: {described(error)}") from error
    if len(again) != len(first) or not all(same(a, b) for a, b in zip(first, again, strict=True)):
        largest = max((float((a - b).abs().max()) for a, b in zip(first, again, strict=True) if a.shape == b.shape), default=0.0)
        raise Failure(f"{when}: another result (by {largest:.2g})")


def same(a: Tensor, b: Tensor) -> bool:
    """Bit-equal; values that are not numbers are equal to each other."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _check_repeats(graph: Graph, built: Built, first: list[Tensor]) -> None:
    """A second run is equal, also after one that was stopped or ran out of memory; unless the host's nodes keep something themselves."""
    stop = {0: comfy.model_management.InterruptProcessingException(), 1: comfy.model_management.OOM_EXCEPTION("out of memory")}
    error = stop.get(graph.seed % 4)
    when = "a second run" if error is None else f"a second run after {type(error).__name__}"
    try:
        if error is not None:
            _stopped(graph, built, error)
        _check_equal(built.sample, first, when)
    except Failure:
        with contextlib.suppress(Exception):
            alone = build(without_us(graph))
            result = alone.sample()
            try:
                if error is not None:
                    _stopped(graph, alone, error)
                _check_equal(alone.sample, result, when)
            except Failure:
                return
        raise


def _repeats_without_us(graph: Graph) -> bool:
    """Whether the host alone makes the same twice, from a model's first run on; with EasyCache on Flux it does not always."""
    material.forget_models()
    with torch.inference_mode(), contextlib.suppress(Exception):
        alone = build(without_us(graph))
        first, second = alone.sample(), alone.sample()
        return len(first) == len(second) and all(map(same, first, second))
    return True


def _stopped(graph: Graph, built: Built, error: BaseException) -> None:
    """A run that ends with an error in the second call of the network."""
    calls: list[int] = []

    def stop(network: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise error

    handles = [model.model.diffusion_model.register_forward_pre_hook(stop, with_kwargs=True) for model in _models(graph)]
    try:
        built.sample()
    except type(error):
        pass
    except Exception as other:
        raise Failure(f"{type(error).__name__} becomes {described(other)}") from other
    finally:
        for handle in handles:
            handle.remove()


def _check_mask(graph: Graph, first: list[Tensor]) -> None:
    """A mask of ones changes nothing, unless the host's own nodes make something of it."""
    bare = {key: value for key, value in graph.latent.items() if key != "mask"}
    try:
        _check_equal(build(replace(graph, latent=bare)).sample, first, "without the mask of ones")
    except Failure:
        alone = without_us(graph)
        if all(map(same, build(alone).sample(), build(replace(alone, latent=bare)).sample())):
            raise


def _check_finite(graph: Graph, results: list[Tensor]) -> None:
    if all(bool(torch.isfinite(result).all()) for result in results):
        return
    for alone in _without_us(graph):
        with contextlib.suppress(Exception):
            if not all(bool(torch.isfinite(result).all()) for result in build(alone).sample()):
                return  # so it is without us
    raise Failure("the latent is not finite")


def _check_count(graph: Graph, built: Built, results: list[Tensor], seen: tuple[int, int]) -> None:
    """The report's calls and rows are those of the networks."""
    name, inputs = graph.sampling
    if not graph.guided or name == "compare" or inputs.get("split"):
        return
    try:
        _, _, table = call("LodestarReport", model=built.model, latent={"samples": results[0]})
    except Exception as error:
        raise Failure(f"the report: {described(error)}") from error
    reported = tuple(int(re.search(rf"^{word} +(\d+)", table, re.MULTILINE)[1]) for word in ("calls", "rows"))
    if reported != seen:
        raise Failure(f"the report says {reported[0]} calls with {reported[1]} rows, the networks saw {seen[0]} with {seen[1]}")


# --- refusals --------------------------------------------------------------------------------------------------------


def _refusal(graph: Graph, error: Exception) -> tuple[str, str]:
    """One sentence of ours, or the host's own error. Raises Failure for anything else."""
    if isinstance(error, TimeoutError):
        raise Failure("it does not end") from error
    text = str(error).strip()
    if isinstance(error, (ValueError, RuntimeError)) and "\n" not in text and any(name in text for name in our_names()):
        return REFUSED, text
    first, second = map(_error_of, _without_us(graph))
    others = [other for other in (first, second) if other is not None]
    if any(type(other) is type(error) for other in others):
        return HOST, described(error)
    if first is not None and "lodestar" not in _raised_in(error).f_globals.get("__name__", ""):  # another of its faults comes first
        return HOST, described(error)
    text = described(error) + (f", without us {described(others[0])}" if others else "")
    raise Failure(text) from error


def _without_us(graph: Graph) -> Iterator[Graph]:
    """The graph on the host alone, and with one prompt alone, as a step without guidance is evaluated."""
    alone = plain(graph)
    name, inputs = alone.sampling
    yield alone
    yield replace(alone, sampling=(name, inputs | {"cfg": 1.0}))


def _error_of(graph: Graph) -> Exception | None:
    """What a graph of the host ends with, if it is an error."""
    try:
        build(graph).sample()
    except Exception as error:
        return error
    return None


@functools.cache
def our_names() -> tuple[str, ...]:
    """The display names of our nodes."""
    return tuple(name for key, name in nodes.NODE_DISPLAY_NAME_MAPPINGS.items() if key.startswith(OURS))


def described(error: BaseException) -> str:
    """Type and first line of an error, and where it was raised."""
    frame = _raised_in(error)
    where = "" if frame is None else f" ({frame.f_code.co_filename.rpartition('/')[2]}: {frame.f_code.co_name})"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}{where}"


def _raised_in(error: BaseException) -> FrameType | None:
    """The frame in which an error was raised; None for one that never was."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace and trace.tb_frame


# --- what is left ----------------------------------------------------------------------------------------------------


def _models(graph: Graph) -> list[Any]:
    return [material.model(graph.kind, seed) for seed in (0, 7)]


def _states(kind: str) -> list[dict[str, Any]]:
    models = [material.model(kind, seed) for seed in (0, 7)]
    comfy.model_management.load_models_gpu(models)  # what clones have patched is put back where they are unloaded
    return [state(model) for model in models]


def state(patcher: Any) -> dict[str, Any]:
    """All of a ModelPatcher and its network that must be the same after sampling."""
    names = (
        "patches", "object_patches", "hook_patches", "hook_backup", "wrappers", "callbacks", "additional_models", "attachments",
        "injections", "object_patches_backup", "model_options",
    )  # fmt: skip
    found = {name: signature(getattr(patcher, name, None)) for name in names}
    for name, module in patcher.model.named_modules():
        values = module.__dict__
        hooks = tuple(len(values[key]) for key in ("_forward_hooks", "_forward_pre_hooks"))
        found[f"module {name or 'of all'}"] = (values.keys() - NOT_KEPT, hooks, id(values.get("forward")))
    with torch.inference_mode():
        found["weights"] = tuple(torch.stack([value.sum() for value in patcher.model.parameters()]).tolist())
    return found


def signature(value: Any) -> Any:
    """What can be compared of nested options: structure, plain values, and the identity of everything else."""
    if isinstance(value, Mapping):
        return tuple(sorted((str(key), signature(part)) for key, part in value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(map(signature, value))
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else str(id(value))


def _differences(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[str]:
    for name, old, new in zip(("model", "weak model"), before, after, strict=True):
        for key in old:
            if old[key] != new.get(key):
                yield f"{key} of the {name}"
