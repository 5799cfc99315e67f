"""`supervised_dictionary`: compares the SAE with a dictionary computed from the class labels.

Makelov et al. 2024, "Towards principled evaluations of sparse autoencoders for interpretability and
control" (arXiv 2405.08366): mean-difference vectors as an upper baseline for approximation, sparse
control and interpretability. Their attributes describe sentences; the use of taxonomy nodes in
their place, with the changes it requires, is our own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from ..errors import ConfigError
from ..presentation import Support
from .base import Evaluator, Intervention, InterventionResult, remembered, require_at_least
from .parts import summary
from .parts.accumulators import ClassCounts, FiringHistogram
from .parts.image_positions import ImagePositions
from .parts.logistic import best_threshold, f1_score
from .parts.node_f1 import Detectors, explain, find_detectors
from .parts.readout import kl_divergence
from .parts.samples import ImageSample

SPLICED = ("sufficiency", "necessity", "control")
OVER_SPLIT = 10  # latents of one node
ROUNDING = 1e-9  # of cosines


@dataclass(frozen=True)
class SupervisedDictionaryOptions:
    """max_images: size of the sample of x on which the dictionary is computed and scored.
    spliced_images: images of the score half run through the model, approximately; nine runs each.
    swaps: latents of a token set to their counterfactual values, at most.
    detected: least F1 on the score half at which a node counts as detected.
    """

    max_images: int = 8192
    spliced_images: int = 64
    swaps: int = 4
    detected: float = 0.5

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_images", "spliced_images", "swaps")
        if not 0 < self.detected <= 1:
            raise ConfigError(
                "detected", "out of range", given=self.detected, allowed="a number in (0, 1]"
            )


class Supervised(NamedTuple):
    """The supervised dictionary of C classes and N nodes."""

    mean: np.ndarray  # (d,) of x
    of_class: np.ndarray  # (C, d) u of each class, NaN without images
    norm: np.ndarray  # (N,) ‖u‖ of each node
    f1: np.ndarray  # (N,) of x·u as a detector, on the score half


class Found(NamedTuple):
    """The supervised dictionary and the latents as detectors of nodes."""

    supervised: Supervised
    detectors: Detectors  # of the latents, per node
    node: np.ndarray  # (m,) best node of each latent, −1 where it never fires
    f1: np.ndarray  # (m,) of the latent as detector of that node, on the score half
    precision: np.ndarray  # (m,)


class SupervisedDictionary(Evaluator[SupervisedDictionaryOptions]):
    """Compares the SAE with u_v = mean(x | v) − mean(x) of each node v, from fit images.

    From replaced activations in the model, on score images, E[x] the mean of x:

    - `sufficiency`: x is replaced by its reconstruction x̂; 1 − D(x̂)/D(E[x]), D the mean
      divergence of outputs from the unmodified ones. 1: no loss; 0: no better than E[x].
    - `necessity`: x is replaced by E[x] + (x − x̂); D/D(E[x]). 1: x − x̂ carries no information.
    - `control`: each image is paired with one of another class, with activations x'. At most four
      latents of x are set to their values on x', chosen greedily to bring x nearest to x'. The
      share of pairs with the prediction of x', among the `n_pairs` where patching in x' changes it.
    - `supervised_*`: the same for the supervised dictionary: x̂ = E[x] + u_class, and one swap,
      x + u_class' − u_class.

    D is the KL divergence of the logits; the prediction is the largest logit. A model without a
    head has D = 1 − cosine of the embeddings, and predictions are equal where the embedding is
    nearer (cosine) to the one with x' than to the unmodified one. All tokens are replaced.

    Without the model, on counts of firings:

    - `interpretability`: over latents that fire, the F1 of their firing for their best node,
      chosen on the fit half and scored on the other; `supervised_interpretability`: over
      `n_nodes` nodes, that of x·u_v above a threshold chosen on the fit half, on a sample in which
      each image counts as the images of its class and half that it stands for.
    - `detected_share`: of the `supervised_nodes` (u_v detects them with F1 ≥ .5), the share that
      some latent detects too.
    - `occluded`: of these nodes, how many no latent detects while a parent or child with a longer u
      is detected; `occluded_share`: of the parent-child pairs with one undetected, the share where
      that one has the shorter u (.5 by chance).
    - `over_split`: nodes that are the best node of ten or more latents of precision ≥ .5.

    Nodes with the same classes count once. The root, nodes without images in a half, and nodes
    where always predicting "yes" reaches F1 .5 are left out. Other sources of latents share x: the
    supervised numbers are NaN there. Metrics from the model are NaN under shuffled labels. Memory
    O(max_images·d + m·C).
    """

    name = "supervised_dictionary"
    description = "the SAE against mean-difference vectors of nodes: approximation, control, F1"
    higher_is_better = {
        **dict.fromkeys(SPLICED, True),
        **{f"supervised_{metric}": True for metric in SPLICED},
        "interpretability": True,
        "supervised_interpretability": True,
        "detected_share": True,
        "occluded": False,
        "occluded_share": None,
        "over_split": False,
        "supervised_nodes": None,
        "n_nodes": None,
        "latents": None,
        "spliced_images": None,
        "n_pairs": None,
    }
    ranges = {
        **dict.fromkeys(("sufficiency", "supervised_sufficiency"), summary.SCORE),
        **dict.fromkeys(("necessity", "supervised_necessity"), summary.POSITIVE),
        **dict.fromkeys(
            (
                "control",
                "supervised_control",
                "interpretability",
                "supervised_interpretability",
                "detected_share",
                "occluded_share",
            ),
            summary.SHARE,
        ),
    }
    support = {
        "interpretability": Support("latents", "latents"),
        "supervised_interpretability": Support("n_nodes", "nodes"),
        "detected_share": Support("supervised_nodes", "nodes"),
        **dict.fromkeys(("control", "supervised_control"), Support("n_pairs", "pairs of nodes")),
        **dict.fromkeys(
            ("sufficiency", "necessity", "supervised_sufficiency", "supervised_necessity"),
            Support("spliced_images", "spliced images"),
        ),
        "occluded": Support("supervised_nodes", "nodes"),
        "over_split": Support("latents", "latents"),
    }
    wants_intervention = repeats_intervention = True
    invariant = frozenset(
        {
            *SPLICED,
            *(f"supervised_{metric}" for metric in SPLICED),
            "latents",
            "spliced_images",
            "n_pairs",
        }
    )
    Options = SupervisedDictionaryOptions

    def prepare(self) -> None:
        context, options = self.context, self.options
        self._classes = context.share(ClassCounts)
        self._firings = context.share(FiringHistogram, survival=(1.0,))
        self._sample = context.share(ImageSample, max_images=options.max_images)
        self._images = context.share(ImagePositions, max_images=options.spliced_images)
        self.nodes, _ = context.distinct_nodes(root=False)

    # Detection of nodes -----------------------------------------------------------------------------

    @remembered
    def found(self, permutation: np.ndarray | None = None, shuffled: bool = False) -> Found:
        """The supervised dictionary and the latents as detectors of nodes."""
        members = self.members(self.nodes, permutation)
        images = self._classes.fit(shuffled), self._classes.score(shuffled)
        halves = self._firings.halves(shuffled)
        detectors = find_detectors(halves, members, *images)
        scored = np.isfinite(detectors.f1)
        at, fit_f1, outcome = explain(halves, members[:, scored], *images)
        fires = fit_f1 > 0
        node = np.append(np.flatnonzero(scored), -1)[np.where(fires, at, -1)]
        supervised = self._supervise(members, shuffled)
        supervised.f1[~scored] = np.nan
        rates = (np.where(fires, rate, np.nan) for rate in (outcome.f1, outcome.precision))
        return Found(supervised, detectors, node, *rates)

    @remembered
    def _weights(self, shuffled: bool) -> np.ndarray:
        """(n,) the images for which each of the sample stands, those of its class and half.

        The sample has equal shares of the classes, but F1 depends on how frequent a node is: that of
        the latents is of all images.
        """
        sample = self._sample.drawn(shuffled)
        labels, fit = sample.labels, sample.is_fit
        weights = np.ones(len(labels))
        halves = (fit, self._classes.fit(shuffled)), (~fit, self._classes.score(shuffled))
        for half, images in halves:
            taken = np.bincount(labels[half], minlength=len(images))
            weights[half] = images[labels[half]] / taken[labels[half]]
        return weights

    def _supervise(self, members: np.ndarray, shuffled: bool) -> Supervised:
        sample = self._sample.drawn(shuffled)
        x, fit, labels = sample.x.numpy(), sample.is_fit, sample.labels
        weights = self._weights(shuffled)
        n_classes, d = len(members), x.shape[1]
        mean = np.average(x[fit], axis=0, weights=weights[fit]) if fit.any() else np.zeros(d)
        counts = np.bincount(labels[fit], weights[fit], minlength=n_classes)
        sums = np.zeros((n_classes, d))
        np.add.at(sums, labels[fit], (x[fit] - mean) * weights[fit, None])
        inside = members.astype(np.float64)
        vectors = summary.ratio(inside.T @ sums, (inside.T @ counts)[:, None])  # (N, d)
        projected = (x - mean) @ vectors.T
        truth = members[labels]
        fitted, held = ((projected[half], truth[half]) for half in (fit, ~fit))
        f1 = held_out_f1(*fitted, *held, weights[fit], weights[~fit])
        of_class = summary.ratio(sums, counts[:, None])
        return Supervised(mean, of_class, np.linalg.norm(vectors, axis=1), f1)

    def _occlusion(self, found: Found) -> tuple[np.ndarray, float]:
        """(N,) which nodes are occluded; of the pairs with one node undetected, the share where
        that node has the shorter vector."""
        norm = found.supervised.norm
        known = found.supervised.f1 >= self.options.detected
        seen = found.detectors.f1 >= self.options.detected
        first, second = self._edges.T
        uneven = known[first] & known[second] & (seen[first] != seen[second])
        first, second = first[uneven], second[uneven]
        missed, other = np.where(seen[first], second, first), np.where(seen[first], first, second)
        shorter = norm[missed] < norm[other]
        occluded = np.zeros(len(norm), dtype=bool)
        occluded[missed[shorter]] = True
        return occluded, summary.mean(shorter)

    @property
    def _edges(self) -> np.ndarray:
        """(E, 2) edges of the collapsed tree, parent first, as positions in `nodes`."""
        return self.taxonomy.edges_among(self.nodes, self.context.present)

    def _split_into(self, found: Found) -> np.ndarray:
        """(N,) the number of latents of precision ≥ .5 with each node as their best."""
        best = found.node[(found.node >= 0) & (found.precision >= 0.5)]
        return np.bincount(best, minlength=len(self.nodes))

    # Splicing into the model -----------------------------------------------------------------------

    @remembered
    def spliced(self) -> Spliced:
        """Results of the model with replaced activations; empty without a model."""
        return NOTHING if self._why_not_spliced() else self._splice()

    def _why_not_spliced(self) -> str:
        context = self.context
        if context.intervene is None:
            return context.no_intervention
        if context.reconstruct is None or context.W_dec is None:
            return f"the latents ({context.source}) cannot be decoded"
        if not len(self._images.index(fit=False)) or not self._sample.drawn().is_fit.any():
            return "there is no image in one of the halves"
        return ""

    @torch.no_grad()
    def _splice(self) -> Spliced:
        intervene, reconstruct = self.context.intervene, self.context.reconstruct
        assert intervene is not None and reconstruct is not None
        index, labels = self._images.index(fit=False), self._images.labels(fit=False)
        x, untouched = run(intervene, index)
        supervised = self.found().supervised
        mean = torch.from_numpy(supervised.mean).float().expand_as(x)
        rebuilt = torch.cat([reconstruct(part)[1].cpu() for part in tokens(x)]).view_as(x)
        partner, paired = partners(labels)
        vectors = torch.from_numpy(supervised.of_class).float()[:, None]
        by_class = torch.nan_to_num(vectors)
        replaced: dict[str, Tensor] = {
            "mean": mean,
            "sufficiency": rebuilt,
            "necessity": mean + x - rebuilt,
            "patched": x[partner],
            "control": self._swap(x, x[partner]),
        }
        if self.context.source == "sae":
            replaced["supervised_sufficiency"] = mean + by_class[labels]
            replaced["supervised_necessity"] = x - by_class[labels]
            change = by_class[labels[partner]] - by_class[labels]
            replaced["supervised_control"] = x + change
        results = {name: run(intervene, index, value)[1] for name, value in replaced.items()}
        lost = divergence(untouched, results["mean"])
        shares = {}
        for prefix in ("", "supervised_"):
            for metric in ("sufficiency", "necessity"):
                if (given := results.get(prefix + metric)) is not None:
                    share = float(summary.ratio(divergence(untouched, given).mean(), lost.mean()))
                    shares[prefix + metric] = 1 - share if metric == "sufficiency" else share
        changed = paired & differs(results["patched"], untouched)
        agree = {
            name: np.where(changed, answers(results[name], untouched, results["patched"]), np.nan)
            for name in ("control", "supervised_control")
            if name in results
        }
        return Spliced(index, labels, labels[partner], shares, agree, untouched.logits is not None)

    def _swap(self, x: Tensor, target: Tensor) -> Tensor:
        """(n, k, d) x with at most `swaps` latents of each token set to their target values."""
        reconstruct, W_dec = self.context.reconstruct, self.context.W_dec
        assert reconstruct is not None and W_dec is not None
        rows = W_dec.detach().float().cpu()
        parts = []
        for own, other in zip(tokens(x), tokens(target)):
            change = reconstruct(other)[0].cpu() - reconstruct(own)[0].cpu()
            decoded = self.context.as_decoded(own)
            if decoded is not own:  # of an SAE that normalises each input
                change = change * (spread(own) / spread(decoded).clamp(min=1e-12))[:, None]
            parts.append(greedy_swap(own, other, change, rows, self.options.swaps))
        return torch.cat(parts).view_as(x)

    # Results ---------------------------------------------------------------------------------------

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        numbers = dict.fromkeys(self.higher_is_better, float("nan"))
        found = self.found(permutation, shuffled)
        known = found.supervised.f1 >= self.options.detected
        seen = found.detectors.f1 >= self.options.detected
        occluded, share = self._occlusion(found)
        numbers |= {
            "interpretability": summary.mean(found.f1),
            "detected_share": summary.mean(seen, known),
            "occluded": float(occluded.sum()),
            "occluded_share": share,
            "over_split": float((self._split_into(found) >= OVER_SPLIT).sum()),
            "latents": float((found.node >= 0).sum()),
            "spliced_images": 0.0,
            "n_pairs": 0.0,
        }
        if self.context.source == "sae":
            numbers["supervised_interpretability"] = summary.mean(found.supervised.f1)
            numbers["supervised_nodes"] = float(known.sum())
            numbers["n_nodes"] = summary.count(found.supervised.f1)
        if not shuffled:
            spliced = self.spliced()
            numbers |= spliced.shares
            numbers |= {name: summary.mean(agree) for name, agree in spliced.agree.items()}
            numbers["spliced_images"] = float(len(spliced.index))
            numbers["n_pairs"] = summary.count(spliced.agree.get("control", EMPTY))
        return numbers

    def notes(self) -> list[str]:
        """The reason for missing metrics; whether outputs are embeddings."""
        if why := self._why_not_spliced():
            return [f"Sufficiency, necessity and control are not computed: {why}."]
        if len(self.spliced().index) and not self.spliced().has_logits:
            return ["The model has no classification head: its final embedding is compared."]
        return []

    def tables(self) -> dict[str, pd.DataFrame]:
        """`nodes`: supervised vector and best latent of each; `latents`: best node of each;
        `control`: agreement by the depth of the lowest common ancestor of the two classes."""
        found, taxonomy = self.found(), self.taxonomy
        nodes = pd.DataFrame(
            {
                "node": [taxonomy.nodes[v] for v in self.nodes],
                "name": [taxonomy.label(v) for v in self.nodes],
                "classes": taxonomy.n_leaves[self.nodes],
                "depth": taxonomy.depth[self.nodes],
                "norm": found.supervised.norm,
                "supervised_f1": found.supervised.f1,
                "latent": found.detectors.latent,
                "f1": found.detectors.f1,
                "latents": self._split_into(found),
                "occluded": self._occlusion(found)[0],
            }
        ).dropna(subset=["f1"], ignore_index=True)
        latent = np.flatnonzero(found.node >= 0)
        of = self.nodes[found.node[latent]]
        latents = pd.DataFrame(
            {
                "latent": latent,
                "node": [taxonomy.nodes[v] for v in of],
                "name": [taxonomy.label(v) for v in of],
                "f1": found.f1[latent],
                "precision": found.precision[latent],
            }
        )
        tables = {"nodes": nodes, "latents": latents, "control": self._control_table()}
        return {name: table for name, table in tables.items() if len(table)}

    def _control_table(self) -> pd.DataFrame:
        spliced = self.spliced()
        depth = self.taxonomy.leaf_lca_depth[spliced.label, spliced.other_label]
        defined = np.isfinite([*spliced.agree.values(), np.full(len(depth), np.nan)]).any(0)
        rows = []
        for t in np.unique(depth[defined]):
            at = defined & (depth == t)
            agree = {name: summary.mean(values, at) for name, values in spliced.agree.items()}
            rows.append({"depth": int(t), "pairs": int(at.sum()), **agree})
        return pd.DataFrame(rows)

    def figures(self) -> dict[str, Figure]:
        """`nodes`: F1 of each node's best latent against that of its supervised vector."""
        found = self.found()
        drawing = summary.figure(
            "Nodes detected by latents and supervised dictionary", "supervised F1", "latent F1"
        )
        ends = [0, 1]
        drawing.add_scatter(
            x=ends, y=ends, name="equal", mode="lines", line={"color": summary.NULL, "dash": "dot"}
        )
        drawing.add_scatter(
            x=found.supervised.f1,
            y=found.detectors.f1,
            text=[self.taxonomy.label(v) for v in self.nodes],
            name="nodes",
            mode="markers",
            marker={"color": summary.VALUE, "size": 5, "opacity": 0.7},
        )
        return {"nodes": drawing}


