"""`nested_topk` against one TopK reconstruction per level, written out."""

import json

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from taxolens.registry.architectures.nested_topk import (
    NestedTopKTrainingSAE,
    NestedTopKTrainingSAEConfig,
)
from taxolens.registry.errors import ConfigError


def make(**settings):
    torch.manual_seed(0)
    settings = {"k": 5, "ks": [1, 3, 5], "rescale_acts_by_decoder_norm": False, **settings}
    sae = NestedTopKTrainingSAE(NestedTopKTrainingSAEConfig(d_in=6, d_sae=20, **settings))
    sae.W_dec.data *= torch.rand(20, 1) + 0.5
    sae.b_dec.data.normal_()
    return sae


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("weighting", "weights"), [("uniform", (1, 1, 1)), ("reverse", (3, 2, 1))])
def test_the_loss_is_the_weighted_mean_over_levels(rescale, weighting, weights):
    sae = make(level_weights=weighting, rescale_acts_by_decoder_norm=rescale)
    x = torch.randn(30, 6)
    output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))

    norms = sae.W_dec.norm(dim=1) if rescale else torch.ones(20)
    scores = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms
    variance = (x - x.mean(0)).square().sum(1).mean()
    expected = 0.0
    for k, weight in zip((1, 3, 5), weights):
        reconstruction = torch.zeros_like(x)
        for row in range(30):
            top = scores[row].argsort(descending=True)[:k]
            reconstruction[row] = (
                sae.b_dec + (scores[row, top].relu() / norms[top]) @ sae.W_dec[top]
            )
        expected += weight * (reconstruction - x).square().sum(1).mean() / variance
    torch.testing.assert_close(output.loss, expected / sum(weights))


def test_levels_by_default_halve_k():
    assert make(k=16, ks=[]).cfg.levels == [2, 4, 8, 16]
    assert make(k=2, ks=[]).cfg.levels == [1, 2]


def test_it_is_saved_at_the_chosen_k(tmp_path):
    make(inference_k=3).save_inference_model(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["k"] == 3


def test_shifting_the_data_leaves_the_normalisation_alone():
    sae, x = make(), torch.randn(30, 6)
    plain = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss
    sae.b_dec.data += 7
    shifted = sae.training_forward_pass(TrainStepInput(x + 7, {}, None, 0, False)).loss
    torch.testing.assert_close(plain, shifted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ks": [3, 1, 5]}, r"ks: out of range; given \[3, 1, 5\]; allowed: .*k=5 at the end"),
        ({"ks": [1, 3]}, r"ks: out of range; given \[1, 3\]; allowed: .*k=5 at the end"),
        ({"k": 0, "ks": []}, "k: out of range; given 0; allowed: above 0, and at most d_sae=20"),
        ({"inference_k": 21}, "inference_k: out of range; given 21; allowed: .* d_sae=20"),
        ({"inference_k": 0}, "inference_k: out of range; given 0; allowed: above 0"),
        ({"level_weights": "best"}, "given 'best'; allowed: 'uniform' or 'reverse'"),
        ({"normalize_activations": "layer_norm"}, "nested_topk.*given 'layer_norm'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
