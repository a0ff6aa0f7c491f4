"""A person at the front end: finds nodes, connects them, runs a template to a picture, and sees in the nodes what guidance does."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MINE = ".lodestar-chart canvas[aria-label]"


def template(name: str, **steps: int) -> dict:
    """A workflow file, with the sampler's steps changed if asked for."""
    workflow = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = steps.get("steps", node["widgets_values"][2])
    return workflow


seeds = itertools.count(1000)


def load(page, workflow: dict) -> None:
    """Open a workflow with a seed of its own, so that nothing that samples is cached."""
    for node in workflow["nodes"]:
        if node["type"] in ("KSampler", "LodestarFreCaS"):
            node["widgets_values"][0] = next(seeds)
    page.evaluate("async w => { await app.loadGraphData(w) }", workflow)
    page.mouse.move(640, 750)  # away from all that opens something under the pointer
    watch(page)


def watch(page) -> None:
    """From now on keep what all charts have said, in ``said``, and how prompts have ended, in ``ended``."""
    page.evaluate(
        """() => {
            window.said = []; window.ended = [];
            if (window.watching) return;
            window.watching = new MutationObserver(changes => changes.forEach(change => said.push(change.target.ariaLabel)));
            watching.observe(document, {subtree: true, attributes: true, attributeFilter: ['aria-label']});
            for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
                app.api.addEventListener(end, ({detail}) => ended.push([end, detail.node_id ?? null]));
        }"""
    )


def run(page) -> None:
    """Press Run, and wait for the end."""
    before = page.evaluate("() => ended.length")
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("before => ended.length > before", arg=before, timeout=180_000)
    assert page.evaluate("() => ended.at(-1)[0]") == "execution_success"
    page.wait_for_timeout(300)


def charts(page) -> dict[str, str]:
    """What the charts of the open graph say, by the type of their node."""
    return page.evaluate(
        """() => Object.fromEntries(app.canvas.graph.nodes.flatMap(node => (node.widgets ?? [])
            .filter(widget => widget.name === 'lodestar_chart')
            .map(widget => [node.type, widget.element.querySelector('canvas').ariaLabel])))"""
    )


def look(page, path: Path, at: str, scale: float = 1.3) -> None:
    """Show the node of a type at the upper left, and take a picture."""
    page.evaluate(
        """([type, scale]) => {
            const node = app.canvas.graph.nodes.find(node => node.type === type);
            app.canvas.ds.scale = scale;
            app.canvas.ds.offset = [-node.pos[0] + 90, -node.pos[1] + 110];
            app.canvas.setDirty(true, true);
        }""",
        [at, scale],
    )
    page.wait_for_timeout(600)
    page.screenshot(path=path)


def saved(page) -> str:
    """The workflow and the prompt as they would be saved and queued, but for where the view is and what the host's own nodes show."""
    return page.evaluate(
        """async () => {
            const {output, workflow} = await app.graphToPrompt();
            delete workflow.extra;
            workflow.nodes = workflow.nodes.filter(node => node.type !== 'PreviewAny');
            for (const [id, node] of Object.entries(output)) if (node.class_type === 'PreviewAny') delete output[id];
            return JSON.stringify([output, workflow]);
        }"""
    )


@pytest.fixture(autouse=True)
def no_errors(page):
    """Whatever a test does, the page throws nothing."""
    page.errors.clear()
    yield
    assert not page.errors


# --- nodes -----------------------------------------------------------------------------------------------------------


def add_by_search(page, name: str, x: int, y: int) -> None:
    """Double-click on the canvas, type, choose ours, and click where it goes."""
    field = page.get_by_role("search").get_by_role("combobox")
    for _ in range(10):  # a page that has just been opened may not listen yet
        page.mouse.dblclick(x, y)
        page.wait_for_timeout(500)
        if field.is_visible():
            break
    field.fill(name)
    page.get_by_role("option").filter(has_text="lodestar").filter(has_text=name).first.click()
    field.wait_for(state="detached")
    page.mouse.move(x, y, steps=3)
    page.mouse.click(x, y)


