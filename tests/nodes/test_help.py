"""Every node has a help page that explains every input; no link to a picture is broken."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "js" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


@pytest.fixture
def schemas(host) -> dict:
    """Of all registered nodes, by id."""

    async def listed() -> list:
        return await (await host.comfy_entrypoint()).get_node_list()

    return {node.define_schema().node_id: node.define_schema() for node in asyncio.run(listed())}


def test_every_node_has_a_page_and_every_page_a_node(host, schemas):
    assert (ROOT / host.WEB_DIRECTORY / "docs").resolve() == DOCS
    assert {page.stem for page in PAGES} == set(schemas)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_names_the_node_and_all_its_inputs(schemas, page):
    import comfy.samplers

    text, schema = page.read_text(encoding="utf-8"), schemas[page.stem]
    of_the_host = comfy.samplers.SAMPLER_NAMES, comfy.samplers.SCHEDULER_NAMES
    assert text.startswith(f"# {schema.display_name}\n")
    for entry in schema.inputs:
        assert re.search(rf"^\| .*`{entry.id}`.* \|", text, re.MULTILINE), entry.id
        options = getattr(entry, "options", None) or ()
        for option in () if options in of_the_host or entry.id == "file" else options:  # the files that there are
            assert f"`{option}`" in text, option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_says_what_it_costs_and_from_where_it_comes(page):
    text = page.read_text(encoding="utf-8")
    if page.stem in ("LodestarReport", "LodestarCompare", "LodestarDemoModel"):
        return
    assert "**Cost:**" in text and "## When to use it" in text and "## What it works with" in text
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}", text)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_pictures_are_there_described_and_small(page):
    for description, target in PICTURE.findall(page.read_text(encoding="utf-8")):
        file = page.parent / target
        assert description and file.is_file(), target
        with Image.open(file) as picture:
            picture.verify()
        assert file.stat().st_size < (60_000 if page.parent == DOCS else 1_000_000)


def test_no_picture_is_left_over():
    used = {target for page in PAGES for _, target in PICTURE.findall(page.read_text(encoding="utf-8"))}
    assert {file.name for file in DOCS.glob("*.png")} == used