class Spliced(NamedTuple):
    """Results of the model with replaced activations; empty where it was not run."""

    index: np.ndarray  # (n,) positions of the images
    label: np.ndarray  # (n,) class of each
    other_label: np.ndarray  # (n,) class of its partner
    shares: dict[str, float]
    agree: dict[str, np.ndarray]  # (n,) 0 or 1; NaN where patching does not change the prediction
    has_logits: bool


EMPTY = np.zeros(0, dtype=np.int64)
NOTHING = Spliced(EMPTY, EMPTY, EMPTY, {}, {}, False)


def held_out_f1(
    scores: np.ndarray,
    truth: np.ndarray,
    held_scores: np.ndarray,
    held_truth: np.ndarray,
    weights: np.ndarray | None = None,
    held_weights: np.ndarray | None = None,
) -> np.ndarray:
    """(N,) F1 of scores > t for each column on held-out rows, t of best F1 on the other rows.

    Args:
        scores, held_scores: (n, N); NaN columns give NaN.
        truth, held_truth: (n, N) bool.
        weights, held_weights: (n,) how often each row counts; None: once.
    """
    found = np.full(scores.shape[1], np.nan)
    for v in np.flatnonzero(np.isfinite(scores).all(0) & truth.any(0)):
        threshold, _ = best_threshold(scores[:, v], truth[:, v], weights)
        found[v] = f1_score(held_scores[:, v] > threshold, held_truth[:, v], held_weights)
    return found


