"""Subgraphs that the host offers to everybody: listed by the server, put on the canvas by the front end, run by the server."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workshop import api

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "subgraphs").glob("*.json"))
KNOBS = {  # what a blueprint shows of the nodes inside it
    "Guided KSampler": {
        "seed": 0, "steps": 30, "cfg": 10.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        "norm_threshold": 15.0, "scale": 1.5, "threshold": 0.998,
    },
    "High-resolution Cascade (FreCaS)": {
        "seed": 0, "cfg": 7.5, "sampler": "euler", "scheduler": "normal", "stages": "auto 2048x2048", "high_scale": 35.0,
        "map_weight": 0.6, "batch_size": 1,
    },
}  # fmt: skip
SMALL = {  # settings for the demo model
    "Guided KSampler": {"steps": 6, "norm_threshold": 5.0, "seed": 7, "scale": 1.0},
    "High-resolution Cascade (FreCaS)": {
        "stages": "32x32: 4 steps, end 0.57; 64x64: 2 steps", "high_scale": 8.0, "seed": 7, "batch_size": 2,
    },
}  # fmt: skip

PLACE = """async ([name, settings]) => {
    // the front end's own way: fetch what the host lists, and put it where the canvas is
    const listed = Object.entries(await (await fetch('/api/global_subgraphs')).json()).find(([, entry]) => entry.name === name);
    const data = JSON.parse((await (await fetch('/api/global_subgraphs/' + listed[0])).json()).data);
    const placed = app.canvas._deserializeItems({nodes: data.nodes, subgraphs: data.definitions.subgraphs}, {position: [0, 0]});
    const blueprint = [...placed.nodes.values()][0];
    const shown = Object.fromEntries(blueprint.widgets.map(widget => [widget.name, widget.value]));
    const labels = blueprint.widgets.map(widget => widget.label ?? widget.name);
    for (const [knob, value] of Object.entries(settings)) blueprint.widgets.find(widget => widget.name === knob).value = value;

    // in the place of the KSampler
    const sampler = app.graph.nodes.find(node => node.type === 'KSampler');
    for (const socket of blueprint.inputs) {
        let link = app.graph.links.get(sampler.inputs.find(input => input.name === socket.name)?.link);
        if (socket.name === 'vae') link = app.graph.links.get(app.graph.nodes.find(n => n.type === 'VAEDecode').inputs[1].link);
        if (link) app.graph.getNodeById(link.origin_id).connect(link.origin_slot, blueprint, socket.name);
    }
    const decode = app.graph.nodes.find(node => node.type === 'VAEDecode');
    blueprint.connect(blueprint.outputs.findIndex(output => output.type === 'LATENT'), decode, 'samples');
    app.graph.remove(sampler);
    return [shown, labels, (await app.graphToPrompt()).output];
}"""


def test_the_host_lists_them(url):
    listed = api.Client(url).get_json("/global_subgraphs")
    ours = {entry["name"]: key for key, entry in listed.items() if entry["info"]["node_pack"] == "custom_nodes.lodestar"}
    assert set(ours) == {file.stem for file in FILES} == set(KNOBS)
    for name, key in ours.items():
        data = json.loads(api.Client(url).get_json(f"/global_subgraphs/{key}")["data"])
        assert data == json.loads((ROOT / "subgraphs" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_front_end_offers_them(page):
    """Its own store of blueprints, which the node library and the search show."""
    page.wait_for_function(
        """names => {
            const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s;
            const offered = stores.get('subgraph').subgraphBlueprints.map(node => node.display_name);
            return names.every(name => offered.includes(name));
        }""",
        arg=list(KNOBS),
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_inside_is_what_the_nodes_have(url, file):
    """Every node is known, every widget has a value, every promoted setting is a setting of a node inside."""
    types = api.Client(url).node_types
    whole = json.loads(file.read_text(encoding="utf-8"))
    (outer,), (inner,) = whole["nodes"], whole["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"] and outer["title"] == inner["name"] == file.stem and len(inner["description"]) > 80
    for node in inner["nodes"]:
        names = list(api.widget_names(types[node["type"]]))
        assert len(node["widgets_values"]) == len(names)
        inputs = types[node["type"]]["input"]
        assert {socket["name"] for socket in node["inputs"]} == {*inputs.get("required", {}), *inputs.get("optional", {})}
    promoted = [name for _, name in outer["properties"]["proxyWidgets"] if name != "control_after_generate"]
    assert promoted == list(KNOBS[file.stem])
    assert len(outer["widgets_values"]) == len(outer["properties"]["proxyWidgets"])


@pytest.mark.parametrize("name", KNOBS)
def test_it_runs_in_place_of_a_ksampler(page, url, name):
    page.evaluate("async w => app.loadGraphData(w)", json.loads((ROOT / "workflows" / "demo_model.json").read_text(encoding="utf-8")))
    shown, labels, prompt = page.evaluate(PLACE, [name, SMALL[name]])
    assert {knob: shown[knob] for knob in KNOBS[name]} == KNOBS[name]
    assert len(set(labels)) == len(labels) and labels[0] == "seed" and not any("_" in label for label in labels) and not page.errors

    client = api.Client(url)
    (sampler,) = api.find(prompt, "KSampler", "LodestarFreCaS")
    for knob, value in SMALL[name].items():
        assert value in [node["inputs"].get(knob) for node in prompt.values()], knob
    outputs = client.run(prompt)
    (preview,) = api.find(prompt, "PreviewImage")
    pictures = [np.asarray(Image.open(io.BytesIO(file)), dtype=float) for file in client.images(outputs[preview])]
    assert len(pictures) == (2 if name.startswith("High") else 4) and all(picture.std() > 5 for picture in pictures)
    if name == "Guided KSampler":
        chain, model = [], prompt[sampler]["inputs"]["model"][0]
        while prompt[model]["class_type"] != "LodestarDemoModel":
            chain.append(prompt[model]["class_type"])
            model = prompt[model]["inputs"]["model"][0]
        assert chain == ["LodestarAdaptiveGuidance", "LodestarPAG", "LodestarAPG"]
