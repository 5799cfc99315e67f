"""The archetypal dictionary row by row, its constraints in training, and k-means point by point."""

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from taxolens.registry.architectures.archetypal import (
    ArchetypalJumpReLUTrainingSAE,
    ArchetypalJumpReLUTrainingSAEConfig,
    ArchetypalTopKTrainingSAE,
    ArchetypalTopKTrainingSAEConfig,
)
from taxolens.registry.architectures.parts.kmeans import seed_centroids, update_centroids
from taxolens.registry.errors import ConfigError

KINDS = {
    "topk": (ArchetypalTopKTrainingSAE, ArchetypalTopKTrainingSAEConfig, {"k": 3}, {}),
    "jumprelu": (
        ArchetypalJumpReLUTrainingSAE,
        ArchetypalJumpReLUTrainingSAEConfig,
        {},
        {"l0": 0.01},
    ),
}


def make(kind="topk", **settings):
    torch.manual_seed(0)
    sae_class, config_class, extra, _ = KINDS[kind]
    return sae_class(config_class(d_in=5, d_sae=12, **{"n_candidates": 7, **extra, **settings}))


def step(sae, x, kind="topk"):
    return sae.training_forward_pass(TrainStepInput(x, KINDS[kind][3], None, 0, False))


def slow_dictionary(sae):
    rows = []
    for w, offset in zip(sae.mixture.detach(), sae.relaxation.detach()):
        w = w.clamp(min=0)
        w = w / w.sum() if w.sum() > 0 else torch.full_like(w, 1 / len(w))
        if offset.norm() > sae.cfg.delta:
            offset = offset * sae.cfg.delta / offset.norm()
        point = sum(weight * a for weight, a in zip(w, sae.candidates))
        rows.append((point + offset) * torch.exp(sae.log_scale.detach()))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dictionary_stays_near_the_hull_through_training(kind):
    sae = make(kind, delta=0.3, candidate_steps=2)
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.1)
    for _ in range(6):
        optimiser.zero_grad()
        step(sae, torch.randn(40, 5) + 1, kind).loss.backward()
        optimiser.step()
    assert sae.relaxation.norm(dim=1).max() > 0.3  # the last step has left the ball
    torch.testing.assert_close(sae.W_dec, slow_dictionary(sae))
    sae.project()
    assert (sae.mixture >= 0).all()
    torch.testing.assert_close(sae.mixture.sum(dim=1), torch.ones(12))
    assert sae.relaxation.norm(dim=1).max() <= 0.3 + 1e-6


def test_gradients_pass_the_projections():
    sae = make()
    x = torch.randn(40, 5)
    step(sae, x).loss.backward()
    for name in ("mixture", "relaxation", "log_scale", "W_enc"):
        assert sae.get_parameter(name).grad.abs().sum() > 0, name


def test_candidates_come_from_the_data_and_then_stay():
    sae, x = make(candidate_steps=2), torch.randn(40, 5)
    step(sae, x)
    assert sae.candidate_counts.sum() == 40
    for point in sae.candidates:
        assert point.norm() <= x.norm(dim=1).max()
    step(sae, x)
    learned = sae.candidates.clone()
    step(sae, torch.randn(40, 5))
    assert torch.equal(sae.candidates, learned)


def test_given_candidates_of_an_earlier_version_stay():
    """Its counts of them were numbers, and 0."""
    sae, points = make(), torch.randn(7, 5)
    sae.set_candidates(points)
    saved = {**sae.state_dict(), "candidate_counts": torch.zeros(7)}
    again = make(candidate_steps=0)
    again.load_state_dict(saved)
    step(again, torch.randn(40, 5))
    assert torch.equal(again.candidates, points)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_candidates_are_points_as_the_sae_normalises_them(norm):
    sae = make("jumprelu", candidate_steps=1, normalize_activations=norm)
    x = 50 * (torch.randn(7, 5) + 3)  # as many as candidates, which start at them
    step(sae, x, "jumprelu")
    seen = x - x.mean(1, keepdim=True) if norm == "layer_norm" else x
    length = (
        2.0 if norm == "layer_norm" else 5**0.5
    )  # of unit standard deviation, or of norm sqrt(d)
    seen = length * torch.nn.functional.normalize(seen, dim=1)
    order = torch.cdist(seen, sae.candidates).argmin(1)
    assert len(set(order.tolist())) == 7
    torch.testing.assert_close(sae.candidates[order], seen, rtol=1e-3, atol=1e-3)
    sae(x)
    assert not {"ln_mu", "ln_std", "x_norm_coeff"} & set(vars(sae))


def test_more_candidates_than_a_batch_has_rows_come_from_the_next_batches():
    sae = make(n_candidates=12, candidate_steps=4)
    batches = torch.randn(4, 5, 5)
    step(sae, batches[0])
    assert len(sae.candidates.unique(dim=0)) == 5
    for batch in batches[1:]:
        step(sae, batch)
    assert len(sae.candidates.unique(dim=0)) == 12
    assert (sae.candidate_counts > 0).all()
    # every encoder column was the projection onto its atom when the atom last moved to new data
    late = make(n_candidates=12, candidate_steps=1)
    step(late, torch.randn(40, 5))
    torch.testing.assert_close((late.W_enc.T * late.W_dec).sum(1), torch.ones(12))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_zeros_are_no_candidates(kind):
    # Nothing fires in some samples of a sparse truth; an atom at 0 made every loss NaN.
    sae = make(kind, n_candidates=12)
    before = sae.candidates.clone()
    step(sae, torch.zeros(40, 5), kind)
    assert torch.equal(sae.candidates, before)
    batch = torch.randn(40, 5)
    batch[::2] = 0
    output = step(sae, batch, kind)
    assert sae.candidates.any(dim=1).all()
    assert output.loss.isfinite()


