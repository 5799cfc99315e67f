"""`monosemanticity` against the sum over all pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.base import EvaluationContext, InterventionResult
from taxolens.registry.evaluators.monosemanticity import Monosemanticity
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]
FLAT = Taxonomy.from_edges([("root", "a"), ("root", "b"), ("root", "c")])


def pairwise(z: np.ndarray, embedding: np.ndarray) -> np.ndarray:
    """The definition, pair by pair."""
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    scores = []
    for a in z.T:
        if a.max() == a.min():
            scores.append(np.nan)
            continue
        a = (a - a.min()) / (a.max() - a.min())
        first, second = np.triu_indices(len(a), 1)
        weight = a[first] * a[second]
        cosine = (unit[first] * unit[second]).sum(1)
        scores.append((weight * cosine).sum() / weight.sum() if weight.sum() else np.nan)
    return np.array(scores)


@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.03, 0.3, 1.0]))
@settings(max_examples=30, deadline=None)
def test_equals_the_sum_over_pairs(
    seed: int, density: float, one_batch: Measured, measured: Measured
) -> None:
    rng = np.random.default_rng(seed)
    n = 30
    z = rng.random((n, 7)).astype(np.float32) + 0.1
    z *= rng.random(z.shape) < density
    z[:, 0] = 2.0  # constant
    z[:, 1] = np.eye(n)[3]  # one image
    z[:, 2] = rng.random(n) + 1  # fires everywhere: scaled from its least value
    embedding = rng.normal(size=(n, 6)).astype(np.float32)
    batch = one_batch(z, rng.integers(0, 3, n))
    order = batch.index.numpy()
    batch = replace(batch, embedding=torch.from_numpy(embedding[order]))
    (evaluator,) = measured(FLAT, batch, [Monosemanticity], size=11)
    np.testing.assert_allclose(evaluator.scores(), pairwise(z, embedding), atol=1e-5)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    above = np.triu_indices(n, 1)
    assert evaluator.baseline == pytest.approx((unit @ unit.T)[above].mean(), abs=1e-5)
    assert evaluator.compute()["own_layer"] == 0.0


def test_latents_of_one_kind_of_image_are_ideal_and_mixed_ones_are_not(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    labels = np.repeat(np.arange(12), 20)
    pure, mixed = np.eye(12)[labels], np.eye(12)[np.random.default_rng(0).permutation(labels)]
    batch = one_batch(np.concatenate([pure, mixed], 1).astype(np.float32), labels)
    batch = replace(batch, embedding=torch.eye(12)[batch.labels])
    (evaluator,) = measured(animals, batch, [Monosemanticity])
    scores = evaluator.scores()
    np.testing.assert_allclose(scores[:12], 1.0, atol=1e-6)
    assert scores[12:].mean() == pytest.approx(evaluator.baseline, abs=0.05)
    table = evaluator.tables()["latents"]
    assert set(table["latent"][:12]) == set(range(12))


def test_without_an_embedding_it_warns_once_that_it_judges_itself(
    animals: Taxonomy, one_batch: Measured, measured: Measured, caplog: pytest.LogCaptureFixture
) -> None:
    batch = one_batch(np.eye(12, dtype=np.float32), np.arange(12))
    (evaluator,) = measured(animals, batch, [Monosemanticity], size=4)
    assert evaluator.compute()["own_layer"] == 1.0
    assert len([r for r in caplog.records if "no independent embedding" in r.message]) == 1


def test_the_encoder_can_be_the_model_or_a_file(
    animals: Taxonomy, one_batch: Measured, measured: Measured, tmp_path: Path
) -> None:
    labels = np.repeat(np.arange(12), 3)
    embedding = np.random.default_rng(0).normal(size=(36, 4)).astype(np.float32)
    batch = one_batch(np.eye(12, dtype=np.float32)[labels] + 0.5, labels)
    given = replace(batch, embedding=torch.from_numpy(embedding)[batch.index])
    (wanted,) = measured(animals, given, [Monosemanticity])

    np.save(tmp_path / "clip.npy", embedding)
    options = {"encoder": str(tmp_path / "clip.npy")}
    (from_file,) = measured(animals, batch, [Monosemanticity], size=5, options=options)
    assert from_file.compute() == pytest.approx(wanted.compute())

    def model(index: torch.Tensor, edit: Any = None) -> InterventionResult:
        return InterventionResult(None, torch.from_numpy(embedding)[index])

    options = {"encoder": "model"}
    (of_model,) = measured(animals, batch, [Monosemanticity], intervene=model, options=options)
    assert of_model.compute() == pytest.approx(wanted.compute())


def test_bad_encoders_are_named(
    animals: Taxonomy, one_batch: Measured, measured: Measured, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"encoder: not known; given 'clip'; allowed: one of"):
        Monosemanticity.Options(encoder="clip")
    with pytest.raises(ConfigError, match=r"encoder: no file '.*no\.npy'"):
        Monosemanticity.Options(encoder=str(tmp_path / "no.npy"))
    batch = one_batch(np.eye(12, dtype=np.float32), np.arange(12))
    np.save(tmp_path / "few.npy", np.zeros((3, 2)))
    for encoder, message in (
        ("mean_patch", "the batches have none"),
        ("model", "no model is available"),
        (str(tmp_path / "few.npy"), "one row for each of the 12 images"),
    ):
        with pytest.raises(AssertionError, match=f"ConfigError: encoder: .*{message}"):
            measured(animals, batch, [Monosemanticity], options={"encoder": encoder})


def test_without_images_all_is_undefined(animals: Taxonomy) -> None:
    numbers = Monosemanticity(EvaluationContext(animals, 0, 5, 3)).compute()
    assert np.isnan(numbers["monosemanticity"]) and numbers["defined"] == 0
