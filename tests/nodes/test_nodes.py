"""All nodes: what they say of themselves, their errors, and what their settings do."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from workshop.interface import recorded

ROOT = Path(__file__).resolve().parents[2]
NODES = recorded()  # test_interface.py compares it with what the nodes have
APPLIED = ("LodestarLinearAG", "LodestarGuidancePolicy", "LodestarRestoration")  # need more than a model
GUIDANCE = [node for node in NODES if NODES[node]["outputs"] == [{"type": "MODEL"}] and node not in APPLIED]
WINDOWED = [node for node in GUIDANCE if "start_percent" in [entry["name"] for entry in NODES[node]["inputs"]]]


@pytest.fixture
def classes(host) -> dict:
    """What the pack registers, by node id."""

    async def listed() -> list:
        return await (await host.comfy_entrypoint()).get_node_list()

    return {node.define_schema().node_id: node for node in asyncio.run(listed())}


def defaults(classes: dict, node: str, **changes) -> dict:
    """Arguments of a node, but for models."""
    return {entry["name"]: entry["default"] for entry in NODES[node]["inputs"] if "default" in entry} | changes


def run(classes: dict, node: str, model: object, **changes) -> object:
    """The MODEL that a node makes, by its own ``execute``; autoguidance from another tiny UNet unless ``weak_model`` is given."""
    import tools

    models = {"weak_model": changes.pop("weak_model", None) or tools.tiny("unet", seed=7)} if node == "LodestarAutoguidance" else {}
    return classes[node].execute(model=model, **models, **defaults(classes, node, **changes)).args[0]


def test_the_pack_has_these_nodes(classes):
    import tools  # noqa: F401

    import nodes

    assert list(classes) == list(NODES)
    assert all(nodes.NODE_CLASS_MAPPINGS[name].define_schema().node_id == name for name in NODES)


@pytest.mark.parametrize("node", NODES)
def test_everything_is_explained(classes, node):
    schema = classes[node].define_schema()
    assert schema.display_name and schema.category.startswith("lodestar/")
    assert len(schema.description) > 40 and schema.search_aliases
    assert all((ROOT / file).is_file() for file in re.findall(r"[\w/]+/\w+\.\w+", classes[node].__doc__))
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip and entry.tooltip.endswith("."), entry


def lists_files(entry):
    """A choice among the files there are, which has no default."""
    return entry.id == "file"


@pytest.mark.parametrize("node", NODES)
def test_defaults_are_allowed_values(classes, node):
    for entry in classes[node].define_schema().inputs:
        if getattr(entry, "min", None) is not None:
            assert entry.min <= entry.default <= entry.max
        if getattr(entry, "options", None) and not lists_files(entry):
            assert entry.default in entry.options


# --- errors: one sentence, before anything is sampled ----------------------------------------------------------------


@pytest.mark.parametrize("node", WINDOWED)
def test_a_reversed_window(classes, node):
    import tools

    name = re.escape(classes[node].define_schema().display_name)
    with pytest.raises(ValueError, match=rf"^{name}: start_percent 0\.8 lies after end_percent 0\.2\.$"):
        run(classes, node, tools.tiny("unet"), start_percent=0.8, end_percent=0.2)


@pytest.mark.parametrize(("kind", "listed"), [("unet", "input:1, input:3, middle:0"), ("mmdit", "double:0-2")])
@pytest.mark.parametrize("layers", ["output:99", "nonsense", "double:7"])
def test_a_wrong_layer_lists_the_layers_there_are(classes, kind, listed, layers):
    import tools

    with pytest.raises(ValueError, match=rf"'{layers}'.*{listed.split(',')[0]}"):
        run(classes, "LodestarPAG", tools.tiny(kind), layers=layers)


def test_no_layer(classes):
    import tools

    with pytest.raises(ValueError, match="at least one layer"):
        run(classes, "LodestarPAG", tools.tiny("unet"), layers=" , ")


def test_a_weak_model_of_another_latent(classes):
    import tools

    with pytest.raises(ValueError, match=r"one latent format: model has SD15 \(4 channels\), weak_model has SD3 \(16 channels\)\.$"):
        run(classes, "LodestarAutoguidance", tools.tiny("unet"), weak_model=tools.tiny("mmdit"))


def test_two_owners_of_the_cfg_combination(classes):
    import tools

    model = tools.tiny("unet")
    model.set_model_sampler_cfg_function(lambda args: args["cond"])
    with pytest.raises(ValueError, match=r"APG \(Adaptive Projected Guidance\) and .* both replace the CFG combination"):
        run(classes, "LodestarAPG", model)


# --- settings that change nothing ------------------------------------------------------------------------------------

NEUTRAL = {
    "LodestarAPG": {"eta": 1.0, "norm_threshold": 0.0, "momentum": 0.0},
    "LodestarPAG": {"scale": 0.0},
    "LodestarAutoguidance": {"scale": 1.0},
    "LodestarGuidanceInterval": {"start_percent": 0.0, "end_percent": 1.0},
    "LodestarAdaptiveGuidance": {"threshold": 1.001},
}


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_neutral_settings_change_no_bit(classes, kind):
    """All of them in one model."""
    import tools

    model = guided = tools.tiny(kind)
    for node, settings in NEUTRAL.items():
        guided = run(classes, node, guided, **settings, **({"weak_model": tools.tiny(kind, seed=7)} if "Auto" in node else {}))
    assert tools.sample(guided).equal(tools.sample(model))
    assert tools.log_of(guided).nfe == 12


@pytest.mark.parametrize("node", GUIDANCE)
def test_defaults_guide_and_leave_the_input_alone(classes, node):
    import tools

    model = tools.tiny("unet")
    plain = tools.sample(model)
    changes = {"LodestarAutoguidance": {"weak_model": tools.tiny("unet", seed=7)}, "LodestarGuidanceInterval": {"start_percent": 0.5}}
    changes["LodestarFrequencyGuidance"] = {"low_width": 64, "low_height": 64}
    guided = tools.sample(run(classes, node, model, **changes.get(node, {})))
    assert guided.isfinite().all() and not tools.close(guided, plain, 1e-3)
    assert tools.sample(model).equal(plain)


def test_every_parameter_arrives_in_the_rule(classes):
    import tools

    from lodestar.guiders.engine.plan import plan_of

    model = tools.tiny("unet")
    window = {"start_percent": 0.1, "end_percent": 0.9}
    settings = {
        "LodestarAPG": {"eta": 0.3, "norm_threshold": 4.0, "momentum": 0.2},
        "LodestarPAG": {"scale": 1.5, "rescale": 0.4},
        "LodestarAutoguidance": {"scale": 2.5},
        "LodestarGuidanceInterval": {},
    }
    for node, values in settings.items():
        model = run(classes, node, model, **values, **window)
    rules = plan_of(model.model_options).rules
    assert len(rules) == 4
    for rule, values in zip(rules, settings.values(), strict=True):
        assert {name: getattr(rule, name) for name in (*values, *window)} == values | window
    assert rules[1].perturbation.joint == "masked"


def test_the_demo_model_comes_with_a_plan(classes):
    """So that the report can count plain CFG."""
    from lodestar.guiders.engine.plan import plan_of

    model, clip, vae = classes["LodestarDemoModel"].execute(model="unet", strength="weak").args
    assert plan_of(model.model_options).rules == () and clip is not None and vae is not None
