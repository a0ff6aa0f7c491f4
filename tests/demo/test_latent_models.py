"""The 128-pixel demo models in training: latent space, caption encoder, networks, and how a run goes on."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch import nn


@pytest.fixture(scope="module")
def L(host):
    from lodestar.demo import latent_models

    return latent_models


@pytest.fixture(scope="module")
def vae(L):
    return L.load_vae()


@pytest.fixture(autouse=True)
def no_gradients(request):
    """As the host runs its nodes; training alone needs gradients."""
    with torch.inference_mode("vae" in request.fixturenames):
        yield


def fresh(count, seed=77, size=128):
    """Pictures [B, H, W, 3] in [0, 1], as the host's IMAGE."""
    from lodestar.demo import scenes

    generator = torch.Generator().manual_seed(seed)
    return scenes.draw(scenes.random_scenes(count, generator), generator, size).movedim(1, -1)


def psnr(restored, pictures):
    return -10 * (restored - pictures).square().mean(dim=(1, 2, 3)).log10()


# --------------------------------------------------------------------------------------------------------- latent space


def test_vae_restores_fresh_pictures(L, vae):
    """As well as when the weights were written, less half a decibel."""
    with safe_open(L.WEIGHTS / "autoencoder.safetensors", "pt") as file:
        reached = float(file.metadata()["psnr"])
    pictures = fresh(32)
    latents = vae.encode(pictures)
    assert latents.shape == (32, 4, 16, 16)
    assert psnr(vae.decode(latents), pictures).mean() > reached - 0.5


def test_latents_are_near_unit_normals(vae):
    latents = vae.encode(fresh(48, seed=5))
    assert (latents.mean(dim=(0, 2, 3)).abs() < 0.15).all()
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.15)


def test_tiles_make_the_same_picture(vae):
    pictures = fresh(1, seed=3, size=256)
    latents = vae.encode(pictures)
    whole = vae.decode(latents)
    tiled = vae.decode_tiled(latents, tile_x=24, tile_y=24, overlap=10)
    assert (tiled - whole).abs().mean() < 5e-3
    assert (vae.encode_tiled(pictures, tile_x=192, tile_y=192, overlap=80) - latents).abs().mean() < 0.05


def test_other_sizes_and_odd_edges(vae):
    assert vae.encode(torch.rand(1, 133, 90, 3)).shape == (1, 4, 16, 11)
    assert vae.decode(torch.zeros(1, 4, 16, 11)).shape == (1, 128, 88, 3)


def test_inpainting_takes_the_latents(host, vae):
    """The host's own node: what it encodes outside of the mask is what the picture holds there."""
    import nodes

    pictures, mask = fresh(1, seed=9), torch.zeros(1, 128, 128)
    mask[:, 32:96, 32:96] = 1
    (encoded,) = nodes.VAEEncodeForInpaint().encode(vae, pictures, mask, grow_mask_by=0)
    assert encoded["samples"].shape == (1, 4, 16, 16) and encoded["noise_mask"].shape[-2:] == (128, 128)
    restored = vae.decode(encoded["samples"])
    assert (restored - pictures)[:, :16].abs().mean() < 0.03


def test_weights_are_small(L):
    assert (L.WEIGHTS / "autoencoder.safetensors").stat().st_size < 4e6


# --------------------------------------------------------------------------------------------------------- caption encoder


