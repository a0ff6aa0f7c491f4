"""The server's part of the charts: who gets which messages, and what a page that is loaded again is given."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from workshop.serving import NO_PROXY

ROOT = Path(__file__).parents[2]


def post(url: str, path: str, body: object) -> dict:
    """JSON there and back."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with NO_PROXY.open(request, timeout=60) as answer:
        return json.load(answer)


def prompt(seed: int, *guidance: tuple[str, str, dict], model: str = "1") -> dict:
    """A text-to-latent graph with a chain of guidance nodes (id, class, inputs)."""
    nodes = {
        "1": ("LodestarDemoModel", {"model": "unet", "strength": "weak"}),
        "2": ("CLIPTextEncode", {"clip": ["1", 1], "text": "a large purple star on a cream background"}),
        "3": ("EmptyChromaRadianceLatentImage", {"width": 32, "height": 32, "batch_size": 1}),
    }
    for node_id, kind, inputs in guidance:
        nodes[node_id] = (kind, {"model": [model, 0], **inputs})
        model = node_id
    settings = {"steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    links = {"model": [model, 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]}
    nodes["90"] = ("KSampler", {"seed": seed, **settings, **links})
    nodes["91"] = ("VAEDecode", {"samples": ["90", 0], "vae": ["1", 2]})
    nodes["92"] = ("PreviewImage", {"images": ["91", 0]})
    return {node_id: {"class_type": kind, "inputs": inputs} for node_id, (kind, inputs) in nodes.items()}


seeds = itertools.count(100)
APG_INPUTS = {"eta": 0.0, "norm_threshold": 5.0, "momentum": -0.5, "start_percent": 0.0, "end_percent": 1.0}
INTERVAL_INPUTS = {"start_percent": 0.0, "end_percent": 0.5}


async def heard(url: str, client: str, graph: dict, *others: str, workflow: dict | None = None) -> dict[str, list[dict]]:
    """What a client and others, all connected, hear while the client's prompt runs, by client."""
    import aiohttp

    events: dict[str, list[dict]] = {name: [] for name in (client, *others)}

    async def listen(name: str, socket) -> None:
        async for raw in socket:
            message = json.loads(raw.data) if raw.type == aiohttp.WSMsgType.TEXT else {"type": ""}
            assert message["type"] != "execution_error", message
            if message["type"] == "lodestar.run":
                events[name].append(message["data"])
            if name == client and message["type"] == "executing" and message["data"]["node"] is None:
                return

    async with aiohttp.ClientSession() as session, contextlib.AsyncExitStack() as stack:
        sockets = {name: await stack.enter_async_context(session.ws_connect(f"{url}/ws?clientId={name}")) for name in events}
        tasks = {name: asyncio.create_task(listen(name, sockets[name])) for name in events}
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        async with session.post(f"{url}/prompt", json={"prompt": graph, "client_id": client, "extra_data": extra}) as answer:
            assert answer.status == 200, await answer.text()
        await asyncio.wait_for(tasks[client], 120)
        for name in others:
            tasks[name].cancel()
    return events


def run(url: str, client: str, graph: dict, *others: str, **more) -> dict[str, list[dict]]:
    return asyncio.run(heard(url, client, graph, *others, **more))


def subscribe(url: str, client: str, on: bool = True) -> list[dict]:
    return post(url, "/lodestar/charts", {"client_id": client, "on": on})["runs"]


def test_the_client_that_queued_the_prompt_is_told_and_no_other(url):
    subscribe(url, "a"), subscribe(url, "b")
    graph = prompt(1, ("10", "LodestarAPG", APG_INPUTS), ("11", "LodestarGuidanceInterval", INTERVAL_INPUTS))
    events = run(url, "a", graph, "b", workflow={"id": "w", "nodes": []})
    last = events["a"][-1]
    assert last["done"] and last["step"] == 4
    assert {node: about["type"] for node, about in last["nodes"].items()} == {"10": "LodestarAPG", "11": "LodestarGuidanceInterval"}
    assert last["workflow"] == "w" and last["sampler"] == "90" and last["prompt"]
    assert [event["serial"] for event in events["a"]] == sorted({event["serial"] for event in events["a"]})
    assert events["b"] == []
    assert subscribe(url, "a") == [last]  # what a page that is loaded again needs
    assert subscribe(url, "b") == []


def test_who_has_not_asked_or_has_turned_it_off_is_told_nothing(url):
    graph = prompt(2, ("10", "LodestarAPG", APG_INPUTS))
    assert run(url, "c", graph)["c"] == []
    subscribe(url, "c")
    assert run(url, "c", prompt(3, ("10", "LodestarAPG", APG_INPUTS)))["c"]
    assert subscribe(url, "c", on=False) == []
    assert run(url, "c", prompt(4, ("10", "LodestarAPG", APG_INPUTS)))["c"] == []


def test_a_node_whose_output_is_cached_is_still_told_of(url):
    subscribe(url, "d")
    node = ("10", "LodestarAPG", APG_INPUTS)
    for seed in (5, 6):  # in the second prompt the node does not run again
        assert set(run(url, "d", prompt(seed, node))["d"][-1]["nodes"]) == {"10"}


def test_the_same_node_under_another_id_is_told_of_under_that_id(url):
    subscribe(url, "e")
    for seed, node_id in ((7, "10"), (8, "12"), (9, "3:14")):  # as in a subgraph
        graph = prompt(seed, (node_id, "LodestarAPG", APG_INPUTS))
        assert set(run(url, "e", graph)["e"][-1]["nodes"]) == {node_id}


def test_two_samplers_on_two_branches(url):
    subscribe(url, "f")
    graph = prompt(10, ("10", "LodestarAPG", APG_INPUTS))
    graph |= {"20": {"class_type": "LodestarGuidanceInterval", "inputs": {"model": ["10", 0], **INTERVAL_INPUTS}}}
    second = graph["90"]["inputs"] | {"model": ["20", 0], "latent_image": ["90", 0], "denoise": 0.5}
    graph |= {"95": {"class_type": "KSampler", "inputs": second}, "96": {"class_type": "PreviewAny", "inputs": {"source": ["95", 0]}}}
    last = {event["sampler"]: event for event in run(url, "f", graph)["f"]}
    assert {sampler: set(event["nodes"]) for sampler, event in last.items()} == {"90": {"10"}, "95": {"10", "20"}}
    assert len(subscribe(url, "f")) == 2


def test_a_node_that_samples_several_models(url):
    """Each model's run is told of; the next prompt's runs take their places."""
    subscribe(url, "i")
    for seed in (20, 21):
        graph = prompt(seed, ("10", "LodestarAPG", APG_INPUTS))
        settings = graph.pop("90")["inputs"]
        other = {"class_type": "LodestarGuidanceInterval", "inputs": {"model": ["1", 0], **INTERVAL_INPUTS}}
        models = {"models.model0": settings.pop("model"), "models.model1": ["20", 0]}
        compare = {"class_type": "LodestarCompare", "inputs": settings | models | {"vae": ["1", 2], "labels": ""}}
        shown = {"class_type": "PreviewImage", "inputs": {"images": ["30", 0]}}
        graph = {node: graph[node] for node in ("1", "2", "3", "10")} | {"20": other, "30": compare, "31": shown}
        last = {event["prompt"]: event for event in run(url, "i", graph)["i"]}
        kept = subscribe(url, "i")
        assert [set(message["nodes"]) for message in kept] == [{"10"}, {"20"}]
        assert {message["prompt"] for message in kept} == set(last) and all(message["done"] for message in kept)


def test_a_cascade_node(url):
    subscribe(url, "g")
    inputs = {
        "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "vae": ["1", 2], "seed": 1, "cfg": 4.0, "sampler": "euler",
        "scheduler": "normal", "stages": "16x16: 3 steps, end 0.57; 32x32: 2 steps", "gamma": -1.0, "high_scale": 8.0, "map_weight": 0.0,
        "resize": "nearest", "batch_size": 1,
    }  # fmt: skip
    graph = {node: prompt(11)[node] for node in "12"} | {
        "30": {"class_type": "LodestarFreCaS", "inputs": inputs},
        "31": {"class_type": "PreviewAny", "inputs": {"source": ["30", 0]}},
    }
    events = run(url, "g", graph)["g"]
    assert events[-1]["sampler"] == "30" and set(events[-1]["nodes"]) == {"30"} and events[-1]["step"] == 5
    assert {event["stage"] for event in events} == {0, 1}


def test_an_inversion_and_the_sampler_that_follows(url):
    """On a model without guidance nodes: each tells of itself, under its own node's id."""
    subscribe(url, "j")
    model, text, latent = ["1", 0], ["2", 0], ["91", 0]
    both = {"model": model, "positive": text, "negative": text}
    graph = {node: prompt(next(seeds))[node] for node in "123"} | {
        "90": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "91": {"class_type": "VAEEncode", "inputs": {"pixels": ["90", 0], "vae": ["1", 2]}},
        "92": {"class_type": "BasicScheduler", "inputs": {"model": model, "scheduler": "normal", "steps": 3, "denoise": 1.0}},
        "30": {"class_type": "LodestarCFGPPInvert", "inputs": {**both, "latent_image": latent, "sigmas": ["92", 0], "lambda_": 0.6}},
        "31": {"class_type": "LodestarCFGPP", "inputs": {"sampler": "euler", "lambda_": 0.6, "eta": 1.0, "history": "unconditional"}},
        "32": {
            "class_type": "SamplerCustom",
            "inputs": {
                **both, "add_noise": False, "noise_seed": 0, "cfg": 1.0, "sampler": ["31", 0], "sigmas": ["30", 1],
                "latent_image": ["30", 0],
            },
        },
        "33": {"class_type": "PreviewAny", "inputs": {"source": ["32", 0]}},
    }  # fmt: skip
    last = {event["sampler"]: event for event in run(url, "j", graph)["j"]}
    told = {sampler: {node: (about["type"], about["kind"]) for node, about in event["nodes"].items()} for sampler, event in last.items()}
    assert told == {"30": {"30": ("LodestarCFGPPInvert", "noise")}, "32": {"31": ("LodestarCFGPP", "weight")}}
    assert all(event["done"] and event["step"] == 3 for event in last.values())


def chart_texts(language: str) -> dict[str, str]:
    return json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["lodestarCharts"]


def test_every_text_of_the_charts_is_there_in_every_language():
    """What js/ asks for by a fixed key is there, and placeholders are the same in all languages."""
    english, chinese = chart_texts("en"), chart_texts("zh")
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", chinese[key])), key
    scripts = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "js").glob("*.js"))
    asked = set(re.findall(r"""say\((?:run\.done \? )?"(\w+)\"""", scripts))
    assert len(asked) > 20 and asked <= set(english)


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_a_template_has_no_id(path):
    """The front end gives every graph that it opens one. With that of the file, it would show the charts of another copy."""
    assert "id" not in json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("workflow", [None, "text", [], {"nodes": []}, {"id": 3}])
def test_a_client_may_send_any_workflow_or_none(url, workflow):
    subscribe(url, "h")
    graph = prompt(next(seeds), ("10", "LodestarAPG", APG_INPUTS))
    assert run(url, "h", graph, workflow=workflow)["h"][-1]["step"] == 4


@pytest.mark.parametrize("body", [{}, {"client_id": ""}, {"client_id": 3, "on": True}, [], "on"])
def test_a_request_without_a_client_is_refused(url, body):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        post(url, "/lodestar/charts", body)
    refusal.value.close()
    assert refusal.value.code == 400
