"""Architectures trained on activations that were made from a known hierarchy.

    python benchmarks/known_truth.py absorption hierarchy large [--seeds 15] [--results FILE]

Every architecture, SAELens's and ours, is trained by SAELens's trainer on sums of true features; as
saved and loaded again it is scored against them. Three experiments:

- `absorption`: the MP-SAE hierarchy (Costa et al. 2025, arXiv 2506.03093; 20 features in 20
  dimensions, of which 3 parents have 3 children each), whose children have magnitude .1, .5 or 1.0
  and next to no spread, beside parents of 1.0 ± .25: the published absorption scores.
- `hierarchy`: the same tree with equal mean magnitudes, with and without spread, and with features
  that correlate within their group.
- `large`: 1,290 features of three levels in 128 dimensions, Zipfian, for 512 latents; in the style of
  SynthSAEBench, whose SAEs too have fewer latents than there are features.

Each result is appended to the results file when it is computed, and an SAE in the file is not trained
again: a run can be stopped at any time and resumed. `random` is a dictionary that was never trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from architectures import NAMES, Budget, Schedule, train
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.synthetic import (
    ActivationGenerator,
    ClassificationMetricsCalculator,
    FeatureDictionary,
    HierarchyConfig,
    HierarchyNode,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    mean_correlation_coefficient,
)
from sae_lens.util import temporary_seed
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SMALL_SPREAD = 1 / 400
CORRELATIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
MIXING = {  # correlation aimed at -> share of the others in each feature of a group
    "children": (0.0, 0.0895, 0.163, 0.226, 0.282, 0.3335, 0.3825, 0.431, 0.482),
    "parents": (0.0, 0.3, 0.44, 0.529, 0.594, 0.6467, 0.692, 0.733, 0.7739),
}
# Whose absorption is published; the paper's own Matryoshka is one of random prefixes.
PUBLISHED = ("mp", "matryoshka_batchtopk", "random_matryoshka", "standard", "batchtopk")
IMPLICATION, RATIO = 0.9, 2.0  # a candidate pair of the Tree SAE paper (arXiv 2605.07922)
RANDOM = "random"
STEPS, LARGE_STEPS = 15_000, 1_500
LR, LARGE_LR = 3e-2, 3e-3
POOL = 50_000  # samples of the large truth, drawn once: drawing them costs as much as training


@dataclass(frozen=True, eq=False)
class Truth:
    """Activations and the features that they are made of.

    Args:
        generator: of the features' magnitudes, (n, F).
        dictionary: their directions, (F, d).
        parents: (F,) the feature above each, −1 at a root.
        pool: train on so many samples, again and again; None: on new ones at each step.
    """

    generator: ActivationGenerator
    dictionary: FeatureDictionary
    parents: np.ndarray
    pool: int | None = None

    @property
    def directions(self) -> Tensor:
        return self.dictionary.feature_vectors.detach()

    @property
    def pairs(self) -> np.ndarray:
        """(P, 2) parent and child."""
        children = np.flatnonzero(self.parents >= 0)
        return np.stack([self.parents[children], children], axis=1)

    @torch.no_grad()
    def sample(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Magnitudes (n, F) and activations (n, d)."""
        with temporary_seed(seed):
            magnitudes = self.generator.sample(n)
        return magnitudes, self.dictionary(magnitudes)

    def batches(self, size: int, seed: int, at_once: int = 50) -> Iterator[Tensor]:
        """Endless activations (size, d), the same for every architecture."""
        first = 10_000 * (seed + 1)
        if self.pool is None:
            for block in itertools.count(first):
                yield from self.sample(size * at_once, block)[1].split(size)
        x = pool(self, first)
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            yield from (x[rows] for rows in order[: len(x) // size * size].split(size))


@lru_cache(maxsize=1)
def pool(truth: Truth, seed: int) -> Tensor:
    """(truth.pool, d) activations."""
    assert truth.pool is not None
    parts = [truth.sample(10_000, seed + part)[1] for part in range(truth.pool // 10_000)]
    return torch.cat(parts)


# The small hierarchy -------------------------------------------------------------------------


def mp_sae_tree() -> tuple[HierarchyNode, np.ndarray]:
    """The virtual root, and of each of the 20 features the probability of firing given its parent."""
    probability = np.full(20, 0.2)
    probability[12:] = 0.05
    groups = [HierarchyNode(p, [HierarchyNode(p + i) for i in (1, 2, 3)], True) for p in (0, 4, 8)]
    leaves = [HierarchyNode(i) for i in range(12, 20)]
    return HierarchyNode(None, groups + leaves, mutually_exclusive_children=True), probability


class ExclusiveChildren:
    """Keeps of each node's children at most one, each with exactly its probability.

    SAELens's own modifier lets children fire independently and then resolves conflicts, which
    distorts the probabilities; here one draw decides between the children.
    """

    def __init__(self, root: HierarchyNode, probability: np.ndarray) -> None:
        self.groups: list[tuple[int | None, list[int], Tensor]] = []
        nodes = [root]
        for node in nodes:
            nodes.extend(node.children)
            children = [int(child.feature_index) for child in node.children]  # type: ignore[arg-type]
            if children:
                share = torch.tensor(probability[children], dtype=torch.float64)
                self.groups.append((node.feature_index, children, share))

    def __call__(self, magnitudes: Tensor) -> Tensor:
        keep = torch.zeros_like(magnitudes, dtype=torch.bool)
        for parent, children, share in self.groups:
            upper = share.cumsum(0)
            drawn = torch.rand(len(magnitudes), 1, dtype=torch.float64)
            chosen = (drawn < upper) & (drawn >= upper - share)
            keep[:, children] = chosen if parent is None else chosen & keep[:, [parent]]
        return magnitudes * keep


def small_truth(
    seed: int,
    correlation: float = 0.0,
    child_mean: float = 1.5,
    child_std: float = 0.25,
    parent_mean: float = 1.5,
    parent_std: float | None = None,
) -> Truth:
    """The MP-SAE hierarchy; `seed` draws the directions. Leaves are as strong as parents."""
    root, probability = mp_sae_tree()
    parents = np.full(20, -1)
    for group in root.children:
        for child in group.children:
            parents[child.feature_index] = group.feature_index
    is_child = torch.from_numpy(parents >= 0)
    mean = torch.where(is_child, child_mean, parent_mean)
    std = torch.where(is_child, child_std, child_std if parent_std is None else parent_std)
    generator = ActivationGenerator(
        20, 1.0, std, mean, modify_activations=ExclusiveChildren(root, probability)
    )
    dictionary = FeatureDictionary(20, 20, initializer=None)
    drawn = torch.randn(20, 20, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(drawn).Q
    at = CORRELATIONS.index(correlation)
    directions = _mix(basis, np.flatnonzero(parents < 0), MIXING["parents"][at])
    for parent in (0, 4, 8):
        directions = _mix(directions, np.flatnonzero(parents == parent), MIXING["children"][at])
    dictionary.feature_vectors.data = directions
    return Truth(generator, dictionary, parents)


def _mix(directions: Tensor, group: np.ndarray, share: float) -> Tensor:
    """Each direction of a group takes `share` of the mean of the others."""
    own = directions[group]
    others = (own.sum(dim=0) - own) / (len(group) - 1)
    mixed = directions.clone()
    mixed[group] = torch.nn.functional.normalize((1 - share) * own + share * others, dim=1)
    return mixed


# The large one -------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def large_truth(seed: int, roots: int = 30, branching: int = 6, d: int = 128) -> Truth:
    """Three levels; siblings exclude each other; Zipfian, roots the most frequent."""
    n = roots * (1 + branching + branching**2)
    model = SyntheticModel(
        SyntheticModelConfig(
            num_features=n,
            hidden_dim=d,
            firing_probability=ZipfianFiringProbabilityConfig(0.5, 0.4, 0.002),
            hierarchy=HierarchyConfig(
                total_root_nodes=roots,
                branching_factor=branching,
                max_depth=2,
                mutually_exclusive_portion=1.0,
                compensate_probabilities=True,
            ),
            orthogonalization=OrthogonalizationConfig(num_steps=50),
            mean_firing_magnitudes=1.5,
            std_firing_magnitudes=0.25,
            bias=False,
            seed=seed,
        )
    )
    assert model.hierarchy is not None
    parents = np.full(n, -1)
    nodes = list(model.hierarchy.roots)
    for node in nodes:
        nodes.extend(node.children)
        for child in node.children:
            parents[child.feature_index] = node.feature_index
    return Truth(model.activation_generator, model.feature_dict, parents, POOL)


# Scores --------------------------------------------------------------------------------------


def match(latents: Tensor, magnitudes: Tensor) -> np.ndarray:
    """The latent of each feature (F,), −1 for none: the assignment with the largest sum of products.

    Both are divided by their largest value first, as in the toy model of Nabeshima 2024.

    Args:
        latents: (n, m); the sign is ignored.
        magnitudes: (n, F).
    """
    z, truth = latents.abs(), magnitudes
    z = z / z.amax(dim=0).clamp_min(1e-9)
    truth = truth / truth.amax(dim=0).clamp_min(1e-9)
    latent, feature = linear_sum_assignment((z.T @ truth).numpy(), maximize=True)
    matched = np.full(truth.shape[1], -1)
    matched[feature] = latent
    return matched


def absorption(
    matched: np.ndarray, decoder: Tensor, directions: Tensor, pairs: np.ndarray
) -> float:
    """Mean cosine of the latent of a child with the true direction of its parent; at best 0.

    With perfect absorption, the latent of a child being the sum of both with magnitudes a and b,
    it is a / √(a² + b²) for the parent's a.
    """
    pairs = pairs[matched[pairs[:, 1]] >= 0]
    child = decoder[matched[pairs[:, 1]]]
    return float(torch.cosine_similarity(child, directions[pairs[:, 0]], dim=1).mean())


def pairs_found(latents: Tensor, matched: np.ndarray, pairs: np.ndarray) -> float:
    """Share of the true pairs whose latents are a pair too: P(parent|child) ≥ .9, and the parent
    fires at least twice as often."""
    fires = (latents != 0).double()
    together = (fires.T @ fires).numpy()
    parent, child = matched[pairs[:, 0]], matched[pairs[:, 1]]
    often = together.diagonal()
    implied = together[parent, child] >= IMPLICATION * np.maximum(often[child], 1)
    found = implied & (often[parent] >= RATIO * often[child]) & (parent >= 0) & (child >= 0)
    return float(found.mean())


@torch.no_grad()
def score(sae: Any, truth: Truth, seed: int = 77, n: int = 10_000) -> dict[str, float]:
    """Scores of `sae` against the truth, on `n` new samples; the matching uses 1,000 of them."""
    magnitudes, x = truth.sample(n, seed)
    z = sae.encode(x)
    z = z.to_dense() if z.is_sparse else z
    error = (sae.decode(z) - x).square().sum()
    decoder = sae.W_dec.detach()
    if not (decoder.isfinite().all() and z.isfinite().all()):  # training diverged
        return dict.fromkeys(COLUMNS[:-1], float("nan"))
    f1 = ClassificationMetricsCalculator(decoder, truth.directions)
    f1.add_batch(z, magnitudes)
    matched = match(z[:1000], magnitudes[:1000])
    return {
        "mcc": mean_correlation_coefficient(decoder, truth.directions),
        "f1": f1.compute().f1_score,
        "absorption": absorption(matched, decoder, truth.directions, truth.pairs),
        "pairs": pairs_found(z, matched, truth.pairs),
        "r2": float(1 - error / (x - x.mean(dim=0)).square().sum()),
        "l0": float((z != 0).sum(dim=1).float().mean()),
        "dead": float((z == 0).all(dim=0).float().mean()),
    }


# Experiments ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One SAE to train; the fields identify its result.

    Args:
        options: settings of the architecture beside those of `architectures.py`, as JSON.
    """

    experiment: str
    architecture: str
    seed: int
    steps: int
    lr: float
    correlation: float = 0.0
    child_mean: float = 1.5
    child_std: float = 0.25
    parent_mean: float = 1.5
    parent_std: float = 0.25
    options: str = "{}"

    @classmethod
    def of(cls, row: dict[str, Any]) -> Case:
        """The case of a result; a field that an older file lacks has its default."""
        names = [field.name for field in dataclasses.fields(cls) if field.name in row]
        return cls(**{"lr": default_lr(row["experiment"])} | {name: row[name] for name in names})

    def truth(self) -> Truth:
        if self.experiment == "large":
            return large_truth(self.seed)
        return small_truth(
            self.seed,
            self.correlation,
            self.child_mean,
            self.child_std,
            self.parent_mean,
            self.parent_std,
        )

    def budget(self) -> Budget:
        if self.experiment == "large":
            return Budget(128, 512, 10.57, 23.0, (30, 130, 352))
        return Budget(20, 20, 1.36, 2.5, (11, 9), residual_threshold=0.05)

    def schedule(self) -> Schedule:
        if self.experiment == "large":
            return Schedule(self.steps, batch=512, lr=self.lr)
        return Schedule(self.steps, batch=200, lr=self.lr, betas=(0.5, 0.9375))

    def run(self) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        truth, budget, schedule = self.truth(), self.budget(), self.schedule()
        if self.architecture == RANDOM:
            torch.manual_seed(1000 + self.seed)
            sae, seconds = untrained(budget), 0.0
        else:
            batches = truth.batches(schedule.batch, self.seed)
            own = json.loads(self.options)
            sae, seconds = train(self.architecture, budget, schedule, batches, self.seed, own)
        return dataclasses.asdict(self) | score(sae, truth) | {"cpu_seconds": seconds}


def default_lr(experiment: str) -> float:
    return LARGE_LR if experiment == "large" else LR


def untrained(budget: Budget) -> SAE[Any]:
    """Random directions that encode and decode, the k strongest active."""
    sae = TopKSAE(TopKSAEConfig(d_in=budget.d_in, d_sae=budget.d_sae, k=budget.k))
    directions = torch.nn.functional.normalize(torch.randn(budget.d_sae, budget.d_in), dim=1)
    sae.W_dec.data, sae.W_enc.data = directions, directions.T.contiguous()
    return sae.eval()


def cases(args: argparse.Namespace) -> list[Case]:
    """The SAEs to train, seeds outermost, so that a run that is stopped has results of every setting."""
    listed = []
    for seed in range(args.seeds):
        for experiment in args.experiments:
            chosen = args.architectures or [*NAMES, RANDOM]
            if experiment == "absorption":
                chosen = args.architectures or [*PUBLISHED, RANDOM]
                variants: list[dict[str, float]] = [
                    {
                        "child_mean": mean,
                        "child_std": SMALL_SPREAD,
                        "parent_mean": args.parent_mean,
                        "parent_std": args.parent_std,
                    }
                    for mean in (0.1, 0.5, 1.0)
                ]
            elif experiment == "hierarchy":
                variants = [
                    {"correlation": correlation, "child_std": std, "parent_std": std}
                    for correlation in args.correlations
                    for std in args.stds
                ]
            else:
                variants = [{}]
            steps = args.steps or (LARGE_STEPS if experiment == "large" else STEPS)
            lr = args.lr or default_lr(experiment)
            listed += [
                Case(experiment, name, seed, steps, lr, options=args.options, **variant)
                for variant in variants
                for name in chosen
            ]
    return listed


COLUMNS = ("mcc", "f1", "absorption", "pairs", "r2", "l0", "dead", "cpu_seconds")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One table for each setting: means over the seeds, absorption with its deviation."""
    frame = pd.DataFrame([dataclasses.asdict(Case.of(row)) | row for row in rows])
    frame = frame.reindex(columns=[*frame.columns.difference(COLUMNS), *COLUMNS])
    setting = ["experiment", "steps", "lr", "correlation", "child_mean", "child_std",
               "parent_mean", "parent_std", "options"]  # fmt: skip
    parts = []
    for values, group in frame.groupby(setting, sort=True):
        named = dict(zip(setting, values))
        parts.append("\n" + ", ".join(f"{key} {value}" for key, value in named.items()))
        parts.append("| architecture | seeds | " + " | ".join(COLUMNS) + " |")
        parts.append("| --- " * (len(COLUMNS) + 2) + "|")
        order = {name: at for at, name in enumerate([*NAMES, RANDOM])}
        for name, runs in sorted(group.groupby("architecture"), key=lambda item: order[item[0]]):
            cells = []
            for column in COLUMNS:
                digits = {"l0": 2, "cpu_seconds": 0}.get(column, 3)
                value = runs[column].mean()
                cells.append("–" if np.isnan(value) else f"{value:.{digits}f}")
                if column == "absorption" and len(runs) > 1:
                    cells[-1] += f" ± {runs[column].std():.3f}"
            parts.append(f"| `{name}` | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(parts)


def _options(text: str) -> str:
    return json.dumps(json.loads(text), sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "experiments", nargs="*", default=["absorption", "hierarchy", "large"],
        help="absorption, hierarchy, large",
    )  # fmt: skip
    parser.add_argument("--architectures", nargs="*")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: 15,000 (large: 1,500)")
    parser.add_argument("--lr", type=float, help="default: 3e-2 (large: 3e-3)")
    parser.add_argument(
        "--options", type=_options, default="{}", metavar="JSON",
        help="""settings for the architectures, such as '{"atom_dropout": 0.1}'""",
    )  # fmt: skip
    parser.add_argument("--correlations", type=float, nargs="*", default=[0.0, 0.4, 0.8])
    parser.add_argument("--parent-mean", type=float, default=1.0, help="in `absorption`")
    parser.add_argument("--parent-std", type=float, default=0.25, help="in `absorption`")
    parser.add_argument("--stds", type=float, nargs="*", default=[SMALL_SPREAD, 0.25])
    parser.add_argument("--results", type=Path, default=Path("known_truth.jsonl"))
    parser.add_argument("--only-print", action="store_true", help="the tables of what is there")
    args = parser.parse_args()

    rows = []
    if args.results.exists():
        rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    done = {Case.of(row) for row in rows}
    for case in [] if args.only_print else cases(args):
        if case in done:
            continue
        row = case.run()
        rows.append(row)
        with args.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    if rows:
        print(table(rows))


if __name__ == "__main__":
    main()
