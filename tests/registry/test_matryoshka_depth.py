"""`matryoshka_depth` against pairs one by one, and on a dictionary sorted by generality."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.base import EvaluationContext
from taxolens.registry.evaluators.matryoshka_depth import (
    MatryoshkaDepth,
    prefix_widths,
)
from taxolens.registry.evaluators.parts.pair_depths import ClassPairs
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.evaluators.parts.ranks import spearman
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_depth_is_the_mean_over_pairs(seed: int, random_dag: Measured) -> None:
    taxonomy = random_dag(seed).taxonomy()
    rng = np.random.default_rng(seed)
    n_classes = len(taxonomy.classes)
    labels = rng.integers(-1, n_classes, (6, 4))
    permutation = rng.permutation(n_classes)
    pairs = ClassPairs(labels, taxonomy.leaf_lca_depth)
    found = zip(labels, pairs.depth(permutation), pairs.different_depth(permutation))
    for row, depth, different_depth in found:
        if (row < 0).any():
            assert np.isnan(depth) and np.isnan(different_depth)
            continue
        both = list(combinations(row, 2))
        depths = [taxonomy.depth[taxonomy.lch(permutation[list(p)])] for p in both]
        different = [d for d, (a, b) in zip(depths, both, strict=True) if a != b]
        assert depth == pytest.approx(np.mean(depths))
        assert different_depth == pytest.approx(
            np.mean(different) if different else np.nan, nan_ok=True
        )


def planted(animals: Taxonomy, one_batch: Measured) -> Any:
    """Node indicators numbered from the root down."""
    labels = np.repeat(np.arange(12), 40)
    latents = PlantedLatents(animals, recall=1.0, false_alarm=0.0)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    return one_batch(z[:, np.argsort(animals.depth[latents.node], kind="stable")], labels)


def test_general_latents_first_is_the_ideal(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    options = {"widths": [1, 3, 9, 21]}
    batch = planted(animals, one_batch)
    (evaluator,) = measured(animals, batch, [MatryoshkaDepth], size=50, options=options)
    numbers = evaluator.compute()
    assert set(numbers) == set(MatryoshkaDepth.higher_is_better)
    assert numbers["groups"] == 4 and numbers["by_rate"] == 0 and numbers["defined"] == 21
    assert numbers["n_ends"] == 1  # the root's latent
    assert numbers["n_different"] == 9 and numbers["n_different_ends"] == 0  # not of one class
    assert numbers["last_depth"] == 3.0  # one class each
    assert numbers["gain"] > 1.5 and numbers["trend"] > 0.95
    assert numbers["different_trend"] > 0.9
    table = evaluator.tables()["groups"]
    assert table["latents"].tolist() == [1, 2, 6, 12]
    assert (np.diff(table["depth"]) > 0).all()
    assert table["permuted"][3] == 3.0  # single classes: the same wherever they stand
    assert table["different_permuted"][2] < table["different_depth"][2]
    latents = evaluator.tables()["latents"]
    assert latents["latent"].tolist() == list(range(21))
    assert latents.groupby("group")["depth"].mean().tolist() == pytest.approx(
        table["depth"].tolist()
    )
    assert len(evaluator.figures()["groups"].data) == 4
    shuffled = evaluator.compute(shuffled=True)
    assert abs(shuffled["gain"]) < 0.3


def test_without_prefixes_latents_go_by_firing_rank(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    batch = planted(animals, one_batch)
    (evaluator,) = measured(animals, batch, [MatryoshkaDepth])
    fired = (batch.z > 0).sum(0)
    assert evaluator.compute()["by_rate"] == 1.0
    assert evaluator.widths[-1] == 21
    for g in range(1, len(evaluator.widths)):
        assert fired[evaluator.group == g].max() <= fired[evaluator.group == g - 1].min()
    assert evaluator.compute()["trend"] > 0.3


def test_widths_of_the_options_are_those_of_the_latents(animals: Any) -> None:
    """Those that end before d_sae too; only other latents than the SAE's have the same shares."""

    def widths(given: list[int], source: str = "sae") -> list[int]:
        context = EvaluationContext(animals, 100, 8, 64, source=source)
        return MatryoshkaDepth(context, {"widths": given}).widths

    assert widths([8, 16]) == widths([8, 16, 64]) == widths([8, 16], "random") == [8, 16, 64]
    assert widths([8, 16], "neurons") == [32, 64]
    with pytest.raises(
        ConfigError, match=r"^widths: beyond d_sae; given \[8, 128\]; allowed: at most 64"
    ):
        widths([8, 128])


@pytest.mark.parametrize(
    ("cfg", "widths"),
    [
        ({"matryoshka_widths": [2, 5]}, [2, 5]),
        ({"metadata": {"matryoshka_widths": [3, 9]}}, [3, 9]),
        (
            {"metadata": {"training_architecture_details": {"matryoshka_widths": [4, 8]}}},
            [4, 8],
        ),
        ({"level_widths": [2, 3, 4]}, [2, 5, 9]),
        ({}, None),
    ],
)
def test_widths_come_from_the_sae(cfg: dict[str, Any], widths: list[int] | None) -> None:
    assert prefix_widths(SimpleNamespace(cfg=SimpleNamespace(**cfg))) == widths
    assert prefix_widths(None) is None


def test_the_widths_of_the_sae_are_used(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    sae = SimpleNamespace(cfg=SimpleNamespace(matryoshka_widths=[3, 9]))
    (evaluator,) = measured(animals, planted(animals, one_batch), [MatryoshkaDepth], sae=sae)
    assert evaluator.widths == [3, 9, 21]  # what lies beyond the last prefix is a group too
    assert np.bincount(evaluator.group).tolist() == [3, 6, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 1}, "k: too small; given 1; allowed: 2 or more, since a pair needs"),
        ({"widths": [4, 2]}, "widths: out of range; given .*numbers that rise strictly"),
        ({"widths": []}, "widths: out of range; given .*numbers that rise strictly"),
        ({"order": "size"}, "order: not known; given 'size'; allowed: one of"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MatryoshkaDepth.Options(**options)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_rank_correlation_is_that_of_scipy(seed: int) -> None:
    from scipy import stats

    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, 12), rng.integers(0, 5, 12)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert np.isnan(spearman(a, np.ones(12)))


def test_a_saved_matryoshka_sae_still_has_its_widths(tmp_path: Path) -> None:
    """SAELens saves it as jumprelu."""
    cfg = MatryoshkaBatchTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2, matryoshka_widths=[2, 8])
    MatryoshkaBatchTopKTrainingSAE(cfg).save_inference_model(tmp_path)
    assert prefix_widths(SAE.load_from_disk(tmp_path)) == [2, 8]
