"""What runs tell while they go on: nothing to nobody, the truth to a listener, and never another picture."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import urllib.error
import urllib.request

import pytest
import tools
import torch
from frecas_tools import pixels, text
from frecas_tools import sample as sample_cascade
from tools import attach, log_of, tiny

from lodestar.guiders.cfgpp.sampler import cfgpp_sampler
from lodestar.guiders.engine import curves, telemetry
from lodestar.guiders.engine import run as run_module
from lodestar.guiders.engine.plan import GuidancePlan
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.policies.interval import GuidanceInterval
from lodestar.guiders.shapers.apg import APG
from workshop.serving import NO_PROXY

KINDS = ["unet", "unet_v", "mmdit"]


class Listener:
    """Keeps what it is told, as the page gets it."""

    def __init__(self) -> None:
        self.here, self.messages = True, []

    def present(self) -> bool:
        return self.here

    def send(self, message) -> None:
        self.messages.append(json.loads(json.dumps(message, allow_nan=False)))


@pytest.fixture
def listener(monkeypatch):
    """Somebody who wants to know about every evaluation."""
    monkeypatch.setattr(telemetry, "PERIOD", 0.0)
    heard = Listener()
    telemetry.connect(lambda: heard)
    yield heard
    telemetry.connect(None)


def guided(model, *rules):
    """The model with rules that come from the nodes "1", "2" and so on."""
    for number, rule in enumerate(rules, 1):
        model = attach(model, rule, str(number))
    return model


def ag(threshold: float, **more) -> AdaptiveGuidance:
    return AdaptiveGuidance(threshold=threshold, **more)


# --- nobody listens --------------------------------------------------------------------------------------------------


def test_without_a_listener_nothing_is_computed(monkeypatch):
    calls = []
    for owner, name in ((run_module.Run, "log_so_far"), (curves.Curves, "collect_ready"), (telemetry, "Telemetry"), (telemetry, "joined")):
        monkeypatch.setattr(owner, name, lambda *_, name=name: calls.append(name))
    asked = []
    telemetry.connect(lambda: asked.append(1))
    try:
        tools.sample(guided(tiny("unet"), APG(), ag(0.9)), steps=5)
    finally:
        telemetry.connect(None)
    assert asked == [1]  # once per sampling call, whatever the number of its steps
    assert calls == []


def test_somebody_who_left_before_the_start_is_told_nothing(listener, monkeypatch):
    listener.here = False
    monkeypatch.setattr(curves.Curves, "collect_ready", lambda _: pytest.fail("read for nobody"))
    tools.sample(guided(tiny("unet"), APG()))
    assert not listener.messages


def test_nobody_is_asked_about_plans_that_show_nothing(monkeypatch):
    monkeypatch.setattr(telemetry, "_find_listener", lambda: pytest.fail("there is nothing to show"))
    model = tiny("unet")
    tools.sample(attach(model))
    tools.sample(tools.guided(model, APG()))  # from no node
    tools.sample(guided(model, *tools.neutral_rules("unet"), ag(1.001), GuidanceInterval()))


# --- somebody listens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_is_the_same_bit_for_bit(kind, listener):
    model = tiny(kind)
    rules = [*tools.all_rules(kind), ag(0.99), GuidanceInterval(end_percent=0.8)]
    plain, watched = tools.guided(model, *rules), guided(model, *rules)
    for sampler in ("euler", "heun", "dpmpp_2m_sde"):
        without = tools.sample(plain, sampler=sampler)
        listener.messages.clear()
        assert tools.sample(watched, sampler=sampler).equal(without)
        assert len(listener.messages) > 5


def test_messages_lead_up_to_the_log(listener):
    main = guided(tiny("unet"), APG(), tools.pag(tiny("unet")), tools.neutral_rules("unet")[2])
    tools.sample(main, steps=6)
    *on_the_way, last = listener.messages
    assert [message["step"] for message in on_the_way] == [1, 2, 3, 4, 5, 6]
    assert [message["nfe"] for message in on_the_way] == [3, 6, 9, 12, 15, 18]
    assert not any(message["done"] for message in on_the_way) and last["done"]
    log = log_of(main)
    assert (last["step"], last["steps"], last["nfe"], last["saved"]) == (6, 6, log.nfe, 0)
    assert set(last["nodes"]) == {"1", "2"}  # the third one is neutral
    for node, name in (("1", APG.name), ("2", "Perturbed-Attention Guidance (PAG)")):
        curve = last["nodes"][node]
        assert (curve["curve"], curve["kind"]) == (name, "update") and not curve["policy"] and "switch" not in curve
        assert dict(curve["points"]) == pytest.approx(tools.curves_of(log)[name], rel=1e-4)
        for number, message in enumerate(on_the_way, 1):
            assert message["nodes"][node]["points"] == curve["points"][:number]  # whole series: what was missed does not matter


def test_two_nodes_of_a_kind_have_curves_of_their_own(listener):
    main = guided(tiny("unet"), tools.pag(tiny("unet"), 1.0), tools.pag(tiny("unet"), 4.0))
    tools.sample(main, steps=3)
    one, two = (listener.messages[-1]["nodes"][node]["points"] for node in "12")
    assert all(a[1] < b[1] for a, b in zip(one, two, strict=True))


def test_branches_of_a_graph_tell_of_their_own_rules(listener):
    trunk = guided(tiny("unet"), APG())
    left, right = attach(trunk, tools.pag(trunk), "7"), attach(trunk, ag(-1.0), "8")
    for model, nodes in ((left, {"1", "7"}), (right, {"1", "8"}), (trunk, {"1"}), (left, {"1", "7"})):
        listener.messages.clear()
        tools.sample(model, steps=2)
        assert {node for message in listener.messages for node in message["nodes"]} == nodes


@pytest.mark.parametrize("switch", ["next_step", "same_step"])
def test_the_switch_of_adaptive_guidance(listener, switch):
    main = guided(tiny("unet"), ag(0.99, switch=switch))
    tools.sample(main, steps=8, latent=tools.empty_latent(main, 3))
    log = log_of(main)
    steps = list(log.switches[AdaptiveGuidance.name].steps)
    last = listener.messages[-1]
    assert last["nodes"]["1"]["switch"] == {"threshold": 0.99, "steps": steps}
    assert last["nodes"]["1"]["kind"] == "cosine"
    assert last["nodes"]["1"]["policy"] and last["saved"] == pytest.approx(log.saved, abs=0.01) and last["saved"] > 0
    for message in listener.messages:  # every picture's switch is known from the step on in which it happens
        told = message["nodes"]["1"]["switch"]["steps"] or [None] * 3
        assert told == [step if step is not None and step < message["step"] else None for step in steps]


def test_an_interval_shows_where_cfg_acts(listener):
    main = guided(tiny("unet"), GuidanceInterval(start_percent=0.3, end_percent=0.7))
    tools.sample(main, steps=8)
    last = listener.messages[-1]
    inside = [step for step, _ in last["nodes"]["1"]["points"]]
    assert inside and inside == list(range(inside[0], inside[-1] + 1)) and len(inside) < 8
    assert last["evaluations"] == [[step, 1 + (step in inside)] for step in range(8)]
    assert last["saved"] == 8 - len(inside)


def test_messages_keep_their_distance(listener, monkeypatch):
    now = iter(0.1 * number for number in range(1000))
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(telemetry, "PERIOD", 0.25)
    reads = []
    monkeypatch.setattr(
        curves.Curves, "collect_ready", lambda self, original=curves.Curves.collect_ready: reads.append(1) or original(self)
    )
    tools.sample(guided(tiny("unet"), APG()), steps=9)
    assert [message["step"] for message in listener.messages] == [1, 4, 7, 9]
    assert len(reads) == 3  # the last message has the values that the run reads anyway


def test_a_page_that_is_loaded_again_gets_the_end(listener):
    present = iter([True, False, False, False, False])
    listener.present = lambda: next(present)
    tools.sample(guided(tiny("unet"), APG()), steps=4)
    assert [(message["step"], message["done"]) for message in listener.messages] == [(1, False), (4, True)]


def test_values_that_are_not_finite_are_gaps():
    assert telemetry._points({0: 1.0, 1: math.nan, 2: math.inf, 3: 0.1234567}) == [(0, 1.0), (1, None), (2, None), (3, 0.12346)]


def test_an_interrupted_run_ends_what_it_told(listener):
    def stop(step, *_) -> None:
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tools.sample(guided(tiny("unet"), APG()), steps=6, callback=stop)
    assert listener.messages[-1]["done"] and listener.messages[-1]["step"] == 2


def test_a_plan_forgets_no_node():
    plan = GuidancePlan().plus(APG(), "1").plus(APG()).plus(APG(), "3")
    assert [entry.node for entry in plan.entries] == ["1", None, "3"] and len(plan.rules) == 3


# --- the cascade -----------------------------------------------------------------------------------------------------


def test_a_cascade_tells_of_its_stages_as_of_one_run(listener):
    model = guided(pixels("unet"), APG(eta=0.5))
    plain = sample_cascade(tools.guided(pixels("unet"), APG(eta=0.5)), text("unet"), map_weight=0.6, high_scale=4.0)
    assert sample_cascade(model, text("unet"), map_weight=0.6, high_scale=4.0, node="9")[-1].equal(plain[-1])
    assert [message["stage"] for message in listener.messages] == [0] * 5 + [1] * 4  # each stage's steps, and its end
    assert [message["step"] for message in listener.messages] == [1, 2, 3, 4, 4, 5, 6, 7, 7]
    assert [message["done"] for message in listener.messages] == [False] * 8 + [True]
    last = listener.messages[-1]
    assert last["stages"] == [{"width": 16, "height": 16, "steps": 4}, {"width": 32, "height": 32, "steps": 3}]
    assert last["steps"] == 7 and last["nfe"] == 14
    assert [step for step, _ in last["nodes"]["9"]["points"]] == list(range(7))
    assert [step for step, _ in last["nodes"]["1"]["points"]] == list(range(7))


def test_switches_in_a_later_stage_are_counted_from_the_first(listener):
    sample_cascade(guided(pixels("unet"), ag(-1.0)), text("unet"), node="9")
    assert listener.messages[-1]["nodes"]["1"]["switch"]["steps"] == [5]


def test_a_cascade_of_no_node_tells_nothing(listener):
    sample_cascade(pixels("unet"), text("unet"))
    assert not listener.messages


# --- samplers that guide ---------------------------------------------------------------------------------------------


def test_the_cfgpp_sampler_of_a_node(listener):
    model = attach(tiny("unet"))
    sampler = cfgpp_sampler("euler", 0.6)
    guider = tools.comfy.samplers.CFGGuider(model)
    guider.set_conds(tools.cond(1), tools.cond(2))
    sigmas = tools.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 5)
    noise = torch.randn(tools.empty_latent(model).shape, generator=torch.Generator().manual_seed(1))

    def run_it():
        with torch.inference_mode():
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)

    plain = run_it()
    assert not listener.messages
    setattr(sampler, telemetry.NODE, "5")
    assert run_it().equal(plain)
    curve = listener.messages[-1]["nodes"]["5"]
    assert (curve["curve"], curve["kind"]) == ("CFG update", "update") and [step for step, _ in curve["points"]] == list(range(5))


# --- the server ------------------------------------------------------------------------------------------------------


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
    assert last["done"] and last["step"] == 4 and set(last["nodes"]) == {"10", "11"}
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
