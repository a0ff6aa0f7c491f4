"""Curves stay on the device until they are read."""

from __future__ import annotations

import pytest
import torch

from lodestar.guiders.engine import curves


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_values_arrive_in_order_and_none_is_lost(device):
    kept = curves.Curves()
    for step in range(50):
        kept.record("a", step, torch.tensor(float(step), device=device))
        if step % 2:
            kept.record("b", step, torch.tensor(-float(step)))  # some values are on the host whatever the device
        kept.collect_ready()
    kept.read()
    assert list(kept.values) == ["a", "b"]
    assert kept.values["a"] == {step: float(step) for step in range(50)} and list(kept.values["a"]) == list(range(50))
    assert kept.values["b"] == {step: -float(step) for step in range(1, 50, 2)}
