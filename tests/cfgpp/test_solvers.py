"""CFG++ in float64 on distributions whose denoisers are known exactly. No host.

The oracles are k-diffusion's formulas with the paper's rule, on y = x / a and rho = s / a, where every path is x0 + rho noise; and VP-DDIM.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lodestar.guiders.cfgpp import solvers as cfgpp
from lodestar.guiders.cfgpp.solvers import SOLVERS, Schedule, ancestral, cfgpp_step, ddim, decay, equivalent_cfg
from lodestar.guiders.spaces import Level, level_at, levels_of

EDM = [14.6, 9.0, 5.2, 3.0, 1.7, 0.9, 0.4, 0.12, 0.0]
FLOW = [0.98, 0.9, 0.8, 0.66, 0.5, 0.33, 0.2, 0.08, 0.0]
PATHS = {"edm": (EDM, False), "flow": (FLOW, True), "flow from pure noise": ([1.0, *FLOW[1:]], True)}
INSIDE = ["edm", "flow"]  # where y = x / a exists everywhere
LAMBDAS = [0.0, 0.3, 0.6, 1.0, 1.7]
STOCHASTIC = [name for name, solver in SOLVERS.items() if solver.split is not cfgpp.no_noise]

MEANS = torch.tensor([[-1.5, 0.5], [2.0, 1.0], [0.3, -2.0]], dtype=torch.float64)
WIDTH = 0.4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(x: Tensor, level: Level, means: Tensor = MEANS) -> Tensor:
    """E[x0 | x] for x0 from Gaussians of variance WIDTH^2 around the means: [B, 2] -> [B, 2]."""
    variance = level.a**2 * WIDTH**2 + level.s**2
    weight = torch.softmax(-torch.cdist(x, level.a * means).square() / (2 * variance), dim=1)
    return weight @ means + level.a * WIDTH**2 / variance * (x - level.a * weight @ means)


def cond(x: Tensor, level: Level) -> Tensor:
    """The first class alone."""
    return mixture(x, level, MEANS[:1])


class Model:
    """``predict`` for the solvers; keeps what it was asked."""

    def __init__(self, flow: bool, lambda_: float, conditional=cond, unconditional=mixture) -> None:
        self.flow, self.lambda_, self.conditional, self.unconditional = flow, lambda_, conditional, unconditional
        self.asked: list[tuple[float, int | None]] = []

    def __call__(self, x: Tensor, sigma: Tensor, i: int | None) -> tuple[Tensor, Tensor]:
        (level,) = levels_of([float(sigma)], self.flow)
        self.asked.append((float(sigma), i))
        uncond = self.unconditional(x, level)
        return uncond + self.lambda_ * (self.conditional(x, level) - uncond), uncond


def noise_of(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The same for all samplers, from the level alone."""
    return random(5, 2, seed=round(1000 * float(sigma)))


def sample(name: str, path: str, model: Model, eta: float = 1.0, history: str = "unconditional", sigmas=None) -> Tensor:
    """A run of one of our solvers from a fixed start."""
    schedule, flow = PATHS[path]
    schedule = sigmas or schedule
    tensor = torch.tensor(schedule, dtype=torch.float64)
    solver = SOLVERS[name]
    whole = Schedule(tensor, levels_of(schedule, flow), range(len(schedule) - 1), partial(solver.split, eta=eta), noise_of, history)
    return solver.run(model, start(path, schedule), whole)


def start(path: str, schedule: list[float]) -> Tensor:
    (level,) = levels_of(schedule[:1], PATHS[path][1])
    return level.s * random(5, 2, seed=3) + level.a * random(5, 2, seed=4)


# --- the oracle: k-diffusion with the paper's rule, in (y, rho) ------------------------------------------------------


