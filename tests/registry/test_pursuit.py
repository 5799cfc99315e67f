"""The fast pursuit against a per-sample numpy loop and against autograd through SAELens's loop."""

import logging
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit
from taxolens.registry.architectures.parts import pursuit
from taxolens.registry.architectures.parts.pursuit import (
    GramCache,
    gram_matrix,
    gram_pays,
    matching_pursuit,
    pursuit_path,
)

METHODS = ("textbook", "gram")


def slow_pursuit(x, atoms, k, threshold=0.0, stop_on_duplicate=False):
    """One sample at a time, as the paper's algorithm 1 reads."""
    x, atoms = x.numpy(), atoms.numpy()
    codes, order = np.zeros((len(x), len(atoms)), x.dtype), []
    for row, sample in enumerate(x):
        r, steps = sample.copy(), []
        for _ in range(k):
            scores = atoms @ r
            j = int(np.argmax(scores))
            a = max(float(scores[j]), 0.0)
            before = codes[row] != 0
            codes[row, j] += a
            r = r - a * atoms[j]
            steps.append(j if a > 0 else -1)
            if stop_on_duplicate and np.array_equal(before, codes[row] != 0):
                break
            if threshold > 0 and np.linalg.norm(r) < threshold:
                break
        order.append(steps)
    return torch.from_numpy(codes), order


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(3)
    atoms = F.normalize(torch.randn(70, 12, generator=generator, dtype=torch.float64), dim=1)
    x = torch.randn(150, 12, generator=generator, dtype=torch.float64)
    return x, atoms


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("threshold", "duplicate"), [(0, False), (0.9, False), (0, True), (1, True)]
)
def test_same_path_and_codes_as_the_slow_loop(problem, method, threshold, duplicate):
    x, atoms = problem
    expected, order = slow_pursuit(x, atoms, 9, threshold, duplicate)
    codes = matching_pursuit(
        x, atoms, 9, method=method, residual_threshold=threshold, stop_on_duplicate=duplicate
    )
    torch.testing.assert_close(codes.dense(70), expected)
    torch.testing.assert_close(codes.residual, x - expected @ atoms)
    for row, steps in enumerate(order):
        for step, atom in enumerate(steps):
            if atom >= 0:
                assert codes.indices[row, step] == atom
        assert not codes.values[row, len(steps) :].any()


@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_lowest_atom(method):
    # Integers, so that every product is exact and the ties are true ties.
    atoms = torch.eye(6)[[0, 1, 1, 2, 3, 4]]
    x = torch.tensor([[2.0, 2.0, 2.0, 0.0, 0.0, 0.0], [-1.0, -1.0, 0.0, 3.0, 3.0, 0.0]])
    codes = matching_pursuit(x, atoms, 3, method=method)
    assert codes.indices[0].tolist() == [0, 1, 3]
    assert codes.indices[1, :2].tolist() == [4, 5]
    assert codes.values[1].tolist() == [3.0, 3.0, 0.0]


