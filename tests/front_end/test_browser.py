"""The host's real front end in Chromium: templates open from its browser, help pages show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from workshop.serving import NO_PROXY

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


def open_templates(page):
    """The template browser, showing this pack's workflows."""
    if not page.get_by_test_id("template-workflows-content").is_visible():
        page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("lodestar", exact=False).first.click()


def test_the_template_browser_opens_a_template(page):
    """The way of a person, once: a second visit to the dialog in one page is not dependable in a headless browser."""
    open_templates(page)
    card = page.get_by_test_id("template-workflow-apg")
    card.scroll_into_view_if_needed()
    card.click()
    wanted = json.loads((ROOT / "workflows" / "apg.json").read_text(encoding="utf-8"))
    page.wait_for_function("count => app.graph.nodes.length === count", arg=len(wanted["nodes"]))


OURS = {  # what people type, and the node that they mean
    "APG": "LodestarAPG", "PAG": "LodestarPAG", "AG": "LodestarAdaptiveGuidance", "adaptive guidance": "LodestarAdaptiveGuidance",
    "FA-CFG": "LodestarFrequencyGuidance", "CFG++": "LodestarCFGPP", "autoguidance": "LodestarAutoguidance",
    "FreCaS": "LodestarFreCaS", "LinearAG": "LodestarLinearAGFit", "guidance interval": "LodestarGuidanceInterval",
}  # fmt: skip


def test_the_search_finds_our_nodes_first(page):
    """The front end's own search. Only ComfyUI's node APG, whose id is the very word, stands before ours, which has it in its name."""
    found = page.evaluate(
        """words => {
            const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
            const search = stores.get('nodeDef').nodeSearchService;
            return Object.fromEntries(words.map(word => [word, search.searchNode(word, [], {limit: 3}).map(node => node.name)]));
        }""",
        [*OURS, "sag", "seg", "rescale", "unsampler"],
    )
    assert found["APG"].pop(0) == "APG"
    assert {word: found[word][0] for word in OURS} == OURS
    assert not any(name.startswith("Lodestar") for word in ("sag", "seg", "rescale", "unsampler") for name in found[word])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_template_opens(page, name):
    """What the dialog does on a click: fetch the template that the host lists, and load it as a graph."""
    wanted = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    page.evaluate(
        """async name => {
            const listed = await (await fetch('/api/workflow_templates')).json();
            if (!listed.lodestar.includes(name)) throw new Error(name + ' is not listed');
            await app.loadGraphData(await (await fetch(`/api/workflow_templates/lodestar/${name}.json`)).json());
        }""",
        name,
    )
    nodes = page.evaluate(
        "() => app.graph.nodes.map(n => [n.type, n.type in LiteGraph.registered_node_types, n.has_errors ?? false, n.widgets?.length ?? 0])"
    )
    assert sorted(node[0] for node in nodes) == sorted(node["type"] for node in wanted["nodes"])
    assert all(known for _, known, _, _ in nodes)
    assert not any(bad for _, _, bad, _ in nodes)
    assert not page.errors


def test_the_front_end_makes_the_same_prompt_as_the_demo(page, url):
    """Our converter of workflow files against the front end's own."""
    from workshop import api

    client = api.Client(url)
    for name in WORKFLOWS:
        workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
        theirs = page.evaluate("async w => { await app.loadGraphData(w); return (await app.graphToPrompt()).output }", workflow)
        ours = api.to_prompt(workflow, client.node_types)
        assert set(theirs) == set(ours)
        for node_id, node in ours.items():
            assert node["class_type"] == theirs[node_id]["class_type"]
            for key, value in node["inputs"].items():
                assert theirs[node_id]["inputs"][key] == value, (name, node_id, key)


def test_help_pages_are_served(url):
    """Where the front end looks for the help page of a node."""
    with NO_PROXY.open(f"{url}/object_info", timeout=60) as answer:
        ours = [name for name in json.load(answer) if name.startswith("Lodestar")]
    assert len(ours) >= 6
    for name in ours:
        with NO_PROXY.open(f"{url}/extensions/lodestar/docs/{name}.md", timeout=60) as answer:
            assert answer.read().decode().startswith("#"), name
        with NO_PROXY.open(f"{url}/extensions/lodestar/docs/{name}/zh.md", timeout=60) as answer:
            assert answer.read().decode().startswith("#"), name


SAID = """type => app.graph.nodes.find(node => node.type === type).widgets.find(widget => widget.name === '$$node-text-preview')?.value"""


def test_nodes_say_how_far_they_are_and_where_a_file_went(page, url):
    """On themselves: a policy search of two iterations, and the node that saves what it has found."""
    workflow = json.loads((ROOT / "workflows" / "policy_search.json").read_text(encoding="utf-8"))
    page.evaluate(
        """async workflow => {
            await app.loadGraphData(workflow);
            const found = type => app.graph.nodes.find(node => node.type === type);
            const last = Number(found('LodestarSavePolicy').id);
            for (const node of [...app.graph.nodes]) if (Number(node.id) > last) app.graph.remove(node);
            found('LodestarPolicySearch').widgets.find(widget => widget.name === 'iterations').value = 2;
            await app.queuePrompt(0, 1);
        }""",
        workflow,
    )
    page.wait_for_function(f"() => ({SAID})('LodestarSavePolicy')")
    path = Path(page.evaluate(SAID, "LodestarSavePolicy").removeprefix("Saved: "))
    assert path.is_file() and path.is_relative_to(url.base)
    line = page.evaluate(SAID, "LodestarPolicySearch")
    assert re.fullmatch(r"2 of 2 · loss \d\.\d{4} · \d+ of 12 evaluations · done in \d+:\d\d", line), line


OPEN_HELP = """async id => {
    const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
    const node = LiteGraph.createNode(id);
    app.graph.add(node);
    app.canvas.selectItems([node]);
    stores.get('canvas').updateSelectedItems();
    while (!document.querySelector('.node-help-content')) { // the panel has to turn to the selection first
        stores.get('rightSidePanel').openPanel('info');
        await new Promise(resolve => setTimeout(resolve, 100));
    }
}"""


def test_the_help_panel_shows_a_page_and_enlarges_its_picture(page, url, shots):
    """In Chinese: tables and picture fit the panel. The picture opens at its own size on a click, and Escape closes it."""
    try:
        page.evaluate("async () => app.extensionManager.setting.set('Comfy.Locale', 'zh')")
        page.set_viewport_size({"width": 1600, "height": 1000})
        page.goto(url)
        page.wait_for_function("() => window.app?.graph?.nodes.length && window.LiteGraph?.registered_node_types.LodestarAPG")
        page.evaluate(OPEN_HELP, "LodestarAPG")
        picture = page.locator(".node-help-content img")
        picture.wait_for()
        assert page.locator(".node-help-content h1").inner_text() == "APG（自适应投影引导）"
        widths = "tables => tables.every(table => table.scrollWidth <= table.parentElement.clientWidth)"
        assert page.locator(".node-help-content table").evaluate_all(widths)
        page.screenshot(path=shots / "help_zh.png")
        picture.click()
        whole = page.locator("dialog.lodestar-picture img")
        whole.wait_for()
        width, natural = whole.evaluate("async image => { await image.decode(); return [image.clientWidth, image.naturalWidth] }")
        assert width == natural > 2 * picture.evaluate("image => image.clientWidth")
        page.keyboard.press("Escape")
        whole.wait_for(state="detached")
    finally:
        page.evaluate("async () => app.extensionManager.setting.set('Comfy.Locale', 'en')")
    assert not page.errors
