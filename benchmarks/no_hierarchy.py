"""What has no hierarchy stays inside the permuted-classes null, and planted truth leaves it.

    python benchmarks/no_hierarchy.py [--runs 200] [--trees 3x3] [--worlds flat] [--results FILE]

Two worlds have no hierarchy: *noise* (firings independent of the class) and *flat* (every latent knows
one to three classes drawn at random: class information without a tree). Two have one: *planted* (a
latent for every distinct node, recall 80 %, false alarms .1 %) and *groups* (the same for inner nodes
alone). Activations are x = z·W_dec + noise with random unit rows, so that x has what z has.

Class sizes: *balanced*; *one large*: the classes of one group below the root have 12 times as many images;
*long tail*: log-normal, shared within groups (σ .7 between groups, .5 within); *absent*: half of the
classes have no image.

For every metric with a direction the table has the share of seeded runs with p ≤ .05 against 19 distinct
trees. In a world without hierarchy a share is bold where it is above .07 and more than two standard errors above
.05. Each run is appended to the results file; a run in the file is not repeated. `--write` counts the runs of the file
in docs/results/no_hierarchy.json, from which tables.py makes the tables in docs/evaluators.md: the cells of which the
file has runs are replaced, the others stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tables
import taxolens
import timing
import torch
from taxolens import Taxonomy
from taxolens.plugin.evaluation.bench import Bench, HeldOutActivations
from taxolens.plugin.evaluation.evaluate import choose_evaluators
from taxolens.plugin.evaluation.settings import EvaluationSettings
from taxolens.plugin.evaluation.split import Split
from taxolens.plugin.reporting.results import MetricResult
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.presentation import shown_metrics
from torch import Tensor
from tqdm import tqdm

WORLDS = tuple(itertools.chain.from_iterable(tables.WORLDS.values()))
LEFT_OUT = (
    *("stability", "hyperbolicity", "monosemanticity", "quasi_orthogonality", "reconstruction"),
    "latent_graph",
)
"""Evaluators that use no tree."""
OPTIONS = {"meta_sae": {"steps": 200}}
"""Other than by default: how well the meta-SAE is trained does not matter to its permuted trees."""
DRAWS = 19
IMAGES = 10  # of a class, on average
NOISE = 0.3  # beside the directions of the latents in x
CLASSES = Path(__file__).with_name("tiny_imagenet.txt")


class Given:
    """Latents that are given for every image, as the source of an evaluation."""

    source = "sae"

    def __init__(self, z: Tensor, W_dec: Tensor) -> None:
        self.z, self.W_dec = z, W_dec
        self.b_dec = torch.zeros(W_dec.shape[1])
        self.d_sae = z.shape[1]

    def encode(self, x: Tensor, *, labels: Tensor, index: Tensor) -> Tensor:
        return self.z[index]

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x @ self.W_dec.T).relu()
        return z, z @ self.W_dec


def tree_of(name: str) -> Taxonomy:
    """A complete tree of given widths, or the ImageNet tree over the classes of Tiny-ImageNet."""
    if name == "tiny-imagenet":
        return taxolens.load_taxonomy("imagenet", classes=CLASSES.read_text().split())
    level, edges = ["root"], []
    for width in map(int, name.split("x")):
        below = [f"{node}.{i}" for node in level for i in range(width)]
        edges += [(node.rpartition(".")[0], node) for node in below]
        level = below
    return Taxonomy.from_edges(edges)


def class_sizes(tree: Taxonomy, sizes: str, generator: np.random.Generator) -> np.ndarray:
    """(C,) images of each class."""
    group = np.unique(tree.cut(1), return_inverse=True)[1]
    mean = np.full(len(tree.classes), float(IMAGES))
    if sizes == "one large":
        mean = np.where(group == generator.integers(group.max() + 1), 12.0, 1.0) * IMAGES / 2
    elif sizes == "long tail":
        between = generator.normal(0, 0.7, group.max() + 1)[group]
        mean = IMAGES * np.exp(between + generator.normal(0, 0.5, len(mean)))
    elif sizes == "absent":
        mean[generator.permutation(len(mean))[: len(mean) // 2]] = 0
    return np.where(mean > 0, np.maximum(np.round(mean), 2), 0).astype(int)


def latents(
    tree: Taxonomy, world: str, labels: np.ndarray, m: int, generator: np.random.Generator
) -> Tensor:
    """(n, m) activations of the world for images of these classes."""
    n, n_classes = len(labels), len(tree.classes)
    if world in ("planted", "groups"):
        planted = PlantedLatents(tree, seed=int(generator.integers(2**31)))
        index = torch.arange(n)
        z = planted.encode(torch.zeros(n, 1), labels=torch.from_numpy(labels), index=index)
        if world == "groups":
            inner = tree.height[tree.distinct_nodes] > 0
            z = z[:, torch.from_numpy(np.flatnonzero(inner))]
        return z
    if world == "noise":
        fires = generator.random((n, m)) < 0.25
    else:
        known = np.zeros((m, n_classes), dtype=bool)
        for latent in range(m):
            known[latent, generator.permutation(n_classes)[: generator.integers(1, 4)]] = True
        fires = generator.random((n, m)) < np.where(known[:, labels].T, 0.7, 0.02)
    return torch.from_numpy(np.where(fires, generator.uniform(0.5, 1.5, (n, m)), 0.0)).float()


def run(
    name: str, world: str, sizes: str, seed: int, evaluators: Sequence[str]
) -> dict[str, float | None]:
    """`evaluator/metric` -> p; None where the metric is undefined or cannot be judged."""
    tree = tree_of(name)
    generator = np.random.default_rng([seed, *name.encode(), *world.encode(), *sizes.encode()])
    labels = np.repeat(np.arange(len(tree.classes)), class_sizes(tree, sizes, generator))
    labels = generator.permutation(labels)
    z = latents(tree, world, labels, 512 if len(tree.classes) > 100 else 96, generator)
    d = 64 if len(tree.classes) > 100 else 24
    options = {name: of for name, of in OPTIONS.items() if name in evaluators}
    numbers = measured(
        tree, labels, z, d, generator, evaluators, options, n_permutations=DRAWS, seed=seed
    )
    return {
        key: None if number.undecided or math.isnan(p) else p
        for key, number in numbers.items()
        if not math.isnan(number.value)
        for p in [number.nulls["permuted_classes"].p]
    }


def measured(
    tree: Taxonomy,
    labels: np.ndarray,
    z: Tensor,
    d: int,
    generator: np.random.Generator,
    evaluators: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: int,
) -> dict[str, MetricResult]:
    """`evaluator/metric` -> a metric with a direction, of latents z (n, m) of images with `labels` (n,),
    beside its permuted classes; x (n, d) = z·W_dec + noise with random unit rows."""
    W_dec = torch.from_numpy(generator.normal(size=(z.shape[1], d))).float()
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    x = z @ W_dec + NOISE * torch.from_numpy(generator.normal(size=(len(z), d))).float()
    metrics = evaluated(
        tree, labels, z, x, W_dec, evaluators, options, nulls=("permuted_classes",), **settings
    )
    return {
        f"{evaluator}/{metric}": number
        for evaluator, numbers in metrics.items()
        for metric, number in numbers.items()
        if taxolens.EVALUATORS[evaluator].higher_is_better[metric] is not None
    }


def evaluated(
    tree: Taxonomy,
    labels: np.ndarray,
    z: Tensor,
    x: Tensor,
    W_dec: Tensor,
    evaluators: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> dict[str, dict[str, MetricResult]]:
    """Evaluator -> metric -> number, of latents z (n, m) of activations x (n, d); without intervals."""
    halves = Split.halves(labels, len(tree.classes), settings.get("seed", 0))
    held_out = HeldOutActivations(x[:, None].numpy(), halves, mean_patch=x.numpy())
    chosen = EvaluationSettings(n_groups=0).override(**settings)
    bench = Bench(tree, choose_evaluators(list(evaluators), options), chosen)
    done = bench.run(Given(z, W_dec), held_out)
    metrics = bench.metrics(done)
    done.release()
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument(
        "--trees", nargs="*", default=tables.TREES, help="widths such as 3x3, or a name"
    )
    parser.add_argument("--worlds", nargs="*", default=WORLDS)
    parser.add_argument("--sizes", nargs="*", default=tables.CLASS_SIZES)
    parser.add_argument("--evaluators", nargs="*", default=None)
    parser.add_argument("--results", type=Path, default=Path("no_hierarchy.jsonl"))
    parser.add_argument("--write", action="store_true", help="write the tables into the docs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    evaluators = args.evaluators or [name for name in taxolens.EVALUATORS if name not in LEFT_OUT]
    found = read(args.results)
    jobs = [
        job
        for job in itertools.product(args.trees, args.worlds, args.sizes, range(args.runs))
        if not set(evaluators) <= found[job].keys()
    ]
    with args.results.open("a") as file:
        for job in tqdm(jobs, unit="run"):
            missing = [name for name in evaluators if name not in found[job]]
            p = run(*job, missing)
            file.write(json.dumps({"job": job, "evaluators": missing, "p": p}) + "\n")
            file.flush()
    counts = counted(read(args.results))
    print(tables.no_hierarchy_table({**counts, "headlines": sorted(counts["cells"])}))
    if args.write:
        joined = replaced(timing.stored("no_hierarchy"), counts)
        timing.store("no_hierarchy", {"headlines": sorted(headlines()), **joined}, indent=None)
        tables.write_pages()


def headlines() -> set[str]:
    """`evaluator/metric` that summaries show."""
    return {
        f"{name}/{metric}"
        for name, evaluator in taxolens.EVALUATORS.items()
        for metric in shown_metrics(
            [headline.metric for headline in evaluator.headlines], evaluator.higher_is_better
        )
    }


Found = defaultdict[tuple[str, str, str, int], dict[str, dict[str, float | None]]]


def read(file: Path) -> Found:
    """(tree, world, sizes, seed) -> evaluator -> metric -> p."""
    found: Found = defaultdict(dict)
    for line in file.read_text().splitlines() if file.exists() else ():
        row = json.loads(line)
        here = found[tuple(row["job"])]
        for name in row["evaluators"]:
            here[name] = {
                key.partition("/")[2]: p
                for key, p in row["p"].items()
                if key.startswith(f"{name}/")
            }
    return found


def counted(found: Found) -> dict[str, dict[str, Any]]:
    """The runs of every cell, as docs/results/no_hierarchy.json has them.

    `runs`: evaluator -> tree -> "world, sizes" -> runs. `cells`: `evaluator/metric` -> the same -> runs that are judged,
    and those of them with p ≤ .05.
    """
    counts: dict[str, dict[str, Any]] = {"runs": {}, "cells": {}}
    for (tree, world, sizes, _), evaluators in sorted(found.items()):
        column = f"{world}, {sizes}"
        for evaluator, metrics in evaluators.items():
            if evaluator in LEFT_OUT:  # in a file of an earlier version
                continue
            runs = counts["runs"].setdefault(evaluator, {}).setdefault(tree, {})
            runs[column] = runs.get(column, 0) + 1
            for metric, p in metrics.items():
                if p is not None:
                    cells = counts["cells"].setdefault(f"{evaluator}/{metric}", {})
                    judged, past = cells.setdefault(tree, {}).get(column, (0, 0))
                    cells[tree][column] = (judged + 1, past + (p <= tables.LEVEL))
    return counts


def replaced(
    stored: Mapping[str, Mapping[str, Any]], counts: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The counts that are stored, with those of `counted` in place of them wherever it has runs of an evaluator,
    a tree and a column. Evaluators that are not registered any longer, or use no tree, are left out."""
    kept = set(taxolens.EVALUATORS) - set(LEFT_OUT)
    joined: dict[str, dict[str, Any]] = {"runs": {}, "cells": {}}
    for part, of_keys in joined.items():
        for key, of_trees in stored[part].items():
            evaluator = key.partition("/")[0]
            if evaluator not in kept:
                continue
            again = counts["runs"].get(evaluator, {})
            of_keys[key] = {
                tree: {
                    column: cell
                    for column, cell in columns.items()
                    if column not in again.get(tree, {})
                }
                for tree, columns in of_trees.items()
            }
        for key, of_trees in counts[part].items():
            for tree, columns in of_trees.items():
                of_keys.setdefault(key, {}).setdefault(tree, {}).update(columns)
    return joined


if __name__ == "__main__":
    main()
