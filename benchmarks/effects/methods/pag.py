"""PAG: better structure with and without a prompt (Ahn et al. 2024, arXiv 2403.17377, tables 1 to 3)."""

from __future__ import annotations

from lodestar.demo.models import MODELS

from ..cells import Cell, guided, node
from ..claims import Claim, Results
from ..method import Curve, Method, cells_of, cfg
from ..metrics import FRECHET, PRECISION, RECALL, Metric

SCALES = (0.5, 1.0, 2.0, 3.0)
LAYERS = {"unet": "output:1", "mmdit": "double:1"}  # the best of each model; its middle block hardly matters to the unet
WHY = (
    "with one object on a few patches, broken self-attention makes other mistakes than the model itself makes, so that stepping away "
    "from it does not lead to better pictures. The implementation is not the reason: it equals ComfyUI's own node on a UNet's middle "
    "block, and explicit masks of minus infinity everywhere else (tests/engine/test_host_nodes.py, "
    "tests/network/test_identity_attention.py)."
)
FALLS = Metric("fall of recall", RECALL.of, -1)


def pag(model: str, scale: float, prompts: bool) -> Cell:
    """PAG without CFG."""
    label = f"PAG {scale:g}" + ("" if prompts else ", no prompt")
    return guided(model, label, 1.0, node("LodestarPAG", scale=scale, layers=LAYERS[model]), prompts=prompts)


def alone(model: str, prompts: bool) -> Cell:
    """The model without guidance."""
    return cfg(model, 1.0) if prompts else guided(model, "no prompt", 1.0, prompts=False)


def sweep(model: str, prompts: bool) -> Curve:
    """PAG over its scale."""
    label = "with prompts" if prompts else "no prompt"
    return Curve(label, model, ((0.0, alone(model, prompts)), *((scale, pag(model, scale, prompts)) for scale in SCALES)))


def claims(results: Results) -> list[Claim]:
    """The best scale against the model without PAG."""
    rows = []
    for model in MODELS:
        for prompts in (False, True):
            without, *guided_cells = cells_of(sweep(model, prompts))
            best = results.best(guided_cells, FRECHET)
            kind = "with prompts" if prompts else "without a prompt"
            rows += [
                Claim(f"{kind}, better distribution", best, without, FRECHET, why=WHY),
                Claim(f"{kind}, more realistic pictures", best, without, PRECISION, why=WHY),
                Claim(f"{kind}, less of the data is covered", best, without, FALLS, why=WHY),
            ]
    return rows


METHOD = Method(
    title="PAG (Perturbed-Attention Guidance)",
    axis="PAG scale",
    claims=claims,
    curves=tuple(sweep(model, prompts) for model in MODELS for prompts in (True, False)),
    strips=tuple(cell for model in MODELS for prompts in (True, False) for cell in (alone(model, prompts), pag(model, 1.0, prompts))),
    panels=(FRECHET, PRECISION, RECALL),
)
