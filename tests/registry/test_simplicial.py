"""`simplicial` against a softmax per group, written out."""

import math

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from taxolens.registry.architectures.simplicial import (
    SimplicialTrainingSAE,
    SimplicialTrainingSAEConfig,
)
from taxolens.registry.errors import ConfigError


def make(**overrides):
    torch.manual_seed(0)
    cfg = {"group_size": 4, "temperature": 0.3, **overrides}
    sae = SimplicialTrainingSAE(SimplicialTrainingSAEConfig(d_in=6, d_sae=12, **cfg))
    sae.b_enc.data.normal_()
    return sae


def test_a_softmax_over_each_group():
    sae, x = make(), torch.randn(20, 6)
    z = sae.encode(x)
    for row, codes in zip(x, z):
        scores = ((row - sae.b_dec) @ sae.W_enc + sae.b_enc).tolist()
        for start in (0, 4, 8):
            weights = [math.exp(s / 0.3) for s in scores[start : start + 4]]
            expected = [w / sum(weights) for w in weights]
            assert codes[start : start + 4].tolist() == pytest.approx(expected, rel=1e-4)


def test_low_temperature_makes_groups_one_hot_and_is_logged():
    x = torch.randn(20, 6)

    def entropy(temperature):
        sae = make(temperature=temperature)
        output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, True))
        return float(output.metrics["group_entropy"])

    assert entropy(1e-4) < 0.05
    assert entropy(1e4) == pytest.approx(math.log(4), rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"group_size": 5}, "given 5; allowed: at least 2, and a divisor of d_sae=12"),
        ({"temperature": 0.0}, "temperature: out of range; given 0.0; allowed: a number above 0"),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(**overrides)
