"""Translations: English is what the schemas say, the others have the same keys, and the front end shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

LOCALES = Path(__file__).parents[2] / "locales"
HELP = Path(__file__).parents[2] / "js" / "docs"
OTHERS = sorted(folder.name for folder in LOCALES.iterdir() if folder.is_dir() and folder.name not in ("en", "__pycache__"))
OF_THE_HOST = {"guidance", "sampling", "training"}  # categories that it translates itself
NAME_LIKE = re.compile(r"\b[A-Z][a-z]+(?: [A-Z][a-z]+)+|\b\w+[a-z][A-Z]\w*|\w+: (?:save|load|fit|apply|search)")
THE_SAME = re.compile(r"[A-Za-z_]+\d*|LinearAG.*|CFG\+\+.*|JSON")  # names that are not translated


def read(language, file="nodeDefs.json"):
    """A file of a language."""
    return json.loads((LOCALES / language / file).read_text(encoding="utf-8"))


def by_keys(texts):
    """The texts of a translation by the keys that lead to them."""
    from workshop.translations import keys

    def at(path):
        value = texts
        for key in path:
            value = value[key]
        return value

    return {path: at(path) for path in keys(texts)}


def test_english_is_what_the_schemas_say(host):
    from workshop.translations import english

    assert read("en") == english(), "python run.py python workshop/translations.py writes it anew"


@pytest.mark.parametrize("language", OTHERS)
def test_nothing_is_missing_or_superfluous(host, language):
    assert set(by_keys(read(language))) == set(by_keys(read("en")))


@pytest.mark.parametrize("language", [*OTHERS, "en"])
def test_texts_are_texts(host, language):
    """No text is empty, left in English, or has what the front end's message format would read as a placeholder or a plural."""
    english = by_keys(read("en"))
    for path, text in by_keys(read(language)).items():
        assert text.strip() and not set(text) & set("{}|@"), path
        if path[-1] in ("description", "tooltip"):
            assert text.endswith((".", "。")), path
            assert language == "en" or text != english[path], path
        elif language != "en":
            assert text != english[path] or THE_SAME.fullmatch(text), path


@pytest.mark.parametrize("language", [*OTHERS, "en"])
def test_labels_are_words(language):
    """Ids have underscores, labels none."""
    assert [text for path, text in by_keys(read(language)).items() if path[-1] == "name" and "_" in text and text.lower() == text] == []


def names_of(served):
    """What nodes are called: by id, also with spaces in it, by name, and by what stands before and in the brackets of a name."""
    for node_id, node in served.items():
        name = node["display_name"] or ""
        yield from filter(None, (node_id, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", node_id), name, *re.split(r" \(|\)", name)))


def named_in_help_pages(language):
    """What the help pages of a language mark as the name of a node: slanted in English, but for captions and sources; else quoted."""
    pages, mark = ("*.md", r"(?<![*\w])\*([^*\n]+)\*(?![*\w])") if language == "en" else (f"*/{language}.md", "“([^”]+)”")
    for page in HELP.glob(pages):
        for paragraph in page.read_text(encoding="utf-8").split("\n\n"):
            if not re.match(r"\*\w", paragraph):
                yield from ((page, found) for found in re.findall(mark, paragraph))


def test_texts_name_nodes_that_exist(url):
    """Whatever looks like the name of a node, words in capitals or one with a capital inside, is the name of one, ours or the host's."""
    from workshop import api

    nodes = set(names_of(api.Client(url).get_json("/object_info")))
    names = sorted({"ComfyUI", "LoRAs", "LoRA", "LinearAG", *nodes}, key=len, reverse=True)
    known = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names))
    for path, text in by_keys(read("en")).items():
        if path[-1] in ("description", "tooltip"):
            unknown = NAME_LIKE.findall(known.sub("", text))
            assert not unknown, (path, unknown)
    assert [found for found in named_in_help_pages("en") if found[1] not in nodes] == []
    for language in OTHERS:
        ours = {part for node in read(language).values() for part in (node["display_name"], *re.split("[（）]", node["display_name"]))}
        quoted = [(path, name) for path, text in by_keys(read(language)).items() for name in re.findall("“([^”]+：[^”]+)”", text)]
        wrong = [found for found in (*named_in_help_pages(language), *quoted) if found[1] not in ours]
        assert wrong == []


def test_numbers_and_choices_are_those_of_the_english_text(host):
    """What a user types or reads off stays the same in every language."""
    english = by_keys(read("en"))
    for language in OTHERS:
        for path, text in by_keys(read(language)).items():
            if path[-1] == "tooltip":
                for number in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", english[path]):
                    assert number in text, (path, number)


@pytest.mark.parametrize("language", OTHERS)
def test_categories_and_types_are_ours(host, language):
    import asyncio

    async def listed():
        return await (await host.comfy_entrypoint()).get_node_list()

    schemas = [node.define_schema() for node in asyncio.run(listed())]
    categories = {part for schema in schemas for part in schema.category.split("/")}
    assert set(read(language, "main.json")["nodeCategories"]) == categories - OF_THE_HOST
    types = {entry.io_type for schema in schemas for entry in (*schema.inputs, *schema.outputs)}
    assert set(read(language, "main.json")["dataTypes"]) == {name for name in types if name.startswith("GUIDANCE_")}


def test_the_host_serves_them(url):
    from workshop import api

    served = api.Client(url).get_json("/i18n")
    for language in ("en", *OTHERS):
        assert served[language]["nodeDefs"] == read(language)


def test_the_front_end_speaks_chinese(page, url):
    try:
        page.evaluate("async () => app.extensionManager.setting.set('Comfy.Locale', 'zh')")
        page.goto(url)
        page.wait_for_function("() => window.app?.graph && window.LiteGraph?.registered_node_types.LodestarAPG")
        shown = page.evaluate(
            """() => {
                const node = LiteGraph.createNode('LodestarAPG');
                app.graph.add(node);
                const [compare, labels] = [LiteGraph.createNode('LodestarCompare'), node.widgets.map(widget => widget.label)];
                return [node.title, labels, node.inputs[0].localized_name, compare.title, node.constructor.category];
            }"""
        )
    finally:
        page.evaluate("async () => app.extensionManager.setting.set('Comfy.Locale', 'en')")
    assert shown[0] == "APG（自适应投影引导）" and shown[3] == "引导对比"
    assert shown[1] == ["eta", "范数阈值", "动量", "起始百分比", "结束百分比"]
    assert shown[2] == "模型" and shown[4] == "Lodestar 引导/引导"
    assert not page.errors
