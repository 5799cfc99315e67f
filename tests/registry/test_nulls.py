"""Null latents, planted detectors and the hash they draw from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.parts.null_latents import (
    NeuronLatents,
    TwinLatents,
    shuffle_labels,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.evaluators.parts.sae_latents import SAELatents, as_input
from taxolens.registry.evaluators.parts.twin import untrained_twin
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


def sae_of(kind: str, firing: float = 0.1, **settings: Any) -> SAELatents:
    """An SAE of 100 random latents; those of thresholds fire for this share of (input, latent)."""
    sae_class, config_class = get_sae_class(kind)
    generator = torch.Generator().manual_seed(7)
    sae = sae_class(config_class(d_in=12, d_sae=100, **settings))
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(12, 100, generator=generator))
        sae.W_dec.copy_(torch.randn(100, 12, generator=generator))
        p = (X - sae.b_dec) @ sae.W_enc
        for name in ("b_enc", "b_gate", "b_mag"):
            if isinstance(getattr(sae, name, None), torch.Tensor) and not settings:
                getattr(sae, name).copy_(-p.quantile(1 - firing, dim=0))
    return SAELatents(sae)


def l0_of(latents: Any) -> float:
    with torch.no_grad():
        return float((latents.encode(X) != 0).sum(1).float().mean())


@pytest.mark.parametrize("firing", [0.0, 0.005, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_one_threshold_gives_a_twin_the_l0_of_its_sae(kind, firing):
    latents = sae_of(kind, firing)
    twin = TwinLatents.fit(latents, X)
    assert l0_of(twin) == pytest.approx(l0_of(latents), abs=0.01)
    weights = dict(twin.sae.named_parameters())
    torch.testing.assert_close(weights["b_dec"], X.mean(0))
    # All latents have one threshold: as a textbook SAE of these directions.
    p = (X - X.mean(0)) @ weights["W_enc"]
    n_fire = round(l0_of(latents) * len(X))
    z = twin.encode(X)
    if n_fire < p.numel():
        t = float(p.flatten().sort(descending=True).values[n_fire])
        jumps = kind != "standard" and t > 0
        fires = p > t
        assert (fires != (z > 0)).sum() <= 1  # one latent may be at t
        torch.testing.assert_close(z, (p if jumps else p - t) * fires, atol=1e-4, rtol=0)
    else:
        assert (z > 0).all()
    for name, dim in (("W_dec", 1), ("W_enc", 0)):
        norms = getattr(latents.sae, name).norm(dim=dim).mean().expand(100)
        torch.testing.assert_close(weights[name].norm(dim=dim), norms)


def test_twins_of_counted_latents_keep_the_count_of_each_input():
    for kind in ("topk", "abstopk"):
        z = TwinLatents.fit(sae_of(kind, k=7), X).encode(X)
        assert ((z != 0).sum(1) == 7).all()
        assert bool((z < 0).any()) == (kind == "abstopk")


@pytest.mark.parametrize("threshold", [3.0, 5.0, 6.0, 8.0, 11.0, 14.5])
def test_a_pursuit_of_a_twin_stops_at_the_l0_of_its_sae(threshold):
    latents = sae_of("matching_pursuit", residual_threshold=threshold)
    with torch.no_grad():
        latents.sae.W_dec.copy_(torch.nn.functional.normalize(latents.sae.W_dec, dim=1))
        latents.sae.b_dec.copy_(X.mean(0))
    twin = TwinLatents.fit(latents, X)
    wanted = l0_of(latents)
    steps = twin.sae.cfg.max_iterations
    assert latents.sae.cfg.max_iterations is None and steps >= 1

    def miss(n: int) -> float:
        twin.sae.cfg.max_iterations = n
        return abs(l0_of(twin) - wanted)

    assert miss(steps) == min(miss(n) for n in range(1, steps + 3))


def test_a_twin_is_reproducible_and_another_draw_is_another_twin():
    latents = sae_of("jumprelu")
    state = torch.random.get_rng_state()
    first = TwinLatents.fit(latents, X, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = TwinLatents.fit(latents, X, seed=1)
    for name, weight in first.sae.state_dict().items():
        assert torch.equal(weight, again.sae.state_dict()[name])
    seeds = {(1, 0), (1, 1), (2, 0), (0, 1)}
    rows = [TwinLatents.fit(latents, X, seed=s, draw=d).W_dec[0, 0].item() for s, d in seeds]
    assert len(set(rows)) == 4


def test_null_latents_are_decoded_as_well_as_they_can_be():
    z, decoded = NeuronLatents.fit(X).reconstruct(X)
    assert torch.allclose(decoded, X, atol=1e-5) and z.shape == (500, 24)
    twin = TwinLatents.fit(sae_of("standard"), X, seed=1)
    z, decoded = twin.reconstruct(X)
    assert torch.equal(z, twin.encode(X))

    def error(scale: float) -> float:
        return float((X - twin.b_dec - scale * z @ twin.W_dec).square().sum())

    assert error(twin.scale) == pytest.approx(float((X - decoded).square().sum()), rel=1e-4)
    assert error(twin.scale) < min(error(twin.scale * s) for s in (0.98, 1.02))
    assert TwinLatents.fit(sae_of("standard", 0.0), X).scale == 1.0  # nothing fires


class Fixed(StandardSAE):
    """A third party's SAE whose first three latents always fire, and no others."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        z = super().encode(x)
        return torch.cat([torch.ones_like(z[:, :3]), 0 * z[:, 3:]], dim=1)


