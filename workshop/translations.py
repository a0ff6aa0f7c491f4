"""``python run.py python workshop/translations.py`` writes English from the nodes' schemas, and says what the other languages lack."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lodestar

FOLDER = Path(__file__).resolve().parents[1] / "locales"
FILE = "nodeDefs.json"


def english() -> dict[str, Any]:
    """What the front end shows of every node, in the form that it looks translations up in."""

    async def listed() -> list[Any]:
        return await (await lodestar.comfy_entrypoint()).get_node_list()

    return {schema.node_id: _node(schema) for schema in (node.define_schema() for node in asyncio.run(listed()))}


def _node(schema: Any) -> dict[str, Any]:
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {name: text for entry in schema.inputs for name, text in _inputs(entry)},
        "outputs": {
            str(index): {"name": _label(entry.display_name or entry.id) if entry.id else entry.io_type, "tooltip": entry.tooltip}
            for index, entry in enumerate(schema.outputs)
        },
    }


def _inputs(entry: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """An input, and the sockets that grow out of it: the front end looks for a_b where the socket is called a.b."""
    yield entry.id, {"name": _label(entry.display_name or entry.id), "tooltip": entry.tooltip}
    for socket in entry.template.get_all() if hasattr(entry, "template") else ():
        yield f"{entry.id}_{socket.id}", {"name": socket.id, "tooltip": socket.tooltip}


def _label(name: str) -> str:
    """A name as people read it."""
    return name.replace("_", " ")


def keys(texts: Mapping[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    """The keys, from the outermost on, that lead to every text of a translation."""
    for key, value in texts.items():
        if isinstance(value, Mapping):
            yield from keys(value, *above, key)
        else:
            yield (*above, key)


def main() -> None:
    """Write English; list what is missing or superfluous in the others."""
    texts = english()
    (FOLDER / "en" / FILE).write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in sorted(FOLDER.glob(f"*/{FILE}")):
        there = set(keys(json.loads(file.read_text(encoding="utf-8"))))
        for what, paths in (("lacks", set(keys(texts)) - there), ("has, but no node needs", there - set(keys(texts)))):
            for path in sorted(paths):
                print(f"{file.parent.name} {what} {' > '.join(path)}")


if __name__ == "__main__":
    main()