def test_without_refinement_candidates_are_rows_of_the_first_batch():
    sae, x = make(candidate_steps=0), torch.randn(40, 5) + 9
    step(sae, x)
    assert len(sae.candidates.unique(dim=0)) == 7
    assert all(any(torch.equal(point, row) for row in x) for point in sae.candidates)
    torch.testing.assert_close((sae.W_enc.T * sae.W_dec).sum(1), torch.ones(12))
    drawn = sae.candidates.clone()
    step(sae, torch.randn(40, 5))
    assert torch.equal(sae.candidates, drawn)


def test_given_candidates_are_kept():
    sae, points = make(), torch.randn(7, 5)
    sae.set_candidates(points)
    for latent in range(12):  # which starts at one candidate, and encodes the projection onto it
        point = points[latent % 7]
        torch.testing.assert_close(sae.W_dec[latent], point)
        torch.testing.assert_close(sae.W_enc[:, latent], point / point.dot(point))
    step(sae, torch.randn(40, 5))
    assert torch.equal(sae.candidates, points)
    with pytest.raises(ConfigError, match=r"given \(3, 5\); allowed: shape \(7, 5\)"):
        sae.set_candidates(points[:3])


def test_atoms_are_those_of_the_projected_weights_to_the_bit():
    sae = make(delta=0.01)
    with torch.no_grad():
        sae.mixture.copy_(torch.randn(12, 7) * 1e4)
        sae.relaxation.copy_(torch.randn(12, 5) * 1e4)
        of_any_weights = sae.dictionary()
        sae.project()
        mixture, relaxation = sae.mixture, sae.relaxation
        assert torch.equal(of_any_weights, mixture @ sae.candidates + relaxation)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_with_its_dictionary(kind, tmp_path):
    sae = make(kind)
    step(sae, torch.randn(40, 5), kind)
    sae.cfg.rescale_acts_by_decoder_norm = False  # saved as it is, not folded
    sae.save_inference_model(tmp_path)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path).W_dec.data, slow_dictionary(sae))


def test_kmeans_point_by_point():
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    counts = torch.tensor([0.0, 2.0, 5.0, 0.0], dtype=torch.float64)
    batch = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    expected, n = centroids.numpy().copy(), counts.numpy().copy()
    nearest = [int(np.argmin(((expected - p) ** 2).sum(1))) for p in batch.numpy()]
    for point, j in zip(batch.numpy(), nearest):
        n[j] += 1
        expected[j] += (point - expected[j]) / n[j]
    update_centroids(centroids, counts, batch)
    np.testing.assert_allclose(centroids.numpy(), expected)
    np.testing.assert_allclose(counts.numpy(), n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kmeans_in_half_precision_finds_the_means(dtype):
    """Of 4,000 points and more: sums and counts of so many are no numbers of half precision."""
    torch.manual_seed(0)
    sae = make(n_candidates=2, dtype=str(dtype).removeprefix("torch."))
    batch = (torch.tensor([[2.0], [40.0]]).repeat_interleave(4000, 0) + torch.randn(8000, 5)).to(
        dtype
    )
    candidates = torch.stack([batch[0], batch[-1]])
    sae.candidates.copy_(candidates)
    for _ in range(5):
        update_centroids(sae.candidates, sae.candidate_counts, batch)
    means = batch.double().unflatten(0, (2, 4000)).mean(1)
    torch.testing.assert_close(sae.candidates.double(), means, rtol=0.01, atol=0)
    assert sae.candidate_counts.tolist() == [20_000, 20_000]


def test_seeding_repeats_rows_only_when_they_run_out():
    batch = torch.arange(5.0)[:, None]
    generator = torch.Generator().manual_seed(0)
    assert seed_centroids(batch, 5, generator).flatten().sort().values.tolist() == [0, 1, 2, 3, 4]
    assert sorted(seed_centroids(batch, 8, generator).flatten().unique().tolist()) == [
        0,
        1,
        2,
        3,
        4,
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_candidates": 0}, "n_candidates: out of range; given 0; allowed: at least 1"),
        ({"delta": -1}, "delta: out of range; given -1; allowed: 0 or more"),
        ({"delta": float("inf")}, "delta: out of range; given inf; allowed: .* finite"),
        (
            {"decoder_init_norm": 0.1},
            "decoder_init_norm: not possible; given 0.1; allowed: None for archetypal_topk",
        ),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ArchetypalTopKTrainingSAEConfig(d_in=5, d_sae=12, **settings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_points_are_counted_on_after_an_sae_in_half_precision_is_loaded(tmp_path, dtype):
    """Of a count in half precision, which stops growing, nothing is left: loading casts to the config's dtype."""
    settings = {"d_in": 4, "d_sae": 8, "k": 2, "n_candidates": 1, "dtype": dtype}
    sae = TrainingSAE.from_dict(ArchetypalTopKTrainingSAEConfig(**settings).to_dict())
    sae.learn_candidates(torch.ones(70_001, 4), 0)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    for step in range(1, 5):
        loaded.learn_candidates(torch.ones(1, 4), step)
    assert loaded.candidate_counts.tolist() == [70_005]
