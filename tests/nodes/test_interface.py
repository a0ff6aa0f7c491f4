"""The public interface is the recorded one: nothing is gone, renamed, reordered or of another default, and additions are recorded."""

from __future__ import annotations

import copy

import pytest

NODE, COMBO = "LodestarAPG", "LodestarCFGPP"


@pytest.fixture(scope="module")
def contract(host):
    """The module with the rules of the contract."""
    from workshop import interface

    return interface


def test_nothing_that_workflows_hold_has_changed(contract):
    assert list(contract.broken(contract.recorded(), contract.offered())) == []


def test_additions_are_recorded(contract):
    assert contract.recorded() == contract.offered(), "python run.py python workshop/interface.py records them"
    assert contract.FILE.read_text(encoding="utf-8") == contract.written(contract.recorded())


def renamed(nodes):
    nodes["Other"] = nodes.pop(NODE)


def input_renamed(nodes):
    nodes[NODE]["inputs"][1]["name"] = "other"


def input_removed(nodes):
    nodes[NODE]["inputs"].pop()


def inputs_reordered(nodes):
    nodes[NODE]["inputs"].reverse()


def input_in_between(nodes):
    nodes[NODE]["inputs"].insert(1, {"name": "other", "type": "FLOAT", "default": 0.0})


def retyped(nodes):
    nodes[NODE]["inputs"][1]["type"] = "INT"


def another_default(nodes):
    nodes[NODE]["inputs"][1]["default"] = 1.0


def required(nodes):
    nodes["LodestarLinearAG"]["inputs"][2].pop("optional")


def narrower(nodes):
    nodes[NODE]["inputs"][1]["max"] = 5.0


def choice_removed(nodes):
    nodes[COMBO]["inputs"][0]["options"].pop()


def fewer_sockets(nodes):
    nodes["LodestarCompare"]["inputs"][0]["sockets"].pop()


def output_retyped(nodes):
    nodes[COMBO]["outputs"][0]["type"] = "MODEL"


def outputs_reordered(nodes):
    nodes["LodestarReport"]["outputs"].reverse()


def input_without_default(nodes):
    nodes[NODE]["inputs"].append({"name": "other", "type": "LATENT"})


BREAKS = [
    renamed, input_renamed, input_removed, inputs_reordered, input_in_between, retyped, another_default, required, narrower, choice_removed,
    fewer_sockets, output_retyped, outputs_reordered, input_without_default,
]  # fmt: skip


@pytest.mark.parametrize("change", BREAKS, ids=lambda change: change.__name__)
def test_what_breaks_workflows_is_noticed_and_not_written(contract, monkeypatch, tmp_path, capsys, change):
    old = contract.recorded()
    new = copy.deepcopy(old)
    change(new)
    assert list(contract.broken(old, new))
    file = tmp_path / "interface.json"
    file.write_text(contract.written(old), encoding="utf-8")
    monkeypatch.setattr(contract, "FILE", file)
    monkeypatch.setattr(contract, "offered", lambda: new)
    assert contract.main() == 1 and "Nothing was written" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == contract.written(old)


def new_node(nodes):
    nodes["Other"] = {"inputs": [{"name": "model", "type": "MODEL"}], "outputs": [{"type": "MODEL"}]}


def new_input(nodes):
    nodes[NODE]["inputs"].append({"name": "other", "type": "FLOAT", "default": 0.0})


def new_socket(nodes):
    nodes[NODE]["inputs"].append({"name": "other", "type": "LATENT", "optional": True})


def new_output(nodes):
    nodes[NODE]["outputs"].append({"type": "STRING"})


def new_choice(nodes):
    nodes[COMBO]["inputs"][0]["options"].append("other")


def wider(nodes):
    nodes[NODE]["inputs"][1]["max"] = 50.0


@pytest.mark.parametrize("change", [new_node, new_input, new_socket, new_output, new_choice, wider], ids=lambda change: change.__name__)
def test_additions_are_written(contract, monkeypatch, tmp_path, change):
    file = tmp_path / "interface.json"
    file.write_text(contract.written(contract.recorded()), encoding="utf-8")
    new = contract.recorded()
    change(new)
    monkeypatch.setattr(contract, "FILE", file)
    monkeypatch.setattr(contract, "offered", lambda: new)
    assert contract.main() == 0 and contract.recorded() == new