def test_words_know_their_object(L):
    """A word is encoded alike wherever it stands in the description of an object, and otherwise in that of another."""
    clip = L.load_clip()
    caption = "a small red disc left of a large striped blue ring on a blue background"
    ((context, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
    assert context.shape == (1, 24, 64) and extra["pooled_output"].shape == (1, 64)
    words, vector = caption.split(), dict(L.word_table())
    phrases = [1] * 6 + [2] * 5 + [4] * 4
    for index, (word, phrase) in enumerate(zip(words, phrases, strict=True)):
        row = vector["words.weight"][L.scenes.WORDS.index(word) + 1] + vector["phrases.weight"][phrase]
        assert torch.allclose(context[0, index], row, atol=1e-5)
    assert context[0, len(words) :].abs().max() == 0
    rows = torch.cat([vector["words.weight"][1:], vector["phrases.weight"][1:]])
    assert torch.allclose(rows @ rows.T, 64 * torch.eye(len(rows)), atol=1e-3)


def test_all_captions_fit(L):
    encoder = L.SceneEncoder()
    drawn = L.scenes.random_scenes(500, torch.Generator().manual_seed(1), shares=(0, 0, 1))
    context, pooled = encoder.encode(L.scenes.captions(drawn))
    assert context.shape == (500, 24, 64) and pooled.shape == (500, 64)


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(("model", "strength", "millions"), [
    ("unet", "main", 1.9), ("unet", "weak", 0.5), ("mmdit", "main", 2.8), ("mmdit", "weak", 0.4),
])  # fmt: skip
def test_networks_are_as_large_as_said(L, model, strength, millions):
    from workshop.train import initialise

    host_model = L.build(model, strength)
    net = host_model.diffusion_model
    initialise(net, 1)
    assert abs(sum(value.numel() for value in net.parameters()) / 1e6 - millions) < 0.1
    with torch.no_grad():
        out = net(torch.randn(2, 4, 16, 16), torch.tensor([500.0, 3.0]), context=torch.randn(2, 24, 64), y=torch.randn(2, 64))
    assert out.shape == (2, 4, 16, 16)
    assert host_model.latent_format.spacial_downscale_ratio == 8 and host_model.latent_format.latent_channels == 4


def test_the_first_transformer_reads_captions(L, vae):
    """Half-way between noise and picture, the right captions help it more than those of other pictures."""
    generator = torch.Generator().manual_seed(11)
    drawn = L.scenes.random_scenes(32, generator)
    latents = vae.encode(L.scenes.draw(drawn, generator).movedim(1, -1))
    noise = torch.randn(latents.shape, generator=generator)
    encoder = L.SceneEncoder()
    encoder.load_sd(L.word_table())
    context, pooled = encoder.encode(L.scenes.captions(drawn))
    net = L.load_model("mmdit", "main").model.diffusion_model

    def error(rows):
        flow = net((latents + noise) / 2, torch.full((32,), 500.0), context=context[rows], y=pooled[rows])
        return (flow - (noise - latents)).square().mean()

    right, wrong = error(torch.arange(32)), error(torch.arange(32).roll(1))
    assert right < 0.3
    assert right < 0.8 * wrong


# ------------------------------------------------------------------------------------------------------------- training


def toy(tmp_path, steps, snapshots=None):
    """A run that learns a matrix."""
    from workshop import trainer

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    wanted = torch.randn(8, 4)

    def loss(step):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        return (net(x) - x @ wanted).square().mean()

    files = trainer.Files(tmp_path / "state" / "toy.pt", tmp_path / "toy.safetensors")
    return trainer.Trainer(net, loss, trainer.Plan(steps, 0.05, 1e-2, ()), files, lambda net: {"size": 1.0}, snapshots)


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    through, stopped = toy(tmp_path / "a", 300), toy(tmp_path / "b", 300)
    losses = [through.train_step() for _ in range(300)]
    first = [stopped.train_step() for _ in range(120)]
    stopped.save()
    resumed = toy(tmp_path / "b", 300)
    second = [resumed.train_step() for _ in range(180)]
    assert first + second == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < 0.1 * losses[0]


def test_a_run_goes_on_from_the_weights_alone(tmp_path):
    from workshop import trainer

    run = toy(tmp_path, 200)
    for _ in range(100):
        last = run.train_step()
    run.save()
    run.files.state.unlink()
    resumed = toy(tmp_path, 200)
    assert (resumed.step, resumed.since) == (100, 100)
    assert resumed.train_step() < 3 * last + 0.1
    assert resumed.optimizers[0].param_groups[0]["lr"] < 0.05 / trainer.WARM_UP  # it warms up again


def test_medium_is_main_at_a_quarter_of_its_way(tmp_path):
    run = toy(tmp_path, 40, {10: tmp_path / "medium.safetensors"})
    run.run()
    steps = []
    for name in ("medium", "toy"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            steps.append(file.metadata()["step"])
    assert steps == ["10", "40"]
    assert run.files.curve.read_text().splitlines()[0] == "step,seconds,loss,size"


def test_the_stream_is_the_same_for_the_same_numbers(L, tmp_path):
    from workshop import latents

    def stream():
        return latents.Stream(latents.Store(tmp_path, L.WEIGHTS / "autoencoder.safetensors", size=8), first=1, most=2, uses=2)

    once, again = stream(), stream()
    for seen in (0, 16, 40):
        first, second = (each.batch(seen, 5, torch.Generator().manual_seed(seen)) for each in (once, again))
        assert torch.equal(first.latents, second.latents)
        assert torch.equal(first.scenes.objects, second.scenes.objects)
        assert first.latents.shape == (5, 4, 16, 16)
    assert sorted(again.shards) == [1, 2]  # the first has had its time
    picture = L.load_autoencoder().decode(first.latents[:1])
    assert picture.shape == (1, 3, 128, 128)


def test_orthogonal_updates():
    from workshop import muon

    for shape in ((12, 30), (30, 12)):
        values = torch.linalg.svdvals(muon.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
        assert values.min() > 0.6 and values.max() < 1.3
