"""Every workflow file on the host's real server, over HTTP."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from workshop import api, stand_in
from workshop.serving import server

WORKFLOWS = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))
NEED_FILES = (  # of models
    "flux_apg", "sd3_adaptive_guidance", "sdxl_apg_pag", "sdxl_cfgpp", "sdxl_compare", "sdxl_frecas", "sdxl_restoration",
)  # fmt: skip
GRIDS = ("compare", "sdxl_compare")  # all pictures in one
NODES = (
    "LodestarAPG",
    "LodestarPAG",
    "LodestarAutoguidance",
    "LodestarGuidanceInterval",
    "LodestarAdaptiveGuidance",
    "LodestarLinearAGFit",
    "LodestarLinearAG",
    "LodestarSaveCoefficients",
    "LodestarLoadCoefficients",
    "LodestarPolicySearch",
    "LodestarGuidancePolicy",
    "LodestarSavePolicy",
    "LodestarLoadPolicy",
    "LodestarCFGPP",
    "LodestarCFGPPInvert",
    "LodestarFrequencyGuidance",
    "LodestarFreCaS",
    "LodestarStageTransition",
    "LodestarMeasure",
    "LodestarMeasurement",
    "LodestarRestoration",
    "LodestarReport",
    "LodestarCompare",
    "LodestarDemoModel",
)


@pytest.fixture(scope="module")
def client():
    """A client of one server for all tests here."""
    with server() as url:
        yield api.Client(url)


def read(path):
    """A workflow file."""
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_server_has_all_nodes(client):
    assert set(NODES) <= set(client.node_types)


def test_every_node_has_a_workflow():
    shown = {node["type"] for path in WORKFLOWS for node in read(path)["nodes"]}
    assert set(NODES) <= shown


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_makes_a_picture(client, path):
    workflow = read(path)
    prompt = api.to_prompt(workflow, client.node_types)
    if path.stem in NEED_FILES:
        stand_in.stand_in(prompt, batch=4, steps=2)
    outputs = client.run(prompt)

    previews = api.find(prompt, "PreviewImage")
    assert previews
    for node_id in previews:
        for file in client.images(outputs[node_id]):
            pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.float64)
            assert pixels.std() > 5
    pictures = client.images(outputs[previews[0]])
    assert len(set(pictures)) == len(pictures) == (1 if path.stem in GRIDS else 4)
    for node_id in api.find(prompt, "PreviewAny"):
        (text,) = outputs[node_id]["text"]
        assert "NFE" in text


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_complete(client, path):
    """Each widget has a value, seeds stay fixed, a note explains, there is a thumbnail."""
    nodes = read(path)["nodes"]
    assert "MarkdownNote" in {node["type"] for node in nodes}
    assert path.with_suffix(".jpg").stat().st_size < 100_000
    for node in nodes:
        if node["type"] == "MarkdownNote":
            continue
        names = list(api.widget_names(client.node_types[node["type"]]))
        assert len(node.get("widgets_values") or ()) >= len(names), node["type"]
        if "" in names:
            assert node["widgets_values"][names.index("")] == "fixed"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_ends_in_previews(client, path):
    """Everything that is made is shown or saved."""
    workflow = read(path)
    used = {link[1] for link in workflow["links"]}
    ends = [node for node in workflow["nodes"] if node["id"] not in used and node["type"] != "MarkdownNote" and node["mode"] == 0]
    assert all(client.node_types[node["type"]]["output_node"] for node in ends)
    assert "PreviewImage" in [node["type"] for node in ends]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_values_are_those_the_host_allows(client, path):
    """Names of the users' own files are left to them, and a note says which."""
    workflow = read(path)
    prompt = api.to_prompt(workflow, client.node_types)
    files = []
    for node in prompt.values():
        groups = client.node_types[node["class_type"]]["input"]
        specs = {**groups.get("required", {}), **groups.get("optional", {})}
        for name, value in node["inputs"].items():
            if isinstance(value, list) or name.partition(".")[0] != name:
                continue
            kind, config = specs[name][0], (specs[name][1:] or [{}])[0]
            options = kind if isinstance(kind, list) else config.get("options")
            if node["class_type"] in stand_in.LOADERS and "_name" in name:
                files.append(value)
            elif options is not None:
                assert value in options, (name, value)
            elif kind in ("INT", "FLOAT"):
                assert config["min"] <= value <= config["max"], (name, value)
    assert stand_in.needs_files(prompt) == bool(files) == (path.stem in NEED_FILES)
    assert set(files) <= {""}
    if files:
        (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
        assert note["title"].endswith(("needs a checkpoint", "needs model files"))
        assert "**Choose " in note["widgets_values"][0] and ".safetensors`" in note["widgets_values"][0]


@pytest.mark.slow
def test_a_picture_of_ones_own_is_edited(client):
    """The editing template with Load Image in the place of the pictures it makes: another colour, and all else as it was."""
    import torch

    from lodestar.demo import classifier, shapes

    def scene(colour):
        objects = torch.tensor([[[1, shapes.COLOURS.index(colour), shapes.SHAPES.index("disc")], [0, 0, 0]]])
        return shapes.Scenes(objects, torch.tensor([shapes.BACKGROUNDS.index("grey")]), torch.tensor([-1]))

    picture = shapes.draw(scene("red"), torch.Generator().manual_seed(2))
    Image.fromarray((picture[0].movedim(0, -1) * 255).byte().numpy()).save(client.url.base / "input" / "disc.png")
    workflow = read(next(path for path in WORKFLOWS if path.stem == "cfgpp_edit"))
    for node in workflow["nodes"]:
        if node["type"] == "LoadImage":
            node.update(mode=0, widgets_values=["disc.png", "image"])
            load = str(node["id"])
    prompt = api.to_prompt(workflow, client.node_types)
    (encode,) = api.find(prompt, "VAEEncode")
    prompt[encode]["inputs"]["pixels"] = [load, 0]
    (inversion,) = api.find(prompt, "LodestarCFGPPInvert")
    (sampler,) = api.find(prompt, "SamplerCustom")
    (decoded,) = (i for i in api.find(prompt, "VAEDecode") if prompt[i]["inputs"]["samples"][0] == sampler)
    assert prompt[prompt[inversion]["inputs"]["positive"][0]]["inputs"]["text"] == "a large red disc on a grey background"
    shown = api.add(prompt, "PreviewImage", images=[decoded, 0])
    (file,) = client.images(client.run(api.keep_only(prompt, [shown]))[shown])
    pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    edited = torch.from_numpy(pixels.copy()).movedim(-1, 0)[None] / 255
    found = classifier.correct(classifier.load_classifier()(edited), scene("blue"))
    assert {name: bool(right) for name, right in found.items()} == dict.fromkeys(found, True)
    assert (edited - picture)[..., :3].abs().mean() < 0.03 and (edited - picture).abs().max() > 0.3


def test_templates_are_offered(client):
    assert sorted(client.get_json("/api/workflow_templates")["lodestar"]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert json.loads(client.get(f"/api/workflow_templates/lodestar/{path.name}")) == read(path)
        assert client.get(f"/api/workflow_templates/lodestar/{path.stem}.jpg")[:3] == b"\xff\xd8\xff"


def test_a_wrong_word_is_one_sentence(client):
    prompt = api.to_prompt(read(WORKFLOWS[0]), client.node_types)
    (sampler,) = api.find(prompt, "KSampler")
    prompt[prompt[sampler]["inputs"]["positive"][0]]["inputs"]["text"] = "a large purple zebra"
    with pytest.raises(api.PromptError, match=r"CLIPTextEncode: The demo model does not know 'zebra'; it knows: a, small, .*\.$"):
        client.run(prompt)


def test_a_prompt_the_server_refuses(client):
    prompt = api.to_prompt(read(WORKFLOWS[0]), client.node_types)
    prompt[api.find(prompt, "KSampler")[0]]["inputs"]["sampler_name"] = "none such"
    with pytest.raises(api.PromptError, match=r"KSampler: Value not in list"):
        client.queue(prompt)


# ------------------------------------------------------------------------------------------------- workflow conversion

NODE_TYPES = {
    "Load": {"input": {"required": {"name": ["COMBO", {}]}}},
    "Patch": {"input": {"required": {"model": ["MODEL"], "on": ["BOOLEAN", {}]}, "optional": {"other": ["MODEL"], "x": ["FLOAT", {}]}}},
    "Sample": {"input": {"required": {"model": ["MODEL"], "seed": ["INT", {"control_after_generate": True}], "kind": [["a", "b"], {}]}}},
}


def small_workflow(mode=0, values=(True, 0.5)):
    """Load -> Patch -> Sample and a note."""
    return {
        "nodes": [
            {"id": 1, "type": "Load", "mode": 0, "inputs": [], "outputs": [{"type": "MODEL"}], "widgets_values": ["m"]},
            {
                "id": 2, "type": "Patch", "mode": mode, "outputs": [{"type": "MODEL"}], "widgets_values": list(values),
                "inputs": [{"name": "model", "type": "MODEL", "link": 10}, {"name": "other", "type": "MODEL", "link": None}],
            },
            {"id": 3, "type": "Sample", "mode": 0, "outputs": [], "widgets_values": [7, "fixed", "a"],
             "inputs": [{"name": "model", "type": "MODEL", "link": 11}]},
            {"id": 4, "type": "MarkdownNote", "mode": 0, "inputs": [], "outputs": [], "widgets_values": ["about"]},
        ],
        "links": [[10, 1, 0, 2, 0, "MODEL"], [11, 2, 0, 3, 0, "MODEL"]],
    }  # fmt: skip


def test_conversion():
    assert api.to_prompt(small_workflow(), NODE_TYPES) == {
        "1": {"class_type": "Load", "inputs": {"name": "m"}},
        "2": {"class_type": "Patch", "inputs": {"on": True, "x": 0.5, "model": ["1", 0]}},
        "3": {"class_type": "Sample", "inputs": {"seed": 7, "kind": "a", "model": ["2", 0]}},
    }


def test_conversion_of_a_file_older_than_an_input():
    assert "x" not in api.to_prompt(small_workflow(values=[True]), NODE_TYPES)["2"]["inputs"]


def test_links_pass_bypassed_nodes_and_end_at_muted_ones():
    assert api.to_prompt(small_workflow(api.BYPASSED), NODE_TYPES)["3"]["inputs"]["model"] == ["1", 0]
    assert "model" not in api.to_prompt(small_workflow(api.MUTED), NODE_TYPES)["3"]["inputs"]


def test_unknown_nodes_are_named():
    with pytest.raises(api.PromptError, match="no node Patch"):
        api.to_prompt(small_workflow(), {key: value for key, value in NODE_TYPES.items() if key != "Patch"})


def test_keep_only():
    prompt = api.to_prompt(small_workflow(), NODE_TYPES)
    assert set(api.keep_only(prompt, ["2"])) == {"1", "2"}
    assert api.add(prompt, "Load", name="n") == "4"
