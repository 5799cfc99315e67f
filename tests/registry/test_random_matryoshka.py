"""`random_matryoshka`: the law of its prefixes, and its loss prefix by prefix."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from taxolens.registry.architectures.random_matryoshka import (
    RandomMatryoshkaTrainingSAE,
    RandomMatryoshkaTrainingSAEConfig,
    pareto_weights,
)
from taxolens.registry.errors import ConfigError


def make(**settings):
    torch.manual_seed(0)
    settings = {"k": 3, "n_prefixes": 4, **settings}
    sae = RandomMatryoshkaTrainingSAE(
        RandomMatryoshkaTrainingSAEConfig(d_in=6, d_sae=20, **settings)
    )
    sae.W_dec.data *= torch.rand(20, 1) + 0.5
    sae.b_dec.data.normal_()
    return sae


@pytest.mark.parametrize("rescale", [False, True])
def test_the_loss_is_the_mean_over_prefixes(rescale):
    sae = make(rescale_acts_by_decoder_norm=rescale)
    x = torch.randn(30, 6)
    prefixes = sae.draw_prefixes(0)
    assert prefixes[-1] == 20
    assert sorted(set(prefixes)) == prefixes
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    acts = output.feature_acts / (sae.W_dec.norm(dim=1) if rescale else 1)
    errors = []
    for length in prefixes:
        reconstruction = sae.b_dec.expand(30, 6).clone()
        for latent in range(length):
            reconstruction = reconstruction + acts[:, latent : latent + 1] * sae.W_dec[latent]
        errors.append((reconstruction - x).square().sum(1).mean())
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())


def test_prefixes_follow_the_pareto_law():
    weights = pareto_weights(1, 20, 0.5)
    # P(length >= l) = (l^-a - 20^-a) / (1 - 20^-a)
    for length in (1, 2, 5, 19):
        expected = (length**-0.5 - 20**-0.5) / (1 - 20**-0.5)
        assert weights[length - 1 :].sum() / weights.sum() == pytest.approx(expected)
    sae = make(n_prefixes=2)
    short = sum(sae.draw_prefixes(step)[0] == 1 for step in range(2000)) / 2000
    assert short == pytest.approx(float(weights[0] / weights.sum()), abs=0.04)


def test_prefixes_depend_on_seed_and_step_alone():
    one, two = make(seed=1), make(seed=1)
    torch.manual_seed(123)
    assert [one.draw_prefixes(s) for s in range(5)] == [two.draw_prefixes(s) for s in range(5)]
    assert one.draw_prefixes(3) != one.draw_prefixes(4)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("scale", [0.2, 5.0])
def test_what_is_saved_after_folding_fires_the_same_latents(rescale, scale, tmp_path):
    """sae-lens before 6.54.12 left the threshold in the units of the scaled input."""
    normalize = "expected_average_only_in"
    sae = make(rescale_acts_by_decoder_norm=rescale, normalize_activations=normalize)
    x = torch.randn(100, 6)
    # the saved JumpReLU by hand, on the input as the trainer scaled it
    pre = (x * scale - sae.b_dec * sae.cfg.apply_b_dec_to_input) @ sae.W_enc + sae.b_enc
    pre = pre * (sae.W_dec.norm(dim=-1) if rescale else 1)
    sae.topk_threshold = pre.detach().quantile(0.8).double()  # between two of them
    expected = pre > sae.topk_threshold
    sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(tmp_path)
    fired = SAE.load_from_disk(tmp_path).encode(x) > 0
    assert 0.1 < expected.float().mean() < 0.3
    assert torch.equal(fired, expected)


def test_one_prefix_is_batchtopk():
    sae, x = make(n_prefixes=1), torch.randn(30, 6)
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    torch.testing.assert_close(output.loss, output.losses["mse_loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"min_prefix": 21},
            r"min_prefix: out of range; given 21; allowed: an integer in 1..d_sae=20",
        ),
        ({"n_prefixes": 0}, "n_prefixes: out of range; given 0; allowed: at least 1"),
        ({"pareto_alpha": 0.0}, "pareto_alpha: out of range; given 0.0; allowed: a number above 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
