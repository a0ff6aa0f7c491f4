"""What people read: links lead somewhere, commands exist, and numbers are those that the commands wrote."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md"
HELP = sorted((ROOT / "js" / "docs").glob("*.md"))
DOCUMENTS = [README, RESULTS, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "demo" / "README.md", *HELP]
LONGEST = 130  # lines of the README: two minutes to read
EFFECTS = ROOT / "benchmarks" / "results" / "effects.json"


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def links(file: Path) -> list[tuple[Path, str]]:
    """Targets of relative links and pictures: (file, anchor)."""
    found = [target for target in re.findall(r"\]\(([^)\s]+)\)", read(file)) if "://" not in target]
    parts = [target.partition("#") for target in found]
    return [((file.parent / path).resolve() if path else file, anchor) for path, _, anchor in parts]


def anchors(file: Path) -> set[str]:
    """Of all headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_packed(name: str) -> bool:
    """Whether the registry's package has a file. Later lines of .comfyignore overrule earlier ones, as in a .gitignore."""
    packed, parents = True, [name, *map(str, Path(name).parents)]
    for line in read(ROOT / ".comfyignore").splitlines():
        pattern = line.lstrip("!").strip("/")
        if pattern and not line.startswith("#") and any(fnmatch(parent, pattern) for parent in parents):
            packed = line.startswith("!")
    return packed


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for target, anchor in links(file):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), (target, anchor)


@pytest.mark.parametrize("file", [README, RESULTS, *HELP], ids=lambda file: str(file.relative_to(ROOT)))
def test_what_users_follow_is_in_the_registrys_package(file):
    assert is_packed(str(file.relative_to(ROOT)))
    for target, _ in links(file):
        assert is_packed(str(target.relative_to(ROOT))), target


def test_the_package_leaves_the_rest_out():
    for name in (
        "tests/test_documents.py",
        "benchmarks/cost.py",
        "benchmarks/effects/report.py",
        ".ci/run",
        "docs/icon.png",
        ".comfyignore",
    ):
        assert (ROOT / name).is_file() and not is_packed(name), name
    assert is_packed("nodes/shapers/apg.py") and is_packed("js/docs/apg.png")


