"""The house keeps its order: imports run one way, without circles, and files stay small.

Read from the sources. An import counts wherever it stands: at the top, in a function, or for type checkers alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOADED = ("guiders", "nodes", "pictures", "demo", "charts", "extension", "__init__")  # by ComfyUI, on users' machines
METHODS = ("shapers", "terms", "policies", "cfgpp", "frecas", "restoration", "comparison")
# A layer may import those above it. Methods may build on each other, as long as no circle comes of it.
LAYERS = (
    ("guiders.spaces",),
    ("guiders.engine",),
    ("guiders.network", "guiders.learning"),
    tuple(f"guiders.{method}" for method in METHODS),
    ("demo", "pictures"),
    ("charts", "nodes"),
    ("extension",),
    ("__init__",),
)
LONGEST, LONGEST_TEST = 300, 500  # lines


def name_of(file: Path) -> str:
    """A module's name within the pack: guiders/engine/plan.py -> guiders.engine.plan."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


# The inner __init__ files are no part of this: they hold a docstring only.
FOUND = [ROOT / f"{top}.py" for top in LOADED] + [file for top in LOADED for file in (ROOT / top).rglob("[!_]*.py")]
FILES = {name_of(file): file for file in sorted(FOUND) if file.is_file()}


def relative_imports(name: str) -> Iterator[str]:
    """What a module imports from the pack, by full names: modules, or folders if what is imported is none."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                yield inner if inner in FILES or not base else ".".join(base)


def absolute_imports(name: str) -> Iterator[str]:
    """What a module imports from elsewhere."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def graph() -> dict[str, set[str]]:
    """Every module with the modules that it imports."""
    return {name: set(relative_imports(name)) & FILES.keys() for name in FILES}


def wing_of(name: str) -> str:
    """guiders.engine.plan -> guiders.engine; everything else is a wing by its first name."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] == "guiders" else 1])


def layer_of(name: str) -> int:
    """The place of a module's wing in LAYERS."""
    return next(number for number, wings in enumerate(LAYERS) if wing_of(name) in wings)


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, or nothing."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def by_wing(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph between wings."""
    wings: dict[str, set[str]] = {}
    for name, others in edges.items():
        wings.setdefault(wing_of(name), set()).update(wing_of(other) for other in others if wing_of(other) != wing_of(name))
    return wings


def lines_of(files: Iterable[Path]) -> dict[str, int]:
    """The length of each file."""
    return {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}


def sources() -> list[Path]:
    """All Python and JavaScript of the repository."""
    found = [file for suffix in ("py", "js") for file in ROOT.rglob(f"*.{suffix}")]
    return [file for file in found if not any(part[0] == "." for part in file.relative_to(ROOT).parts)]


def test_the_reader_sees_imports_of_every_kind():
    """If these are not found, the other tests prove nothing."""
    edges = graph()
    assert len(FILES) > 40
    assert "guiders.shapers.apg" in edges["nodes.shapers.apg"]  # from ...guiders.shapers.apg import APG
    assert "charts" in edges["extension"]  # from . import charts
    assert "extension" in edges["__init__"]  # in a function
    assert {"torch", "comfy.samplers"} <= {found for name in FILES for found in absolute_imports(name)}
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and not circle_in({"a": {"b", "c"}, "b": {"c"}})


def test_imports_run_one_way():
    against = {f"{name} imports {other}" for name, others in graph().items() for other in others if layer_of(other) > layer_of(name)}
    assert not against


def test_the_ground_imports_nothing_of_ours():
    assert not set(relative_imports("guiders.spaces"))


def test_no_circle():
    edges = graph()
    assert not circle_in(edges)
    assert not circle_in(by_wing(edges)), "between wings"


def test_guiders_import_guiders_alone():
    """Never nodes, pictures, demo, or what is for developers."""
    found = {f"{name} imports {other}" for name in FILES for other in relative_imports(name) if name.startswith("guiders.")}
    assert not {line for line in found if not line.split()[-1].startswith("guiders.")}


def test_what_users_load_needs_nothing_that_they_do_not_have():
    """Nothing of workshop, tests or benchmarks; and the pack has whatever name its folder has."""
    within = {f"{name} imports {other}" for name in FILES for other in relative_imports(name) if other.split(".")[0] not in LOADED}
    developers = {"lodestar", "workshop", "tests", "tools", "benchmarks", "run"}
    absolute = {f"{name} imports {other}" for name in FILES for other in absolute_imports(name) if other.split(".")[0] in developers}
    assert not within | absolute


@pytest.mark.parametrize("top", ["guiders", "nodes", "pictures", "demo", "workshop", "benchmarks"])
def test_init_files_hold_a_docstring_only(top):
    for file in (ROOT / top).rglob("__init__.py"):
        (only,) = ast.parse(file.read_text(encoding="utf-8")).body
        assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant) and isinstance(only.value.value, str), file


def test_files_stay_small():
    tests = [file for file in sources() if file.is_relative_to(ROOT / "tests")]
    long = {name: count for name, count in lines_of(tests).items() if count > LONGEST_TEST}
    long |= {name: count for name, count in lines_of(set(sources()) - set(tests)).items() if count > LONGEST}
    assert not long
