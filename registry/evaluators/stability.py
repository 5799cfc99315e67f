"""`stability`: whether another SAE finds the same latents.

One-to-one and one-to-many matching are those of convergent learning (Li et al. 2016, arXiv
1511.07543, made for the units of networks); relative representations are those of Moschella et al.
2022 (arXiv 2209.15430). The ports to the latents of SAEs are our own definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .. import hashing
from ..errors import ConfigError
from ..presentation import Support
from .base import ALL_NULLS, Evaluator, Peer, not_finite, remembered, require_at_least
from .parts import summary
from .parts.samples import FiringSample, shape

SALT = 105
RIDGE = 1e-3  # of the regressions, relative to the variance of a latent
MATCHES = ("decoder", "activation")


@dataclass(frozen=True)
class StabilityOptions:
    """max_images: size of the sample on which latents are compared, fit and score half together.
    max_latents: number of most frequently active latents matched, of either SAE; the time is cubic
    in it.
    regressors: latents of the peer that predict one latent jointly, at most.
    anchors: reference images of a relative representation.
    same: least cosine, or correlation, at which a pair counts as the same latent.
    """

    max_images: int = 4096
    max_latents: int = 2048
    regressors: int = 5
    anchors: int = 256
    same: float = 0.7

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_images", "max_latents", "regressors", "anchors")
        if not 0 < self.same <= 1:
            raise ConfigError("same", "out of range", given=self.same, allowed="a number in (0, 1]")


class Comparison(NamedTuple):
    """Comparison with one peer; arrays over the latents compared, NaN and −1 where undefined."""

    peer: str
    relation: str
    latent: np.ndarray  # (a,) of the SAE
    partner: dict[str, np.ndarray]  # match -> (a,) latent of the peer
    likeness: dict[str, np.ndarray]  # match -> (a,) cosine, or held-out correlation
    r2: np.ndarray  # (regressors, a) held-out, from at most that many latents of the peer
    relative_cosine: float
    relative_mrr: float


class Stability(Evaluator[StabilityOptions]):
    """Compares the SAE with its peers, the evaluation's other SAEs; numbers are means over peers.

    - `decoder_cosine`: mean cosine of the decoder rows under the one-to-one matching of largest sum
      (Hungarian); `decoder_same_share`: pairs of cosine .7 or more. Only between decoders of one
      space: not across models; across layers only as far as they share a residual stream.
    - `activation_correlation`, `activation_same_share`: the same with the correlation of
      activations over images, pairs chosen on the fit half and correlated on the other.
    - `agreement`: latents that both matchings give the same partner.
    - `one_to_one_r2`, `one_to_many_r2`: the share of a latent's held-out variance that is predicted
      linearly from the best latent of the peer, and from up to five chosen greedily on the fit half
      (orthogonal matching pursuit in place of the paper's lasso); a prediction worse than the mean
      counts 0. If the second is far above the first, the peer has split or merged the latent.
    - `relative_cosine`, `relative_mrr`: a held-out image is represented by the cosines of its
      latents with those of the anchors, images of the fit half. The two SAEs' representations of
      the same images are compared: mean cosine, after centring; mean reciprocal rank of an image
      among all images. Images with equal representations share a rank, so that a copy reaches 1 in
      `relative_mrr` only where no two images have the same. Comparable across SAEs of different width or model.

    Latents that are 0 on every fit image of the sample are left out, and in wide dictionaries those
    that are active least; `latents` are left, and `decoder_pairs` and `activation_pairs` of them have a partner: fewer where the
    other SAE has fewer. Everything is NaN without a peer. Memory
    O(max_images·(L0 + max_latents) + max_latents²).
    """

    name = "stability"
    description = "whether another SAE (seed, architecture, layer or model) finds the same latents"
    higher_is_better = {
        "decoder_cosine": True,
        "decoder_same_share": True,
        "activation_correlation": True,
        "activation_same_share": True,
        "agreement": True,
        "one_to_one_r2": True,
        "one_to_many_r2": True,
        "relative_cosine": True,
        "relative_mrr": True,
        "latents": None,
        "decoder_pairs": None,
        "activation_pairs": None,
        "peers": None,
    }
    ranges = {
        **dict.fromkeys(
            ("decoder_cosine", "activation_correlation", "relative_cosine"), summary.COSINE
        ),
        **dict.fromkeys(
            (
                "decoder_same_share",
                "activation_same_share",
                "agreement",
                "one_to_one_r2",
                "one_to_many_r2",
                "relative_mrr",
            ),
            summary.SHARE,
        ),
    }
    support = {
        **dict.fromkeys(
            ("decoder_cosine", "decoder_same_share"), Support("decoder_pairs", "pairs of latents")
        ),
        **dict.fromkeys(
            ("activation_correlation", "activation_same_share", "agreement"),
            Support("activation_pairs", "pairs of latents"),
        ),
        **dict.fromkeys(("one_to_one_r2", "one_to_many_r2"), Support("latents", "latents")),
    }
    nulls = {
        **ALL_NULLS,
        "permuted_classes": "latents are compared with latents, with no tree",
        "shuffled": "no label is used",
    }
    invariant = frozenset(higher_is_better)
    wants_peers = True
    Options = StabilityOptions

    def prepare(self) -> None:
        self._sample = self.context.share(FiringSample, max_images=self.options.max_images)

    @remembered
    def comparisons(self) -> list[Comparison]:
        """One comparison for each peer."""
        return [self._compare(peer) for peer in self.context.peers]

    def _compare(self, peer: Peer) -> Comparison:
        sample, options = self._sample, self.options
        own, other = sample.z, peer.latents(sample.index)
        if error := not_finite(f"latents of the peer {peer.name}", torch.from_numpy(other.data)):
            raise error
        fit = sample.is_fit
        a = most_firing(own[fit], options.max_latents)
        b = most_firing(other[fit], options.max_latents)
        halves = [
            (
                torch.from_numpy(own[half][:, a].toarray()),
                torch.from_numpy(other[half][:, b].toarray()),
            )
            for half in (fit, ~fit)
        ]
        likeness, partner = {}, {}
        cosine = self._cosine(peer, a, b)
        partner["decoder"] = match(cosine)
        likeness["decoder"] = of_pairs(cosine, partner["decoder"])
        partner["activation"] = match(correlations(*halves[0]))
        held_out = correlations(*halves[1], constant=float("nan"))
        likeness["activation"] = of_pairs(held_out, partner["activation"])
        found = relative_agreement(*self._described(own, other))
        return Comparison(
            peer=peer.name,
            relation=peer.relation,
            latent=a,
            partner={kind: np.append(b, -1)[column] for kind, column in partner.items()},
            likeness=likeness,
            r2=regression_r2(*halves[0], *halves[1], options.regressors),
            relative_cosine=found[0],
            relative_mrr=found[1],
        )

    def _cosine(self, peer: Peer, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(a, b) cosines of decoder rows, NaN where the decoders are not of one space."""
        own, other = self.context.W_dec, peer.W_dec
        if own is None or other is None or not peer.same_space or own.shape[1] != other.shape[1]:
            return np.full((len(a), len(b)), np.nan)
        rows = [unit(w.detach().float().cpu()[i]) for w, i in ((own, a), (other, b))]
        return (rows[0] @ rows[1].T).numpy()

    def _described(self, own: sparse.csr_array, other: sparse.csr_array) -> list[np.ndarray]:
        """(n, anchors) relative representations of the score half, by either SAE."""
        fit = np.flatnonzero(self._sample.is_fit)
        drawn = np.argsort(hashing.uniform(self._sample.index[fit], SALT), kind="stable")
        anchors = fit[drawn[: self.options.anchors]]
        score = ~self._sample.is_fit
        return [relative(z[score], z[anchors]) for z in (own, other)]

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        each = [self._numbers(found) for found in self.comparisons()]
        numbers = {
            metric: summary.mean([numbers[metric] for numbers in each])
            for metric in self.higher_is_better
            if metric != "peers"
        }
        return {**numbers, "peers": float(len(each))}

    def _numbers(self, found: Comparison) -> dict[str, float]:
        numbers = {}
        for kind, name in zip(MATCHES, ("decoder_cosine", "activation_correlation")):
            likeness = found.likeness[kind]
            numbers[name] = summary.mean(likeness)
            same = likeness >= self.options.same
            numbers[f"{kind}_same_share"] = summary.mean(same, np.isfinite(likeness))
            numbers[f"{kind}_pairs"] = summary.count(likeness)
        both = [found.partner[kind] for kind in MATCHES]
        numbers["agreement"] = summary.mean(both[0] == both[1], (both[0] >= 0) & (both[1] >= 0))
        numbers["one_to_one_r2"] = summary.mean(found.r2[0])
        numbers["one_to_many_r2"] = summary.mean(found.r2[-1])
        numbers["relative_cosine"] = found.relative_cosine
        numbers["relative_mrr"] = found.relative_mrr
        return {**numbers, "latents": float(len(found.latent))}

    def notes(self) -> list[str]:
        """The peers compared with, or why there are none."""
        if not self.context.peers:
            return [
                "There is no other SAE to compare with: evaluate two runs (seeds), a run of several "
                "layers, or SAEs of two models together."
            ]
        peers = ", ".join(f"{peer.name} ({peer.relation})" for peer in self.context.peers)
        notes = [f"Compared with {peers}."]
        if not all(peer.same_space for peer in self.context.peers):
            notes.append("Decoder rows of two models have no common space: no cosine is given.")
        return notes

    def tables(self) -> dict[str, pd.DataFrame]:
        """`latents`: partners of every latent compared; `peers`: the numbers for each peer."""
        found = self.comparisons()
        if not found:
            return {}
        peers = pd.DataFrame(
            [{"peer": c.peer, "relation": c.relation, **self._numbers(c)} for c in found]
        )
        latents = pd.concat([_latents(c) for c in found], ignore_index=True)
        return {"peers": peers, **({"latents": latents} if len(latents) else {})}

    def figures(self) -> dict[str, Figure]:
        """`matches`: similarity of matched latents, by decoder and by activation."""
        found = self.comparisons()
        if not found:
            return {}
        names = {"decoder": "decoder cosine", "activation": "correlation of activations"}
        values = {
            name: np.concatenate([c.likeness[kind] for c in found]) for kind, name in names.items()
        }
        drawing = summary.histograms("Latents and their partners", "likeness", values)
        if not drawing.data:
            drawing.add_scatter(x=[], y=[], name="no latent is matched")
        return {"matches": drawing}


def _latents(found: Comparison) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "peer": found.peer,
            "latent": found.latent,
            "decoder_partner": found.partner["decoder"],
            "decoder_cosine": found.likeness["decoder"],
            "activation_partner": found.partner["activation"],
            "activation_correlation": found.likeness["activation"],
            "one_to_one_r2": found.r2[0],
            "one_to_many_r2": found.r2[-1],
        }
    )


