"""Scores of latents whose truth is known: what node indicators reach, and cases in which a metric misleads.

    python benchmarks/ideal.py

*Node indicators*: one latent for each node of a tree, which fires exactly on the images below it; x is the
sum of orthonormal directions of the latents that fire, and a little noise. The metrics of `INDICATORS`
are stored beside permuted classes and shuffled labels. *Cases* are single metrics of planted detectors, of noise and
of random rows. All are stored in docs/results/ideal.json, from which the tables in docs/evaluators.md are made.
Takes a minute of one core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import tables
import taxolens
import timing
import torch
from no_hierarchy import NOISE, evaluated, tree_of
from study import number_of, rounded
from taxolens.plugin.evaluation.settings import EvaluationSettings
from taxolens.plugin.reporting.results import MetricResult
from taxolens.registry.evaluators.meta_sae import MetaSAEOptions, decompose
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from torch import Tensor
from torch.nn.functional import normalize

TREE, IMAGES = "4x3x3", 24  # of a class
INDICATORS = {
    "lch_height": ("lower_share",),
    "ontological_coverage": ("internal_f1",),
    "pair_depth": ("pair_depth",),
    "parent_child": ("edge_precision", "edge_recall"),
    "absorption": ("full_absorption", "fraction_absorption"),
    "taxonomic_autocorrelation": ("moran_i",),
    "feature_geometry": ("hierarchy_cosine", "parent_length"),
    "infomec": ("infoe", "infom", "infoc", "nested_infom"),
    "tree_probe": ("z_spearman", "ceiling", "z_uuas", "z_euclidean_uuas"),
    "cpcc": ("z_cpcc",),
    "latent_dendrogram": ("firing_cophenetic", "firing_gamma", "firing_purity"),
}
"""Evaluator -> the metrics that are stored."""
PLANTED = "planted detectors (recall 80 %, false alarms .1 %)"
RUNS, DRAWS = 20, 19  # of `mistake_severity`
LATENTS = 20  # that fire independently
ROWS, WIDTH = 1000, 192  # of a random decoder


def main() -> None:
    torch.set_num_threads(1)
    tree = tree_of(TREE)
    found = {
        "classes": len(tree.classes),
        "nodes": len(tree.nodes),
        "images": IMAGES * len(tree.classes),
        "draws": EvaluationSettings().n_permutations,
        "indicators": indicators(tree),
        "cases": [*ceilings(), *planted(tree), *severity(), *dense(tree), *random_rows()],
    }
    timing.store("ideal", found)
    tables.write_pages()


def indicators(tree: taxolens.Taxonomy, **settings: int) -> dict[str, Any]:
    """`evaluator/metric` -> the number of node indicators beside its nulls by labels."""
    labels = np.repeat(np.arange(len(tree.classes)), IMAGES)
    z = detectors(tree, labels, recall=1.0, false_alarm=0.0, binary=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(z.shape[1], z.shape[1], generator=generator))[0]
    x = z @ rows + 0.02 * torch.randn(z.shape, generator=generator)
    nulls = ("permuted_classes", "shuffled")
    metrics = evaluated(tree, labels, z, x, rows, list(INDICATORS), nulls=nulls, **settings)
    return {
        f"{evaluator}/{metric}": number_of(metrics[evaluator][metric])
        for evaluator, names in INDICATORS.items()
        for metric in names
    }


def ceilings() -> Iterator[dict[str, Any]]:
    """The ceiling of `tree_probe`, which depends on the tree alone."""
    tree = tree_of("tiny-imagenet")
    numbers = of_planted(tree, 4, "tree_probe")
    yield case("tree_probe/ceiling", f"Tiny-ImageNet's tree, {len(tree.classes)} classes", numbers["ceiling"].value)  # fmt: skip


def planted(tree: taxolens.Taxonomy) -> Iterator[dict[str, Any]]:
    """Edges of planted detectors, whose recall is below the bound of an edge."""
    numbers = of_planted(tree, IMAGES, "parent_child")
    yield case(
        "parent_child/holds_share",
        f"{PLANTED}, {len(tree.classes)} classes",
        numbers["holds_share"].value,
        edges=numbers["edges"].value,
    )


def severity() -> Iterator[dict[str, Any]]:
    """How often each score of `mistake_severity` is past its permuted classes."""
    tree, past = tree_of("3x3x3"), Counter()
    for seed in range(RUNS):
        numbers = of_planted(
            tree, 10, "mistake_severity", seed, nulls=("permuted_classes",), n_permutations=DRAWS
        )
        for name, number in numbers.items():
            if "permuted_classes" in number.nulls and not name.startswith("n_"):
                past[name] += number.nulls["permuted_classes"].p <= 0.05
    of = past.pop("z_probe_distance_20")
    yield case(
        "mistake_severity/z_probe_distance_20, runs past the permuted classes",
        f"{PLANTED}, {len(tree.classes)} classes, {RUNS} runs",
        of,
        **{"every other score at least": min(past.values())},
    )


def dense(tree: taxolens.Taxonomy) -> Iterator[dict[str, Any]]:
    """Edges among latents that fire independently, dense and sparse."""
    labels = np.repeat(np.arange(len(tree.classes)), IMAGES)
    rng = np.random.default_rng(0)
    for low, high in ((0.5, 0.99), (0.02, 0.3)):
        size = len(labels), LATENTS
        z = np.where(rng.random(size) < rng.uniform(low, high, LATENTS), rng.random(size) + 0.5, 0)
        z = torch.from_numpy(z).float()
        numbers = evaluated(tree, labels, z, z, torch.eye(LATENTS), ["latent_graph"], nulls=())[
            "latent_graph"
        ]
        share = f"{100 * low:.0f} % to {100 * high:.0f} %"
        of = f"{LATENTS} independent latents, each on {share} of the images"
        for name in ("n_edges", "implication"):
            if np.isfinite(numbers[name].value):
                chance = {f"chance_{name}": numbers[f"chance_{name}"].value}
                yield case(f"latent_graph/{name}", of, numbers[name].value, **chance)


def random_rows() -> Iterator[dict[str, Any]]:
    """What a meta-SAE explains of a decoder without shared directions."""
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    explained = decompose(normalize(rows, dim=1), MetaSAEOptions(), 0).explained
    yield case("meta_sae/explained_variance", f"{ROWS:,} random rows of {WIDTH} dimensions", explained)  # fmt: skip


def case(metric: str, of: str, value: float, **beside: float) -> dict[str, Any]:
    """A row of the second table."""
    numbers = {name: plain(number) for name, number in beside.items()}
    return {"metric": metric, "of": of, "value": plain(value), "beside": numbers}


def plain(value: float) -> float | None:
    """A count as an integer, any other number rounded."""
    return int(value) if float(value).is_integer() else rounded(value)


def detectors(tree: taxolens.Taxonomy, labels: np.ndarray, **kwargs: Any) -> Tensor:
    """(n, m) activations of the planted detectors for images with `labels` (n,)."""
    index = torch.arange(len(labels))
    return PlantedLatents(tree, **kwargs).encode(labels=torch.from_numpy(labels), index=index)


def of_planted(
    tree: taxolens.Taxonomy, images: int, evaluator: str, seed: int = 0, **settings: Any
) -> dict[str, MetricResult]:
    """The metrics of planted detectors on `images` images of each class; x = z·W_dec + noise."""
    labels = np.repeat(np.arange(len(tree.classes)), images)
    z = detectors(tree, labels, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(z.shape[1], 64, generator=generator), dim=1)
    x = z @ rows + NOISE * torch.randn(len(z), 64, generator=generator)
    settings = {"nulls": (), **settings}
    return evaluated(tree, labels, z, x, rows, [evaluator], seed=seed, **settings)[evaluator]


if __name__ == "__main__":
    main()
