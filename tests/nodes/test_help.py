"""Every node has a help page in English and in Chinese that explains every input and fits the panel; no link and no picture is broken."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "js" / "docs"
ENGLISH = sorted(DOCS.glob("*.md"))
CHINESE = sorted(DOCS.glob("*/zh.md"))  # where the front end looks first when it speaks Chinese
PAGES = [*ENGLISH, *CHINESE]
LABELS = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")
WITHOUT_PAPER = ("LodestarReport", "LodestarCompare", "LodestarDemoModel")


def node_of(page):
    """Id of the node that a page is for."""
    return page.stem if page.parent == DOCS else page.parent.name


def read(page):
    """A page's text."""
    return page.read_text(encoding="utf-8")


def tables(text):
    """The tables of a page as lists of rows, each a list of cells, without the line below the head."""
    blocks = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    rows = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]
    return [[row for row in table if not re.fullmatch(r"[-:]+", row[0])] for table in rows]


def outline(text):
    """What a page is made of: levels of headings, sizes of tables, pictures, addresses, marks in code, and numbers outside of code."""
    prose = re.sub(r"`[^`]*`", "", text)
    return {
        "headings": [len(level) for level in re.findall(r"^(#+) ", text, re.MULTILINE)],
        "tables": [[len(row) for row in table] for table in tables(text)],
        "pictures": [target for _, target in PICTURE.findall(text)],
        "addresses": sorted(set(re.findall(r"https://[^)\s]+", text))),
        "code": sorted(set(re.findall(r"`([^`]+)`", text))),
        "numbers": sorted(set(re.findall(r"\d+\.\d+", prose))),
    }


@pytest.fixture(scope="module")
def schemas(host) -> dict:
    """Of all registered nodes, by id."""

    async def listed() -> list:
        return await (await host.comfy_entrypoint()).get_node_list()

    return {node.define_schema().node_id: node.define_schema() for node in asyncio.run(listed())}


def test_every_node_has_a_page_in_each_language_and_every_page_a_node(host, schemas):
    assert (ROOT / host.WEB_DIRECTORY / "docs").resolve() == DOCS
    assert {node_of(page) for page in ENGLISH} == {node_of(page) for page in CHINESE} == set(schemas)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{node_of(page)}-{page.stem}")
def test_the_page_names_the_node_and_all_its_inputs(schemas, page):
    import comfy.samplers

    text, schema = read(page), schemas[node_of(page)]
    labels = LABELS[schema.node_id] if page in CHINESE else None
    of_the_host = comfy.samplers.SAMPLER_NAMES, comfy.samplers.SCHEDULER_NAMES
    assert text.startswith(f"# {labels['display_name'] if labels else schema.display_name}\n")
    for entry in schema.inputs:
        name = entry.display_name or entry.id
        label = "" if labels is None or labels["inputs"][entry.id]["name"] == name else f"<br>{labels['inputs'][entry.id]['name']}"
        assert re.search(rf"^\| .*`{name}`{label}(?!\w).* \|", text, re.MULTILINE), name + label
        options = getattr(entry, "options", None) or ()
        for option in () if options in of_the_host or entry.id == "file" else options:  # the files that there are
            assert f"`{option}`" in text, option


@pytest.mark.parametrize("page", CHINESE, ids=node_of)
def test_both_languages_have_the_same_parts(page):
    assert outline(read(page)) == outline(read(DOCS / f"{node_of(page)}.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{node_of(page)}-{page.stem}")
def test_the_page_says_what_it_costs_and_from_where_it_comes(page):
    if node_of(page) in WITHOUT_PAPER:
        return
    text, chinese = read(page), ("**开销：**", "## 何时使用", "## 适用范围")
    for words in chinese if page in CHINESE else ("**Cost:**", "## When to use it", "## What it works with"):
        assert words in text, words
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{node_of(page)}-{page.stem}")
def test_it_fits_the_panel(page):
    """Its 272 pixels hold three columns. Links open in a new window, below the server's root, where there is no page of ours."""
    text = read(page)
    assert max((len(row) for table in tables(text) for row in table), default=0) <= 3
    assert all("://" in target for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", text))
    assert "run.py" not in text and ".py" not in text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_pictures_are_there_described_and_small(page):
    """The front end looks for the pictures of every language in the folder of the English pages."""
    folder = DOCS if page in PAGES else page.parent
    for description, target in PICTURE.findall(read(page)):
        file = folder / target
        assert description and file.is_file(), target
        with Image.open(file) as picture:
            picture.verify()
        assert file.stat().st_size < (60_000 if page in PAGES else 1_000_000)


def test_no_picture_is_left_over():
    used = {target for page in PAGES for _, target in PICTURE.findall(read(page))}
    assert {file.name for file in DOCS.glob("*.png")} == used
