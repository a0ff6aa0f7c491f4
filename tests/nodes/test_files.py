"""Load nodes without anything to load: their list says what to run first, and one sentence refuses to run them."""

from __future__ import annotations

import pytest


@pytest.fixture
def folder(host, monkeypatch, tmp_path):
    """An empty folder in the place of the host's models/guidance."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "guidance", ([str(tmp_path)], set()))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.mark.parametrize(
    ("module", "node", "made_by", "file"),
    [
        ("guidance_policy", "LodestarLoadPolicy", "Guidance policy search", "p.json"),
        ("linear_ag", "LodestarLoadCoefficients", "LinearAG: fit", "c.safetensors"),
    ],
)
def test_a_list_without_files_says_what_to_run(folder, module, node, made_by, file):
    import importlib

    load = getattr(importlib.import_module(f"lodestar.nodes.policies.{module}"), node)
    (only,) = load.define_schema().inputs[0].options
    assert only == f"nothing to load yet: run {made_by} first"
    assert load.validate_inputs(only) == f"There is nothing to load in models/guidance yet; run {made_by} and save its result first."
    assert load.validate_inputs() is True  # another node gives the name
    (folder / file).touch()
    assert load.define_schema().inputs[0].options == [file] and load.validate_inputs(file) is True
    for other in (only, "../" + file):
        assert load.validate_inputs(other) == f"models/guidance has no file {other!r}; choose one of the list (R refreshes it)."
