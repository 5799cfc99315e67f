"""Latents and activations that are noise lie neither above nor below their shuffled labels."""

from __future__ import annotations

from typing import Any

import no_hierarchy
import numpy as np
import pytest
import taxolens
import torch

RUNS = {"feature_geometry": 48, "supervised_dictionary": 48}
"""Of the evaluators whose numbers vary more; else 16."""
TREE = taxolens.Taxonomy.from_edges(
    [("root", f"g{i}") for i in range(4)]
    + [(f"g{i}", f"c{i}{j}") for i in range(4) for j in range(3)]
)
EQUAL = [12] * 12
UNEQUAL = [240] * 3 + [24] * 9
SAMPLES = {"max_images": 240}
CASES = [
    ("infomec", ["infoe"], EQUAL, {}),
    ("infomec", ["infoe"], UNEQUAL, SAMPLES),
    ("feature_geometry", ["hierarchy_cosine", "parent_length"], UNEQUAL, SAMPLES | {"min_images": 4}),
    ("supervised_dictionary", ["interpretability", "supervised_interpretability"], UNEQUAL, SAMPLES),
    ("absorption", ["probe_f1"], UNEQUAL, SAMPLES | {"min_images": 4}),
    (
        "level_information",
        ["x_knn_accuracy", "z_knn_accuracy", "x_knn_level_accuracy", "x_probe_accuracy"],
        UNEQUAL,
        {},
    ),
    ("mistake_severity", ["x_knn_mistake_severity", "x_knn_hierarchical_f1"], UNEQUAL, {}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("evaluator", "metrics", "sizes", "options"),
    CASES,
    ids=[f"{name} {'un' * (sizes is UNEQUAL)}equal" for name, _, sizes, _ in CASES],
)
def test_noise_is_like_its_shuffled_labels(
    evaluator: str, metrics: list[str], sizes: list[int], options: dict[str, Any]
) -> None:
    """The mean of value − null over the runs, in standard errors."""
    differences: dict[str, list[float]] = {metric: [] for metric in metrics}
    runs = RUNS.get(evaluator, 16)
    for seed in range(runs):
        found = noise(evaluator, sizes, options, seed)
        for metric, of in differences.items():
            of.append(found[metric].value - found[metric].nulls["shuffled"].mean)
    for metric, of in differences.items():
        assert np.isfinite(of).all(), metric
        error = np.std(of, ddof=1) / np.sqrt(runs)
        assert abs(np.mean(of)) < 4 * error, (metric, np.mean(of), error)


def noise(evaluator: str, sizes: list[int], options: dict[str, Any], seed: int) -> Any:
    """Metrics of 32 latents and 12 activations that know nothing of the classes."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(12), sizes))
    z = generator.lognormal(0, 1, (len(labels), 32)) * (generator.random((len(labels), 32)) < 0.2)
    W_dec = torch.from_numpy(generator.normal(size=(32, 12))).float()
    latents = torch.from_numpy(z).float()
    return no_hierarchy.evaluated(
        TREE, labels, latents, latents @ W_dec, W_dec, [evaluator], {evaluator: options},
        nulls=("shuffled",), seed=seed,
    )[evaluator]  # fmt: skip
