"""Scores of planted detectors on Tiny-ImageNet's tree, for every evaluator that needs no model.

    python benchmarks/planted.py [--images 30]

One latent for each distinct node detects its classes with recall 80 % and false alarms of .1 % or 1 %;
*shuffled nodes* detect random sets of as many classes: information about classes without hierarchy.
Activations are x = z·W_dec + noise with random unit rows in 64 dimensions. The numbers, each beside its
permuted classes, are stored in docs/results/planted.json; `python benchmarks/study.py write` makes the table
in docs/evaluators.md of them.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import taxolens
import torch
from no_hierarchy import LEFT_OUT, Given, headlines, tree_of
from study import STORED, number_of
from taxolens.plugin.evaluation.bench import Bench, HeldOutActivations
from taxolens.plugin.evaluation.evaluate import choose_evaluators
from taxolens.plugin.evaluation.settings import EvaluationSettings
from taxolens.plugin.evaluation.split import Split
from taxolens.registry.evaluators.parts.planted import PlantedLatents

WORLDS = {
    "false alarms .1 %": {"false_alarm": 0.001},
    "false alarms 1 %": {"false_alarm": 0.01},
    "shuffled nodes, 1 %": {"false_alarm": 0.01, "shuffle_nodes": True},
}
D_IN, NOISE = 64, 0.3


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
        "headlines": ["/".join(headline) for headline in sorted(headlines())],
        "worlds": {name: measured(tree, args.images, **world) for name, world in WORLDS.items()},
    }
    STORED["planted"].write_text(json.dumps(found, separators=(",", ":")) + "\n")


def measured(tree: taxolens.Taxonomy, images: int, **world: object) -> dict[str, dict[str, object]]:
    """`evaluator/metric` -> the number of a headline metric beside its permuted classes."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(len(tree.classes)), images))
    latents = PlantedLatents(tree, seed=0, **world)  # type: ignore[arg-type]
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    W_dec = torch.from_numpy(generator.normal(size=(latents.d_sae, D_IN))).float()
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    x = z @ W_dec + NOISE * torch.from_numpy(generator.normal(size=(len(z), D_IN))).float()
    held_out = HeldOutActivations(
        x[:, None].numpy(), Split.halves(labels, len(tree.classes), 0), mean_patch=x.numpy()
    )
    names = [name for name in taxolens.EVALUATORS if name not in LEFT_OUT]
    settings = EvaluationSettings(nulls=("permuted_classes",), n_groups=0)
    bench = Bench(tree, choose_evaluators(names, None), settings)
    metrics = bench.metrics(bench.run(Given(z, W_dec), held_out))
    return {
        f"{evaluator}/{metric}": number_of(number)
        for evaluator, numbers in metrics.items()
        for metric, number in numbers.items()
        if bench.chosen[evaluator][0].higher_is_better[metric] is not None
        and number.nulls["permuted_classes"].n
    }


if __name__ == "__main__":
    main()