def k_diffusion(name: str, path: str, lambda_: float, eta: float = 1.0, base: bool = False, history: str = "unconditional") -> Tensor:
    """CFG++ as the spec's listings have it for a = 1; ``base``: the plain sampler of the same name on D_u."""
    schedule, flow = PATHS[path]
    levels = levels_of(schedule, flow)
    rho = [level.s / level.a for level in levels]
    y = start(path, schedule) / levels[0].a

    def predict(y: Tensor, rho: float) -> tuple[Tensor, Tensor]:
        level = level_at(rho, flow)
        u = mixture(level.a * y, level)
        return (u, u) if base else (u + lambda_ * (cond(level.a * y, level) - u), u)

    old, h_last = None, None
    for i, (now, then) in enumerate(pairwise(rho)):
        z = noise_of(torch.tensor(schedule[i]), torch.tensor(0.0))
        d, u = predict(y, now)
        if then == 0:
            y = d
            continue
        h = math.log(now / then)
        up = min(then, eta * (then**2 * (now**2 - then**2) / now**2) ** 0.5)
        down = (then**2 - up**2) ** 0.5
        if name == "euler":
            y = d + then * (y - u) / now
        elif name == "euler_ancestral":
            y = d + down * (y - u) / now + up * z
        elif name == "dpmpp_2m":
            correction = 0 if old is None else -math.expm1(-h) / (2 * h_last / h) * ((u if history == "unconditional" else d) - old)
            y = d - math.exp(-h) * u + math.exp(-h) * y + correction
        elif name == "dpmpp_2m_sde":  # every D is D_u, plus lambda Delta
            h_eta = h * (1 + eta)
            correction = 0 if old is None else -0.5 * math.expm1(-h_eta) / (h_last / h) * ((u if history == "unconditional" else d) - old)
            noise = then * math.sqrt(-math.expm1(-2 * h * eta)) * z
            y = then / now * math.exp(-h * eta) * y - math.expm1(-h_eta) * u + correction + noise + (d - u)
        elif down > 0:
            h = math.log(now / down)
            middle = math.sqrt(now * down)
            d, u = predict(middle / now * y - math.expm1(-h / 2) * u, middle)
            y = d - math.exp(-h) * u + down / now * y + up * z
        else:
            y = d + down * (y - u) / now + up * z
        old, h_last = u, h
    return y


