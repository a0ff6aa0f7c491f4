"""``python run.py python workshop/interface.py`` records what was added to the public interface in tests/data/interface.json.

Workflow files in the wild hold node ids, input names and values, so these are a contract. What is recorded may not be removed, renamed,
reordered, retyped or given another default. New nodes may come, and new inputs, outputs, choices and wider ranges at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lodestar

FILE = Path(__file__).resolve().parents[1] / "tests" / "data" / "interface.json"
Interface = dict[str, dict[str, list[dict[str, Any]]]]  # node id -> "inputs", "outputs" -> the facts of each
_OF_ANY_MACHINE = ("the host's samplers", "the host's schedulers", "files")  # stand for choices that differ between machines


def offered() -> Interface:
    """The interface that the nodes have now."""

    async def listed() -> list[Any]:
        return await (await lodestar.comfy_entrypoint()).get_node_list()

    schemas = [node.define_schema() for node in asyncio.run(listed())]
    return {
        schema.node_id: {"inputs": [_input(entry) for entry in schema.inputs], "outputs": [_output(entry) for entry in schema.outputs]}
        for schema in schemas
    }


def recorded() -> Interface:
    """The interface that workflow files rely on."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def _input(entry: Any) -> dict[str, Any]:
    facts = {"name": entry.id, "type": entry.io_type, "default": getattr(entry, "default", None)}
    facts |= {"min": getattr(entry, "min", None), "max": getattr(entry, "max", None), "options": _options(entry)}
    if hasattr(entry, "template"):  # a row of sockets that grows
        facts |= {"sockets": [socket.id for socket in entry.template.get_all()], "socket_type": entry.template.input.io_type}
    return {name: value for name, value in facts.items() if value is not None} | ({"optional": True} if entry.optional else {})


def _options(entry: Any) -> list[str] | str | None:
    import comfy.samplers

    options = getattr(entry, "options", None)
    kinds = (options == comfy.samplers.SAMPLER_NAMES, options == comfy.samplers.SCHEDULER_NAMES, entry.id == "file")
    return next((text for text, applies in zip(_OF_ANY_MACHINE, kinds, strict=True) if applies), options)


def _output(entry: Any) -> dict[str, Any]:
    facts = {"type": entry.io_type} | ({"name": entry.id} if entry.id else {})
    return facts | ({"list": True} if entry.is_output_list else {})


def broken(old: Interface, new: Interface) -> Iterator[str]:
    """A sentence for everything in ``old`` that ``new`` does not keep."""
    for node, parts in old.items():
        if node not in new:
            yield f"{node} is gone."
            continue
        for part, entries in parts.items():
            there = new[node][part]
            for index, entry in enumerate(entries):
                if index >= len(there) or not _keeps(entry, there[index]):
                    now = there[index] if index < len(there) else "nothing"
                    yield f"{node}: number {index + 1} of the {part} was {entry} and is {now}."
            for entry in there[len(entries) :] if part == "inputs" else ():
                if not entry.get("optional") and "default" not in entry:
                    yield f"{node}: the new input {entry['name']} has no default; old workflows have no value for it."


def _keeps(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether one input or output still takes and means what it did: equal, but for choices and sockets at the end, and wider ranges."""
    longer, wider = ("options", "sockets"), ("min", "max")
    exact = [{name: value for name, value in facts.items() if name not in (*longer, *wider)} for facts in (old, new)]
    return (
        exact[0] == exact[1]
        and all(new.get(name) == old.get(name) or _begins(old.get(name), new.get(name)) for name in longer)
        and ("min" not in old or "min" not in new or new["min"] <= old["min"])
        and ("max" not in old or "max" not in new or new["max"] >= old["max"])
        and all(name in old or name not in new for name in wider)
    )


def _begins(old: Any, new: Any) -> bool:
    return isinstance(old, list) and isinstance(new, list) and new[: len(old)] == old


def written(interface: Interface) -> str:
    """The JSON text, with a line for each input and output."""

    def part(name: str, entries: list[dict[str, Any]]) -> str:
        lines = ",\n".join(f"      {json.dumps(entry, ensure_ascii=False)}" for entry in entries)
        return f"    {json.dumps(name)}: [\n{lines}\n    ]"

    nodes = (
        f"  {json.dumps(node)}: {{\n" + ",\n".join(part(*entries) for entries in parts.items()) + "\n  }"
        for node, parts in interface.items()
    )
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def main() -> int:
    """Write additions, or say what is broken and write nothing."""
    old, new = recorded() if FILE.exists() else {}, offered()
    lost = list(broken(old, new))
    if lost:
        print("\n".join(lost), "\nNothing was written: workflows in the wild hold what is recorded.", sep="", file=sys.stderr)
        return 1
    FILE.write_text(written(new), encoding="utf-8")
    print(f"{FILE.name}: {len(new)} nodes, {'as before' if new == old else 'with additions'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