def most_firing(z: sparse.csr_array, most: int) -> np.ndarray:
    """(≤ most,) the latents of z (n, m) that are not 0 on most images, ascending; no dead ones."""
    active = np.bincount(z.indices[z.data != 0], minlength=shape(z)[1])
    order = np.argsort(-active, kind="stable")[:most]
    return np.sort(order[active[order] > 0])


def match(likeness: np.ndarray) -> np.ndarray:
    """(a,) the column of each row of likeness (a, b) in the one-to-one matching of largest sum.

    −1 for unmatched rows, and for all rows where a likeness is NaN.
    """
    column = np.full(len(likeness), -1)
    if np.isfinite(likeness).all():
        rows, columns = linear_sum_assignment(likeness, maximize=True)
        column[rows] = columns
    return column


def of_pairs(likeness: np.ndarray, column: np.ndarray) -> np.ndarray:
    """(a,) likeness of each row with its column; NaN where the column is −1."""
    found = np.full(len(column), np.nan)
    rows = np.flatnonzero(column >= 0)
    found[rows] = likeness[rows, column[rows]]
    return found


def unit(x: Tensor) -> Tensor:
    """x (n, d) with rows scaled to length 1; zero rows stay."""
    return torch.nn.functional.normalize(x, dim=1)


def standard(x: Tensor) -> Tensor:
    """x (n, w) with columns of mean 0 and length √n; constant columns become 0."""
    x = x.double()
    centred = x - x.mean(0) if len(x) else x
    deviation = centred.square().mean(0).sqrt() if len(x) else torch.zeros(x.shape[1])
    constant = deviation <= 1e-9 * x.abs().amax(0) if len(x) else deviation == 0
    return torch.where(constant, 0.0, centred / deviation.masked_fill(constant, 1)).float()