def test_every_node_is_found_by_its_name(page, url, shots):
    from workshop import api

    ours = {kind: about["display_name"] for kind, about in api.Client(url).node_types.items() if kind.startswith("Lodestar")}
    assert len(ours) >= 20
    for kind, name in ours.items():
        page.evaluate("() => { app.graph.clear(); app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0] }")
        add_by_search(page, name, 500, 300)
        page.wait_for_function("kind => app.graph.nodes.some(node => node.type === kind)", arg=kind)
        assert page.evaluate("() => app.graph.nodes.length") == 1, kind
    page.screenshot(path=shots / "node_added.png")


def test_nodes_are_connected_by_dragging(page, shots):
    page.evaluate("() => { app.graph.clear(); app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0] }")
    add_by_search(page, "Demo Model (Shapes)", 250, 250)
    add_by_search(page, "Guidance Interval", 650, 250)
    page.wait_for_function("() => app.graph.nodes.length === 2")
    ends = page.evaluate(
        """() => {
            const [model, interval] = ['LodestarDemoModel', 'LodestarGuidanceInterval'].map(t => app.graph.nodes.find(n => n.type === t));
            model.pos = [150, 200]; interval.pos = [600, 200];
            const area = app.canvas.canvas.getBoundingClientRect();
            return [model.getOutputPos(0), interval.getInputPos(0)].map(([x, y]) => [x + area.x, y + area.y]);
        }"""
    )
    page.wait_for_timeout(300)
    page.mouse.move(*ends[0])
    page.mouse.down()
    page.mouse.move(400, 260, steps=5)
    page.mouse.move(*ends[1], steps=5)
    page.mouse.up()
    page.wait_for_function("() => app.graph.nodes.find(n => n.type === 'LodestarGuidanceInterval').inputs[0].link != null")
    page.screenshot(path=shots / "connected.png")


def test_a_wrong_layer_is_shown_at_the_node_that_has_it(another_page, shots):
    page = another_page()
    workflow = template("pag")
    pag = next(node for node in workflow["nodes"] if node["type"] == "LodestarPAG")
    pag["widgets_values"][1] = "middel"
    load(page, workflow)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => ended.length")
    assert page.evaluate("() => ended[0]") == ["execution_error", str(pag["id"])]
    page.get_by_text("PAG (Perturbed-Attention Guidance) failed").wait_for()
    page.screenshot(path=shots / "wrong_layer.png")
    page.get_by_text("View details").click()
    page.get_by_text("no self-attention layer 'middel'; it has").first.wait_for()
    page.screenshot(path=shots / "wrong_layer_details.png")
    assert not charts(page)


# --- charts ----------------------------------------------------------------------------------------------------------


def test_the_demo_workflow_from_the_template_browser_to_a_picture(page, shots):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_role("dialog").get_by_text("lodestar").first.click()
    card = page.get_by_test_id("template-workflow-adaptive_guidance")
    card.scroll_into_view_if_needed()
    shown = "card => [...card.querySelectorAll('img')].some(image => image.complete && image.naturalWidth >= 256)"
    page.wait_for_function(shown, arg=card.element_handle())  # its thumbnail
    page.wait_for_timeout(500)  # which fades in
    page.screenshot(path=shots / "templates.png")
    card.click()
    page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'LodestarAdaptiveGuidance')")
    watch(page)
    before = saved(page)
    assert not charts(page)
    run(page)
    page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'PreviewImage' && node.imgs?.[0]?.naturalWidth >= 256)")
    steps = [int(number) for text in page.evaluate("() => said") for number in re.findall(r"step (\d+) of 20", text)]
    assert steps == sorted(steps) and len(set(steps)) >= 3 and steps[-1] == 20  # it moves
    shown = charts(page)["LodestarAdaptiveGuidance"]
    ended = r"CFG ended (for \d of 4 pictures|at steps? .* of 20), [\d.]+ evaluations saved, "
    assert re.fullmatch(ended + r"cosine 0\.99\d+, threshold 0\.\d+, step 20 of 20, [\d.]+ evaluations \(NFE\)", shown), shown
    assert saved(page) == before
    page.screenshot(path=shots / "adaptive_guidance.png")
    look(page, shots / "adaptive_guidance_near.png", "LodestarAdaptiveGuidance")


