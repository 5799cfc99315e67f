"""Cards of latents for the report: position in the tree and most activating images."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ...registry.evaluators.parts.accumulators import FiringRate, TopImages
from ...registry.files import write_atomically
from ...registry.presentation import NodeTable
from ...registry.taxonomies.graph import listed
from ...registry.taxonomies.taxonomy import Taxonomy
from ..reporting.results import LatentCard, TopImage

logger = logging.getLogger(__name__)

Tables = Mapping[str, Mapping[str, pd.DataFrame]]
NodeFrames = dict[str, tuple[NodeTable, pd.DataFrame]]  # evaluator -> its node table and the rows

N_CARDS = 6
N_IMAGES = 6
TOP_IMAGES = 16  # the number that pair_depth keeps, so that both share one accumulator
GOOD_F1 = 0.5
THUMBNAIL = 96  # pixels a side
THUMBNAILS_FOLDER = "thumbnails"
EMPTY = pd.DataFrame({"latent": [], "node": [], "f1": []})


class NodeTables:
    """Latents and nodes in the evaluators' tables, which each evaluator's `node_table` describes.

    Args:
        tables: evaluator -> table -> its rows.
        sources: evaluator -> its `node_table`.
        taxonomy: the class tree.
        n_latents: of the SAE.
    """

    def __init__(
        self,
        tables: Tables,
        sources: Mapping[str, NodeTable | None],
        taxonomy: Taxonomy,
        n_latents: int,
    ) -> None:
        self._nodes, self._n_latents = set(taxonomy.nodes), n_latents
        declared = [(name, source) for name, source in sources.items() if source is not None]
        declared.sort(key=lambda item: item[1].priority)
        self._found = [
            (source, table)
            for name, source in declared
            if (table := self._read(name, source, tables.get(name, {}))) is not None
        ]

    def node_f1(self) -> dict[str, float]:
        """Node -> F1 of its best latent."""
        table = next((table for source, table in self._found if source.f1), EMPTY)
        best: dict[str, float] = {}
        for node, f1 in zip(table["node"], table["f1"], strict=True):
            best[node] = max(float(f1), best.get(node, 0.0))
        return best

    def placed_latents(self) -> pd.DataFrame:
        """Columns latent, node, f1 (and fires_on); a row per latent, with the node it detects best."""
        table = next((table for source, table in self._found if source.latent), EMPTY)
        best_first = table.query("latent >= 0").sort_values("f1", ascending=False, kind="stable")
        return best_first.drop_duplicates("latent")

    def _read(
        self, evaluator: str, source: NodeTable, tables: Mapping[str, pd.DataFrame]
    ) -> pd.DataFrame | None:
        """Columns latent, node, f1 (and fires_on); None, with a warning, where it cannot be read."""
        table = tables.get(source.name)
        if table is None:
            return None
        try:
            found = pd.DataFrame(
                {
                    "latent": table[source.latent].astype(int) if source.latent else -1,
                    "node": table[source.node].astype(str),
                    "f1": table[source.f1].astype(float) if source.f1 else math.nan,
                }
            )
            if source.fires_on:
                found["fires_on"] = table[source.fires_on].astype(float)
            if unknown := sorted(set(found["node"]) - self._nodes):
                raise ValueError(f"nodes that the taxonomy does not have: {listed(unknown)}")
            if found["latent"].to_numpy().max(initial=-1) >= self._n_latents:
                raise ValueError(f"latents above {self._n_latents - 1}")
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            logger.warning("%s: the table %r places no latents (%s)", evaluator, source.name, what)
            return None
        return found.dropna(subset=["f1"]) if source.f1 else found


def pick(placed: pd.DataFrame, taxonomy: Taxonomy, n: int = N_CARDS) -> tuple[list[int], list[int]]:
    """Rows of `placed`: the n most and the n least specific latents.

    They are sorted by the number of classes below their node and then by F1. Latents with an F1 of
    GOOD_F1 or more come before all others. A latent of one class is never among the least specific.
    """
    if placed.empty:
        return [], []
    classes = np.array([taxonomy.n_leaves[taxonomy.index(node)] for node in placed["node"]])
    f1 = placed["f1"].fillna(0).to_numpy()
    good = np.flatnonzero(f1 >= GOOD_F1)
    if len(good) < 2 * n:
        good = np.argsort(-f1, kind="stable")[: 2 * n]
    n = min(n, (len(good) + 1) // 2)
    general = good[np.lexsort((-f1[good], -classes[good]))]
    least = general[classes[general] > 1][: min(n, len(good) - n)]
    rest = np.setdiff1d(good, least)
    most = rest[np.lexsort((-f1[rest], classes[rest]))][:n]
    return most.tolist(), least.tolist()


def make_cards(
    placed: pd.DataFrame,
    rows: list[int],
    *,
    taxonomy: Taxonomy,
    top: TopImages,
    rate: FiringRate,
    image_ids: np.ndarray,
    images: str,
) -> list[LatentCard]:
    """Cards of some rows of `placed`; the thumbnails are written by `write_thumbnails`.

    Args:
        placed: columns latent, node, f1, and maybe fires_on.
        rows: which of its rows.
        taxonomy: the class tree.
        top: the most activating images of each latent.
        rate: the firing rate of each latent.
        image_ids: (n,) position in the evaluation set -> row of the dataset.
        images: fingerprint of the dataset, of which the folder of the thumbnails has its name.
    """
    cards = []
    for row in rows:
        latent, node_id, f1 = placed.iloc[row][["latent", "node", "f1"]]
        latent, node = int(latent), taxonomy.index(node_id)
        shown = [i for i in range(min(N_IMAGES, top.k)) if top.index[latent, i] >= 0]
        cards.append(
            LatentCard(
                latent=latent,
                node=node_id,
                path=[taxonomy.label(v) for v in reversed(taxonomy.path_to_root(node))],
                height=float(taxonomy.height[node]),
                generality=float(taxonomy.generality[node]),
                f1=float(f1),
                fires_on=float(rate.rate[latent]),
                above_threshold_on=float(placed.iloc[row].get("fires_on", math.nan)),
                images=[
                    TopImage(
                        index=(image := int(image_ids[top.index[latent, i]])),
                        label=taxonomy.label(int(taxonomy.class_nodes[top.labels()[latent, i]])),
                        activation=float(top.values[latent, i]),
                        thumbnail=f"{THUMBNAILS_FOLDER}/{images}/{image}.jpg",
                    )
                    for i in shown
                ],
            )
        )
    return cards


def write_thumbnails(cards: list[LatentCard], images: Any, folder: Path) -> None:
    """Write one small JPEG per image; an image that cannot be read has none."""
    shown = {image.thumbnail: image.index for card in cards for image in card.images}
    for name, index in sorted(shown.items(), key=lambda item: item[1]):
        file = folder / str(name)
        if file.exists():
            continue
        try:
            write_atomically(file, thumbnail(images.decode(index)), sync=False)
        except Exception as error:  # a missing thumbnail must not cost the numbers
            logger.warning("no thumbnail of image %d: %s", index, error)


def thumbnail(image: Image.Image, size: int = THUMBNAIL) -> bytes:
    """The middle square of an image as JPEG."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    buffer = io.BytesIO()
    square.resize((size, size), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
