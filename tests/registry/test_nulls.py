"""Null latents, planted detectors and the hash they draw from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.parts.null_latents import (
    NeuronLatents,
    RandomLatents,
    shuffle_labels,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.hashing import uniform

X = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * 3 + 5


def test_the_hash_is_uniform_and_keyed():
    draws = uniform(np.arange(20_000))
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi², 19 degrees of freedom, p = .001
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.03
    other = uniform(np.arange(20_000), salt=1)
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.03
    assert (uniform([7, 3]) == draws[[7, 3]]).all()


def test_shuffled_labels_keep_the_classes():
    labels = np.repeat(np.arange(10), 10)
    shuffled = shuffle_labels(labels, 3)
    assert (np.bincount(shuffled) == 10).all() and (shuffled != labels).any()
    assert (shuffled == shuffle_labels(labels, 3)).all()


def test_neurons_are_the_two_signs_about_the_mean():
    latents = NeuronLatents.fit(X)
    z = latents.encode(X)
    assert z.shape == (500, 24) and latents.d_sae == 24 and (z >= 0).all()
    assert torch.allclose(z[:, :12] - z[:, 12:], X - X.mean(0), atol=1e-5)
    assert torch.allclose(z @ latents.W_dec + latents.b_dec, X, atol=1e-5)


@pytest.mark.parametrize("l0", [0, 0.5, 3.2, 40])
def test_random_latents_match_the_sparsity(l0):
    latents = RandomLatents.fit(X, 100, l0, seed=1)
    z = latents.encode(X)
    assert z.shape == (500, 100) and (z >= 0).all()
    assert (z > 0).sum(1).float().mean() == pytest.approx(l0, abs=0.01)
    assert torch.allclose(latents.W_dec.norm(dim=1), torch.ones(100))
    assert torch.allclose(latents.b_dec, X.mean(0))
    assert torch.equal(latents.W_dec, RandomLatents.fit(X, 100, l0, seed=1).W_dec)
    assert not torch.equal(latents.W_dec, RandomLatents.fit(X, 100, l0, seed=2).W_dec)


def test_null_latents_are_decoded_as_well_as_they_can_be():
    z, decoded = NeuronLatents.fit(X).reconstruct(X)
    assert torch.allclose(decoded, X, atol=1e-5) and z.shape == (500, 24)
    latents = RandomLatents.fit(X, 100, 3.2, seed=1)
    z, decoded = latents.reconstruct(X)
    assert torch.equal(z, latents.encode(X))

    def error(scale: float) -> float:
        return float((X - latents.b_dec - scale * z @ latents.W_dec).square().sum())

    assert error(latents.scale) == pytest.approx(float((X - decoded).square().sum()), rel=1e-4)
    assert error(latents.scale) < min(error(latents.scale * s) for s in (0.98, 1.02))
    assert RandomLatents.fit(X, 100, 0).scale == 1.0  # nothing fires


def test_random_latents_never_fire_below_zero():
    z = RandomLatents.fit(X, 100, 90).encode(X)  # more than half would need that
    assert (z >= 0).all() and 45 < (z > 0).sum(1).float().mean() < 55


def test_random_latents_refuse_an_impossible_sparsity():
    with pytest.raises(
        ConfigError, match="l0: out of range; given 11; allowed: a number between 0 and d_sae=10"
    ):
        RandomLatents.fit(X, 10, 11)


def test_planted_detectors_have_the_recall_and_false_alarms_asked_for(animals):
    labels = torch.arange(12).repeat_interleave(2000)
    latents = PlantedLatents(animals, recall=0.8, false_alarm=0.01, seed=3)
    z = latents.encode(labels=labels, index=torch.arange(len(labels)))
    belongs = torch.from_numpy(animals.membership[labels][:, latents.node])
    fires = z > 0
    assert fires[belongs].float().mean() == pytest.approx(0.8, abs=0.01)
    assert fires[~belongs].float().mean() == pytest.approx(0.01, abs=0.002)
    assert z[fires].min() >= 1 and z.max() < 2


def test_planted_detectors_do_not_depend_on_the_batches(animals):
    labels, index = torch.arange(12).repeat(5), torch.randperm(60)
    latents = PlantedLatents(animals)
    whole = latents.encode(labels=labels, index=index)
    parts = [latents.encode(labels=a, index=b) for a, b in zip(labels.split(7), index.split(7))]
    assert torch.equal(whole, torch.cat(parts))


def test_planted_nodes_can_be_shuffled_without_changing_their_size(animals):
    latents = PlantedLatents(animals, shuffle_nodes=True)
    assert (latents.members.sum(0) == animals.n_leaves[latents.node]).all()
    assert (latents.members != animals.membership[:, latents.node]).any()


def test_planted_probabilities_are_checked(animals):
    with pytest.raises(
        ConfigError, match=r"false_alarm: out of range; given 1\.5; allowed: a probability"
    ):
        PlantedLatents(animals, false_alarm=1.5)