@pytest.mark.parametrize("path", INSIDE)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("lambda_", LAMBDAS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_equals_the_listings_in_noise_to_signal_units(name, path, lambda_, eta):
    ours = sample(name, path, Model(PATHS[path][1], lambda_), eta)
    torch.testing.assert_close(ours, k_diffusion(name, path, lambda_, eta), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", INSIDE)
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_the_guided_history(name, path):
    ours = sample(name, path, Model(PATHS[path][1], 0.6), history="guided")
    torch.testing.assert_close(ours, k_diffusion(name, path, 0.6, history="guided"), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(ours, sample(name, path, Model(PATHS[path][1], 0.6)), rtol=1e-3)


# --- the invariants --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SOLVERS)
def test_lambda_0_is_the_unconditional_trajectory(name, path):
    flow = PATHS[path][1]
    assert sample(name, path, Model(flow, 0.0)).equal(sample(name, path, Model(flow, 0.0, conditional=mixture)))
    if path in INSIDE:
        torch.testing.assert_close(sample(name, path, Model(flow, 0.0)), k_diffusion(name, path, 0.0, base=True), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lambda_", LAMBDAS)
def test_equal_predictions_are_the_base_sampler_for_every_lambda(path, lambda_):
    for name in SOLVERS:
        for history in cfgpp.HISTORIES:
            same = sample(name, path, Model(PATHS[path][1], lambda_, conditional=mixture), history=history)
            if path in INSIDE:
                torch.testing.assert_close(same, k_diffusion(name, path, 0.0, base=True), rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(same, sample(name, path, Model(PATHS[path][1], 0.0, conditional=mixture)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lambda_", LAMBDAS)
def test_a_step_is_a_step_of_cfg_with_the_equivalent_weight(path, lambda_):
    schedule, flow = PATHS[path]
    for now, then in pairwise(levels_of(schedule, flow)):
        x = random(5, 2)
        c, u = cond(x, now), mixture(x, now)
        w = equivalent_cfg(lambda_, now, then)
        torch.testing.assert_close(cfgpp_step(x, u + lambda_ * (c - u), u, now, then), ddim(x, u + w * (c - u), now, then))
        if flow:
            assert w == pytest.approx(lambda_ * now.s * (1 - then.s) / (now.s - then.s))
        else:
            assert w == pytest.approx(lambda_ * now.s / (now.s - then.s))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_single_step_to_the_picture_is_cfg_with_the_weight_lambda(name, path):
    schedule, flow = PATHS[path]
    (level,) = levels_of(schedule[2:3], flow)
    x = start(path, [schedule[2]])
    out = sample(name, path, Model(flow, 0.7), sigmas=[schedule[2], 0.0])
    assert out.equal(mixture(x, level) + 0.7 * (cond(x, level) - mixture(x, level)))
    assert equivalent_cfg(0.7, level, Level(1.0, 0.0)) == 0.7


def test_vp_ddim_and_k_diffusion_agree():
    """The paper's own listing on x_vp = sqrt(abar) x_0 + sqrt(1 - abar) eps, against sigma = sqrt((1 - abar) / abar)."""
    abar = [0.005, 0.05, 0.2, 0.5, 0.8, 0.97, 1.0]
    sigmas = [math.sqrt((1 - a) / a) for a in abar]
    x = random(5, 2)
    y = x / math.sqrt(abar[0])
    for i, (now, then) in enumerate(pairwise(abar)):
        level = Level(math.sqrt(now), math.sqrt(1 - now))
        eps_c, eps_u = ((x - level.a * d(x, level)) / level.s for d in (cond, mixture))
        eps_hat = eps_u + 0.6 * (eps_c - eps_u)
        x = math.sqrt(then) * (x - level.s * eps_hat) / level.a + math.sqrt(1 - then) * eps_u
        model = Model(False, 0.6)
        y = cfgpp_step(y, *model(y, torch.tensor(sigmas[i], dtype=torch.float64), i), Level(1.0, sigmas[i]), Level(1.0, sigmas[i + 1]))
        torch.testing.assert_close(y, x / math.sqrt(then))


def test_the_formula_is_that_of_any_path():
    """The same step on VP levels themselves."""
    now, then = Level(math.sqrt(0.3), math.sqrt(0.7)), Level(math.sqrt(0.6), math.sqrt(0.4))
    x = random(5, 2)
    c, u = cond(x, now), mixture(x, now)
    expected = then.a * (u + 0.6 * (c - u)) + then.s * (x - now.a * u) / now.s
    torch.testing.assert_close(cfgpp_step(x, u + 0.6 * (c - u), u, now, then), expected)


@pytest.mark.parametrize("lambda_", LAMBDAS)
def test_the_older_flow_form_differs_by_t_lambda_delta(lambda_):
    """x' = D_lambda + t' v_u of the paper's appendix."""
    for now, then in pairwise(levels_of(FLOW, True)):
        x = random(5, 2)
        c, u = cond(x, now), mixture(x, now)
        older = u + lambda_ * (c - u) + then.s * (x - u) / now.s
        torch.testing.assert_close(cfgpp_step(x, u + lambda_ * (c - u), u, now, then) - older, -then.s * lambda_ * (c - u))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_eta_0_is_deterministic(name, path):
    quiet = {"euler_ancestral": "euler", "dpmpp_2m_sde": "dpmpp_2m"}
    out = sample(name, path, Model(PATHS[path][1], 0.6), eta=0.0)
    if name in quiet:
        torch.testing.assert_close(out, sample(quiet[name], path, Model(PATHS[path][1], 0.6)), rtol=1e-12, atol=1e-12)
    elif path in INSIDE:
        torch.testing.assert_close(out, k_diffusion(name, path, 0.6, eta=0.0), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(out, sample(name, path, Model(PATHS[path][1], 0.6), eta=1.0), rtol=1e-2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_noise_is_divided_without_loss(path, eta):
    for now, then in pairwise(levels_of(*PATHS[path])):
        for split in (ancestral, cfgpp.reverse_sde, cfgpp.no_noise):
            down, up = split(now, then, eta)
            assert math.hypot(down, up) == pytest.approx(then.s) and down >= 0 and up >= 0


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_ancestral_split_from_pure_noise_is_its_limit(eta):
    """rho = inf has rho_up = eta rho', rho_down = rho' sqrt(1 - eta^2)."""
    then = Level(0.1, 0.9)
    down, up = ancestral(Level(0.0, 1.0), then, eta)
    assert (down, up) == pytest.approx((0.9 * math.sqrt(1 - eta**2), 0.9 * eta))
    assert ancestral(Level(1e-9, 1 - 1e-9), then, eta) == pytest.approx((down, up), abs=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_from_pure_noise_nothing_is_infinite(name, eta):
    model = Model(True, 0.6)
    out = sample(name, "flow from pure noise", model, eta)
    assert out.isfinite().all() and model.asked[:2] == [(1.0, 0), (0.9, 1)]


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations(name):
    """One at each level of the schedule; dpmpp_2s_ancestral has a second one in the middle of all steps but the last."""
    model = Model(False, 0.6)
    sample(name, "edm", model)
    assert [(sigma, i) for sigma, i in model.asked if i is not None] == list(zip(EDM, range(len(EDM) - 1), strict=False))
    assert len(model.asked) - (len(EDM) - 1) == (len(EDM) - 2 if name == "dpmpp_2s_ancestral" else 0)


def geometric(count: int, flow: bool) -> list[float]:
    """Equal steps in log(a / s) from rho 8 to rho 0.1."""
    return [level_at(8 * (0.1 / 8) ** (i / count), flow).s for i in range(count + 1)]


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("dpmpp_2m", 2), ("dpmpp_2s_ancestral", 2), ("dpmpp_2m_sde", 2)])
def test_order_of_convergence(name, order, flow):
    """To the exact solution for a Gaussian: x - a mu shrinks like the standard deviation of x."""
    path = "flow" if flow else "edm"
    gaussian = partial(mixture, means=MEANS[:1])

    def error(count: int) -> float:
        schedule = geometric(count, flow)
        out = sample(name, path, Model(flow, 0.6, gaussian, gaussian), eta=0.0, sigmas=schedule)
        first, last = (levels_of([s], flow)[0] for s in (schedule[0], schedule[-1]))
        scale = math.hypot(last.a * WIDTH, last.s) / math.hypot(first.a * WIDTH, first.s)
        exact = last.a * MEANS[:1] + scale * (start(path, schedule) - first.a * MEANS[:1])
        return float((out - exact).norm())

    measured = math.log2(error(40) / error(80))
    assert measured == pytest.approx(order, abs=0.25)


def test_more_steps_are_more_cfg():
    """w_eff grows with the number of steps, is lambda at the last one, and does not depend on what is sampled."""

    def weights(count: int) -> list[float]:
        return [equivalent_cfg(0.6, now, then) for now, then in pairwise(levels_of([*geometric(count, False), 0.0], False))]

    assert weights(50)[0] > weights(20)[0] > weights(10)[0] > 0.6
    assert weights(20)[-1] == 0.6


def test_the_mean_weight_agrees_with_the_authors_pairs():
    """50 DDIM steps of Stable Diffusion 1.5, matched by LPIPS: lambda 0.2 to 1 and cfg 2 to 12.5."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    abar = (1 - betas).cumprod(0)
    sigmas = ((1 - abar) / abar).sqrt()[1::20].flip(0).tolist()
    for lambda_, w in ((0.2, 2.0), (0.4, 5.0), (0.6, 7.5), (0.8, 9.0), (1.0, 12.5)):
        assert cfgpp.mean_equivalent_cfg(lambda_, levels_of([*sigmas, 0.0], False)) == pytest.approx(w, rel=0.21)


def test_equal_levels_have_no_equivalent():
    assert equivalent_cfg(0.6, Level(1.0, 2.0), Level(1.0, 2.0)) == math.inf and decay(Level(1.0, 2.0), Level(1.0, 2.0)) == 1
