"""Wrappers around modules: there for one pass in one thread, and nothing is left afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_cases import build_ernie, build_hidream, build_pixart
from network_tools import Case
from torch import Tensor, nn

from lodestar.guiders.engine.keys import AROUND
from lodestar.guiders.network.around import around, with_attention


class Double(nn.Module):
    def forward(self, x: Tensor, *, add: float = 0.0) -> Tensor:
        return 2 * x + add


def plus(amount: float) -> Callable[[Callable], Callable]:
    return lambda forward: lambda *args, **kwargs: forward(*args, **kwargs) + amount


def test_the_last_one_is_the_outermost_and_none_stays():
    module, x = Double(), torch.ones(1)
    with around(module, plus(1)):
        with around(module, lambda forward: lambda x: 10 * forward(x)):
            assert module(x) == 30
        assert module(x) == 3 and module(x, add=4) == 7
    assert module(x) == 2 and "forward" not in module.__dict__


def test_it_goes_off_in_any_order_and_after_errors():
    module, x = Double(), torch.ones(1)
    first, second = around(module, plus(1)), around(module, plus(10))
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert module(x) == 12
    second.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="out of memory"), around(module, plus(1)):
        raise RuntimeError("out of memory")
    assert module(x) == 2 and "forward" not in module.__dict__


def test_what_another_pack_put_on_the_module_stays():
    module, x = Double(), torch.ones(1)
    module.forward = theirs = lambda x: 5 * x
    with around(module, plus(1)):
        assert module(x) == 6
    assert module.forward is theirs
    with around(module, plus(1)):
        module.forward = later = lambda x: 7 * x
    assert module.forward is later


def test_threads_do_not_meet_each_others_wrappers():
    module, x, results = Double(), torch.ones(1), {}
    both = threading.Barrier(2, timeout=10)

    def run(name: float) -> None:
        with around(module, plus(name)):
            both.wait()
            results[name] = float(module(x))
            both.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in (1.0, 10.0)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == {1.0: 3.0, 10.0: 12.0} and "forward" not in module.__dict__


# --- in networks -----------------------------------------------------------------------------------------------------


def forwards(case: Case) -> list[str]:
    return [name for name, module in case.network.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("build", [build_pixart, build_ernie, build_hidream])
def test_nothing_is_left_in_a_network(build, host):
    """Neither after a pass nor after one that fails. Without rows that are perturbed nothing changes."""
    case = build()
    clean, rule = case.run(), case.rule("auto")
    options = rule.patch({}, [True] * 3)
    with options[AROUND][0](case.network):
        assert forwards(case)
    case.run(**options)
    block = next(iter(case.layers.values()))
    handle = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        case.run(**case.rule(next(iter(case.layers))).patch({}, [True] * 3))
    handle.remove()
    assert forwards(case) == []
    assert case.run().equal(clean)


def test_attention_that_another_pack_replaced_is_refused(host):
    case = build_pixart()
    attention = case.network.blocks[1].attn
    own = type(attention).forward
    attention.forward = lambda *args, **kwargs: own(attention, *args, **kwargs)
    with pytest.raises(ValueError, match=r"^PAG \(Perturbed-Attention Guidance\) does not reach the layer double:1: another node has "):
        case.perturbed(case.rule("double:1"), [False, True, False])
    assert with_attention(Double().forward, print) is None


def test_attention_is_seen_by_the_wrapped_module_alone(host):
    """The function of the host stays what it is for everybody else."""
    from comfy.ldm.pixart import blocks

    case, seen = build_pixart(), []
    ordinary = blocks.optimized_attention

    def override(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(func is ordinary)
        return func(*args, **kwargs)

    with around(case.network.blocks[0].attn, lambda forward: with_attention(forward, override)):
        case.run()
    assert seen == [True] and blocks.optimized_attention is ordinary


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_pictures_are_those_of_the_unfused_reference(cfg, host):
    import tools

    model = tools.tiny("pixart")
    rule = tools.pag(model)
    more = {"steps": 3, "cfg": cfg, "latent": tools.empty_latent(model, 1, 8)}
    guided = tools.guided(model, rule)
    with tools.counted(model) as rows:
        ours = tools.sample(guided, **more)
    assert rows == [2 if cfg == 1.0 else 3] * 3
    assert tools.close(ours, tools.sample(tools.reference(model, rule), **more))
    assert not tools.close(ours, tools.sample(model, **more), 1e-3)
    assert not [name for name, module in model.model.named_modules() if "forward" in module.__dict__]
