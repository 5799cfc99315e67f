"""`matryoshka_depth`: whether latents of later prefix groups are more specific.

The LCA depth per prefix group is that of Pach et al. 2025 (arXiv 2504.02821, §4.3); trend, groups
by firing rank and the form over pairs of different classes are our own definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.stats import rankdata

from ..errors import ConfigError
from ..presentation import Support
from .base import Evaluator, remembered
from .parts import summary
from .parts.accumulators import FiringRate, TopImages
from .parts.pair_depths import ClassPairs
from .parts.ranks import pearson

SHARES = (0.002, 0.009, 0.035, 0.189, 0.765)
"""The groups of the paper, as shares of the dictionary; by rate, of the latents with a depth."""
COLUMNS = [
    "group",
    "latents",
    "end",
    "defined",
    "depth",
    "permuted",
    "different_depth",
    "different_permuted",
]
ORDERS = ("auto", "index", "rate")


@dataclass(frozen=True)
class MatryoshkaDepthOptions:
    """k: number of most activating images of a latent; undefined where it fires on fewer.
    widths: ends of the prefixes, increasing, at most d_sae; what is beyond the last is a group of its own. None:
        those of the SAE, else `SHARES`.
    order: `index`: latents by index. `rate`: by decreasing firing rate. `auto`: `index` if there
        are widths, else `rate`.
    """

    k: int = 16
    widths: Sequence[int] | None = None
    order: str = "auto"

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ConfigError(
                "k", "too small", given=self.k, allowed="2 or more, since a pair needs two images"
            )
        if self.order not in ORDERS:
            raise ConfigError(
                "order", "not known", given=self.order, allowed=f"one of {', '.join(ORDERS)}"
            )
        widths = self.widths
        if widths is not None and (not widths or list(widths) != sorted({*widths} - {0})):
            raise ConfigError(
                "widths",
                "out of range",
                given=list(widths),
                allowed="numbers that rise strictly from above 0",
            )


class MatryoshkaDepth(Evaluator[MatryoshkaDepthOptions]):
    """Mean LCA depth of the top images of the latents of each prefix group.

    The depth of a latent is the mean over the pairs of its top k images, a pair of one class
    counting with the depth of that class; `different_*` leave such pairs out, so that class
    detectors do not raise them. `gain` is the last group minus the first, `trend` the rank
    correlation of group and depth over latents: both are above 0 where early latents are general
    and late ones specific. Counts of latents: `defined` (of `depth`, `trend`) and `n_different` (of
    `different_depth`, `different_trend`); `n_ends` and `n_different_ends`, the fewer of those in the
    first and in the last group, for the gains.

    An SAE without prefixes, or a Matryoshka SAE saved as another architecture without its widths
    (give them in the options), is grouped by firing rate: `by_rate` is 1. So is the `neurons` null,
    unless the options give widths; `random` has the SAE's groups.
    """

    name = "matryoshka_depth"
    description = "whether latents of later prefix groups of the dictionary are more specific"
    higher_is_better = {
        "depth": True,
        "first_depth": None,
        "last_depth": None,
        "gain": True,
        "trend": True,
        "different_depth": True,
        "different_gain": True,
        "different_trend": True,
        "groups": None,
        "defined": None,
        "n_different": None,
        "n_ends": None,
        "n_different_ends": None,
        "by_rate": None,
    }
    ranges = {
        **dict.fromkeys(
            ("depth", "first_depth", "last_depth", "different_depth"), summary.POSITIVE
        ),
        **dict.fromkeys(("trend", "different_trend"), summary.COSINE),
    }
    support = {
        **dict.fromkeys(("depth", "trend"), Support("defined", "latents")),
        "gain": Support("n_ends", "latents of the first and last group"),
        **dict.fromkeys(("different_depth", "different_trend"), Support("n_different", "latents")),
        "different_gain": Support("n_different_ends", "latents of the first and last group"),
    }
    invariant = frozenset(
        {"groups", "defined", "n_different", "n_ends", "n_different_ends", "by_rate"}
    )
    Options = MatryoshkaDepthOptions

    def prepare(self) -> None:
        self._top = self.context.share(TopImages, k=self.options.k)
        self._rate = self.context.share(FiringRate)
        given, order = self.options.widths, self.options.order
        self._widths = self._given() if given else prefix_widths(self.context.sae)
        self.by_rate = order == "rate" or (order == "auto" and self._widths is None)

    def _given(self) -> list[int]:
        """The widths of the options; where there are other latents than the SAE's, such as neurons, the same
        shares of them, up to the last width.

        Raises:
            ConfigError: they exceed the SAE.
        """
        given, d_sae = list(self.options.widths or ()), self.context.d_sae
        if self.context.source not in ("sae", "random"):
            return [round(w / given[-1] * d_sae) for w in given]
        if given[-1] > d_sae:
            raise ConfigError("widths", "beyond d_sae", given=given, allowed=f"at most {d_sae}")
        return given

    @property
    def widths(self) -> list[int]:
        """The ends of the groups."""
        d_sae, widths = self.context.d_sae, self._widths
        if widths is None:
            # Rare latents are last by rate: the last group might have no latent with a depth.
            able = int((self._rate.fired >= self.options.k).sum()) if self.by_rate else d_sae
            widths = [round(share * able) for share in np.cumsum(SHARES)[:-1]]
        return sorted({min(w, d_sae) for w in (*widths, d_sae) if w > 0})

    @property
    @remembered
    def group(self) -> np.ndarray:
        """(m,) the prefix group of each latent."""
        place = np.arange(self.context.d_sae)
        if self.by_rate:
            place[np.argsort(-self._rate.fired, kind="stable")] = np.arange(len(place))
        return np.searchsorted(self.widths, place, side="right")

    @remembered
    def _group_ranks(self, valid: np.ndarray) -> np.ndarray:
        """(l,) the rank of the group of each of the latents that are true in `valid` (m,)."""
        return rankdata(self.group[valid])

    @remembered
    def pairs(self, shuffled: bool = False) -> ClassPairs:
        """The pairs of classes of each latent."""
        return self._top.pairs(shuffled)

    @remembered
    def depths(
        self, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(m,) mean depth over all pairs, and over those of different classes; NaN if undefined."""
        pairs = self.pairs(shuffled)
        return pairs.depth(permutation), pairs.different_depth(permutation)

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        group = self.group
        numbers = {
            "groups": float(len(self.widths)),
            "by_rate": float(self.by_rate),
        }
        for prefix, depth in zip(("", "different_"), self.depths(permutation, shuffled)):
            ends = [group == g for g in (0, len(self.widths) - 1)]
            first, last = (summary.mean(depth, end) for end in ends)
            valid = np.isfinite(depth)
            numbers[f"n_{prefix}ends"] = float(min((valid & end).sum() for end in ends))
            numbers[f"{prefix}depth"] = summary.mean(depth)
            numbers[f"{prefix}gain"] = last - first
            numbers[f"{prefix}trend"] = pearson(self._group_ranks(valid), rankdata(depth[valid]))
            if not prefix:
                numbers |= {"first_depth": first, "last_depth": last, "defined": float(valid.sum())}
            else:
                numbers["n_different"] = float(valid.sum())
        return numbers

    def tables(self) -> dict[str, pd.DataFrame]:
        """`groups`: one row for each prefix group, with the permuted classes; `latents`: one for
        each defined latent, by index."""
        group = self.group
        depth, different = self.depths()
        permuted = [self.depths(p) for p in self.context.permutations]
        rows = []
        for g, end in enumerate(self.widths):
            own = group == g
            nulls = [[summary.mean(d, own) for d in draw] for draw in permuted]
            null, different_null = (summary.mean(draws) for draws in zip(*nulls, [np.nan] * 2))
            rows.append(
                (
                    g + 1,
                    int(own.sum()),
                    end,
                    int(np.isfinite(depth[own]).sum()),
                    summary.mean(depth, own),
                    null,
                    summary.mean(different, own),
                    different_null,
                )
            )
        latent = np.flatnonzero(np.isfinite(depth))
        latents = {
            "latent": latent,
            "group": group[latent] + 1,
            "fired": self._rate.fired[latent],
            "depth": depth[latent],
            "different_depth": different[latent],
        }
        return {"groups": pd.DataFrame(rows, columns=COLUMNS), "latents": pd.DataFrame(latents)}

    def figures(self) -> dict[str, Figure]:
        """`groups`: depth of each group, with the permuted classes dotted."""
        table = self.tables()["groups"]
        of = "firing rank" if self.by_rate else "prefix"
        drawing = summary.figure("LCA depth of the top images", f"group by {of}", "mean depth")
        for column, null, name, colour in (
            ("depth", "permuted", "all pairs", summary.VALUE),
            ("different_depth", "different_permuted", "different classes", summary.OTHER),
        ):
            line = {"color": colour}
            drawing.add_scatter(x=table["group"], y=table[column], name=name, line=line)
            drawing.add_scatter(
                x=table["group"],
                y=table[null],
                name=f"{name}, permuted",
                line={**line, "dash": "dot"},
            )
        drawing.update_xaxes(dtick=1)
        return {"groups": drawing}


def prefix_widths(sae: Any) -> list[int] | None:
    """The ends of the prefixes in an SAE's config; None where it has none.

    Read from: `matryoshka_widths` (ends) in the config, its metadata, and the training config that
    SAELens stores in the metadata of a converted SAE; `level_widths` (widths).
    """
    cfg = getattr(sae, "cfg", None)
    metadata = _get(cfg, "metadata")
    for place in (cfg, metadata, _get(metadata, "training_architecture_details")):
        if ends := _get(place, "matryoshka_widths"):
            return [int(w) for w in ends]
    if widths := _get(cfg, "level_widths"):
        return np.cumsum(widths).tolist()
    return None


def _get(place: Any, name: str) -> Any:
    return place.get(name) if isinstance(place, dict) else getattr(place, name, None)
