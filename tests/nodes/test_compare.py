"""Compare Guidance: every picture is KSampler's own, every refusal names its column, labels are written in any script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

SETTINGS = {"seed": 7, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
BATCH = 2


@pytest.fixture(scope="module")
def demo(host):
    """The demo model's MODEL, VAE and two conds."""
    import nodes
    from lodestar.nodes.demo_model import LodestarDemoModel

    model, clip, vae = LodestarDemoModel.execute(model="unet", strength="main").args
    with torch.inference_mode():
        conds = [nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a large red disc on a grey background", "")]
    return model, vae, *conds


@pytest.fixture
def guided(demo):
    """Four models as a graph would make them: plain, APG, PAG, and APG with a switch."""
    import tools

    from lodestar.guiders.policies.adaptive import AdaptiveGuidance
    from lodestar.guiders.shapers.apg import APG

    model = demo[0]
    apg = tools.guided(model, APG(norm_threshold=5.0))
    return [model, apg, tools.guided(model, tools.pag(model)), tools.guided(apg, AdaptiveGuidance(threshold=-1.0))]


def latent(batch=BATCH, **more) -> dict:
    """An empty one for the demo model."""
    return {"samples": torch.zeros(batch, 3, 32, 32), **more}


def compare(demo, models, labels="", latent_image=None, **changes):
    """What the node returns: picture and table."""
    from lodestar.nodes.comparison import LodestarCompare

    sockets = {f"model{i}": model for i, model in enumerate(models) if model is not None}
    with torch.inference_mode():
        return LodestarCompare.execute(
            models=sockets, vae=demo[1], positive=demo[2], negative=demo[3], latent_image=latent_image or latent(), labels=labels,
            **SETTINGS | changes,
        ).args  # fmt: skip


def by_ksampler(demo, model, latent_image=None, **changes):
    """The host's own KSampler and VAE Decode."""
    import nodes

    with torch.inference_mode():
        sampled = nodes.common_ksampler(
            model, positive=demo[2], negative=demo[3], latent=latent_image or latent(), **SETTINGS | changes
        )[0]  # fmt: skip
        return nodes.VAEDecode().decode(demo[1], sampled)[0]


def cells(picture, columns, rows=BATCH, side=256):
    """The images of a grid, enlarged as they are: [column][row] of [side, side, 3]."""
    gap, left = 10, 30
    top = picture.shape[1] - rows * (side + gap)
    return [[picture[0, top + r * (side + gap) :, left + c * (side + gap) :][:side, :side] for r in range(rows)] for c in range(columns)]


def numbers(table):
    """Column number -> (NFE, seconds, saturation) of a table."""
    rows = (line.split() for line in table.splitlines()[3:])
    return {int(row[0]): tuple(map(float, row[1:4])) for row in rows if row and row[0].isdigit()}


@pytest.mark.parametrize("changes", [{}, {"denoise": 0.6, "sampler_name": "dpmpp_2m_sde", "scheduler": "karras"}, {"cfg": 1.0}])
def test_every_picture_is_ksamplers(demo, guided, changes):
    given = latent(noise_mask=torch.ones(1, 32, 32), batch_index=[3, 5])
    given["samples"] = torch.rand(given["samples"].shape, generator=torch.Generator().manual_seed(1))
    picture, _ = compare(demo, guided, latent_image=given, **changes)
    for shown, model in zip(cells(picture, len(guided)), guided, strict=True):
        for cell, image in zip(shown, by_ksampler(demo, model, given, **changes), strict=True):
            assert cell[::8, ::8].equal(image)
            assert cell.equal(image.repeat_interleave(8, 0).repeat_interleave(8, 1))


def test_the_order_of_the_columns_does_not_matter(demo, guided):
    there, back = (cells(compare(demo, models)[0], 4) for models in (guided, guided[::-1]))
    for one, other in zip(there, reversed(back), strict=True):
        assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_a_model_without_our_nodes_is_compared_too(demo, guided):
    from lodestar.guiders.engine.attach import detach

    bare = detach(demo[0])
    picture, table = compare(demo, [bare, guided[1]])
    assert cells(picture, 2)[0][0][::8, ::8].equal(by_ksampler(demo, bare)[0])
    assert numbers(table)[1][0] == 6


def test_the_table_holds_what_the_logs_and_pictures_say(demo, guided):
    import tools

    picture, table = compare(demo, guided)
    counted = numbers(table)
    assert [row[0] for row in counted.values()] == [6, 6, 9, 4]
    assert tools.log_of(guided[2]).nfe == 9
    for (_, seconds, saturation), column in zip(counted.values(), cells(picture, 4), strict=True):
        pixels = torch.stack(column)
        assert 0 < seconds < 60
        expected = ((pixels.amax(-1) - pixels.amin(-1)) / pixels.amax(-1).clamp(min=1 / 255)).mean()
        assert saturation == pytest.approx(float(expected), abs=6e-4)
    assert "seed 7, 3 steps of euler (normal), cfg 4, denoise 1" in table


# --- labels ----------------------------------------------------------------------------------------------------------


def test_columns_are_named_after_their_rules(demo, guided):
    import tools

    from lodestar.guiders import comparison
    from lodestar.guiders.policies.interval import GuidanceInterval
    from lodestar.guiders.terms.autoguidance import Autoguidance

    names = [comparison.describe(model, 4.0) for model in guided]
    assert names[0] == "CFG" and comparison.describe(demo[0], 1.0) == "no guidance"
    assert names[1] == "APG: eta 0, norm_threshold 5, momentum -0.5"
    assert names[2].startswith("PAG: scale ") and "layers " in names[2]
    assert names[3] == f"{names[1]}\nAG: threshold -1"
    window = tools.guided(demo[0], GuidanceInterval(start_percent=0.2), Autoguidance(weak_model=demo[0], scale=1.0))
    assert comparison.describe(window, 4.0) == "Guidance Interval: start_percent 0.2"  # the other one is neutral


def test_a_label_belongs_to_its_socket(demo, guided):
    _, table = compare(demo, [guided[0], None, guided[2]], labels="first\nsecond\nthird\nfourth", steps=1)
    rows = [line.split()[4:] for line in table.splitlines()[3:]]
    assert rows == [["first"], ["third"]]
    _, table = compare(demo, guided[:2], labels="\nmine", steps=1)
    assert [line.split()[4:] for line in table.splitlines()[3:]] == [["CFG"], ["mine"]]


@pytest.mark.parametrize("label", ["引导", "強い誘導", "안내", "сильно", "a very long label that does not fit on one line of its column"])
def test_labels_change_the_picture_above_the_images_only(demo, guided, label):
    from lodestar.pictures.text import unwritable

    if unwritable(label):
        pytest.skip(f"no font here has {unwritable(label)} (Debian: apt install fonts-wqy-microhei)")
    plain, named = (compare(demo, guided[:1], labels=text, steps=1) for text in ("x", label))
    assert not named[0][0, :180].equal(plain[0][0, :180])
    assert cells(named[0], 1)[0][0].equal(cells(plain[0], 1)[0][0])
    assert label in named[1] and "No font" not in named[1]


def drawn(text, size=24) -> bytes:
    """The pixels of a text."""
    from PIL import Image, ImageDraw

    from lodestar.pictures.text import write

    picture = Image.new("L", (200, 50))
    write(ImageDraw.Draw(picture), (5, 5), text, size, 255)
    return picture.tobytes()


def test_glyphs_are_drawn_and_no_boxes(host):
    from lodestar.pictures.text import unwritable

    characters = "中文引导强度あ안"
    if unwritable(characters):
        pytest.skip("no font with Chinese, Japanese and Korean is installed (Debian: apt install fonts-wqy-microhei)")
    pictures = [drawn(character) for character in characters]
    assert len(set(pictures)) == len(characters) and drawn(" ") not in pictures
    boxes = {drawn(character) for character in "\U0010ffff\ue123\U000e0f00"}  # without a glyph in any font
    assert not boxes & set(pictures)
    assert len({drawn("a" + character) for character in characters}) == len(characters)


def test_a_label_without_a_font_is_said_and_not_drawn(demo, guided):
    label = "x \U0010fffe"  # a noncharacter: no font ever has it
    picture, table = compare(demo, guided[:2], labels=f"{label}\nplain", steps=1)
    numbered, _ = compare(demo, guided[:2], labels="1 (see the table)\nplain", steps=1)
    assert "No font on this machine has \U0010fffe, so the picture calls column 1 only by its number." in table and label in table
    assert picture[0, 30:60].equal(numbered[0, 30:60])


def test_text_is_broken_within_the_room(host):
    from lodestar.pictures.text import width, wrapped

    for text in ("some words that need several lines", "中文引导强度" * 5, "averylongwordwithoutanyspace" * 3, "a\n\nb", ""):
        lines = wrapped(text, 16, 100).split("\n")
        assert all(width(line, 16) <= 100 for line in lines)
        assert "".join("".join(lines).split()) == "".join(text.split())


@pytest.mark.parametrize(("height", "width"), [(16, 48), (300, 200), (1024, 768)])
def test_grids_of_other_sizes(host, height, width):
    from lodestar.pictures.comparison import LabelledPictures, draw

    generator = torch.Generator().manual_seed(0)
    columns = [LabelledPictures("a label " * n, torch.rand(n, height, width, 3, generator=generator), 3.5, 1.0) for n in (1, 3)]
    grid = draw(columns, "settings")
    assert grid.shape[0] == 1 and grid.shape[3] == 3 and float(grid.min()) >= 0 and float(grid.max()) <= 1
    factor = max(1, 256 // max(height, width))
    corner = columns[1].images[2, -1, -1]
    matches = (grid[0] == corner).all(dim=-1).nonzero()
    assert len(matches) == factor**2  # the last image is there to its last pixel


# --- refusals and interruption ---------------------------------------------------------------------------------------


def test_a_refused_column_is_named_before_anything_is_sampled(demo, guided):
    import tools

    from lodestar.guiders.engine.attach import attach
    from lodestar.guiders.shapers.apg import APG
    from lodestar.guiders.shapers.frequency import FrequencyGuidance

    too_large = tools.guided(demo[0], FrequencyGuidance(low_height=64, low_width=64))
    claimed = attach(demo[0], APG())
    claimed.set_model_sampler_cfg_function(lambda args: args["cond"])
    for refused, more, why in (
        (guided[3], {"sampler_name": "euler_cfg_pp"}, "cannot work with the sampler euler_cfg_pp"),
        (too_large, {}, "is larger than the latent of 32x32"),
        (claimed, {}, "both replace the CFG combination"),
        (tools.tiny("mmdit"), {}, r"works on SD3 \(16 channels\) latents"),
    ):
        with tools.counted(demo[0]) as calls, pytest.raises(ValueError, match=rf"^Compare Guidance: model1 \(.*\): .*{why}"):
            compare(demo, [guided[0], refused], **more)
        assert not calls


def test_a_failure_while_sampling_names_the_column_too(demo, guided):
    from comfy.patcher_extension import WrappersMP

    def broken(*args, **kwargs):
        raise ValueError("what another pack has to say")

    other = guided[1].clone()
    other.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "other pack", broken)
    with pytest.raises(ValueError, match=r"^Compare Guidance: model1 \(mine\): what another pack has to say$"):
        compare(demo, [guided[0], other], labels="\nmine")


def test_interruption_stops_it(demo, guided):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        compare(demo, guided)


def test_one_progress_bar_over_all_columns(demo, guided):
    import comfy.utils

    seen = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: seen.append((value, total)))
    try:
        compare(demo, guided[:3], sampler_name="heun")
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    values = [value for value, _ in seen]
    assert values == sorted(set(values)) and values[-1] == 9 and len(values) >= 3  # newer hosts leave out what comes too fast
    assert {total for _, total in seen} == {9}


