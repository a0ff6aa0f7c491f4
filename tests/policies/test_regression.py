"""LinearAG's regression against lstsq and closed forms."""

from __future__ import annotations

import pytest
import torch

from lodestar.guiders.policies.linear_ag.regression import Gram, denoised, predict, previous, replaced_steps, score, shifted

A, B = 0.7, 0.35  # of the synthetic u_k = A c_k + B u_{k-1}


def scores(steps: int = 8, batch: int = 3, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Correlated scores of a batch of trajectories: both drift slowly and differ little, like real ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 4, 6, 6)
    cond, uncond = [], []
    base, push = (torch.randn(shape, generator=generator) for _ in range(2))
    for _ in range(steps):
        base = base + 0.2 * torch.randn(shape, generator=generator)
        push = 0.8 * push + 0.1 * torch.randn(shape, generator=generator)
        cond.append(base + 0.1 * push)
        uncond.append(base - 0.1 * push + 0.02 * torch.randn(shape, generator=generator))
    return cond, uncond


def test_the_solution_is_that_of_lstsq():
    """Without a ridge, over two batches, in float64."""
    gram, batches = Gram(8), [scores(seed=seed) for seed in (0, 1)]
    for cond, uncond in batches:
        gram.add(cond, uncond)
    for k in replaced_steps(8):
        columns = [torch.cat([c[i].flatten() for c, _ in batches]) for i in range(k + 1)]
        columns += [torch.cat([u[i].flatten() for _, u in batches]) for i in range(k)]
        target = torch.cat([u[k].flatten() for _, u in batches]).double()
        direct = torch.linalg.lstsq(torch.stack(columns, dim=1).double(), target[:, None]).solution[:, 0]
        torch.testing.assert_close(gram.solve(k, ridge=0.0), direct, rtol=1e-8, atol=1e-9)
        error = target - torch.stack(columns, dim=1).double() @ direct
        assert gram.r2(k, direct) == pytest.approx(1 - float(error.square().sum() / target.square().sum()), abs=1e-12)


def test_the_ridge_is_small_and_damps():
    gram = Gram(8)
    gram.add(*scores())
    for k in replaced_steps(8):
        assert gram.r2(k, gram.solve(k)) == pytest.approx(gram.r2(k, gram.solve(k, 0.0)), abs=1e-7)
        assert gram.solve(k, 10.0).norm() < gram.solve(k).norm()


def test_the_fit_is_at_least_as_good_as_trivial_predictors():
    gram = Gram(12)
    gram.add(*scores(12))
    for k in replaced_steps(12):
        fit = gram.r2(k, gram.solve(k))
        assert fit >= gram.r2(k, previous(k)) and fit >= gram.r2(k, shifted(k))


def test_trivial_predictors():
    cond, uncond = scores(4)
    for k in (1, 3):
        history = cond[: k + 1], uncond[:k]
        assert predict(previous(k), *history).equal(uncond[k - 1])
        torch.testing.assert_close(predict(shifted(k), *history), cond[k] + uncond[k - 1] - cond[k - 1])


def test_memory_does_not_grow_with_trajectories_and_batches_do_not_matter():
    together, apart = Gram(4), Gram(4)
    cond, uncond = scores(4, batch=5)
    together.add(cond, uncond)
    for rows in (slice(0, 2), slice(2, 5)):
        apart.add([c[rows] for c in cond], [u[rows] for u in uncond])
    assert together.matrix.shape == apart.matrix.shape == (8, 8) and together.matrix.dtype == torch.float64
    torch.testing.assert_close(together.matrix, apart.matrix)
    assert together.trajectories == apart.trajectories == 5


def test_large_latents_are_added_in_parts():
    whole, parts = Gram(3), Gram(3, chunk=50)
    whole.add(*scores(3))
    parts.add(*scores(3))
    torch.testing.assert_close(whole.matrix, parts.matrix)


def test_synthetic_data_are_predicted_exactly():
    """u_k = A c_k + B u_{k-1}: predictions are compared, since coefficients are not unique."""
    cond, uncond = scores(10)
    for k in range(1, 10):
        uncond[k] = A * cond[k] + B * uncond[k - 1]
    gram = Gram(10)
    gram.add(cond, uncond)
    for k in replaced_steps(10):
        predicted = predict(gram.solve(k), cond[: k + 1], uncond[:k])
        torch.testing.assert_close(predicted, uncond[k], rtol=1e-4, atol=1e-5)
        assert gram.r2(k, gram.solve(k)) > 1 - 1e-10


def test_the_replaced_steps():
    assert replaced_steps(20) == (1, 3, 5, 7, 9)
    assert replaced_steps(10) == (1, 3)
    assert replaced_steps(4) == (1,) and replaced_steps(3) == ()


def test_incomplete_trajectories_are_refused():
    cond, uncond = scores(4)
    with pytest.raises(ValueError, match="5 predictions"):
        Gram(5).add(cond, uncond)


def test_scores_and_back():
    x, d, sigma = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([2.0, 0.3])
    torch.testing.assert_close(denoised(x, score(x, d, sigma), sigma), d)
    torch.testing.assert_close(score(x, d, sigma)[1], (x[1] - d[1]) / 0.3)
