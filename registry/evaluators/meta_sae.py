"""`meta_sae`: an SAE of the decoder rows, and whether it groups latents of one branch of the tree.

The meta-SAE of SAEBench (`sae_bench/evals/meta_structure`, after Bussmann et al. 2025, arXiv 2503.17547,
appendix D.1): width, k, steps and learning rate are its. That the latents that never fire are left
out, and what is measured of the tree, is our own definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from ..errors import ConfigError
from ..presentation import Headline, Support
from .base import ALL_NULLS, Evaluator, remembered, require_at_least
from .parts import summary
from .parts.latent_nodes import LatentNodes, shared_depth

BATCH = 1024


@dataclass(frozen=True)
class MetaSAEOptions:
    """width: latents of the meta-SAE, as a share of the rows.
    k: mean number of meta-latents of a row.
    steps: of training, with 1,024 rows each.
    lr: learning rate.
    min_fired: least number of images of the fit half on which a latent fires.
    """

    width: float = 0.25
    k: int = 4
    steps: int = 1500
    lr: float = 5e-4
    min_fired: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise ConfigError(
                "width", "out of range", given=self.width, allowed="a number in (0, 1]"
            )
        if not self.lr > 0:
            raise ConfigError("lr", "out of range", given=self.lr, allowed="above 0")
        require_at_least(1, self, "k", "steps", "min_fired")


class MetaLatents(NamedTuple):
    """The trained meta-SAE over the rows of l latents."""

    explained: float
    acts: np.ndarray  # (l, w) activations of the meta-latents


class MetaSAE(Evaluator[MetaSAEOptions]):
    """Variance of the decoder rows that a BatchTopK SAE of a quarter of their number explains.

    The rows, at length 1, of the latents that fire on `min_fired` images of the fit half.
    `explained_variance` = 1 − Σ‖D − D̂‖² / Σ‖D − D̄‖². It is high where the latents share directions.

    Each latent has the node of best F1 with its firing on the fit half, the root left out. Over the
    meta-latents that are above 0 for rows of two different nodes or more:

    - `common_depth`: mean depth, in the primary tree, of the lowest common node of two rows of
      different nodes.
    - `one_branch_share`: meta-latents whose rows all lie at or below one child of the lowest node
      above all classes that have images, the root where all have some.

    `n_latents` rows, `n_meta_latents` with rows of different nodes, `mean_l0` meta-latents of a
    row. NaN without a decoder and with fewer than 4·k rows. Trained by SAELens's trainer with the
    sparse step, on the device of the decoder. Memory O(l·w), w = l/4.
    """

    name = "meta_sae"
    description = "an SAE of the decoder rows: shared directions, and the branches that it groups"
    higher_is_better = {
        "explained_variance": None,
        "common_depth": True,
        "one_branch_share": True,
        "mean_l0": None,
        "n_latents": None,
        "n_meta_latents": None,
    }
    ranges = {
        "explained_variance": summary.SCORE,
        **dict.fromkeys(("common_depth", "mean_l0"), summary.POSITIVE),
        "one_branch_share": summary.SHARE,
    }
    nulls = {
        **ALL_NULLS,
        "neurons": "their decoder rows are the axes and their negatives, which share no direction",
    }
    invariant = label_free = frozenset({"explained_variance", "mean_l0", "n_latents"})
    support = {
        name: Support("n_meta_latents", "meta-latents")
        for name in ("common_depth", "one_branch_share")
    }
    headlines = (
        Headline(
            "common_depth",
            "meta-latent depth",
            "depth of the lowest common node of two latents that a meta-latent groups",
            priority=80,
        ),
    )
    Options = MetaSAEOptions

    def prepare(self) -> None:
        self._nodes = LatentNodes(self.context)

    @property
    @remembered
    def latents(self) -> np.ndarray:
        """(l,) the latents whose rows are decomposed, ascending; none without a decoder."""
        decoder = self.context.W_dec
        if decoder is None:
            return np.zeros(0, dtype=np.int64)
        latents = np.flatnonzero(self._nodes.fired >= self.options.min_fired)
        return latents[decoder.detach()[latents].norm(dim=1).cpu().numpy() > 0]

    @property
    @remembered
    def meta(self) -> MetaLatents | None:
        """The meta-SAE; None with too few rows."""
        latents, decoder = self.latents, self.context.W_dec
        if decoder is None or len(latents) < 4 * self.options.k:
            return None
        rows = torch.nn.functional.normalize(decoder.detach().float()[latents], dim=1)
        return decompose(rows, self.options, self.context.seed)

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        self._check_shuffled(shuffled)
        numbers = dict.fromkeys(self.higher_is_better, float("nan"))
        numbers["n_latents"] = float(len(self.latents))
        found = self.meta
        if found is None:
            return numbers
        depth, one_branch = self.groups(permutation, shuffled)
        return {
            **numbers,
            "explained_variance": found.explained,
            "common_depth": summary.mean(depth),
            "one_branch_share": summary.mean(one_branch),
            "mean_l0": float((found.acts > 0).sum(1).mean()),
            "n_meta_latents": summary.count(depth),
        }

    @remembered
    def groups(
        self, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(w,) mean common depth of each meta-latent, and (w,) whether its rows are of one branch;
        NaN where its rows are of one node, and without a meta-SAE."""
        found = self.meta
        if found is None:
            return np.zeros(0), np.zeros(0)
        nodes = self._nodes.of(self.latents, permutation, shuffled)[0]
        shared = shared_depth(self.taxonomy, nodes)
        depth, one_branch = np.full((2, found.acts.shape[1]), np.nan)
        top = self.taxonomy.depth[self.context.lch]
        for meta, on in enumerate(found.acts.T > 0):
            own = nodes[on]
            different = own[:, None] != own
            if different.any():
                among = shared[np.ix_(on, on)][different]
                depth[meta] = among.mean()
                one_branch[meta] = among.min() > top
        return depth, one_branch

    def notes(self) -> list[str]:
        """Why the numbers are undefined, where they are."""
        if self.context.W_dec is None:
            return ["There is no decoder to decompose."]
        if self.meta is None:
            return [
                f"Only {len(self.latents)} latents fire on {self.options.min_fired} images of the fit "
                f"half; a meta-SAE needs {4 * self.options.k}."
            ]
        return []

    def tables(self) -> dict[str, pd.DataFrame]:
        """`meta_latents`: the rows that each groups, most active first, beside the permuted classes."""
        found = self.meta
        if found is None:
            return {}
        depth, one_branch = self.groups()
        permuted = [self.groups(p)[0] for p in self.context.permutations]
        names = [self.taxonomy.label(v) for v in self._nodes.of(self.latents)[0].tolist()]
        on = found.acts > 0
        meta = np.flatnonzero(on.any(0))
        if not len(meta):
            return {}
        null = np.mean(permuted, axis=0) if permuted else np.full(len(depth), np.nan)
        return {
            "meta_latents": pd.DataFrame(
                {
                    "meta_latent": meta,
                    "n_latents": on.sum(0)[meta],
                    "common_depth": depth[meta],
                    "permuted": null[meta],
                    "one_branch": one_branch[meta],
                    "latents": [
                        ", ".join(
                            f"{names[i]} ({self.latents[i]})"
                            for i in np.argsort(-found.acts[:, w], kind="stable")[: on[:, w].sum()]
                        )
                        for w in meta
                    ],
                }
            )
        }

    def figures(self) -> dict[str, Figure]:
        """`common_depth`: histogram over the meta-latents, with the permuted classes."""
        permuted = [self.groups(p)[0] for p in self.context.permutations]
        drawing = summary.histograms(
            "Common depth of the latents that a meta-latent groups",
            "mean depth of the lowest common node of two latents",
            {
                "meta-latents": self.groups()[0],
                "permuted classes": np.concatenate([*permuted, np.zeros(0)]),
            },
        )
        if not drawing.data:
            drawing.add_scatter(x=[], y=[], name="no meta-latent")
        return {"common_depth": drawing}


