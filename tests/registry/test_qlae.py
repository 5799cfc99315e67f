"""`qlae` against a loop over latents, and where its gradients go."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from taxolens.registry.architectures.qlae import (
    QLAETrainingSAE,
    QLAETrainingSAEConfig,
    even_levels,
    snap,
)
from taxolens.registry.errors import ConfigError


def make(**overrides):
    torch.manual_seed(0)
    cfg = {"n_levels": 4, "decay_per_step": 0.0, **overrides}
    sae = QLAETrainingSAE(QLAETrainingSAEConfig(d_in=6, d_sae=8, **cfg))
    sae.levels.data += 0.1 * torch.randn(8, 4)
    return sae


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_decay_in_every_dtype(dtype):
    """Half precision would round the decay of one step away."""
    sae = make(decay_per_step=1e-4, dtype=dtype)
    sae.W_dec.data = torch.rand(8, 6).to(sae.W_dec.dtype) + 1
    before = sae.W_dec.detach().double().norm()
    for step in range(3200):
        sae.training_forward_pass(
            TrainStepInput(torch.zeros(1, 6).to(sae.W_dec), {}, None, step, False)
        )
    expected = before * (1 - 1e-4) ** 3200
    torch.testing.assert_close(
        sae.W_dec.detach().double().norm(), expected, atol=0, rtol=0.03
    )  # without decay it is .38 off


def slow_snap(continuous, levels):
    out = torch.zeros_like(continuous)
    for row in range(len(continuous)):
        for latent in range(continuous.shape[1]):
            nearest = min(levels[latent], key=lambda v: abs(v - continuous[row, latent]))
            out[row, latent] = nearest
    return out


def test_snapping_latent_by_latent():
    levels = torch.randn(5, 7)
    continuous = torch.randn(40, 5)
    assert torch.equal(snap(continuous, levels), slow_snap(continuous, levels))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_are_levels_to_the_bit(dtype, tmp_path):
    """Images at one level are equally active, however large their pre-activations are."""
    sae = make(dtype=dtype)
    sae.W_enc.data *= 100
    x = torch.randn(300, 6).to(sae.W_enc)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert pre.abs().max() > 30 * sae.levels.abs().max()
    trained = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).feature_acts
    for acts in (trained, sae.encode(x), loaded.encode(x)):
        assert (acts[:, :, None] == sae.levels).any(-1).all()
        assert torch.equal(acts, slow_snap(pre, sae.levels))
    (gradient,) = torch.autograd.grad(trained.sum(), sae.b_enc)
    assert torch.equal(gradient, torch.full_like(gradient, 300))


def test_levels_start_even():
    torch.testing.assert_close(even_levels(2, 3), torch.tensor([[-0.5, 0, 0.5]] * 2))
    assert even_levels(1, 10)[0].diff().unique().numel() <= 10


def test_losses_and_where_their_gradients_go():
    sae, x = make(), torch.randn(30, 6)
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    continuous = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    z = slow_snap(continuous.detach(), sae.levels.detach())
    torch.testing.assert_close(output.feature_acts, z)
    gap = (continuous - z).square().sum(1).mean()
    mse = (z @ sae.W_dec + sae.b_dec - x).square().sum(1).mean()
    torch.testing.assert_close(output.loss, mse + 0.02 * gap)

    losses = output.losses
    (levels,) = torch.autograd.grad(losses["quantization_loss"], sae.levels, retain_graph=True)
    assert levels.abs().sum() > 0
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(losses["quantization_loss"], sae.W_enc, retain_graph=True)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(losses["mse_loss"], sae.levels, retain_graph=True)
    # straight through: as if the decoder had seen the continuous latents at the snapped point
    (got,) = torch.autograd.grad(losses["mse_loss"], sae.W_enc)
    upstream = 2 * (z @ sae.W_dec + sae.b_dec - x) / 30 @ sae.W_dec.T
    torch.testing.assert_close(got, (x - sae.b_dec).T @ upstream)


def test_weights_decay_and_levels_do_not():
    sae = make(decay_per_step=0.1)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.training_forward_pass(TrainStepInput(torch.randn(5, 6), {}, None, 0, False))
    torch.testing.assert_close(sae.W_enc.data, 0.9 * before["W_enc"])
    torch.testing.assert_close(sae.W_dec.data, 0.9 * before["W_dec"])
    assert torch.equal(sae.levels.data, before["levels"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_levels": 1}, "n_levels: out of range; given 1; allowed: at least 2"),
        (
            {"decay_per_step": 1.0},
            r"decay_per_step: out of range; given 1.0; allowed: a number in \[0, 1\)",
        ),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        QLAETrainingSAEConfig(d_in=6, d_sae=8, **overrides)
