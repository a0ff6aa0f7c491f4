"""The demo: data, captions, text encoder, models, classifier, sheet, and ``run.py demo`` from end to end."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
MODELS = [(model, strength) for model in ("unet", "mmdit") for strength in ("main", "weak")]


def scenes(count, seed=0, pairs=0.2):
    """Random scenes."""
    from lodestar.demo import shapes

    return shapes.random_scenes(count, torch.Generator().manual_seed(seed), pairs)


# ---------------------------------------------------------------------------------------------------- data and captions


def test_captions_use_the_vocabulary():
    from lodestar.demo import shapes

    used = {word for caption in shapes.captions(scenes(2000)) for word in caption.split()}
    assert used == set(shapes.WORDS)


def test_captions_say_what_is_drawn():
    from lodestar.demo import shapes
    from workshop import compare

    drawn = scenes(200)
    for index, caption in enumerate(shapes.captions(drawn)):
        read = compare.scenes_of(caption, 1)
        assert read.background[0] == drawn.background[index]
        assert read.relation[0] == drawn.relation[index]
        shown = 1 if drawn.relation[index] < 0 else 2
        assert torch.equal(read.objects[0, :shown], drawn.objects[index, :shown])
    assert compare.scenes_of("a purple pentagon", 1) is None


@pytest.mark.parametrize("size", [32, 64])
def test_draw_is_deterministic(size):
    from lodestar.demo import shapes

    first, second, other = (shapes.draw(scenes(16), torch.Generator().manual_seed(seed), size) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (16, 3, size, size)
    assert first.min() >= 0 and first.max() <= 1
    assert first.flatten(1).std(dim=1).min() > 0.02


def test_random_scenes_are_as_asked():
    from lodestar.demo import shapes

    assert (scenes(200, pairs=0.0).relation == -1).all()
    pairs = scenes(200, pairs=1.0)
    assert (pairs.relation >= 0).all()
    assert (pairs.objects[:, 0, 1] != pairs.objects[:, 1, 1]).all()  # colours differ
    assert len(set(shapes.captions(scenes(500)))) > 300


# --------------------------------------------------------------------------------------------------------- text encoder


def test_unknown_words_are_refused_in_one_sentence(host):
    from lodestar.demo import text

    with pytest.raises(ValueError, match=r"^The demo model does not know 'zebra', 'cube'; it knows: .*\.$") as raised:
        text.CaptionTokenizer().tokenize_with_weights("a red zebra on a grey cube")
    assert "\n" not in str(raised.value)


def test_long_captions_are_refused(host):
    from lodestar.demo import text

    with pytest.raises(ValueError, match=r"17 words; the demo model reads at most 16"):
        text.CaptionTokenizer().tokenize_with_weights(" ".join(["red"] * 17))


def test_weights_of_words(host):
    from lodestar.demo import models, text

    plain, weighted = (
        text.CaptionTokenizer().tokenize_with_weights(caption)["words"][0] for caption in ("a red disc", "a (Red:1.5), disc.")
    )
    assert [token[0] for token in plain] == [token[0] for token in weighted]
    assert [token[1] for token in weighted[:4]] == [1.0, 1.5, 1.0, 1.0]
    clip = models.load_clip()
    ((context, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize("a (red:1.5) disc"))
    ((base, _),) = clip.encode_from_tokens_scheduled(clip.tokenize("a red disc"))
    assert context.shape == (1, text.LENGTH, text.WIDTH)
    assert extra["pooled_output"].shape == (1, text.WIDTH)
    changed = (context != base).any(dim=-1)[0]
    assert changed.tolist() == [index == 1 for index in range(text.LENGTH)]


# --------------------------------------------------------------------------------------------------- models, classifier


def test_weights_are_small():
    files = list((ROOT / "demo" / "weights").glob("*.safetensors"))
    assert len(files) == 6
    assert sum(file.stat().st_size for file in files) <= 16e6


@pytest.mark.parametrize(("model", "strength"), MODELS)
def test_models_denoise(host, model, strength):
    from lodestar.demo import models, shapes

    network = models.load_model(model, strength).model
    clip = models.load_clip()
    drawn = scenes(8, pairs=0.0)
    encoded = [clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True) for caption in shapes.captions(drawn)]
    context, pooled = (torch.cat(part) for part in zip(*encoded, strict=True))
    generator = torch.Generator().manual_seed(1)
    clean = network.process_latent_in(shapes.draw(drawn, generator) * 2 - 1)
    noise = torch.randn(clean.shape, generator=generator)
    level = 0.5 if model == "mmdit" else 1.0  # noise as strong as the picture
    sigma = torch.full((8,), level)
    noisy = network.model_sampling.noise_scaling(sigma[:, None, None, None], noise, clean)
    with torch.inference_mode():
        denoised = network.apply_model(noisy, sigma, c_crossattn=context, y=pooled)
    assert (denoised - clean).square().mean() < 0.5 * clean.var()


def sampled(model):
    """Eight steps of a demo model that other nodes may have patched."""
    import tools

    from lodestar.demo import models

    clip = models.load_clip()
    positive, negative = (models.encode(clip, [caption]) for caption in ("a small red disc on a grey background", ""))
    latent = torch.zeros(1, 3, 32, 32)
    return tools.sample(model, steps=8, latent=latent, positive=positive, negative=negative, scheduler=models.SCHEDULERS["unet"])


def test_the_unet_works_with_easycache(host):
    """Wrappers of the network, such as that of EasyCache, see as many channels come out as go in, and a size that stays."""
    import comfy_extras.nodes_easycache

    from lodestar.demo import models

    model = models.load_model("unet", "main")
    cached = comfy_extras.nodes_easycache.EasyCacheNode.execute(model, 0.3, 0.15, 0.95, False).result[0]
    calls = []
    handle = model.model.diffusion_model.time_embed.register_forward_pre_hook(lambda *_: calls.append(1))
    result = sampled(cached)
    handle.remove()
    assert 1 < len(calls) < 8
    assert torch.isfinite(result).all()
    assert not torch.equal(result, sampled(model))


@pytest.mark.parametrize(("model", "strength"), MODELS)
def test_the_host_can_load_the_weights_once_more(host, model, strength):
    """For another device, or without dynamic VRAM."""
    from lodestar.demo import models

    loaded = models.load_model(model, strength)
    load, args = loaded.cached_patcher_init
    for again in (load(*args), load(*args, disable_dynamic=True)):
        assert again.model is not loaded.model
        ours, theirs = loaded.model.state_dict(), again.model.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_classifier(host):
    from lodestar.demo import classifier, shapes

    drawn = scenes(512, seed=3, pairs=0.0)
    with torch.inference_mode():
        net = classifier.load_classifier()
        pictures = shapes.draw(drawn, torch.Generator().manual_seed(4))
        right = classifier.correct(net(pictures), drawn)
        assert net.features(pictures).shape == (512, 96)
    assert right["all"].float().mean() >= 0.95
    assert set(right) == {*shapes.ATTRIBUTES, "all"}


# ------------------------------------------------------------------------------------------------------ picture, tables


def test_saturation():
    from workshop import compare

    assert compare.saturation(Image.new("RGB", (4, 4), (90, 90, 90))) == 0
    assert compare.saturation(Image.new("RGB", (4, 4))) == 0
    assert compare.saturation(Image.new("RGB", (4, 4), (200, 100, 150))) == 0.5


def test_real_saturation_needs_captions():
    from workshop import compare

    assert 0.1 < compare.real_saturation(compare.SHAPES_PROMPTS) < 0.4
    assert compare.real_saturation(("a red zebra",)) is None


@pytest.mark.parametrize("label", ["a disc", "ein größerer Stern", "большая звезда", "紫色の五角形と青い円", "نجمة", "\U0001f98a", ""])
def test_labels_in_any_script(label):
    from lodestar.pictures import sheets

    cell = [Image.new("RGB", (32, 32), "teal")] * 4
    picture = sheets.comparison([("CFG", "cfg 4")], [label, "x"], [[cell, cell]], "corner")
    assert picture.width == sheets.SIDE + sheets.CELL + 2 * sheets.GAP


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_tiles(count):
    from lodestar.pictures import sheets

    grid = sheets.tiled([Image.new("RGB", (32, 16), "red")] * count, 240)
    assert grid.size == (240, 240)
    assert grid.getpixel((1, 1)) == (255, 0, 0)


def test_autoguidance_without_a_weak_checkpoint():
    from workshop import api, compare

    settings = compare.Settings(("x",), 7.0, 1, 2, 1, 512, ("a.safetensors",))
    prompt = {"1": {"class_type": "LodestarDemoModel", "inputs": {"model": "unet", "strength": "weak"}}}
    with pytest.raises(api.PromptError, match="--weak FILE"):
        compare.use_checkpoint(prompt, settings)
    skipped = compare.Result(compare.METHODS[-1], problem=compare.NEEDS_WEAK)
    assert "--weak FILE" in compare.as_table([skipped], settings)


# ----------------------------------------------------------------------------------------------------------- end to end


def rows_of(table):
    """The cells of a Markdown table by their row's name."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.slow
