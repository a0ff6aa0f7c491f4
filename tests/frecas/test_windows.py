"""Windows of self-attention: against full attention under an explicit mask, in the host's networks, and in cascades."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import tools
import torch
from comfy.ldm.modules.attention import optimized_attention
from frecas_tools import cascade, pixels, sample, text
from network_tools import BUILD, Case, random
from torch import Tensor

from lodestar.benchmarks._sampling import decoded, prompts
from lodestar.demo import models
from lodestar.demo.shapes import captions, random_scenes
from lodestar.guiders.engine import rows
from lodestar.guiders.engine.keys import WINDOWS
from lodestar.guiders.engine.sharing import chunks_of
from lodestar.guiders.frecas.cascade import Cascade
from lodestar.guiders.frecas.map_patches import AddedMaps, Chunks
from lodestar.guiders.frecas.maps import Maps
from lodestar.guiders.frecas.windows import WindowedAttention, Windows, borders, windowed, with_windows
from lodestar.guiders.network.calls import Call
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import resolve_layers
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.terms.pag import PAG

# --- the oracle: full attention in which what lies in another window has a logit of -inf -----------------------------


def window_of(token: int, length: int, count: int, shifted: bool) -> int:
    """The number of the window in which the middle of a token lies. The outer ones reach to the picture's edges."""
    place = Fraction(2 * token + 1, 2) * count / length + Fraction(1 if shifted else -1, 4)
    return min(max(math.ceil(place) - 1, 0), count - 1)


def allowed(height: int, width: int, windows: Windows, text: int) -> Tensor:
    """Which token may attend to which [T + h*w, T + h*w]: text first."""
    rows = [window_of(y, height, windows.down, windows.shifted) for y in range(height)]
    columns = [window_of(x, width, windows.across, windows.shifted) for x in range(width)]
    number = torch.tensor([[100 * row + column for column in columns] for row in rows]).flatten()
    seen = torch.ones(text + len(number), text + len(number), dtype=torch.bool)
    seen[text:, text:] = number[:, None] == number
    return seen


def masked(seen: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **kw: Any) -> Tensor:
    """The host's attention function in float64, where ``seen`` is false with logits of -inf."""
    by_head = not kw.get("skip_reshape")
    if by_head:
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits + (mask.double().log() if mask.dtype == torch.bool else mask.double())
    out = (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()).to(q.dtype)
    return out if kw.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)


GRIDS = [(4, 4, 2, 2), (5, 7, 3, 2), (7, 6, 4, 1), (2, 3, 4, 4), (8, 8, 3, 5)]  # high, wide, windows across, down


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("height", "width", "across", "down"), GRIDS)
def test_windows_are_full_attention_under_a_mask(height, width, across, down, shifted):
    windows = Windows(across, down, shifted, (height, width))
    for text_tokens in (0, 3):
        tokens = text_tokens + height * width
        seen = allowed(height, width, windows, text_tokens)
        for shape, kw in (((2, tokens, 8), {}), ((2, 2, tokens, 4), {"skip_reshape": True, "skip_output_reshape": True})):
            q, k, v = (random(*shape, seed=seed, dtype=torch.float64) for seed in range(3))
            hidden = torch.arange(tokens).view(1, 1, 1, -1) >= min(2, text_tokens)  # padding of the text
            for mask in (None, hidden, random(2, 1, tokens, tokens, seed=5, dtype=torch.float64)):
                full = partial(masked, torch.tensor(True))
                found = windows.attention(Call.of(full, q, k, v, 2, mask, transformer_options={}, **kw))
                torch.testing.assert_close(found, masked(seen, q, k, v, 2, mask, **kw), rtol=1e-12, atol=1e-12)


def test_shifted_windows_have_their_borders_inside_the_others():
    assert borders(16, 4, False) == [0, 5, 9, 13, 16]
    assert borders(16, 4, True) == [0, 3, 7, 11, 16]
    assert borders(10, 4, False) == [0, 3, 6, 8, 10]
    for length, count in ((16, 1), (1, 4)):
        assert borders(length, count, False) == borders(length, count, True) == [0, length]


# --- in the host's networks ------------------------------------------------------------------------------------------