def decompose(rows: Tensor, options: MetaSAEOptions, seed: int) -> MetaLatents:
    """Train the meta-SAE on rows (l, d) and apply it to them; the global random state is kept."""
    # SAELens takes seconds to import, and the table of evaluators is listed without it.
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from ..architectures.parts.sparse_step import with_sparse_step

    device = str(rows.device)
    config = BatchTopKTrainingSAEConfig(
        d_in=rows.shape[1],
        d_sae=max(math.ceil(options.width * len(rows)), options.k),
        k=options.k,
        rescale_acts_by_decoder_norm=True,
        device=device,
    )
    training = SAETrainerConfig(
        total_training_samples=options.steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=options.lr,
        lr_end=options.lr,
        device=device,
    )
    devices = [rows.device] if rows.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        sae = with_sparse_step(BatchTopKTrainingSAE(config))
        trainer = SAETrainer(training, sae, iter(()))
        for _ in range(options.steps):
            trainer.step(rows[torch.randint(len(rows), (BATCH,), device=rows.device)])
            trainer.n_training_steps += 1
    with torch.no_grad():
        acts = sae.eval().encode(rows)
        error = (sae.decode(acts) - rows).square().sum()
        spread = (rows - rows.mean(0)).square().sum()
    return MetaLatents(float(1 - error / spread), acts.cpu().numpy())
