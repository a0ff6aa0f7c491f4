"""The nodes: what they make of their inputs, and what they refuse."""

from __future__ import annotations

import pytest
import tools
import torch
from restoration_tools import measured, pictures, pixel_model, tiny_vae

from lodestar.guiders.engine.plan import plan_of
from lodestar.guiders.restoration.damage import OPERATORS
from lodestar.nodes.report import LodestarReport
from lodestar.nodes.restoration import LodestarMeasure, LodestarMeasurement, LodestarRestoration
from workshop.interface import recorded


def defaults(node, **changes):
    """Arguments of a node."""
    inputs = recorded()[node.define_schema().node_id]["inputs"]
    return {entry["name"]: entry["default"] for entry in inputs if "default" in entry} | changes


def sockets(operator, size=16):
    """What an operator needs, and a kernel that fits small pictures."""
    mask = (torch.arange(size) < 5).float().expand(1, size, size)
    return {"operator": operator, "kernel_size": 5} | ({"mask": mask} if operator == "inpaint" else {})


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_picture_that_is_damaged_can_be_read(operator):
    """Both nodes describe the same measurement, up to the bytes."""
    image = pictures(2)
    measurement, shown = LodestarMeasure.execute(**defaults(LodestarMeasure, image=image, **sockets(operator))).args
    (read,) = LodestarMeasurement.execute(**defaults(LodestarMeasurement, image=shown, **sockets(operator))).args
    assert shown.shape[-1] == 3 and shown.min() >= 0 and shown.max() <= 1
    assert (read.height, read.width, read.noise) == (16, 16, 0.0) and type(read.operator) is type(measurement.operator)
    torch.testing.assert_close(read.y, measurement.y.clamp(-1, 1), rtol=0, atol=1e-5)
    assert operator == "grey" or shown.shape[1] != 16 or not shown.equal(image)


def test_every_setting_counts():
    """Changes of an operator's own inputs change the measurement; those of the others do not."""
    own = {
        "downscale": {"factor": 2, "method": "area"},
        "blur": {"kernel_size": 7, "blur_width": 1.0},
        "motion blur": {"kernel_size": 7, "angle": 0.0, "kernel": torch.eye(5)[None, :, :, None].expand(-1, -1, -1, 3)},
        "JPEG": {"quality": 90},
        "inpaint": {"mask": torch.ones(1, 16, 16).triu()},
        "grey": {},
    }
    image = pictures()

    def damaged(operator, **changes):
        return LodestarMeasure.execute(**defaults(LodestarMeasure, image=image, **sockets(operator) | changes)).args[0].y

    for operator, settings in own.items():
        plain = damaged(operator)
        for name, value in settings.items():
            changed = damaged(operator, **{name: value})
            assert changed.shape != plain.shape or not changed.equal(plain), (operator, name)
        for name in {"factor", "angle", "quality"} - set(settings):
            assert damaged(operator, **{name: 7}).equal(plain), (operator, name)
        assert not damaged(operator, noise=0.05).equal(plain)
        assert damaged(operator, noise=0.05, seed=1).equal(damaged(operator, noise=0.05, seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operator": "inpaint"}, "inpaint needs a mask"),
        ({"operator": "inpaint", "mask": torch.ones(1, 16, 16)}, "the mask hides the whole picture"),
        ({"operator": "inpaint", "mask": torch.zeros(1, 8, 16)}, "the mask has 16x8 pixels and the picture 16x16"),
        ({"operator": "inpaint", "mask": torch.zeros(2, 16, 16)}, "one mask for all pictures, and this is a batch of 2"),
        ({"operator": "grey", "mask": torch.zeros(1, 16, 16)}, "the mask is for the operator inpaint, and this one is grey"),
        ({"operator": "blur", "kernel_size": 4}, "4 pixels on a side; it needs an odd number"),
        ({"operator": "blur", "kernel_size": 61}, "61 pixels on a side and the picture 16x16"),
        ({"operator": "blur", "kernel": torch.ones(1, 5, 5, 3)}, "the kernel is for the operator motion blur"),
        ({"operator": "motion blur", "kernel": torch.zeros(1, 5, 5, 3)}, "black all over"),
        ({"operator": "downscale", "factor": 5}, "cannot be made 5 times smaller"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(changes, message):
    with pytest.raises(ValueError, match=rf"^Degrade \(Measurement\): .*{message}.*\.$"):
        LodestarMeasure.execute(**defaults(LodestarMeasure, image=pictures(), **changes))
    if changes["operator"] != "downscale":  # there the picture is the small one
        with pytest.raises(ValueError, match=rf"^Measurement: .*{message}.*\.$"):
            LodestarMeasurement.execute(**defaults(LodestarMeasurement, image=pictures(), **changes))


def test_the_measured_picture_of_downscale_is_larger():
    (read,) = LodestarMeasurement.execute(**defaults(LodestarMeasurement, image=pictures(), operator="downscale", factor=3)).args
    assert (read.height, read.width) == (48, 48)


def test_every_parameter_arrives_in_the_rule():
    settings = {"mode": "psld", "strength": 0.3, "gluing": 0.03, "iterations": 4, "start_percent": 0.1, "end_percent": 0.9}
    measurement, vae = measured(), tiny_vae()
    (model,) = LodestarRestoration.execute(model=tools.tiny("unet"), vae=vae, measurement=measurement, **settings).args
    (rule,) = plan_of(model.model_options).rules
    assert {name: getattr(rule, name) for name in settings} == settings
    assert rule.measurement is measurement and rule.vae is vae


def test_what_the_restoration_node_refuses():
    arguments = defaults(LodestarRestoration, measurement=measured())
    with pytest.raises(ValueError, match=r"^Restoration: this model works on latents.*connect its VAE to vae\.$"):
        LodestarRestoration.execute(**arguments, model=tools.tiny("unet"))
    with pytest.raises(ValueError, match=r"^Restoration: start_percent 0\.8 lies after end_percent 0\.2\.$"):
        LodestarRestoration.execute(**arguments | {"start_percent": 0.8, "end_percent": 0.2}, model=pixel_model())


def test_the_report_shows_the_error_and_what_was_spent():
    (model,) = LodestarRestoration.execute(**defaults(LodestarRestoration, measurement=measured(), mode="psld"), model=pixel_model()).args
    latent = tools.sample(model, cfg=1.0, steps=3, latent=torch.zeros(1, 3, 16, 16))
    _, picture, table = LodestarReport.execute(model, {"samples": latent}).args
    assert "measurement error" in table
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line}
    assert lines["backward"] == ["3", "1.00", "per", "step"] and lines["NFE"][0] == "6"
    assert picture.shape[1] > 600  # a panel more than the updates'
