"""The latents that a report shows: their place in the tree and the images they fire on most."""

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
from ...registry.taxonomies.taxonomy import Taxonomy
from ..reporting.results import LatentCard, TopImage

logger = logging.getLogger(__name__)

Tables = Mapping[str, Mapping[str, pd.DataFrame]]

N_CARDS = 6
N_IMAGES = 6
TOP_IMAGES = 16  # as many as pair_depth keeps, so that both read the same accumulator
GOOD_F1 = 0.5
THUMBNAIL = 96  # pixels a side
THUMBNAILS_FOLDER = "thumbnails"


def node_f1(tables: Tables) -> dict[str, float]:
    """node -> F1 of its best latent, from the `nodes` table of ontological_coverage."""
    nodes = tables.get("ontological_coverage", {}).get("nodes")
    if nodes is None:
        return {}
    return dict(zip(nodes["node"].astype(str), nodes["f1"].astype(float), strict=True))


def placed_latents(tables: Tables) -> pd.DataFrame:
    """latent, node, f1, one row per latent: the node for which it is the best detector (of several
    the one it detects best); where coverage was not measured, the LCH of its classes."""
    nodes = tables.get("ontological_coverage", {}).get("nodes")
    if nodes is not None:
        placed = nodes.loc[(nodes["latent"] >= 0) & nodes["f1"].notna(), ["latent", "node", "f1"]]
        best_first = placed.sort_values(by="f1", ascending=False, kind="stable")
        return best_first.drop_duplicates("latent")
    latents = tables.get("lch_height", {}).get("latents")
    if latents is None:
        return pd.DataFrame({"latent": [], "node": [], "f1": []})
    return latents[["latent", "node"]].assign(f1=math.nan)


def pick(placed: pd.DataFrame, taxonomy: Taxonomy, n: int = N_CARDS) -> tuple[list[int], list[int]]:
    """Rows of `placed`: the n most and the n least specific latents, by the number of classes below
    their node and then by F1. Latents that detect their node well come before all others."""
    if placed.empty:
        return [], []
    classes = np.array([taxonomy.n_leaves[taxonomy.index(node)] for node in placed["node"]])
    f1 = placed["f1"].fillna(0).to_numpy()
    good = np.flatnonzero(f1 >= GOOD_F1)
    if len(good) < 2 * n:
        good = np.argsort(-f1, kind="stable")[: 2 * n]
    n = min(n, (len(good) + 1) // 2)
    general = good[np.lexsort((-f1[good], -classes[good]))]
    least = general[: min(n, len(good) - n)]
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
) -> list[LatentCard]:
    """Cards without thumbnails.

    Args:
        image_ids: (n,) position in the evaluation set -> row of the dataset.
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
                images=[
                    TopImage(
                        index=(image := int(image_ids[top.index[latent, i]])),
                        label=taxonomy.label(int(taxonomy.class_nodes[top.labels()[latent, i]])),
                        activation=float(top.values[latent, i]),
                        thumbnail=f"{THUMBNAILS_FOLDER}/{image}.jpg",
                    )
                    for i in shown
                ],
            )
        )
    return cards


def write_thumbnails(cards: list[LatentCard], images: Any, folder: Path) -> None:
    """One small JPEG per image; an image that cannot be read has none."""
    for index in sorted({image.index for card in cards for image in card.images}):
        file = folder / THUMBNAILS_FOLDER / f"{index}.jpg"
        if file.exists():
            continue
        try:
            write_atomically(file, thumbnail(images.decode(index)), sync=False)
        except Exception as error:  # a picture for the report is not worth the numbers
            logger.warning("no thumbnail of image %d: %s", index, error)


def thumbnail(image: Image.Image, size: int = THUMBNAIL) -> bytes:
    """The middle square of an image as JPEG."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    buffer = io.BytesIO()
    square.resize((size, size), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