def greedy_swap(x: Tensor, target: Tensor, change: Tensor, rows: Tensor, swaps: int) -> Tensor:
    """x (n, d) + Σ change_l·D_l over at most `swaps` latents l of each row: greedily, the one that
    most reduces the distance to the target (n, d), while one does.

    Args:
        change: (n, m) change of each latent when swapped.
        rows: (m, d) the decoder.
    """
    change = change.clone()
    lengths = rows.square().sum(1)
    for _ in range(min(swaps, len(rows))):
        gain = change * (2 * (target - x) @ rows.T - change * lengths)
        best = gain.max(1)
        chosen = best.indices[:, None]
        step = torch.where(best.values[:, None] > 0, change.gather(1, chosen), 0.0)
        x = x + step * rows[chosen[:, 0]]
        change.scatter_(1, chosen, 0.0)
    return x


def partners(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the next position, cyclically, with another label; (n,) whether there is one."""
    n = len(labels)
    partner = np.arange(n)
    for step in range(1, n):
        same = labels[partner] == labels
        partner[same] = (np.flatnonzero(same) + step) % n
    return partner, labels[partner] != labels


def spread(x: Tensor) -> Tensor:
    """(n,) the length of each row of x (n, d) about its mean."""
    return (x - x.mean(1, keepdim=True)).norm(dim=1)


def tokens(x: Tensor) -> tuple[Tensor, ...]:
    """x (n, k, d) split into parts (≤ 256, d), to bound the memory of their latents."""
    return x.flatten(0, 1).split(256)


def run(
    intervene: Intervention, index: np.ndarray, replacement: Tensor | None = None
) -> tuple[Tensor, InterventionResult]:
    """Run the model on images, with their activations replaced by (n, k, d), or unmodified.

    Returns:
        the original activations (n, k, d); the model's outputs.
    """
    seen: list[Tensor] = []

    def edit(x: Tensor) -> Tensor:
        start = sum(map(len, seen))  # the model runs a few images at a time, in order
        seen.append(x.detach().float().cpu())
        if replacement is None:
            return x
        return replacement[start : start + len(x)].to(x.device, x.dtype)

    given = intervene(torch.from_numpy(index), edit)
    return torch.cat(seen), given


def divergence(untouched: InterventionResult, other: InterventionResult) -> np.ndarray:
    """(n,) KL divergence of the logits; without any, 1 − cosine of the embeddings."""
    if untouched.logits is not None and other.logits is not None:
        before, after = (r.double().log_softmax(1) for r in (untouched.logits, other.logits))
        return kl_divergence(before, after).numpy()
    return 1 - cosine(untouched, other)


def differs(one: InterventionResult, other: InterventionResult) -> np.ndarray:
    """(n,) whether the largest logit differs; without logits, whether the embedding does."""
    if one.logits is not None and other.logits is not None:
        return (one.logits.argmax(1) != other.logits.argmax(1)).numpy()
    return cosine(one, other) < 1 - ROUNDING


def answers(
    given: InterventionResult, untouched: InterventionResult, wanted: InterventionResult
) -> np.ndarray:
    """(n,) whether the prediction is that of `wanted`: the same largest logit; without logits, an
    embedding nearer to that of `wanted` than to the unmodified one."""
    if wanted.logits is not None:
        return ~differs(given, wanted)
    return cosine(given, wanted) > cosine(given, untouched) + ROUNDING


def cosine(one: InterventionResult, other: InterventionResult) -> np.ndarray:
    """(n,) cosine of the embeddings."""
    similarity = torch.nn.functional.cosine_similarity
    return similarity(one.embedding.double(), other.embedding.double()).numpy()
