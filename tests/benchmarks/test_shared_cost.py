"""What CFG with PAG costs on networks of well-known shapes, counted from shapes alone."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("name", "layers", "most"),
    [("SD1.5", "middle", 2.72), ("SDXL", "middle", 2.72), ("SD3-medium", "auto", 2.55), ("SD3-medium", "double:16", 2.40),
     ("Flux", "auto", 2.60), ("Flux", "single:19", 2.40)],
)  # fmt: skip
def test_cfg_with_pag(host, name, layers, most):
    """Its own layers or those where a transformer's last third begins. Without sharing it is 3."""
    from lodestar.benchmarks import _shapes

    assert 2.3 < _shapes.cfg_with_pag(name, layers) <= most


def test_a_step_without_sharing_is_three_evaluations(host):
    from lodestar.benchmarks import _shapes

    assert _shapes.cfg_with_pag("SD1.5", "middle", shared=False) == pytest.approx(3, abs=0.02)