# --- the front end ---------------------------------------------------------------------------------------------------


def test_sockets_grow_as_they_are_connected(page):
    workflow = json.loads((Path(__file__).parents[2] / "workflows" / "compare.json").read_text(encoding="utf-8"))
    before, after, reloaded, sent = page.evaluate(
        """async workflow => {
            const sockets = () => {
                const compare = app.graph.nodes.find(node => node.type === 'LodestarCompare');
                return compare.inputs.filter(input => input.name.startsWith('models.')).map(input => [input.name, input.link != null]);
            };
            await app.loadGraphData(workflow);
            const before = sockets();
            const compare = app.graph.nodes.find(node => node.type === 'LodestarCompare');
            app.graph.nodes.find(node => node.type === 'LodestarPAG').connect(0, compare, before.at(-1)[0]);
            await new Promise(resolve => setTimeout(resolve, 200));
            const after = sockets();
            await app.loadGraphData(app.graph.serialize());
            const prompt = (await app.graphToPrompt()).output;
            const inputs = Object.values(prompt).find(node => node.class_type === 'LodestarCompare').inputs;
            return [before, after, sockets(), Object.keys(inputs)];
        }""",
        workflow,
    )
    assert before == [*([f"models.model{i}", True] for i in range(4)), ["models.model4", False]]
    assert after == [*([f"models.model{i}", True] for i in range(5)), ["models.model5", False]] == reloaded
    assert {f"models.model{i}" for i in range(5)} <= set(sent) and "models.model5" not in sent
    assert not page.errors
