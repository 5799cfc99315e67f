"""Planted detectors: latents computed from the labels and the tree, as positive controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...hashing import uniform
from ...taxonomies.taxonomy import Taxonomy


class PlantedLatents:
    """One latent per distinct leaf set of the taxonomy, firing on its classes (own definition).

    Latent v fires on an image of its classes with probability `recall`, on any other with
    probability `false_alarm`; a firing is 1 + u with u uniform in [0, 1). Recall 1 and false alarm
    0 give exact node indicators.

    Args:
        taxonomy: the tree whose nodes are detected.
        recall, false_alarm: probabilities; the standard controls are .8 with .001 and with .01.
        binary: every firing is 1.
        shuffle_nodes: each node is replaced by a random set of as many classes: no hierarchy.

    Attributes:
        node: (m,) the node of each latent in `taxonomy`.
    """

    source = "planted"

    def __init__(
        self,
        taxonomy: Taxonomy,
        *,
        recall: float = 0.8,
        false_alarm: float = 0.001,
        seed: int = 0,
        binary: bool = False,
        shuffle_nodes: bool = False,
    ) -> None:
        for field, value in (("recall", recall), ("false_alarm", false_alarm)):
            if not 0 <= value <= 1:
                raise ConfigError(field, "out of range", given=value, allowed="a probability")
        self.recall, self.false_alarm, self.seed, self.binary = recall, false_alarm, seed, binary
        self.node = taxonomy.distinct_nodes
        members = taxonomy.membership[:, self.node]
        if shuffle_nodes:
            members = np.random.default_rng(seed).permuted(members, axis=0)
        self.members = np.ascontiguousarray(members)
        self.d_sae = len(self.node)

    def encode(self, x: Tensor | None = None, *, labels: Tensor, index: Tensor, **_: Any) -> Tensor:
        """(n, m) z of images with classes `labels` (n,) at positions `index` (n,)."""
        cells = index.cpu().numpy()[:, None] * self.d_sae + np.arange(self.d_sae)
        odds = np.where(self.members[labels.cpu().numpy()], self.recall, self.false_alarm)
        fires = uniform(cells, 2 * self.seed) < odds
        height = 1.0 if self.binary else 1.0 + uniform(cells, 2 * self.seed + 1)
        return torch.from_numpy(np.where(fires, height, 0.0).astype(np.float32)).to(labels.device)
