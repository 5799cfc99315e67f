"""Results as an evaluation would write them, made up: for the tests of report and W&B log."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from taxolens.plugin.evaluation.beside_nulls import with_nulls
from taxolens.plugin.reporting.results import (
    DatasetInfo,
    EvaluatorInfo,
    EvaluatorResult,
    LatentCard,
    PermutedClassesInfo,
    Results,
    SAEResult,
    SkippedImage,
    TaxonomyInfo,
    TopImage,
)
from taxolens.registry.presentation import Headline, NodeTable, Support
from taxolens.registry.taxonomies.taxonomy import Taxonomy

EVALUATORS = {
    "ontological_coverage": EvaluatorInfo(
        description="How much of the tree has a detector",
        directions={"internal_f1": True, "leaf_f1": True, "internal_nodes": None},
        nulls={"permuted_classes": None, "shuffled": None, "random": None, "neurons": None},
        headlines=[Headline("internal_f1", "node coverage", "mean F1 over nodes", priority=10)],
        labels={"leaf_f1": "coverage of the leaves"},
        node_table=NodeTable("latents", latent=None, meaning="how well <it> is found"),
        support={"internal_f1": Support("internal_nodes", "nodes", least=5)},
    ),
    "pair_depth": EvaluatorInfo(
        description="Mean depth of the LCA of pairs",
        directions={"pair_depth": True},
        nulls={"permuted_classes": None, "shuffled": None, "random": None, "neurons": None},
    ),
    "level_information": EvaluatorInfo(
        description="What the activations say per depth",
        directions={"x_probe_right_group": True, "error": False},
        nulls={
            "permuted_classes": None,
            "shuffled": None,
            "random": "x has no latents",
            "neurons": "x has no latents",
        },
    ),
}


def tree(branching: tuple[int, ...] = (3, 3, 2)) -> Taxonomy:
    """A regular tree; its leaves are the classes."""
    edges, level = [], ["thing"]
    for width in branching:
        following = [f"{node}.{i}" for node in level for i in range(width)]
        edges += [(child.rpartition(".")[0], child) for child in following]
        level = following
    return Taxonomy.from_edges(edges, names={node: f"<{node}> & co" for _, node in edges})


def make_results(
    folder: Path,
    *,
    n_layers: int = 3,
    runs: tuple[str, ...] = ("demo",),
    taxonomy: Taxonomy | None = None,
) -> Results:
    """Results with tables, figures and thumbnails lying in `folder`."""
    taxonomy = taxonomy or tree()
    folder.mkdir(parents=True, exist_ok=True)
    saes = [
        _sae(folder, taxonomy, run, layer, n_layers, several=len(runs) > 1)
        for run in runs
        for layer in range(n_layers)
    ]
    results = Results(
        created="2026-01-01T00:00:00+00:00",
        settings={"n_permutations": 19, "evaluators": list(EVALUATORS), "options": {}},
        provenance={"taxolens": "0.1.0", "torch": "2.0"},
        dataset=DatasetInfo(
            path="photos",
            split="validation",
            fingerprint="abc",
            n_images=60,
            n_fit=30,
            n_score=30,
            classes=list(taxonomy.classes),
            skipped=[SkippedImage(7, "<truncated> file")],
        ),
        taxonomy=TaxonomyInfo(
            "tree",
            len(taxonomy.nodes),
            len(taxonomy.classes),
            taxonomy.max_depth,
            json.loads(taxonomy.to_json()),
        ),
        evaluators=EVALUATORS,
        saes=saes,
        permuted_classes=PermutedClassesInfo(
            present=18, movable=16, strata=4, draws=19, same_tree=1, repeated=2
        ),
    )
    results.save(folder)
    return Results.load(folder)


def _sae(
    folder: Path, taxonomy: Taxonomy, run: str, layer: int, n_layers: int, several: bool
) -> SAEResult:
    generator = np.random.default_rng(layer + 100 * len(run))
    name = f"blocks.{layer}.hook_resid_post"
    sae_id = f"{run}/{name}" if several else name
    rise = (layer + 1) / n_layers
    evaluators = {}
    for evaluator, info in EVALUATORS.items():

        def draw(scale: float, info=info) -> dict[str, float]:
            return {
                m: (20 if m == "internal_nodes" else 1)
                * (scale * (0.2 + 0.5 * rise) + 0.02 * generator.random())
                for m in info.directions
            }

        draws = {
            "permuted_classes": [draw(0.7) for _ in range(19)],
            "shuffled": [draw(0.2)],
            "random": info.nulls["random"] or [draw(1.05 - 0.4 * rise)],
            "neurons": info.nulls["neurons"] or [draw(0.8)],
        }
        left_out = [draw(1.0) for _ in range(5)]
        metrics = with_nulls(
            draw(1.0), draws, info.directions, support=info.support, left_out=left_out
        )
        table, figure = (
            f"tables/{sae_id}/{evaluator}.latents.csv",
            f"figures/{sae_id}/{evaluator}.curve.json",
        )
        for file in (table, figure):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"latent": range(4), "f1": generator.random(4)}).to_csv(
            folder / table, index=False
        )
        (folder / figure).write_text(
            go.Figure(go.Scatter(y=[1, 2, 3], name="</script><b>")).to_json()
        )
        evaluators[evaluator] = EvaluatorResult(metrics, {"latents": table}, {"curve": figure}, 0.5)
    f1 = {
        node: float(np.clip(rise * generator.random() * 1.4, 0, 1)) if i else math.nan
        for i, node in enumerate(taxonomy.nodes)
    }
    cards = [_card(folder, taxonomy, latent, generator) for latent in range(6)]
    cards.sort(key=lambda card: card.generality)
    return SAEResult(
        id=sae_id,
        run=run,
        name=name,
        hook_name=name,
        layer=layer,
        model_name="a/model",
        architecture="topk",
        tokens="class",
        d_in=8,
        d_sae=16,
        l0=4.2,
        fingerprint="f",
        evaluators=evaluators,
        most_specific=cards[:3],
        least_specific=cards[:2:-1],
        node_f1=f1,
        seconds=1.5,
    )


def _card(
    folder: Path, taxonomy: Taxonomy, latent: int, generator: np.random.Generator
) -> LatentCard:
    node = int(generator.integers(1, len(taxonomy.nodes)))
    images = []
    for i in range(6):
        file = f"thumbnails/{int(generator.integers(8))}.jpg"
        (folder / "thumbnails").mkdir(exist_ok=True)
        colour = tuple(int(v) for v in generator.integers(40, 220, 3))
        Image.new("RGB", (80, 80), colour).save(folder / file)
        images.append(
            TopImage(i, taxonomy.label(int(taxonomy.leaves(node)[0])), 2.5 - i / 10, file)
        )
    return LatentCard(
        latent=latent,
        node=taxonomy.nodes[node],
        path=[taxonomy.label(v) for v in reversed(taxonomy.path_to_root(node))],
        height=float(taxonomy.height[node]),
        generality=float(taxonomy.generality[node]),
        f1=float(generator.random()),
        fires_on=0.03,
        images=images,
    )