def in_windows(case: Case, windows: Windows, **options: Any) -> dict[str, Any]:
    """The options of one forward pass of a network, as it gets them in a run: what is on the model, the engine's, then the windows."""
    perturbed = options.pop("perturbed", None)
    options["optimized_attention_override"] = WindowedAttention(options.get("optimized_attention_override"))
    if perturbed is not None:
        options = case.rule(perturbed).patch(options, [False, True, False])
    return windowed(case.network, windows, options, case.args[0])


def oracle(case: Case, windows: Windows, monkeypatch: pytest.MonkeyPatch, perturbed: str | None = None) -> Tensor:
    """The network with masked self-attention: found by its modules in a UNet, by its tokens in SD3.

    perturbed: a layer where every token of the picture is in a window of its own, which is what PAG makes of it.
    """

    def seen_in(size: Sequence[int], text_tokens: int, alone: bool) -> Tensor:
        return allowed(*size, Windows(size[1], size[0], False) if alone else windows, text_tokens)

    def forward(module: Any, x: Tensor, context: Any = None, value: Any = None, mask: Any = None, **kw: Any) -> Tensor:
        seen = seen_in(kw["transformer_options"]["activations_shape"][-2:], 0, module is case.layers.get(perturbed))
        return module.to_out(masked(seen, module.to_q(x), module.to_k(x), module.to_v(x), module.heads))

    calls: list[int] = []

    def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        seen = seen_in(size, k.shape[1] - size[0] * size[1], f"double:{len(calls) - 1}" == perturbed)
        return masked(seen, q, k, v, heads)

    size = tuple(side // 2 for side in case.args[0].shape[-2:])
    layers = [module.attn1 for module in case.network.modules() if hasattr(module, "attn1")]
    for layer in layers:
        monkeypatch.setattr(layer, "forward", partial(forward, layer))
    out = case.run(**({} if layers else {"optimized_attention_override": override}))
    monkeypatch.undo()
    return out


def doubled(name: str) -> Case:
    """A network of the host in float64, on inputs that windows do not divide. The UNet's text is as long as a level has tokens."""
    case = BUILD[name]()
    case.network.double()
    case.args = (random(3, 4, 12, 16, dtype=torch.float64), *case.args[1:])
    case.kwargs = {key: value.double() for key, value in case.kwargs.items()}
    if name == "unet":
        case.kwargs["context"] = random(3, 6 * 8, 16, seed=9, dtype=torch.float64)
    return case


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", ["unet", "mmdit", "mmdit_dual"])
def test_a_network_in_windows_equals_the_oracle(name, shifted, monkeypatch):
    case = doubled(name)
    windows = Windows(3, 2, shifted)
    out = case.run(**in_windows(case, windows))
    torch.testing.assert_close(out, oracle(case, windows, monkeypatch), rtol=1e-9, atol=1e-9)
    assert (out - case.run()).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "layer"), [("unet", "middle:0.1"), ("mmdit", "double:2")])
def test_perturbed_rows_and_windows_go_together(name, layer, monkeypatch):
    """PAG's rows lose the layer's attention and have windows in all others; the rest of the batch has windows in this one as well."""
    case, windows = doubled(name), Windows(3, 2, True)
    out = case.run(**in_windows(case, windows, perturbed=layer))
    torch.testing.assert_close(out[[0, 2]], oracle(case, windows, monkeypatch)[[0, 2]], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out[1], oracle(case, windows, monkeypatch, layer)[1], rtol=1e-6, atol=1e-6)


CALLS = {"unet": {(120, 120), (72, 72), (30, 30), (18, 18), (192, 48), (48, 48)}, "mmdit": {(30, 35), (18, 23), (5, 53)}}


