"""Scores of planted detectors on Tiny-ImageNet's tree, for every evaluator that needs no model.

    python benchmarks/planted.py [--images 30]

One latent for each distinct node detects its classes with recall 80 % and false alarms of .1 % or 1 %;
*shuffled nodes* detect random sets of as many classes: information about classes without hierarchy.
Activations are x = z·W_dec + noise with random unit rows in 64 dimensions. The numbers, each beside its
permuted classes, are stored in docs/results/planted.json, and the table in docs/evaluators.md is made of them.
"""

from __future__ import annotations

import argparse

import numpy as np
import tables
import taxolens
import timing
import torch
from no_hierarchy import LEFT_OUT, headlines, measured, tree_of
from study import number_of
from taxolens.registry.evaluators.parts.planted import PlantedLatents

WORLDS = {
    "false alarms .1 %": {"false_alarm": 0.001},
    "false alarms 1 %": {"false_alarm": 0.01},
    "shuffled nodes, 1 %": {"false_alarm": 0.01, "shuffle_nodes": True},
}
D_IN = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=30, help="of a class")
    args = parser.parse_args()
    tree = tree_of("tiny-imagenet")
    found = {
        "classes": len(tree.classes),
        "images_per_class": args.images,
        "nodes": len(tree.nodes),
        "distinct_nodes": len(tree.distinct_nodes),
        "headlines": sorted(headlines()),
        "worlds": {name: numbers_of(tree, args.images, **world) for name, world in WORLDS.items()},
    }
    timing.store("planted", found, indent=None)
    tables.write_pages()


def numbers_of(
    tree: taxolens.Taxonomy, images: int, **world: object
) -> dict[str, dict[str, object]]:
    """`evaluator/metric` -> the number beside its permuted classes, where it has any."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(len(tree.classes)), images))
    latents = PlantedLatents(tree, seed=0, **world)  # type: ignore[arg-type]
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    names = [name for name in taxolens.EVALUATORS if name not in LEFT_OUT]
    found = measured(tree, labels, z, D_IN, generator, names)
    return {
        key: number_of(number)
        for key, number in found.items()
        if number.nulls["permuted_classes"].n
    }


if __name__ == "__main__":
    main()