def test_the_graph_is_moved_and_zoomed_over_a_chart_too(page):
    load(page, template("apg", steps=4))
    run(page)
    page.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [-200, 150]; app.canvas.setDirty(true, true) }")
    page.wait_for_timeout(500)
    box = page.locator(MINE).first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    before = page.evaluate("() => [...app.canvas.ds.offset]")
    page.mouse.down(button="middle")
    page.mouse.move(middle[0] + 60, middle[1] + 40, steps=6)
    page.mouse.up(button="middle")
    after = page.evaluate("() => [...app.canvas.ds.offset]")
    assert after[0] - before[0] > 30 and after[1] - before[1] > 20
    page.mouse.move(*middle)
    page.mouse.wheel(0, -300)
    page.wait_for_function("() => app.canvas.ds.scale > 1.02")


def test_after_a_reload_the_chart_is_there_again(page, shots):
    load(page, template("apg", steps=8))
    run(page)
    before = charts(page)
    assert "step 8 of 8" in before["LodestarAPG"]
    page.wait_for_timeout(1500)  # the front end keeps drafts of workflows with a delay
    page.reload()
    page.wait_for_function("() => window.app?.graph?.nodes.some(node => node.type === 'LodestarAPG')")
    page.wait_for_selector(MINE, state="attached")
    assert charts(page) == before
    look(page, shots / "reloaded.png", "LodestarAPG")


def test_charts_go_on_when_the_connection_breaks(page):
    load(page, template("apg", steps=30))
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => said.length")
    page.evaluate("() => app.api.socket.close()")
    page.wait_for_function("() => said.some(text => text.includes('step 30 of 30'))", timeout=180_000)
    page.wait_for_function("() => ended.length")


def test_another_workflow_has_no_charts_and_the_first_gets_its_own_back(page):
    load(page, template("apg", steps=30))
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => said.length")
    first = page.evaluate("() => app.extensionManager.workflow.activeWorkflow.path")
    page.evaluate("async w => { await app.loadGraphData(w) }", template("pag"))  # has a node 3 too
    assert not charts(page)
    page.wait_for_function("() => ended.length", timeout=180_000)
    assert not charts(page)
    page.get_by_text(first.split("/")[-1].removesuffix(".json"), exact=True).first.click()
    page.wait_for_function("path => app.extensionManager.workflow.activeWorkflow.path === path", arg=first)
    page.wait_for_selector(MINE, state="attached")
    assert "step 30 of 30" in charts(page)["LodestarAPG"], charts(page)


def test_a_second_page_is_not_disturbed(page, another_page):
    other = another_page()
    for each in (page, other):
        load(each, template("apg", steps=4))
    watch(other)
    run(page)
    assert "step 4 of 4" in charts(page)["LodestarAPG"]
    assert not charts(other) and not other.evaluate("() => said") and not other.errors


def test_bypassed_nodes_have_no_chart(page):
    load(page, template("apg_pag", steps=4))
    run(page)
    assert set(charts(page)) == {"LodestarAPG", "LodestarPAG"}
    higher = page.evaluate("() => app.graph.nodes.find(node => node.type === 'LodestarAPG').size[1]")
    page.evaluate(
        """() => {
            app.canvas.selectNode(app.graph.nodes.find(node => node.type === 'LodestarAPG'));
            app.extensionManager.command.execute('Comfy.Canvas.ToggleSelectedNodes.Bypass');
            app.extensionManager.workflow.activeWorkflow.changeTracker.checkState();
        }"""
    )
    page.wait_for_function("() => document.querySelectorAll('.lodestar-chart').length === 1")
    assert set(charts(page)) == {"LodestarPAG"}
    assert page.evaluate("() => app.graph.nodes.find(node => node.type === 'LodestarAPG').size[1]") < higher
    run(page)
    assert set(charts(page)) == {"LodestarPAG"}


