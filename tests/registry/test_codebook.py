"""`codebook` against a loop over samples, and how its codes find their places."""

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from taxolens.registry.architectures.codebook import CodebookTrainingSAE, CodebookTrainingSAEConfig
from taxolens.registry.errors import ConfigError


def make(**overrides):
    torch.manual_seed(0)
    cfg = {"k": 3, "kmeans_init": 0, **overrides}
    sae = CodebookTrainingSAE(CodebookTrainingSAEConfig(d_in=6, d_sae=20, **cfg))
    sae.W_dec.data.normal_()
    return sae


def step(sae, x, dead=None):
    return sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))


def test_the_output_is_the_mean_of_the_codes_nearest_in_direction():
    sae, x = make(), torch.randn(30, 6)
    sae.b_dec.data.normal_()
    for row, out, acts in zip(x, sae(x), sae.encode(x)):
        cosine = [(row - sae.b_dec) @ code / code.norm() for code in sae.W_dec]
        nearest = sorted(range(20), key=lambda i: -cosine[i])[:3]
        expected = sum(sae.W_dec[i] for i in nearest) / 3 + sae.b_dec
        torch.testing.assert_close(out, expected)
        assert sorted(acts.nonzero().flatten().tolist()) == sorted(nearest)


def test_gradients_pass_to_the_input_straight_through():
    sae, x = make(), torch.randn(4, 6, requires_grad=True)
    weights = torch.randn(4, 6)
    (gradient,) = torch.autograd.grad((sae(x) * weights).sum(), x)
    torch.testing.assert_close(gradient, weights)


def test_active_codes_are_drawn_to_the_input():
    sae, x = make(), torch.randn(30, 6)
    output = step(sae, x)
    output.loss.backward()
    direction = torch.zeros_like(sae.W_dec)
    for row in range(30):
        for code in output.feature_acts[row].nonzero().flatten():
            direction[code] += 2 * (output.sae_out[row] - x[row]).detach() / 3 / 30
    torch.testing.assert_close(sae.W_dec.grad, direction)


def test_kmeans_starts_codes_on_the_data():
    blobs = torch.randn(4, 6).repeat_interleave(50, 0) * 5
    x = blobs + 0.01 * torch.randn(200, 6)
    random, kmeans = make(k=1), make(k=1, kmeans_init=10)
    assert step(kmeans, x).loss < 0.1 * step(random, x).loss


def test_dead_codes_move_to_inputs_of_the_batch():
    sae, x = make(replace_dead=True), torch.randn(30, 6)
    before = sae.W_dec.detach().clone()
    dead = torch.arange(20) < 4
    step(sae, x, dead)
    for code in sae.W_dec[:4]:
        assert (x == code).all(dim=1).any()
    assert torch.equal(sae.W_dec[4:], before[4:])
    kept = make()
    step(kept, x, dead)
    assert torch.equal(kept.W_dec, before)


def test_wrong_k_is_named():
    with pytest.raises(
        ConfigError, match=r"k: out of range; given 21; allowed: an integer in 1..d_sae=20"
    ):
        make(k=21)