@pytest.mark.parametrize(("name", "calls"), CALLS.items())
def test_an_override_that_is_there_computes_the_windows(name, calls, monkeypatch):
    """Sage and flash attention nodes go on, with the queries and keys of a window; cross-attention and the text's queries are whole."""
    seen, case, windows = set(), doubled(name), Windows(2, 1, False)

    def other(func: Callable, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.add((q.shape[1], k.shape[1]))
        return func(q, k, *args, **kwargs)

    out = case.run(**in_windows(case, windows, optimized_attention_override=other))
    torch.testing.assert_close(out, oracle(case, windows, monkeypatch), rtol=1e-9, atol=1e-9)
    assert seen == calls


def test_another_packs_replacement_of_a_layer_goes_on():
    """A replacement that does its own attention has the layer to itself; so has a patch that merges tokens or divides them."""
    case, windows = doubled("unet"), Windows(2, 2, False)
    attn1 = {("middle", 0): lambda q, k, v, extra: v.roll(1, dims=1)}
    options = in_windows(case, windows, patches_replace={"attn1": attn1})
    replaced = options["patches_replace"]["attn1"]
    q, v = random(1, 12, 32, dtype=torch.float64), random(1, 12, 32, seed=1, dtype=torch.float64)
    extra = options | {"activations_shape": [1, 32, 3, 4], "n_heads": 2, "attn_precision": None}
    assert replaced["middle", 0, 1](q, q, v, extra).equal(v.roll(1, dims=1)) and attn1.keys() == {("middle", 0)}
    for queries, keys in ((q[:, :7], q), (q[:, :6], q[:, :6])):
        found = replaced["input", 1, 0](queries, keys, v[:, : keys.shape[1]], extra)
        torch.testing.assert_close(found, masked(torch.tensor(True), queries, keys, v[:, : keys.shape[1]], 2))


def test_maps_are_added_to_windows():
    """SD3's term of the maps is the same with windows and without."""
    q, k, v = (random(1, 3 + 8, 8, seed=seed) for seed in range(3))
    store = Maps()
    store.add("a", (2, 4), random(1, 8, 3, seed=3).softmax(-1))
    inner, options = WindowedAttention(None), {WINDOWS: Windows(2, 1, False, (2, 4))}
    plain, mixed = (AddedMaps(Chunks(use, None, ("a",), [False], None), 0.5, (2, 4), inner) for use in (None, store))
    full, other = (AddedMaps(Chunks(use, None, ("a",), [False], None), 0.5, (2, 4), None) for use in (None, store))
    run = lambda attention: attention(optimized_attention, q, k, v, 2, transformer_options=options)  # noqa: E731
    torch.testing.assert_close(run(mixed) - run(plain), run(other) - run(full), rtol=1e-4, atol=1e-5)
    assert not tools.close(run(plain), run(full), 1e-3)


# --- in cascades -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_a_stage_without_windows_is_what_it_was(kind):
    """To the bit; and what has windows has them in its own stage alone."""
    model, stages = pixels(kind), text(kind, ("8x8", "16x16"), (2, 2))
    plain, one, four = (sample(model, stages + end, map_weight=0.6) for end in ("", ", windows 1x1", ", windows 2x2"))
    assert all(a.equal(b) for a, b in zip(plain, one, strict=True))
    assert four[0].equal(plain[0]) and not tools.close(four[1], plain[1], 1e-3)
    assert with_windows(model, 1, 1) is model


def test_windows_shift_with_the_step():
    """All evaluations of a step have the same ones."""
    model, shifted = pixels("mmdit"), []

    def spy(_, args, kwargs):
        windows = kwargs["transformer_options"].get(WINDOWS)
        shifted.append(windows and windows.shifted)

    model.model.diffusion_model.register_forward_pre_hook(spy, with_kwargs=True)
    sample(model, text("mmdit", ("8x8", "16x16"), (2, 4)) + ", windows 2x2", sampler="heun", cfg=1.0)
    assert shifted == [None] * 3 + [False, False, True, True, False, False, True]


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_guidance_sees_the_same_windows_in_all_its_branches(kind):
    """PAG that breaks nothing adds nothing, in uneven windows, two prompts in areas of their own, and a batch."""
    model, stages = pixels(kind), text(kind, ("16x16", "24x20"), (2, 2)) + ", windows 3x2"
    areas = [*tools.cond(1, area=(16, 8, 0, 0), strength=1.0), *tools.cond(3, tokens=7, area=(16, 8, 0, 8), strength=1.0)]
    unbroken = tools.guided(model, PAG(perturbation=IdentityAttention(()), scale=3.0))
    settings = {"positive": areas, "batch": 2, "map_weight": 0.6}
    result = sample(model, stages, **settings)[-1]
    assert tools.close(sample(unbroken, stages, **settings)[-1], result, 1e-4)
    assert result.isfinite().all() and not result[0].equal(result[1])


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_beginnings_are_shared_in_windows_and_with_maps(kind, monkeypatch):
    model = pixels(kind)
    perturbed = tools.guided(model, PAG(perturbation=IdentityAttention(resolve_layers(model, "auto")), scale=2.0))
    stages, results, shares = text(kind, ("8x8", "16x16"), (2, 2)) + ", windows 2x2", [], []
    for found in (lambda *_: None, chunks_of):
        monkeypatch.setattr(rows, "chunks_of", found)
        results.append(sample(perturbed, stages, batch=2, map_weight=0.6)[-1])
        shares.append(tools.log_of(perturbed).shares)
    assert tools.close(*results, 1e-4)
    assert not shares[0] and max(shares[1]["PAG"].values()) < 1


@pytest.mark.parametrize("kind", ["unet", "mmdit"])
def test_adaptive_guidance_leaves_out_rows_in_windows(kind):
    """It begins anew in every stage, and at this threshold ends CFG after one step of each."""
    model = tools.guided(pixels(kind), AdaptiveGuidance(threshold=-1.0))
    with tools.counted(model) as rows:
        result = sample(model, text(kind, ("8x8", "16x16"), (3, 3)) + ", windows 2x2", batch=2, map_weight=0.6)[-1]
    assert sum(rows) == 2 * (3 + 1 + 3 + 1) and result.isfinite().all()


@pytest.mark.parametrize("windows", ["2", "2x", "0x2", "17x1"])
def test_wrong_windows_are_one_sentence(windows):
    """Sixteen patches of two pixels are on each side."""
    message = "1x1 to 16x16 are accepted" if windows in ("0x2", "17x1") else "is not a stage; write, for example, .*windows 2x2"
    with pytest.raises(ValueError, match=rf"^FreCaS Cascade: [^\n]*{message}[^\n]*\.?$"):
        cascade(pixels("mmdit"), text("mmdit") + f", windows {windows}")


def test_a_network_without_known_windows_is_refused_before_anything_runs():
    model = tools.tiny("wan")
    with (
        tools.counted(model) as rows,
        pytest.raises(ValueError, match=r"^FreCaS Cascade: windows work with [^\n]*, not with WanModel; leave them out"),
    ):
        sample(model, "8x8: 3 steps, end 0.6; 16x12: 2 steps, windows 2x2", latent={"samples": torch.zeros(1, 16, 3, 8, 8)})
    assert not rows


# --- seams -----------------------------------------------------------------------------------------------------------


def large(model: str, windows: str) -> Tensor:
    """Pictures [B, 3, 64, 64] of a demo model, twice the size that it knows."""
    end = {"unet": 0.572, "mmdit": 0.3}[model]
    whole = Cascade.read(
        f"32x32: 4 steps, end {end}; 64x64: 4 steps{windows}", model=models.load_model(model, "main"), vae=models.load_vae(), cfg=4.0,
        sampler="euler", scheduler=models.SCHEDULERS[model], gamma=-1.0, high_scale=8.0, map_weight=0.6,
    )  # fmt: skip
    scenes = random_scenes(4, torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return decoded(whole.sample(*prompts(captions(scenes)), 3, whole.latent(None, 4))[-1]["samples"])


def seam(pictures: Tensor, places: Sequence[int], patch: int) -> float:
    """Gradient of pictures [B, 3, H, W] across lines at ``places``, down and across, over that at the other lines between patches.

    Small steps, such as a seam in a plain area would be, count in full, the edges of objects no more than they.
    """

    def steps(lines: Sequence[int]) -> Tensor:
        pairs = [turned[..., line] - turned[..., line - 1] for turned in (pictures, pictures.mT) for line in lines]
        return torch.stack(pairs).abs().clamp(max=0.05).mean()

    return float(steps(places) / steps([line for line in range(patch, pictures.shape[-1], patch) if line not in places]))


@pytest.mark.parametrize("model", models.MODELS)
def test_windows_leave_no_seams(model):
    """Across the borders of windows a picture changes as much as elsewhere, compared with the same one without windows."""
    plain, ours = large(model, ""), large(model, ", windows 2x2")
    assert not tools.close(plain, ours, 1e-2)
    for shifted in (False, True):
        places = [4 * cut for cut in borders(16, 2, shifted)[1:-1]]
        assert seam(ours, places, 4) < 1.1 * seam(plain, places, 4)