def test_the_demo_command(tmp_path):
    command = [sys.executable, "run.py", "demo", "--out", str(tmp_path), "--cfg", "9", "--seed", "3"]
    prompt = "a large purple pentagon on a cream background"
    done = subprocess.run([*command, "--prompt", prompt], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "comparison.png") in done.stdout
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 1600 and picture.height > 300

    rows = rows_of((tmp_path / "comparison.md").read_text(encoding="utf-8"))
    assert {name: row[1] for name, row in rows.items() if row[1].isdigit()} == {
        "CFG": "40", "APG": "40", "PAG": "40", "CFG + PAG": "60", "APG + PAG": "60", "Autoguidance": "40",
    }  # fmt: skip
    assert {row[2] for row in rows.values() if row[1] == "60"} == {"240"}
    assert float(rows["APG"][4]) < float(rows["CFG"][4])
    assert float(rows["real pictures"][4]) < float(rows["CFG"][4])
    assert "CFG" in done.stdout and prompt in (tmp_path / "comparison.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_demo_with_a_checkpoint(host, tmp_path, capsys):
    """A checkpoint as the host's users have it, in small: an SD3 transformer, CLIP-L, and a tiny autoencoder, all random."""
    from workshop import compare

    checkpoint = tmp_path / "tiny.safetensors"
    write_checkpoint(checkpoint)
    options = ["--checkpoint", str(checkpoint), "--size", "64", "--steps", "2", "--prompt", "лиса в снегу"]
    assert compare.main([*options, "--out", str(tmp_path)]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert {name: row[1] for name, row in rows.items() if row[1].isdigit()} == {
        "CFG": "4", "APG": "4", "PAG": "4", "CFG + PAG": "6", "APG + PAG": "6",
    }  # fmt: skip
    assert rows["Autoguidance"][4] == compare.NEEDS_WEAK
    assert re.search(r"лиса в снегу", (tmp_path / "comparison.md").read_text(encoding="utf-8"))
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width < 1600  # five columns


def write_checkpoint(path):
    """Random weights under the names that the host recognises."""
    import comfy.clip_model
    import comfy.ops
    import comfy.supported_models
    import tools
    from comfy.taesd.taesd import TAESD
    from safetensors.torch import save_file

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}}
    sizes = {"adm_in_channels": 2048, "context_embedder_config": embedder, "depth": 2, "num_blocks": 2}
    network = comfy.supported_models.SD3(tools.MMDIT | sizes).get_model({}, device=torch.device("cpu")).diffusion_model
    tools.fill(network)
    state = {f"model.diffusion_model.{key}": value for key, value in network.state_dict().items()}
    config = {
        "num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "quick_gelu",
        "projection_dim": 768, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407,
    }  # fmt: skip
    clip = comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", comfy.ops.disable_weight_init)
    for parameter in clip.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    state |= {f"text_encoders.clip_l.transformer.{key}": value for key, value in clip.state_dict().items()}
    taesd = TAESD(latent_channels=16).state_dict()
    state |= {f"first_stage_model.{key}": value for key, value in taesd.items()}
    save_file({key: value.detach().half().contiguous().clone() for key, value in state.items()}, path)
