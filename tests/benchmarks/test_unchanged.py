"""The comparing part of ``bench unchanged``: what counts as a difference, and what is printed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lodestar.benchmarks.unchanged.comparison import Recording, differences, report


def recording(tensors, rows=None, raised=None):
    """A recording of tensors by "case#number"; their values stand for their hashes."""
    rows = {name.rpartition("#")[0]: [2, 2] for name in tensors} | (rows or {})
    return Recording(tensors, rows, raised or {}, {name: str(tensor.tolist()) + str(tensor.dtype) for name, tensor in tensors.items()})


def two(last=2.0):
    """Two cases, one of them of two tensors."""
    return {"a#0": torch.tensor([1.0, -4.0]), "b#0": torch.tensor([0.5]), "b#1": torch.tensor([1.0, last])}


def test_equal_recordings():
    text, equal = report(recording(two()), recording(two()))
    assert equal and text == "2 cases (3 tensors), 2 bit-equal (0 of them refused in both), 0 not."


def test_a_difference_is_measured_and_counted():
    text, equal = report(recording(two()), recording(two(last=2.5)))
    assert not equal
    assert text.splitlines() == [
        "b: 1 of 2 tensors: largest difference 0.5 of 2",
        "2 cases (3 tensors), 1 bit-equal (0 of them refused in both), 1 not.",
    ]


def test_the_smallest_difference_counts():
    before = torch.tensor([1.0])
    assert list(differences(recording({"a#0": before}), recording({"a#0": torch.nextafter(before, before * 2)})))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"a#0": torch.zeros(2)}, "missing now"),
        ({**two(), "c#0": torch.zeros(1)}, "missing before"),
        ({name: tensor for name, tensor in two().items() if name != "b#1"}, "2 tensors before, 1 now"),
        ({**two(), "b#1": torch.zeros(3)}, "(2,) torch.float32 before, (3,) torch.float32 now"),
        ({**two(), "b#1": two()["b#1"].double()}, "torch.float64 now"),
    ],
)
def test_what_is_missing_or_of_another_shape(now, message):
    assert any(message in text for _, text in differences(recording(two()), recording(now)))


def test_refusals():
    """A sentence may be worded anew, but a refusal is no result."""
    refused = recording(two(), {"c": []}, {"c": "ValueError: no"})
    other_words = recording(two(), {"c": []}, {"c": "ValueError: it cannot be"})
    crash = recording(two(), {"c": []}, {"c": "KeyError: 'x'"})
    assert report(refused, other_words) == ("3 cases (3 tensors), 3 bit-equal (1 of them refused in both), 0 not.", True)
    assert list(differences(refused, crash)) == [("c", "before: ValueError: no; now: KeyError: 'x'")]


def test_other_forward_passes():
    (found,) = differences(recording(two()), recording(two(), {"a": [2, 2, 2]}))
    assert found == ("a", "the same result from other forward passes: 2 with 4 rows before, 3 with 6 rows now")


def test_a_part_of_a_recording():
    part = recording(two()).only("b")
    assert list(part.tensors) == ["b#0", "b#1"] and list(part.rows) == ["b"]
    assert report(part, recording(two()).only("b"))[0].startswith("1 cases (2 tensors), 1 bit-equal")


def test_nothing_to_compare_is_no_success():
    assert not report(recording({}), recording({}))[1]


def test_loading(tmp_path):
    about = {"rows": {"a": [2]}, "raised": {}, "sha256": {"a#0": "0"}}
    save_file({"a#0": torch.ones(2)}, tmp_path / "x.safetensors", {"about": json.dumps(about)})
    loaded = Recording.load(tmp_path / "x.safetensors")
    assert loaded.rows == {"a": [2]} and loaded.tensors["a#0"].equal(torch.ones(2)) and loaded.tensors_of("a") == ["a#0"]