def test_a_node_in_a_subgraph(page, shots):
    load(page, template("apg_pag", steps=4))
    page.evaluate(
        """() => {
            const {subgraph, node} = app.graph.convertToSubgraph(new Set([app.graph.nodes.find(n => n.type === 'LodestarAPG')]));
            window.inside = subgraph;
        }"""
    )
    run(page)
    assert set(charts(page)) == {"LodestarPAG"}
    said = page.locator(".lodestar-chart canvas").evaluate_all("all => all.map(canvas => canvas.ariaLabel)")
    assert len(said) == 3 and len(set(said)) == 2  # that of APG twice: inside, and on the subgraph's node, which people see
    page.evaluate("() => app.canvas.setGraph(inside)")
    page.wait_for_timeout(500)
    assert "step 4 of 4" in charts(page)["LodestarAPG"]
    look(page, shots / "subgraph.png", "LodestarAPG")
    page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")


def test_nodes_made_of_html(page, shots):
    setting = "() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', %s)"
    page.evaluate(setting % "true")
    try:
        load(page, template("everything", steps=6))
        page.wait_for_timeout(1000)
        before = saved(page)
        run(page)
        assert set(charts(page)) == {"LodestarAPG", "LodestarPAG", "LodestarAutoguidance", "LodestarGuidanceInterval"}
        look(page, shots / "everything_html.png", "LodestarAPG", 0.9)
        assert page.locator(MINE).first.bounding_box()["height"] > 30
        page.wait_for_timeout(500)
        assert saved(page) == before
    finally:
        page.evaluate(setting % "false")


def test_the_stages_of_a_cascade(page, shots):
    load(page, template("frecas"))
    run(page)
    said = " ".join(page.evaluate("() => said"))
    assert "stage 1 of 2" in said and "stage 2 of 2" in said
    told = r"30 steps, the work of [\d.]+ at \d+×\d+, CFG update [\d.]+ %, stage 2 of 2, step 30 of 30, 60 evaluations \(NFE\)"
    assert re.fullmatch(told, charts(page)["LodestarFreCaS"]), charts(page)
    look(page, shots / "frecas.png", "LodestarFreCaS", 1.1)


def test_the_setting_turns_it_off(page, url, shots):
    load(page, template("apg", steps=4))
    run(page)
    natural = page.evaluate("() => app.graph.serialize().nodes.find(node => node.type === 'LodestarAPG').size[1]")
    assert charts(page)
    page.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.get_by_role("dialog").get_by_text("Lodestar", exact=True).first.click()
    switch = page.get_by_role("dialog").get_by_role("switch").first
    switch.wait_for()
    page.screenshot(path=shots / "setting.png")
    switch.click()
    page.wait_for_function("() => !document.querySelector('.lodestar-chart')")
    page.keyboard.press("Escape")
    assert not charts(page)
    assert page.evaluate("() => app.graph.nodes.find(node => node.type === 'LodestarAPG').size[1]") == natural
    page.evaluate("() => { window.heard = 0; app.api.addEventListener('lodestar.run', () => { heard += 1 }) }")
    load(page, template("apg", steps=4))
    run(page)
    assert page.evaluate("() => heard") == 0 and not charts(page)
    page.evaluate("() => app.extensionManager.setting.set('Lodestar.LiveCharts', true)")
    page.wait_for_timeout(500)
    load(page, template("apg", steps=4))
    run(page)
    assert page.evaluate("() => heard") > 0 and charts(page)
