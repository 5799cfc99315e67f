"""`monosemanticity`: similarity of a latent's images in the embedding of an independent encoder.

MonoScore of Pach et al. 2025 (arXiv 2504.02821, §3.2), computed in one pass and linear time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from scipy import sparse
from torch import Tensor

from ..errors import ConfigError
from ..files import open_regular
from ..presentation import Support
from .base import ALL_NULLS, EvaluationBatch, Evaluator
from .parts import summary

logger = logging.getLogger(__name__)

DENSE = 0.05
"""Share of nonzeros above which a dense matrix product is faster."""
ENCODERS = ("auto", "embedding", "model", "mean_patch", "x")


@dataclass(frozen=True)
class MonosemanticityOptions:
    """encoder: source of the embeddings. `embedding`: that of the batches. `model`: the final class
    token of the model itself, one more forward pass per image. `mean_patch` and `x`: the
    activations at the hook point. A path: a .npy of shape (images, e), rows in the order of the
    evaluation set. `auto`: `embedding` where the batches have it, else `x`, with a warning, since
    it is not independent of the SAE.
    """

    encoder: str = "auto"

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS and not self.encoder.endswith(".npy"):
            raise ConfigError(
                "encoder",
                "not known",
                given=self.encoder,
                allowed=f"one of {', '.join(ENCODERS)} or a path to a .npy file",
            )
        if self.encoder not in ENCODERS and not Path(self.encoder).is_file():
            raise ConfigError("encoder", f"no file {self.encoder!r}", allowed="an existing file")


class Monosemanticity(Evaluator[MonosemanticityOptions]):
    """Mean similarity of a latent's images, weighted by its activation.

    MS_j = Σ_{a<b} ã_a ã_b cos(E_a, E_b) / Σ_{a<b} ã_a ã_b over the pairs of images, ã the
    activation of latent j scaled to 0 … 1 over all images, E the embedding. With Ê = E/‖E‖ this
    equals (‖Σ ã Ê‖² − Σ ã²) / ((Σ ã)² − Σ ã²): from one sum per latent.

    Undefined for a latent that is constant or above its least value on one image only. The `baseline` is the
    mean cosine over all pairs of images, the score of a latent without preference. Memory O(m·e).
    """

    name = "monosemanticity"
    description = "similarity of a latent's images in the embedding of an independent encoder"
    higher_is_better = {
        "monosemanticity": True,
        "excess": True,
        "baseline": None,
        "defined": None,
        "own_layer": None,
    }
    ranges = {
        **dict.fromkeys(("monosemanticity", "baseline"), summary.COSINE),
    }
    support = dict.fromkeys(("monosemanticity", "excess"), Support("defined", "latents"))
    nulls = {
        **ALL_NULLS,
        "permuted_classes": "the images are compared with each other, not with the tree",
        "shuffled": "no label is used",
    }
    invariant = label_free = frozenset(higher_is_better)
    wants_embedding = True
    Options = MonosemanticityOptions

    def prepare(self) -> None:
        m = self.context.d_sae
        self._own_layer = False
        self._file: np.ndarray | None = None
        self._images = 0
        self._active = np.zeros(m, dtype=np.int64)  # images on which each latent is not 0
        self._sum, self._squares = np.zeros(m), np.zeros(m)
        self._least = torch.full((m,), torch.inf)
        self._most = torch.full((m,), -torch.inf)
        self._weighted: Tensor | None = None  # (m, e) Σ z Ê
        self._embedded: Tensor | None = None  # (e,) Σ Ê
        self._waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def update(self, batch: EvaluationBatch) -> None:
        embedding = self._embed(batch).to(batch.z.device, torch.float32)
        embedding = torch.nn.functional.normalize(embedding, dim=1)
        if self._weighted is None or self._embedded is None:
            size = (self.context.d_sae, embedding.shape[1])
            self._weighted = torch.zeros(size, dtype=torch.float64)
            self._embedded = torch.zeros(size[1], dtype=torch.float64)
        self._embedded += embedding.sum(0, dtype=torch.float64).cpu()
        self._add(batch, embedding)
        _, latents, values = (t.cpu() for t in batch.active)
        m = len(self._active)
        self._images += len(batch)
        self._active += torch.bincount(latents, minlength=m).numpy()
        for total, of in ((self._sum, values.double()), (self._squares, values.double().square())):
            total += torch.bincount(latents, weights=of, minlength=m).numpy()
        self._least.scatter_reduce_(0, latents, values, "amin")
        self._most.scatter_reduce_(0, latents, values, "amax")

    def merge(self, other: Monosemanticity) -> None:
        self._merge()
        other._merge()
        self._own_layer |= other._own_layer
        self._images += other._images
        self._active += other._active
        self._sum += other._sum
        self._squares += other._squares
        self._least = torch.minimum(self._least, other._least)
        self._most = torch.maximum(self._most, other._most)
        if self._weighted is None or self._embedded is None:
            self._weighted, self._embedded = other._weighted, other._embedded
        elif other._weighted is not None and other._embedded is not None:
            self._weighted += other._weighted
            self._embedded += other._embedded

    def _add(self, batch: EvaluationBatch, embedding: Tensor) -> None:
        """Add Σ z Ê of a batch. A sparse product writes all of (m, e), so the firings of a sparse z
        are collected first, of at most as many images as there are latents."""
        assert self._weighted is not None
        rows, latents, values = (t.cpu() for t in batch.active)
        n, m = batch.z.shape
        if len(values) > DENSE * n * m:
            z = batch.z.float().nan_to_num(0.0)
            self._weighted += (z.T @ embedding).cpu()
            return
        self._waiting.append((rows, latents, values, embedding.cpu()))
        images = sum(len(unit) for *_, unit in self._waiting)
        entries = sum(len(values) for _, _, values, _ in self._waiting)
        if images >= m or entries >= self._weighted.numel():
            self._merge()

    def _merge(self) -> None:
        if not self._waiting or self._weighted is None:
            return
        rows, latents, values, units = zip(*self._waiting)
        self._waiting = []
        starts = np.cumsum([0, *(len(unit) for unit in units)])
        row = torch.cat([r + int(start) for r, start in zip(rows, starts)]).numpy()
        entries = (torch.cat(values).numpy(), (torch.cat(latents).numpy(), row))
        z = sparse.csr_array(entries, shape=(len(self._active), int(starts[-1])))
        self._weighted += torch.from_numpy(z @ torch.cat(units).numpy())

    def _embed(self, batch: EvaluationBatch) -> Tensor:
        encoder = self.options.encoder
        if encoder == "auto":
            encoder = "x" if batch.embedding is None else "embedding"
            if encoder == "x" and not self._own_layer and self.context.source == "sae":
                logger.warning(
                    "monosemanticity: no independent embedding is given; images are compared by the "
                    "activations that the SAE was trained on"
                )
        if encoder == "x":
            self._own_layer = True
            return batch.x
        if encoder in ("embedding", "mean_patch"):
            found: Tensor | None = getattr(batch, encoder)
            if found is None:
                problem = "the batches have none"
                raise ConfigError("encoder", problem, given=encoder, allowed="another encoder")
            return found
        if encoder == "model":
            if self.context.intervene is None:
                problem, allowed = "no model is available", "another encoder"
                raise ConfigError("encoder", problem, given=encoder, allowed=allowed)
            return self.context.intervene(batch.index).embedding
        if self._file is None:
            self._file = read_embeddings(encoder, self.context.n_images)
        return torch.from_numpy(np.asarray(self._file[batch.index.cpu().numpy()], np.float32))

    def scores(self) -> np.ndarray:
        """(m,) MS of each latent, NaN where undefined."""
        self._merge()
        if self._weighted is None or self._embedded is None:
            return np.full(self.context.d_sae, np.nan)
        always = self._active == self._images
        least, most = self._least.double().numpy(), self._most.double().numpy()
        low = np.where(always, least, np.minimum(least, 0.0))
        span = np.where(always, most, np.maximum(most, 0.0)) - low
        scale = np.divide(1.0, span, out=np.zeros_like(span), where=span > 0)
        whole = (self._sum - self._images * low) * scale
        squares = self._squares - 2 * low * self._sum + self._images * low**2
        squares = squares * scale**2
        # ‖Σ ã Ê‖² = (‖Σ z Ê‖² − 2·low·⟨Σ z Ê, Σ Ê⟩ + low²·‖Σ Ê‖²)·scale²
        length = self._weighted.square().sum(1).numpy()
        along = (self._weighted @ self._embedded).numpy()
        length = length - 2 * low * along + low**2 * float(self._embedded.square().sum())
        pairs = whole**2 - squares
        defined = (scale > 0) & (pairs > 1e-9 * whole**2)
        return np.where(defined, summary.ratio(length * scale**2 - squares, pairs), np.nan)

    @property
    def baseline(self) -> float:
        """The mean cosine over all pairs of images (scalar)."""
        if self._embedded is None or self._images < 2:
            return float("nan")
        n = self._images
        return (float(self._embedded.square().sum()) - n) / (n * n - n)

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        scores = self.scores()
        value = summary.mean(scores)
        return {
            "monosemanticity": value,
            "excess": value - self.baseline,
            "baseline": self.baseline,
            "defined": summary.count(scores),
            "own_layer": float(self._own_layer),
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """`latents`: one row for each defined latent, by decreasing score."""
        scores = self.scores()
        latent = np.flatnonzero(np.isfinite(scores))
        latent = latent[np.argsort(-scores[latent], kind="stable")]
        table = {"latent": latent, "monosemanticity": scores[latent], "fired": self._active[latent]}
        return {"latents": pd.DataFrame(table)}

    def figures(self) -> dict[str, Figure]:
        """`monosemanticity`: scores of the latents, and the baseline."""
        drawing = summary.histograms(
            "Monosemanticity of latents", "similarity of its images", {"latents": self.scores()}
        )
        if np.isfinite(self.baseline):
            drawing.add_vline(x=self.baseline, line={"color": summary.NULL, "dash": "dot"})
        return {"monosemanticity": drawing}


def read_embeddings(path: str, n_images: int) -> np.ndarray:
    """(images, e) the rows of a .npy file, memory-mapped.

    Raises:
        ConfigError: it cannot be read, or the numbers of rows and images differ.
    """
    try:
        open_regular(path).close()
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a damaged header numpy raises nearly anything
        problem = f"cannot be read: {error or type(error).__name__}"
        raise ConfigError("encoder", problem, given=path, allowed="a .npy file") from None
    if rows.ndim != 2 or len(rows) != n_images:
        raise ConfigError(
            "encoder",
            f"{path!r} has another number of rows than images",
            given=rows.shape,
            allowed=f"one row for each of the {n_images} images",
        )
    return rows