class Signed(StandardSAE):
    """A third party's SAE of which every other latent is below 0 where it is active."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        z = super().encode(x)
        return torch.where(torch.arange(z.shape[1]) % 2 == 0, z, -z)


@pytest.mark.parametrize("firing", [0.1, 0.7])
def test_latents_below_0_count_in_the_l0_of_a_twin(firing):
    sae = Signed(StandardSAEConfig(d_in=12, d_sae=100))
    sae.load_state_dict(sae_of("standard", firing).sae.state_dict())
    latents = SAELatents(sae)
    twin = TwinLatents.fit(latents, X)
    assert bool((twin.encode(X) < 0).any()) and l0_of(latents) == pytest.approx(100 * firing, abs=1)
    assert l0_of(twin) == pytest.approx(l0_of(latents), abs=0.01)


def test_a_twin_of_an_sae_in_training_takes_inputs_on_its_scale():
    scaler = ActivationScaler()
    scaler.scaling_factor = 0.5
    latents = SAELatents(sae_of("standard").sae, scaler)
    twin = TwinLatents.fit(latents, X)
    assert twin.scaler is scaler and l0_of(twin) == pytest.approx(l0_of(latents), abs=0.01)
    torch.testing.assert_close(twin.sae.b_dec, X.mean(0) / 2)


class Sparse(StandardSAE):
    """A third party's SAE with latents as a sparse tensor."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x).to_sparse()

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return super().decode(feature_acts.to_dense())


def test_sparse_latents_are_as_dense_ones():
    dense = StandardSAE(StandardSAEConfig(d_in=12, d_sae=100))
    sparse = Sparse(dense.cfg)
    sparse.load_state_dict(dense.state_dict())
    one, other = (TwinLatents.fit(SAELatents(sae), X) for sae in (dense, sparse))
    assert one.scale == other.scale != 1
    for latents, twin in ((SAELatents(dense), SAELatents(sparse)), (one, other)):
        for wanted, found in zip(latents.reconstruct(X), twin.reconstruct(X)):
            assert found.layout == torch.strided and torch.equal(wanted, found)
        assert torch.equal(latents.encode(X), twin.encode(X))


def test_an_sae_may_lack_a_decoder_or_want_its_head_apart():
    bare = SAELatents(SimpleNamespace(cfg=SimpleNamespace(d_sae=3)))
    assert bare.d_sae == 3 and bare.W_dec is None and bare.b_dec is None
    for apart, shape in ((True, (500, 1, 12)), (False, (500, 12))):
        assert as_input(SimpleNamespace(hook_z_reshaping_mode=apart), X).shape == shape


def test_a_twin_has_the_precision_of_its_sae():
    latents = sae_of("standard", dtype="float64")
    assert latents.encode(X).dtype == latents.reconstruct(X)[0].dtype == torch.float32
    twin = TwinLatents.fit(latents, X)
    z, decoded = twin.reconstruct(X)
    assert twin.sae.W_dec.dtype == torch.float64 and twin.scale != 1
    wanted = twin.sae.b_dec + twin.scale * z.double() @ twin.sae.W_dec
    torch.testing.assert_close(decoded, wanted.float())


def test_an_sae_without_a_twin_is_refused(monkeypatch):
    sae = Fixed(StandardSAEConfig(d_in=12, d_sae=100))
    twin = TwinLatents.fit(SAELatents(sae), X)
    assert l0_of(twin) == 3 and not twin.sae.b_enc.any()  # its own rule gives its L0
    assert not any(weight.requires_grad for weight in twin.sae.parameters())
    with pytest.raises(ConfigError, match=r"another mean L0.*; given '3'; allowed: 5, that of the"):
        untrained_twin(sae, X, 5.0, 0)
    silent = {"encode": lambda self, x: torch.ones(len(x), 100)}  # no pre-activations are shown
    with pytest.raises(ConfigError, match=r"another mean L0.*; given '100'; allowed: 5, that of"):
        untrained_twin(type("Silent", (StandardSAE,), silent)(sae.cfg), X, 5.0, 0)
    monkeypatch.setattr(Fixed, "l0_rule", "unheard of", raising=False)
    with pytest.raises(ConfigError, match="l0_rule: not known; given 'unheard of'; allowed: coun"):
        untrained_twin(sae, X, 3.0, 0)


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


def test_planted_detectors_of_other_seeds_are_independent(animals):
    labels, index = torch.arange(12).repeat_interleave(400), torch.arange(4800)
    own = torch.from_numpy(animals.membership[labels][:, animals.distinct_nodes])
    planted = [PlantedLatents(animals, recall=0.5, false_alarm=0.0, seed=seed) for seed in range(3)]
    z = [latents.encode(labels=labels, index=index)[own] for latents in planted]
    for one in range(3):
        for other in range(3):
            if one != other:
                fires = z[one] > 0
                assert (z[other][fires] > 0).float().mean() == pytest.approx(0.5, abs=0.02)
                strength = [z[one][fires & ((z[other] > 0) == both)].mean() for both in (0, 1)]
                assert strength == pytest.approx([1.5, 1.5], abs=0.02)


def test_planted_nodes_can_be_shuffled_without_changing_their_size(animals):
    latents = PlantedLatents(animals, shuffle_nodes=True)
    assert (latents.members.sum(0) == animals.n_leaves[latents.node]).all()
    assert (latents.members != animals.membership[:, latents.node]).any()


def test_planted_probabilities_are_checked(animals):
    with pytest.raises(
        ConfigError, match=r"false_alarm: out of range; given 1\.5; allowed: a probability"
    ):
        PlantedLatents(animals, false_alarm=1.5)