def correlations(x: Tensor, y: Tensor, constant: float = 0.0) -> np.ndarray:
    """(a, b) Pearson correlations of the columns of x (n, a) and y (n, b).

    Args:
        constant: value where a column is constant, so that the correlation is undefined.
    """
    x, y = standard(x), standard(y)
    found = (x.T @ y) / max(len(x), 1)
    varies = (x != 0).any(0)[:, None] & (y != 0).any(0)
    return torch.where(varies, found.clamp(-1, 1), constant).numpy()


def regression_r2(
    x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, regressors: int
) -> np.ndarray:
    """(regressors, a) R² of the columns of x (n, a), from the s columns of y (n, b) that orthogonal
    matching pursuit picks for each, s = 1 …; on the rows held out, never below 0.

    NaN where a column is constant there. With fewer than s columns, R² of all of them.
    """
    n_targets, n_sources = x.shape[1], y.shape[1]
    r2 = np.full((regressors, n_targets), np.nan)
    if not (len(x) and len(held_x) and n_targets and n_sources):
        return r2
    x_mean, y_mean = x.mean(0), y.mean(0)
    y_scale = y.std(0, correction=0)
    y_scale = y_scale.masked_fill(y_scale == 0, torch.inf)  # a constant contributes 0
    source = ((y - y_mean) / y_scale).float()
    target = (x - x_mean).float()
    gram = source.T @ source / len(x) + RIDGE * torch.eye(n_sources)
    moment = target.T @ source / len(x)  # (a, b)
    held = ((held_y - y_mean) / y_scale).float()
    total = (held_x - held_x.mean(0)).square().sum(0)
    varies = total > 1e-9 * held_x.square().sum(0)
    chosen = torch.zeros(n_targets, 0, dtype=torch.int64)
    rest = moment.clone()
    for size in range(1, regressors + 1):
        if size <= n_sources:
            gain = rest.abs().scatter_(1, chosen, -1.0)
            chosen = torch.cat([chosen, gain.argmax(1, keepdim=True)], dim=1)
            among = gram[chosen[:, :, None], chosen[:, None, :]]
            weight = torch.linalg.solve(among, moment.gather(1, chosen))
            predicted = x_mean.expand(len(held), -1).clone()
            rest = moment.clone()
            for column, w in zip(chosen.T, weight.T):
                predicted += held[:, column] * w
                rest -= w[:, None] * gram[column]
        error = (held_x - predicted).square().sum(0)
        share = 1 - error / total.masked_fill(~varies, 1)
        r2[size - 1] = torch.where(varies, share.clamp(min=0), torch.nan).numpy()
    return r2