@pytest.fixture
def tied():
    """Integers, each atom five times: exact products, and nothing but ties."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.eye(16).repeat(5, 1)[torch.randperm(80, generator=generator)]
    return torch.randint(-2, 4, (2 * 32 + 5, 16), generator=generator).float(), atoms


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.parametrize(("threshold", "duplicate"), [(0, False), (2.5, True)])
def test_the_fused_update_takes_the_path_of_the_textbook(tied, monkeypatch, threshold, duplicate):
    monkeypatch.setattr(pursuit, "FUSED_BLOCK", 32)
    monkeypatch.setattr(pursuit, "_fused_update", fused := pursuit._FusedUpdate())
    how = {"residual_threshold": threshold, "stop_on_duplicate": duplicate}
    x, atoms = tied
    expected = pursuit_path(x, atoms, 6, method="textbook", **how)
    path = pursuit_path(x, atoms, 6, method="gram", compiled=True, **how)
    active = expected.values > 0
    assert torch.equal(path.values, expected.values)
    assert torch.equal(path.indices[active], expected.indices[active])
    assert fused.compiled is not None
    assert not fused.impossible


def test_what_cannot_be_compiled_is_logged_once_and_done_plainly(tied, monkeypatch, caplog):
    def no_compiler(function, **_):
        def fail(*_):
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(pursuit, "FUSED_BLOCK", 32)
    monkeypatch.setattr(pursuit, "_fused_update", pursuit._FusedUpdate())
    monkeypatch.setattr(torch, "compile", no_compiler)
    with caplog.at_level(logging.INFO, logger=pursuit.__name__):
        path = pursuit_path(*tied, 6, method="gram", compiled=True)
    assert [record.message for record in caplog.records] == [
        "the fused pursuit cannot be compiled, the plain one is used: no C++ compiler"
    ]
    expected = pursuit_path(*tied, 6, method="textbook")
    assert torch.equal(path.values, expected.values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("threshold", "duplicate"), [(0.0, False), (0.9, True)])
def test_gradients_match_autograd_through_the_textbook_loop(problem, method, threshold, duplicate):
    x, atoms = (t.float() for t in problem)
    weights = torch.randn(len(x), 70, generator=torch.Generator().manual_seed(1))

    def gradients(encode):
        inputs = x.clone().requires_grad_(), atoms.clone().requires_grad_()
        z = encode(*inputs)
        loss = (z * weights).sum() + ((z @ inputs[1] - inputs[0]) ** 2).sum()
        return torch.autograd.grad(loss, inputs)

    expected = gradients(lambda x, D: _encode_matching_pursuit(x, D, threshold, 9, duplicate))
    got = gradients(
        lambda x, D: matching_pursuit(
            x, D, 9, method=method, residual_threshold=threshold, stop_on_duplicate=duplicate
        ).dense(70)
    )
    for ours, theirs in zip(got, expected):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_gradients_reach_the_input_through_the_residual(problem):
    x, atoms = problem

    def residual_norm(x, atoms):
        return matching_pursuit(x, atoms, 4, method="gram").residual.square().sum()

    inputs = (x[:3].clone().requires_grad_(), atoms.clone().requires_grad_())
    torch.autograd.gradcheck(residual_norm, inputs)


@pytest.mark.parametrize("method", METHODS)
def test_excluded_atoms_are_never_chosen(problem, method):
    x, atoms = problem
    allowed = torch.arange(70) % 3 == 0
    codes = matching_pursuit(x, atoms, 6, method=method, allowed=allowed)
    assert allowed[codes.indices[codes.values > 0]].all()
    expected, _ = slow_pursuit(x, atoms[allowed], 6)
    torch.testing.assert_close(codes.dense(70)[:, allowed], expected)


@pytest.mark.parametrize("method", METHODS)
def test_first_steps_of_a_longer_pursuit_are_the_shorter_one(problem, method):
    x, atoms = problem
    long, short = (matching_pursuit(x, atoms, k, method=method) for k in (8, 3))
    assert torch.equal(long.indices[:, :3], short.indices)
    torch.testing.assert_close(long.values[:, :3], short.values)


def test_the_correlations_handed_in_stay_as_they_are(problem):
    x, atoms = problem
    correlations = x @ atoms.T
    before = correlations.clone()
    matching_pursuit(x, atoms, 5, method="gram", correlations=correlations)
    assert torch.equal(correlations, before)


def test_gram_matrix_in_blocks(problem):
    _, atoms = problem
    torch.testing.assert_close(gram_matrix(atoms, block=16), atoms @ atoms.T)


def test_the_cache_notices_a_write_through_data(problem):
    x, atoms = problem
    atoms, cache = torch.nn.Parameter(atoms.clone()), GramCache()
    matching_pursuit(x, atoms, 5, method="gram", cache=cache)
    kept = cache.gram
    matching_pursuit(x, atoms, 5, method="gram", cache=cache)
    assert cache.gram is kept
    atoms.data[7] = -atoms.data[7]  # leaves the version counter alone
    expected, _ = slow_pursuit(x, atoms.detach(), 5)
    codes = matching_pursuit(x, atoms, 5, method="gram", cache=cache)
    torch.testing.assert_close(codes.dense(70).detach(), expected)


@pytest.mark.parametrize(
    ("limit", "pays", "built"),
    [(2**30, True, True), (70 * 70 * 8 - 1, True, False), (2**30, False, False)],
)
def test_auto_keeps_to_the_memory_limit_and_to_what_pays(problem, monkeypatch, limit, pays, built):
    x, atoms = problem
    calls = []
    monkeypatch.setattr(pursuit, "gram_pays", lambda *args, **kwargs: pays)
    monkeypatch.setattr(pursuit, "gram_matrix", lambda a: calls.append(1) or gram_matrix(a))
    matching_pursuit(x, atoms, 5, max_gram_bytes=limit)
    assert bool(calls) is built


def test_what_pays():
    assert gram_pays(4096, 3072, 768, 32)  # a training step
    assert gram_pays(1024, 8192, 768, 32, reuse=0)  # encoding with frozen weights
    assert not gram_pays(8, 8192, 768, 32)  # few inputs: building the matrix costs more
    assert not gram_pays(200, 40, 20, 4)  # narrow inputs: a product is cheaper than a gather


def test_empty_batches_and_single_steps(problem):
    x, atoms = problem
    for method in METHODS:
        assert matching_pursuit(x[:0], atoms, 3, method=method).values.shape == (0, 3)
        one = matching_pursuit(x, atoms, 1, method=method)
        assert torch.equal(one.indices[:, 0], (x @ atoms.T).argmax(dim=1))


@pytest.mark.parametrize("method", METHODS)
def test_the_path_alone_has_the_same_codes(problem, method):
    x, atoms = problem
    path = pursuit_path(x, atoms, 9, method=method)
    torch.testing.assert_close(path.dense(70), slow_pursuit(x, atoms, 9)[0])
    assert not path.values.requires_grad
