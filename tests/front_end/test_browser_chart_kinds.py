"""Every chart in the real front end: what it says, where it is drawn, and pictures of all in both renderers, light and dark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chart_messages import EVERY, message

PACK = Path(__file__).parents[2]
TEXTS = {language: json.loads((PACK / "locales" / language / "main.json").read_text(encoding="utf-8")) for language in ("en", "zh")}


def show(page, kinds) -> None:
    """A graph with a node of each kind, in columns, and its message as if it had come from the server."""
    page.evaluate(
        """async kinds => {
            await app.loadGraphData({version: 0.4, nodes: [], links: [], groups: [], last_node_id: 0, last_link_id: 0});
            const feet = [40, 40, 40, 40];
            for (const [type, message] of kinds) {
                const node = LiteGraph.createNode(type);
                app.graph.add(node);
                const column = feet.indexOf(Math.min(...feet));
                node.pos = [40 + column * 390, feet[column]];
                node.setSize([360, node.size[1]]);
                feet[column] += node.size[1] + 170;
                const [curve] = Object.values(message.nodes);
                const about = {...message, prompt: `${node.id}`, sampler: `${node.id}`, workflow: app.graph.id};
                const told = {...about, nodes: {[node.id]: {type, ...curve}}};
                app.api.dispatchCustomEvent('lodestar.run', told);
            }
            app.extensionManager.workflow.activeWorkflow.changeTracker.checkState();
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [40, 90];
            app.canvas.setDirty(true, true);
        }""",
        [[kind, told] for kind, told, _ in kinds],
    )
    page.wait_for_timeout(500)


def said(page) -> dict[str, str]:
    """What the charts of the open graph say, by the type of their node."""
    return page.evaluate(
        """() => Object.fromEntries(app.graph.nodes.flatMap(node => (node.widgets ?? [])
            .filter(widget => widget.name === 'lodestar_chart')
            .map(widget => [node.type, widget.element.querySelector('canvas').ariaLabel])))"""
    )


def settle(page, setting: str, value) -> None:
    page.evaluate("async ([id, value]) => { await app.extensionManager.setting.set(id, value) }", [setting, value])
    page.wait_for_timeout(800)


def painted(page) -> tuple[list[int], list[str]]:
    """The background and the colours of the first chart."""
    return page.evaluate(
        """selector => {
            const canvas = document.querySelector(selector);
            const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            const ink = new Set();
            for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) ink.add(data.slice(i, i + 3).join());
            return [getComputedStyle(canvas.parentElement).backgroundColor.match(/\\d+/g).map(Number), [...ink]];
        }""",
        ".lodestar-chart canvas[aria-label]",
    )


@pytest.fixture(autouse=True)
def no_errors(page):
    """Whatever a test does, the page throws nothing."""
    page.errors.clear()
    page.set_viewport_size({"width": 1720, "height": 1300})
    yield
    assert not page.errors


def test_every_chart_says_what_its_node_did(page, shots):
    """Also after a change of theme, of renderer and of language."""
    show(page, EVERY.values())
    expected = {kind: begins for kind, _, begins in EVERY.values()}
    heard = said(page)
    assert {kind: heard[kind][: len(begins)] for kind, begins in expected.items()} == expected
    for renderer in ("classic", "nodes2"):
        settle(page, "Comfy.VueNodes.Enabled", renderer == "nodes2")
        for palette in ("dark", "light"):
            settle(page, "Comfy.ColorPalette", palette)
            page.screenshot(path=shots / f"charts_{renderer}_{palette}.png")
            assert said(page) == heard
            paper, ink = painted(page)
            assert (max(paper) < 100 and "116,182,245" in ink) if palette == "dark" else (min(paper) > 150 and "31,95,168" in ink)
    settle(page, "Comfy.VueNodes.Enabled", False)
    settle(page, "Comfy.ColorPalette", "dark")
    settle(page, "Comfy.Locale", "zh")  # which loads the graph anew
    page.wait_for_selector(".lodestar-chart canvas[aria-label*='CFG 在第 11 步结束（共 20 步），节省 9 次评估，余弦 0.9893']")
    page.screenshot(path=shots / "charts_chinese.png")
    settle(page, "Comfy.Locale", "en")
    page.wait_for_selector(".lodestar-chart canvas[aria-label*='CFG ended at step 11']")
    assert said(page) == heard


def words(page, told: dict) -> str:
    """What a chart would say."""
    return page.evaluate(
        """async told => {
            const names = performance.getEntriesByType('resource').map(({name}) => name);
            const {describe} = await import(names.find(name => name.endsWith('/chart_words.js')));
            return describe(told, Object.values(told.nodes)[0]);
        }""",
        told,
    )


def adaptive(*steps, **about) -> dict:
    node = {"role": "policy", "kind": "cosine", "points": [[0, 0.9], [1, 0.95]], "switch": {"threshold": 0.99, "steps": list(steps)}}
    return message(node, **about)


def policy(*acted, **about) -> dict:
    return message({"role": "policy", "kind": "update", "points": [[step, 0.5] for step in acted], "predicted": []}, **about)


def shaper(values, plain) -> dict:
    return message({"role": "shaper", "kind": "update", "points": values, "plain": plain})


@pytest.mark.parametrize(
    ("told", "begins"),
    [
        (adaptive(None, done=False, step=3), "CFG in every step so far, cosine 0.95, threshold 0.99, step 3 of 20"),
        (adaptive(None), "CFG in every step: threshold not reached,"),
        (adaptive(9, 9), "CFG ended at step 9 of 20,"),
        (adaptive(9, 12, saved=19, nfe=21), "CFG ended at steps 9 to 12 of 20, 19 evaluations saved,"),
        (adaptive(9, None, saved=1, nfe=39), "CFG ended for 1 of 2 pictures, 1 evaluation saved,"),
        (adaptive(9, saved=8.25, nfe=31.75), "CFG ended at step 9 of 20, 8.25 evaluations saved,"),
        (policy(*range(20)), "CFG in every step,"),
        (policy(*range(5), step=5, done=False), "CFG in every step so far,"),
        (policy(0, 1, 2, 7), "CFG in 4 of 20 steps,"),
        (policy(), "Did nothing in this run,"),
        (policy(done=False, step=1), "Nothing so far,"),
        (shaper([[0, 0.5], [1, None]], [[0, 1.0], [1, 2.0]]), "Shrank CFG's update to 50 %, CFG alone 200 %,"),
        (shaper([[0, 0.5]], [[0, 0.501]]), "Left CFG's update at its size,"),
        (shaper([[0, 0.123]], []), "Added up to 12 % of the image,"),
        (shaper([[0, 0.0]], [[0, 0.1]]), "No effect:"),
    ],
)  # fmt: skip
def test_words(page, told, begins):
    assert words(page, told).startswith(begins)


def test_a_chart_belongs_to_a_node_type_and_a_graph(page):
    """Messages about another graph, or about a node of another type with the same id, are not shown; a new copy of a graph has none."""
    kind, told, _ = EVERY["shaper"]
    show(page, [EVERY["shaper"]])
    assert set(said(page)) == {kind}
    show(page, [])
    tell = """([told, change]) => {
        const node = LiteGraph.createNode('LodestarAPG');
        app.graph.clear();
        app.graph.add(node);
        const [curve] = Object.values(told.nodes);
        const mine = {...told, workflow: app.graph.id, type: 'LodestarAPG', ...change};
        app.api.dispatchCustomEvent('lodestar.run', {...mine, nodes: {[node.id]: {...curve, type: mine.type}}});
    }"""
    for change in ({"workflow": "another"}, {"workflow": None}, {"type": "LodestarPAG"}, {"type": None}):
        page.evaluate(tell, [told, change])
        assert not said(page), change
    page.evaluate(tell, [told, {}])
    assert set(said(page)) == {kind}
    template = json.loads((PACK / "workflows" / "apg.json").read_text(encoding="utf-8"))
    ids = []
    for _ in range(2):
        page.evaluate("async w => { await app.loadGraphData(w, true, true, 'apg') }", template)
        ids.append(page.evaluate("() => app.graph.id"))
        assert not said(page)
        page.evaluate(
            """told => {
                const node = app.graph.nodes.find(node => node.type === 'LodestarAPG');
                const [curve] = Object.values(told.nodes);
                const nodes = {[node.id]: {...curve, type: node.type}};
                app.api.dispatchCustomEvent('lodestar.run', {...told, workflow: app.graph.id, nodes});
            }""",
            told,
        )
        assert set(said(page)) == {kind}
    assert ids[0] != ids[1]


def ink(page, told: dict, width: int) -> dict:
    """Draw a message on a canvas, and tell which texts lie within the plot, or reach over the edge."""
    return page.evaluate(
        """async ([told, width]) => {
            const names = performance.getEntriesByType('resource').map(({name}) => name);
            const {draw} = await import(names.find(name => name.endsWith('/chart_drawing.js')));
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [width, 92];
            const pen = canvas.getContext('2d');
            const texts = [], lines = [];
            const fillText = pen.fillText.bind(pen), rect = pen.rect.bind(pen);
            pen.fillText = (text, x, y, most) => {
                const size = pen.measureText(text), wide = Math.min(size.width, most ?? Infinity);
                const left = {left: x, right: x - wide, center: x - wide / 2}[pen.textAlign];
                texts.push([text, left, y - size.actualBoundingBoxAscent, left + wide, y + size.actualBoundingBoxDescent]);
                fillText(text, x, y, most);
            };
            pen.rect = (x, y, w, h) => { lines.push([x, y + 2, x + w, y + h - 2]); rect(x, y, w, h); };
            const colours = Object.fromEntries(['paper', 'ink', 'soft', 'grid', 'curve', 'mark', 'bar'].map(name => [name, '#888']));
            draw(pen, width, 92, told, Object.values(told.nodes)[0], colours);
            const [plot] = lines;
            const over = texts.filter(([, l, t, r, b]) => l < -0.5 || t < -0.5 || r > width + 0.5 || b > 92.5);
            const within = texts.filter(([, l, t, r, b]) => r > plot[0] + 1 && l < plot[2] && b > plot[1] + 1 && t < plot[3] - 1);
            const clash = texts.filter((one, i) => texts.slice(i + 1).some(two =>
                one[3] > two[1] + 0.5 && two[3] > one[1] + 0.5 && one[4] > two[2] + 0.5 && two[4] > one[2] + 0.5));
            return {plot, over, within, clash, count: texts.length};
        }""",
        [told, width],
    )


@pytest.mark.parametrize("width", [190, 330])
def test_no_label_lies_on_a_curve_or_on_another(page, width):
    for name, (_, told, _) in EVERY.items():
        drawn = ink(page, told, width)
        assert drawn["count"] >= 5, name
        assert (drawn["over"], drawn["within"], drawn["clash"]) == ([], [], []), name
        left, top, right, bottom = drawn["plot"]
        assert right - left > 0.75 * width and bottom - top >= 30, name


def test_texts_are_those_of_the_locale_files(page):
    given = page.evaluate("async () => await (await app.api.fetchApi('/i18n')).json()")
    for language, texts in TEXTS.items():
        assert given[language]["lodestarCharts"] == texts["lodestarCharts"]
    assert given["zh"]["settings"]["Lodestar_LiveCharts"]["name"]