def relative(z: sparse.csr_array, anchors: sparse.csr_array) -> np.ndarray:
    """(n, A) cosines of the rows of z (n, m) with those of anchors (A, m); 0 for zero rows."""
    dots = np.asarray((z @ anchors.T).toarray(), dtype=np.float64)
    for axis, rows in ((1, z), (0, anchors)):
        squares = sparse.csr_array((np.square(rows.data), rows.indices, rows.indptr), shape(rows))
        length = np.sqrt(np.asarray(squares.sum(1), dtype=np.float64)).ravel()
        dots /= np.expand_dims(np.where(length > 0, length, 1), axis)
    return dots


def relative_agreement(own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Mean cosine of the rows of own and other (n, A), each about its mean row; and the mean of
    1/rank of row i of `other` among its rows, by cosine with row i of `own` (ties share a rank).

    Rows that equal the mean row in either have no cosine and are left out of its mean. Both are NaN
    with fewer than two rows, and where all rows of either are 0.
    """
    if len(own) < 2 or not (own.any() and other.any()):
        return float("nan"), float("nan")
    first, second = (r - r.mean(0) for r in (own, other))
    defined = np.all([np.linalg.norm(r, axis=1) > 1e-9 for r in (first, second)], axis=0)
    first, second = (unit(torch.from_numpy(r)).numpy() for r in (first, second))
    likeness = first @ second.T
    same = likeness.diagonal()[:, None]
    tolerance = 1e-9
    above = (likeness > same + tolerance).sum(1)
    equal = (np.abs(likeness - same) <= tolerance).sum(1)
    return summary.mean(likeness.diagonal(), defined), float((1 / (above + (equal + 1) / 2)).mean())