@pytest.mark.parametrize("file", [*DOCUMENTS, ROOT / ".comfyignore"], ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_and_files_that_are_named_exist(file):
    import run

    text = read(file)
    assert set(re.findall(r"run\.py bench (\w+)", text)) - {"NAME"} <= set(run.benchmarks())
    for name in re.findall(r"run\.py python (\w\S+\.py)", text) + re.findall(
        r"`((?:tests|guiders|nodes|benchmarks|workshop|demo|pictures|js)/[\w/.-]+\.\w+)`", text
    ):
        assert (ROOT / name).is_file(), name


def test_the_readme_is_short_and_names_every_node():
    assert len(read(README).splitlines()) <= LONGEST
    assert {target for target, _ in links(README)} >= set(HELP)
    templates = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert set(re.findall(r"\*\*([a-z_]+)\*\*|template `(\w+)`", read(README))) <= {(name, "") for name in templates} | {
        ("", name) for name in templates
    }
    for family in re.findall(r"`(\w+_)…`", read(README)):
        assert any(name.startswith(family) for name in templates), family


# ------------------------------------------------------------------------------------------------- what commands wrote


def part(file: Path, name: str) -> str:
    from lodestar.benchmarks import _results

    return _results.part(file, name)[1].strip()


def test_the_results_are_those_of_the_effects(host, tmp_path):
    """Written anew, both documents stay as they are."""
    from lodestar.benchmarks.effects import report
    from lodestar.benchmarks.effects.__main__ import methods

    copies = [tmp_path / file.name for file in (RESULTS, README)]
    for file, copy in zip((RESULTS, README), copies, strict=True):
        copy.write_text(read(file), encoding="utf-8")
    report.write(report.Report.load(EFFECTS), {name: method.title for name, method in methods().items()}, *copies)
    assert [read(copy) for copy in copies] == [read(RESULTS), read(README)], "run `python run.py bench effects --readme`"


def test_the_readme_counts_the_claims(host):
    verdicts = [claim["verdict"] for method in json.loads(read(EFFECTS)).values() for claim in method["claims"]]
    numbers = [len(verdicts), *(verdicts.count(verdict) for verdict in ("holds", "fails", "undecided"))]
    assert [int(number) for number in re.findall(r"\b\d+\b", part(README, "effects"))] == numbers
    rows = re.findall(r"\| \**(holds|fails|undecided)\** \|$", part(RESULTS, "effects"), re.MULTILINE)
    assert sorted(rows) == sorted(verdicts)


def test_the_readmes_costs_are_those_of_the_results(host):
    from lodestar.benchmarks.cost import SHORT

    *tables, shapes = part(RESULTS, "cost").split("\n\n")[1:]
    works = [{cells[1].strip(): cells[-2].strip() for cells in (line.split("|") for line in table.splitlines())} for table in tables]
    table, sentence = part(README, "cost").split("\n\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == list(SHORT) and len(works) == 2
    shares = [[100 * float(work[name]) / float(work["CFG"]) for work in works] for name in SHORT.values()]
    assert [[float(cell.rstrip("%")) for cell in row[2:]] for row in rows] == [pytest.approx(share, abs=1) for share in shares]
    of_shapes = re.findall(r"of (\S+)'s shape \| \d+ \| `(?:middle|auto)` \| [\d.]+ \| ([\d.]+)", shapes)
    assert len(of_shapes) == 4 and [(name, cost) for cost, name in re.findall(r"([\d.]+) in a network of (\S+)'s", sentence)] == of_shapes


def test_every_part_is_written(host):
    """None is left empty, and each names the command that writes it."""
    import run

    for file in (README, RESULTS):
        for name, command in re.findall(r"<!-- (\w+): written by `python run\.py bench ([^`]+)` -->", read(file)):
            assert command.split()[0] == name in run.benchmarks()
            assert part(file, name), name
    assert len(re.findall(r"<!-- end of ", read(RESULTS))) == 9


@pytest.mark.parametrize(
    ("page", "pattern", "name"),
    [
        ("LodestarAdaptiveGuidance", r"\*\*(0\.99\d\d)\*\*", "gamma"),
        ("LodestarLinearAG", r"\+(0\.\d{3})", "effects"),
        ("LodestarPolicySearch", r"\+(0\.\d{3})", "effects"),
        ("LodestarPolicySearch", r"(\d\.\d) GiB", "search_memory"),
        ("LodestarCFGPPInvert", r"\| \**(\d\d\.\d)\** (?=\|)", "inversion"),
    ],
)
def test_numbers_on_help_pages_are_those_of_the_results(host, page, pattern, name):
    found = {
        number
        for groups in re.findall(pattern, read(ROOT / "js" / "docs" / f"{page}.md"))
        for number in ([groups] if isinstance(groups, str) else groups)
        if number
    }
    measured = set(re.findall(r"\d+\.\d+", part(RESULTS, name)))
    assert len(found) >= 2 and found <= measured, found - measured


def test_a_part_is_replaced_and_nothing_else(host, tmp_path):
    from lodestar.benchmarks import _results

    page = tmp_path / "page.md"
    page.write_text(
        "Before\n<!-- a: written by hand -->\nold\n<!-- end of a -->\nbetween\n<!-- b: too -->\n<!-- end of b -->\n", encoding="utf-8"
    )
    _results.write(page, "a", "new\n")
    assert read(page) == "Before\n<!-- a: written by hand -->\n\nnew\n\n<!-- end of a -->\nbetween\n<!-- b: too -->\n<!-- end of b -->\n"
    before = read(page)
    _results.write(page, "a", "new")
    assert read(page) == before
    with pytest.raises(ValueError, match=r"page\.md has to have one part"):
        _results.write(page, "c", "new")


def test_only_default_settings_go_into_the_documents(host, capsys):
    from lodestar.benchmarks import cost

    with pytest.raises(SystemExit):
        cost.main(["--write", "--models", "unet"])
    assert "--write goes with the default settings, not with --models" in capsys.readouterr().err
