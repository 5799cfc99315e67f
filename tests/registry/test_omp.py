"""`omp` against scipy's non-negative least squares, one sample at a time, and against autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from taxolens.registry.architectures.parts.orthogonal_pursuit import (
    non_negative_least_squares,
    orthogonal_pursuit,
)
from taxolens.registry.architectures.parts.pursuit import matching_pursuit


def slow_omp(x, atoms, k, threshold=0.0):
    x, atoms = x.numpy(), atoms.numpy()
    codes = np.zeros((len(x), len(atoms)))
    for row, sample in enumerate(x):
        chosen, z, r = [], np.zeros(0), sample
        for _ in range(k):
            scores = atoms @ r
            scores[chosen] = -np.inf
            j = int(np.argmax(scores))
            if scores[j] <= 1e-12:
                break
            chosen.append(j)
            z, _ = nnls(atoms[chosen].T, sample)
            r = sample - z @ atoms[chosen]
            if np.linalg.norm(r) < threshold:
                break
        codes[row, chosen] = z
    return torch.from_numpy(codes)


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(11)
    shared = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    # correlated atoms, so that coefficients do fall to 0 on the way
    atoms = torch.randn(30, 8, generator=generator, dtype=torch.float64) + 1.5 * shared
    x = torch.randn(120, 8, generator=generator, dtype=torch.float64) + shared
    return x, F.normalize(atoms, dim=1)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_same_codes_as_the_slow_loop(problem, threshold):
    x, atoms = problem
    expected = slow_omp(x, atoms, 6, threshold)
    codes = orthogonal_pursuit(x, atoms, 6, residual_threshold=threshold)
    torch.testing.assert_close(codes.dense(30), expected, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(codes.residual, x - expected @ atoms, atol=1e-8, rtol=1e-6)


def test_some_coefficients_do_fall_to_zero(problem):
    x, atoms = problem
    codes = orthogonal_pursuit(x, atoms, 6)
    full = (codes.indices.diff(dim=1) != 0).all(dim=1)  # rows that did not stop early
    assert (codes.values[full] == 0).any()


def test_the_residual_is_orthogonal_to_active_atoms(problem):
    x, atoms = problem
    codes = orthogonal_pursuit(x, atoms, 6)
    inner = torch.einsum("nd,nkd->nk", codes.residual, atoms[codes.indices])
    assert inner[codes.values > 0].abs().max() < 1e-8


def test_gradients_match_autograd_through_a_solve(problem):
    x, atoms = problem
    support = orthogonal_pursuit(x, atoms, 5)
    weights = torch.randn(x.shape[0], 30, generator=torch.Generator().manual_seed(0)).double()

    def loss(z, x, atoms):
        return (z * weights).sum() + (z @ atoms - x).square().sum()

    a, b = x.clone().requires_grad_(), atoms.clone().requires_grad_()
    rows = []
    for row in range(len(x)):
        active = support.indices[row][support.values[row] > 0]
        z = torch.linalg.lstsq(b[active].T, a[row]).solution
        rows.append(torch.zeros(30, dtype=torch.float64).scatter(0, active, z))
    expected = torch.autograd.grad(loss(torch.stack(rows), a, b), (a, b))

    c, d = x.clone().requires_grad_(), atoms.clone().requires_grad_()
    codes = orthogonal_pursuit(c, d, 5)
    through_codes = torch.autograd.grad(loss(codes.dense(30), c, d), (c, d))
    for got, want in zip(through_codes, expected):
        torch.testing.assert_close(got, want)

    codes = orthogonal_pursuit(c, d, 5)
    by_residual = (codes.dense(30) * weights).sum() + codes.residual.square().sum()
    for got, want in zip(torch.autograd.grad(by_residual, (c, d)), expected):
        torch.testing.assert_close(got, want)


def test_it_explains_more_than_plain_pursuit(problem):
    x, atoms = problem
    omp = orthogonal_pursuit(x, atoms, 6).residual.norm(dim=1)
    mp = matching_pursuit(x, atoms, 6).residual.norm(dim=1)
    assert omp.mean() < mp.mean()


def test_non_negative_least_squares_against_scipy():
    generator = torch.Generator().manual_seed(2)
    design = torch.randn(60, 5, 9, generator=generator, dtype=torch.float64) + 0.7
    target = torch.randn(60, 9, generator=generator, dtype=torch.float64)
    gram = design @ design.mT
    linear = torch.einsum("nsd,nd->ns", design, target)
    valid = torch.rand(60, 5, generator=generator) < 0.8
    z = non_negative_least_squares(gram, linear, valid, torch.zeros(60, 5, dtype=torch.float64))
    for row in range(60):
        columns = valid[row].numpy()
        expected = np.zeros(5)
        if columns.any():
            expected[columns], _ = nnls(design[row].numpy()[columns].T, target[row].numpy())
        np.testing.assert_allclose(z[row].numpy(), expected, atol=1e-8)


def test_a_repeated_atom_is_chosen_once():
    atoms = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    codes = orthogonal_pursuit(torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64), atoms, 3)
    assert codes.dense(3).flatten().tolist() == pytest.approx([2.0, 0.0, 1.0])
