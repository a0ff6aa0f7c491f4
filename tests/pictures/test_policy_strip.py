"""The strip of the report that shows what policies made of a run."""

from __future__ import annotations

import tools
from PIL import Image, ImageDraw, ImageFont
from policy_tools import applied, policy_for, sample

from lodestar.guiders.engine.choice import Choice
from lodestar.pictures import policy_strip, report

WIDTH = 20


def cells(choices) -> list[list[tuple[int, int, int]]]:
    """The colours of every step's cell near its upper and its lower edge."""
    picture = Image.new("RGB", (400, policy_strip.HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    middles = [30 * step + 20 for step in choices]
    policy_strip.draw_strip(pen, choices, 0, 10, WIDTH, middles.__getitem__, ImageFont.load_default, "black")
    bottom = max(y for y in range(policy_strip.HEIGHT) if picture.getpixel((middles[0], y)) != (255, 255, 255))
    return [[picture.getpixel((x - WIDTH // 2 + 2, y)) for y in (bottom - 20, bottom - 1)] for x in middles]


def test_every_step_has_a_cell_in_the_colour_of_what_it_did():
    cfg, cond, uncond, predicted = Choice(weight=12.0), Choice(weight=1.0), Choice(weight=0.0), Choice(predicted=True)
    drawn = cells(dict(enumerate([cfg, cond, uncond, predicted, Choice()])))
    assert all(above == below for above, below in drawn)
    assert len(set(map(tuple, drawn))) == 4 and drawn[0] == drawn[4]
    assert (255, 255, 255) not in drawn[0] + drawn[1] + drawn[2] + drawn[3]


def test_where_some_rows_are_guided_the_cell_is_filled_from_below():
    (cfg, _), (cond, _), mixed = cells({0: Choice(), 1: Choice(uncond=False), 2: Choice(uncond=(True, False, False, False))})
    assert mixed == [cond, cfg]


def test_the_report_has_a_strip_where_a_policy_acted():
    model = tools.tiny("unet")
    guided, plain = applied(model, policy_for(model, (12.0, 1.0, 0.0, 3.0))), tools.attach(model)
    sample(guided), sample(plain)
    log = tools.log_of(guided)
    assert [policy_strip.kind_of(log.choices[i]) for i in range(4)] == ["CFG", "conditional", "unconditional", "CFG"]
    assert report.draw(log).shape[1] == report.draw(tools.log_of(plain)).shape[1] + policy_strip.HEIGHT


def test_a_cell_shows_how_many_rows_are_guided():
    assert policy_strip.guided(Choice(uncond=(True, False, False, False))) == 0.25
    assert policy_strip.kind_of(Choice(uncond=(True, False))) == "CFG" and policy_strip.kind_of(Choice(uncond=False)) == "conditional"
    assert policy_strip.kind_of(Choice(predicted=True)) == "predicted"
    assert not policy_strip.wanted({0: Choice()}) and policy_strip.wanted({0: Choice(), 1: Choice(weight=1.0)})
