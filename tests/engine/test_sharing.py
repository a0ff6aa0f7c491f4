"""Shared beginnings in sampling runs: which rows are known to be equal, the results, and what the log and the report say."""

from __future__ import annotations

import pytest
import tools
import torch
from conditioning_tools import EVERYWHERE, control_net, with_values
from tools import close, cond, empty_latent, guided, log_of, sample, tiny

from lodestar.benchmarks._flops import counted_flops
from lodestar.guiders.engine import rows
from lodestar.guiders.engine.sharing import chunks_of
from lodestar.guiders.network.identity_attention import IdentityAttention
from lodestar.guiders.network.layers import resolve_layers
from lodestar.guiders.policies.adaptive import AdaptiveGuidance
from lodestar.guiders.terms.pag import PAG
from lodestar.pictures.report import table

STEPS, BATCH = 3, 2


def pag(kind: str, layers: str = "auto") -> PAG:
    return PAG(perturbation=IdentityAttention(resolve_layers(tiny(kind), layers)), scale=2.0)


def run(model, **more) -> torch.Tensor:
    return sample(model, **{"steps": STEPS, "latent": empty_latent(model, BATCH)} | more)


@pytest.fixture
def compared(monkeypatch):
    """Samples without sharing and with it; the log of that. The results have to be equal to float rounding."""

    def compare(model, *rules, **more):
        results, logs = [], []
        for found in (lambda *_: None, chunks_of):
            monkeypatch.setattr(rows, "chunks_of", found)
            chosen = guided(model, *rules)
            results.append(run(chosen, **more))
            logs.append(log_of(chosen))
        assert close(*results, 1e-5)
        assert (logs[0].nfe, logs[0].rows, logs[0].calls) == (logs[1].nfe, logs[1].rows, logs[1].calls)
        assert not logs[0].shares
        return logs[1]

    return compare


def in_part(log, name: str = "PAG") -> bool:
    return bool(log.shares) and all(0 < share < 1 for share in log.shares[name].values())


@pytest.mark.parametrize(("kind", "cfg"), [("unet", 4.0), ("mmdit", 4.0), ("mmdit", 1.0)])
def test_a_run_is_equal_and_costs_less(compared, kind, cfg):
    """Counted by torch, what is saved is what the log says, but for the attention that PAG does not compute in its layer."""
    model = tiny(kind)
    log = compared(model, pag(kind), cfg=cfg)
    assert in_part(log) and set(log.shares["PAG"]) == set(range(STEPS))
    counted = {}
    for name, chosen in (("alone", model), ("PAG", guided(model, pag(kind)))):
        with counted_flops() as flops:
            run(chosen, cfg=cfg)
        counted[name] = flops.get_total_flops()
    alone = 1 if cfg == 1 else 2
    assert counted["PAG"] / counted["alone"] * alone - alone == pytest.approx(log.shares["PAG"][0], abs=0.05)


@pytest.mark.parametrize("conditioning", EVERYWHERE, ids=lambda f: f.__name__)
def test_conditioning_of_every_kind(compared, conditioning):
    model = tiny("unet")
    log = compared(model, pag("unet"), **{"latent": empty_latent(model, 1)} | conditioning(model))
    assert in_part(log)


@pytest.mark.parametrize("on", [("positive",), ("positive", "negative")], ids="+".join)
def test_control_nets(compared, on):
    conds = {name: cond(i) for i, name in enumerate(("positive", "negative"), start=1)}
    control = control_net()
    conds |= {name: with_values(conds[name], control=control, control_apply_to_uncond=False) for name in on}
    log = compared(tiny("unet"), pag("unet", "output:0"), **conds)
    assert in_part(log)


def test_several_terms_fork_where_each_begins(compared):
    log = compared(tiny("unet"), pag("unet", "middle"), pag("unet", "output:1"), pag("unet", "input:1"))
    assert [*log.shares] == ["PAG 1", "PAG 2", "PAG 3"] and all(in_part(log, name) for name in log.shares)
    shares = [of_term[0] for of_term in log.shares.values()]
    assert shares[1] < shares[0] < shares[2]


def test_rows_that_adaptive_guidance_leaves_out(compared):
    """Pictures of a batch switch at different steps: then there are parts of the call, and each shares."""
    rule = AdaptiveGuidance(threshold=0.9, switch="same_step")
    latent = {"latent": empty_latent(tiny("unet"), 4), "steps": 6}
    log = compared(tiny("unet"), pag("unet"), rule, **latent)
    assert in_part(log) and log.saved > 0


def test_where_the_host_splits_the_batch_nothing_is_shared(compared, monkeypatch):
    """When memory is short; the perturbed rows then are in a call of their own."""
    monkeypatch.setattr(tools.comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)
    log = compared(tiny("unet"), pag("unet"))
    assert log.calls == 3 * STEPS and not log.shares


def test_another_packs_patch_is_named_in_the_report(compared):
    class Painter:
        def __call__(self, h, options):
            return h + torch.arange(len(h)).view(-1, 1, 1, 1) / len(h)

    model = tiny("unet").clone()
    model.set_model_input_block_patch(Painter())
    log = compared(model, pag("unet"))
    assert log.shares == {"PAG": dict.fromkeys(range(STEPS), 1.0)} and log.unshared == "Painter"
    assert log.to_json()["shares"] == {"PAG": 1.0} and log.to_json()["unshared"] == "Painter"
    line = next(line for line in table(log).splitlines() if line.startswith("PAG"))
    assert line.split(maxsplit=2)[1:] == ["1", "of an evaluation: nothing is shared, because Painter changes layers before its own"]


def test_the_report_says_what_a_branch_costs():
    model = guided(tiny("unet"), pag("unet"))
    run(model)
    share = next(iter(log_of(model).shares["PAG"].values()))
    line = next(line for line in table(log_of(model)).splitlines() if line.startswith("PAG"))
    assert line.split(maxsplit=2)[1:] == [f"{share:.2g}", "of an evaluation: what comes before its layers is computed once"]


def test_a_pack_that_regroups_rows_gets_all_of_them(compared):
    """Tiles in the batch: no chunk of it is known to equal another."""
    model = tiny("unet").clone()

    def tiled(apply_model, args):
        x, c = args["input"], args["c"]
        halves = [apply_model(part, t, **c | {"c_crossattn": c["c_crossattn"].repeat(2, 1, 1)}) for part, t in (
            (torch.cat(x.chunk(2, dim=-1)), args["timestep"].repeat(2)),
        )]  # fmt: skip
        return torch.cat(halves[0].chunk(2), dim=-1)

    model.set_model_unet_function_wrapper(tiled)
    log = compared(model, pag("unet"))
    assert not log.shares
