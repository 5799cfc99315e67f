"""Small random trees, latents with known truth, and one pass over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from taxolens.registry.evaluators.base import (
    EvaluationBatch,
    EvaluationContext,
    Evaluator,
    InterventionResult,
    stream,
)
from taxolens.registry.taxonomies import Taxonomy

Edges = list[tuple[str, str]]


@dataclass(frozen=True)
class RandomDag:
    """The edges and classes of a random rooted DAG whose ids are unrelated to its order."""

    edges: Edges
    classes: list[str]

    def taxonomy(self) -> Taxonomy:
        return Taxonomy.from_edges(self.edges, self.classes)


def make_dag(seed: int, n_nodes: int = 14) -> RandomDag:
    rng = np.random.default_rng(seed)
    ids = [f"n{i:02d}" for i in rng.permutation(n_nodes)]
    edges: Edges = []
    for child in range(1, n_nodes):
        for parent in rng.choice(child, size=min(child, rng.integers(1, 4)), replace=False):
            edges.append((ids[parent], ids[child]))
    parents = {p for p, _ in edges}
    classes = [v for v in ids if v not in parents or rng.random() < 0.15]
    return RandomDag(edges, [classes[i] for i in rng.permutation(len(classes))])


def make_batch(
    z: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    *,
    x: np.ndarray | torch.Tensor | None = None,
    mean_patch: torch.Tensor | None = None,
    seed: int = 0,
) -> EvaluationBatch:
    """A complete evaluation set: every other image of a class fits, and those come first."""
    n = len(labels)
    rank = np.array([(labels[:i] == labels[i]).sum() for i in range(n)])
    order = torch.from_numpy(np.argsort(rank % 2, kind="stable"))
    z = torch.as_tensor(z)
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed)) if x is None else x
    shuffled = np.random.default_rng(seed).permutation(labels)
    return EvaluationBatch(
        x=torch.as_tensor(x)[order],
        z=z[order],
        labels=torch.from_numpy(labels)[order],
        shuffled_labels=torch.from_numpy(shuffled)[order],
        index=order,
        is_fit=torch.from_numpy(rank % 2 == 0)[order],
        mean_patch=None if mean_patch is None else mean_patch[order],
    )


def split(batch: EvaluationBatch, size: int) -> list[EvaluationBatch]:
    """The same images in batches of `size`."""
    fields = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return [
        replace(batch, **{k: v[i : i + size] for k, v in fields.items()})
        for i in range(0, len(batch), size)
    ]


def make_pass(
    taxonomy: Taxonomy,
    batch: EvaluationBatch,
    classes: Sequence[type[Evaluator[Any]]],
    *,
    size: int | None = None,
    options: Any = None,
    **facts: Any,
) -> list[Evaluator[Any]]:
    """Evaluators that have seen the images of `batch`, thresholds calibrated on the fit half.

    Fails where one of them has failed.
    """
    facts = {"class_counts": np.bincount(batch.labels, minlength=len(taxonomy.classes)), **facts}
    context = EvaluationContext(
        taxonomy, len(batch), batch.x.shape[1], batch.z.shape[1], n_permutations=3, **facts
    )
    chosen = {f"{cls.name} {i}": (cls, cls._options(options)) for i, cls in enumerate(classes)}
    fit = split(batch, int(batch.is_fit.sum()))[0]
    done = stream(context, chosen, split(batch, size or len(batch)), calibration=lambda: fit)
    assert not done.errors, done.errors
    return list(done.evaluators.values())


class ToyModel:
    """An `Intervention` in a line: what the tokens become goes through two matrices.

    x (n, k, d) are the activations of the evaluation set; embedding = mean token @ A, logits
    = embedding @ B, where there is a B.
    """

    def __init__(
        self,
        x: torch.Tensor,
        to_embedding: torch.Tensor,
        to_logits: torch.Tensor | None = None,
        logit_classes: np.ndarray | None = None,
    ) -> None:
        self.x, self.to_embedding, self.to_logits = x, to_embedding, to_logits
        self.logit_classes = logit_classes
        self.images = 0

    def __call__(self, index: torch.Tensor, edit: Any = None) -> InterventionResult:
        self.images += len(index)
        x = self.x[index]
        embedding = (x if edit is None else edit(x)).mean(1) @ self.to_embedding
        return InterventionResult(
            None if self.to_logits is None else embedding @ self.to_logits, embedding
        )


@pytest.fixture(scope="session")
def toy_model() -> type[ToyModel]:
    return ToyModel


@pytest.fixture(scope="session")
def random_dag() -> Callable[..., RandomDag]:
    return make_dag


@pytest.fixture(scope="session")
def one_batch() -> Callable[..., EvaluationBatch]:
    return make_batch


@pytest.fixture(scope="session")
def batches_of() -> Callable[..., list[EvaluationBatch]]:
    return split


@pytest.fixture(scope="session")
def measured() -> Callable[..., list[Evaluator[Any]]]:
    return make_pass


@pytest.fixture(scope="session")
def animals() -> Taxonomy:
    """12 classes under 3 genera each of 2 families; balanced, so that results are simple."""
    edges: Edges = []
    for family in ("carnivore", "bird"):
        edges.append(("animal", family))
        for g in range(3):
            genus = f"{family}_{g}"
            edges.append((family, genus))
            edges += [(genus, f"{genus}_{s}") for s in range(2)]
    return Taxonomy.from_edges(edges)
