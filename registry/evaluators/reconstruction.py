"""`reconstruction`: reconstruction error, sparsity, and effect of x̂ on the model's outputs.

SAELens's own evals (6.54, `sae_lens/evals.py`), under its names, for tokens of images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from ..errors import ConfigError
from ..presentation import Support
from .base import (
    ALL_NULLS,
    EvaluationBatch,
    Evaluator,
    InterventionResult,
    remembered,
    require_at_least,
    require_same,
)
from .parts import summary
from .parts.accumulators import FiringRate
from .parts.image_positions import ImagePositions
from .parts.readout import class_probabilities, head_of, kl_divergence

TINY = 1e-6
"""Least effect of an ablation for which scores are defined."""


@dataclass(frozen=True)
class ReconstructionOptions:
    """max_images: images of the score half on which x is replaced by x̂, at most.
    almost_dead, dense: a latent that is not 0 on a smaller, or larger, share of the tokens.
    """

    max_images: int = 256
    almost_dead: float = 1e-7
    dense: float = 0.01

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_images")
        for field in ("almost_dead", "dense"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(
                    field, "out of range", given=getattr(self, field), allowed="a number in [0, 1]"
                )


@dataclass(frozen=True)
class Downstream:
    """Outputs of the model with replaced activations, means over the images."""

    ce_loss: float  # nats; NaN without a head for the classes
    accuracy: float
    kl_div: float  # from the unmodified outputs; NaN without a head
    cossim: float  # of the final embedding with the unmodified one
    change: float  # ‖difference‖ / ‖unmodified‖


class Reconstruction(Evaluator[ReconstructionOptions]):
    """Error, sparsity and downstream effect of x̂, the decoded latents; over tokens, not images.

    `mse` = mean ‖x − x̂‖²; `fvu` = mse / total variance of x, `explained_variance` = 1 − fvu;
    `cossim`, mean cos(x, x̂); `l2_ratio`, mean ‖x̂‖/‖x‖; `relative_reconstruction_bias` =
    mean ‖x̂‖² / mean x·x̂. `l0`: latents that are not 0 on a token, `l0_image` on any token of an
    image. `dead_share`: latents that are 0 on every token; `almost_dead_share`, not 0 on a share
    below 1e-7 (the same on fewer than 10 million tokens); `dense_share`, above 1 %.

    Splicing replaces the chosen tokens at the hook point by x̂; ablation by 0, mean ablation by
    their mean over the fit half. `ce_loss_without_sae`, `_with_sae`, `_with_ablation`,
    `_with_mean_ablation`: the model's own head against the true class, −log Σ of the outputs of
    that class. `ce_loss_score` = (ablated − spliced)/(ablated − clean), `ce_loss_score_mean` the
    same for mean ablation; `kl_div_score` = 1 − KL(clean‖spliced)/KL(clean‖ablated). For any model
    (own definition): `embedding_cossim_*` of the final embedding with the unmodified one,
    `embedding_change` = ‖difference‖/‖unmodified‖, `embedding_score` = 1 − (1 − cos spliced)/(1 −
    cos ablated). NaN without a head, a decoder or a model; the table `splicing` gives the reason.

    The `random` null is decoded at the scale of least squared error (see `TwinLatents`).
    """

    name = "reconstruction"
    description = "reconstruction error, sparsity, and the effect on the model's outputs"
    higher_is_better = {
        "explained_variance": True,
        "fvu": False,
        "mse": False,
        "cossim": True,
        "l2_ratio": None,
        "relative_reconstruction_bias": None,
        "l0": None,
        "l0_image": None,
        "dead_share": False,
        "almost_dead_share": False,
        "dense_share": None,
        "ce_loss_without_sae": None,
        "ce_loss_with_sae": False,
        "ce_loss_with_ablation": None,
        "ce_loss_with_mean_ablation": None,
        "ce_loss_score": True,
        "ce_loss_score_mean": True,
        "accuracy_without_sae": None,
        "accuracy_with_sae": True,
        "accuracy_with_ablation": None,
        "accuracy_with_mean_ablation": None,
        "kl_div_with_sae": False,
        "kl_div_with_ablation": None,
        "kl_div_score": True,
        "embedding_cossim_with_sae": True,
        "embedding_cossim_with_ablation": None,
        "embedding_cossim_with_mean_ablation": None,
        "embedding_change": False,
        "embedding_score": True,
        "embedding_score_mean": True,
        "images": None,
    }
    ranges = {
        **dict.fromkeys(
            ("explained_variance", "kl_div_score", "embedding_score", "embedding_score_mean"),
            summary.SCORE,
        ),
        **dict.fromkeys(
            (
                "fvu",
                "mse",
                "l2_ratio",
                "l0",
                "l0_image",
                "ce_loss_without_sae",
                "ce_loss_with_sae",
                "ce_loss_with_ablation",
                "ce_loss_with_mean_ablation",
                "kl_div_with_sae",
                "kl_div_with_ablation",
                "embedding_change",
            ),
            summary.POSITIVE,
        ),
        **dict.fromkeys(
            (
                "cossim",
                "embedding_cossim_with_sae",
                "embedding_cossim_with_ablation",
                "embedding_cossim_with_mean_ablation",
            ),
            summary.COSINE,
        ),
        **dict.fromkeys(
            (
                "dead_share",
                "almost_dead_share",
                "dense_share",
                "accuracy_without_sae",
                "accuracy_with_sae",
                "accuracy_with_ablation",
                "accuracy_with_mean_ablation",
            ),
            summary.SHARE,
        ),
    }
    nulls = {
        **ALL_NULLS,
        "permuted_classes": "no tree is used",
        "shuffled": "only the cross-entropy of the head uses labels",
        "neurons": "x⁺ and (−x)⁺ reconstruct x exactly",
    }
    support = {
        name: Support("images", "spliced images")
        for name, better in higher_is_better.items()
        if better is not None and name.startswith(("ce_", "accuracy_", "kl_", "embedding_"))
    }
    invariant = frozenset(higher_is_better)
    labels = {"l0": "L0 of a token", "l0_image": "L0 of an image"}
    wants_intervention = True
    Options = ReconstructionOptions

    def prepare(self) -> None:
        self._rate = self.context.share(FiringRate)
        self._images = self.context.share(ImagePositions, max_images=self.options.max_images)
        self._tokens = 0
        self._seen_images = self._of_images = 0  # images, and Σ of their latents that are not 0
        self._active = np.zeros(self.context.d_sae, dtype=np.int64)  # tokens where z is not 0
        self._sums: dict[str, float] = {}
        self._offset: Tensor | None = None  # mean of the sample, for precision of squares
        self._moved = torch.zeros(self.context.d_in, dtype=torch.float64)  # Σ (x − offset)
        self._fit_sum = torch.zeros(self.context.d_in, dtype=torch.float64)
        self._fit_tokens = 0

    def calibrate(self, batch: EvaluationBatch) -> None:
        self._offset = batch.x.double().mean(0).cpu()

    def update(self, batch: EvaluationBatch) -> None:
        if self._offset is None:
            self.calibrate(batch)
        reconstruct = self.context.reconstruct
        if reconstruct is None:
            return
        tokens = batch.x[:, None] if batch.tokens is None else batch.tokens
        per_image = max(1, tokens.shape[1])
        # the latents of all tokens of a batch might not fit into memory
        for images in torch.arange(len(tokens)).split(max(1, 4096 // per_image)):
            x = tokens[images].flatten(0, 1)
            z, decoded = reconstruct(x)
            active = (z != 0).unflatten(0, (len(images), -1))
            self._active += active.sum((0, 1)).cpu().numpy()
            self._of_images += int(active.any(1).sum())
            self._seen_images += len(images)
            self._add(x.double().cpu(), decoded.double().cpu())
        fit = tokens[batch.is_fit.to(tokens.device)].flatten(0, 1)
        self._fit_sum += fit.sum(0, dtype=torch.float64).cpu()
        self._fit_tokens += len(fit)

    def merge(self, other: Reconstruction) -> None:
        require_same("mean of x", self._offset, other._offset)
        self._tokens += other._tokens
        self._seen_images += other._seen_images
        self._of_images += other._of_images
        self._active += other._active
        for name, total in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
        self._moved += other._moved
        self._fit_sum += other._fit_sum
        self._fit_tokens += other._fit_tokens

    def _add(self, x: Tensor, decoded: Tensor) -> None:
        assert self._offset is not None
        self._tokens += len(x)
        self._moved += (x - self._offset).sum(0)
        length, product = x.norm(dim=1), (x * decoded).sum(1)
        found = decoded.norm(dim=1)
        for name, values in {
            "squares": (x - self._offset).square().sum(1),
            "residual": (x - decoded).square().sum(1),
            "cossim": product / (length * found).clamp(min=1e-30),
            "ratio": found / length.clamp(min=1e-30),
            "decoded": found.square(),
            "product": product,
        }.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(values.sum())

    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        numbers = dict.fromkeys(self.higher_is_better, float("nan"))
        numbers["l0_image"] = self._rate.mean_l0
        if self._tokens:
            numbers |= self._quality() | self._sparsity()
        return numbers | self._costs()

    def _quality(self) -> dict[str, float]:
        n, sums = self._tokens, self._sums
        variance = sums["squares"] / n - float((self._moved / n).square().sum())
        mse = sums["residual"] / n
        fvu = float(summary.ratio(mse, variance if variance > 1e-12 * sums["squares"] else 0))
        return {
            "explained_variance": 1 - fvu,
            "fvu": fvu,
            "mse": mse,
            "cossim": sums["cossim"] / n,
            "l2_ratio": sums["ratio"] / n,
            "relative_reconstruction_bias": float(summary.ratio(sums["decoded"], sums["product"])),
        }

    def _sparsity(self) -> dict[str, float]:
        density = self.density
        return {
            "l0": float(density.sum()),
            "l0_image": self._of_images / self._seen_images,
            "dead_share": summary.mean(density == 0),
            "almost_dead_share": summary.mean(density < self.options.almost_dead),
            "dense_share": summary.mean(density > self.options.dense),
        }

    @property
    def density(self) -> np.ndarray:
        """(m,) share of the tokens on which each latent is not 0; NaN if nothing is decoded."""
        return summary.ratio(self._active, self._tokens)

    # Downstream --------------------------------------------------------------------------------

    def _costs(self) -> dict[str, float]:
        runs = self.downstream()
        if not runs:
            return {}
        clean, spliced, zero, mean = (runs[run] for run in ("clean", "spliced", "zero", "mean"))
        return {
            "ce_loss_without_sae": clean.ce_loss,
            "ce_loss_with_sae": spliced.ce_loss,
            "ce_loss_with_ablation": zero.ce_loss,
            "ce_loss_with_mean_ablation": mean.ce_loss,
            "ce_loss_score": _recovered(clean.ce_loss, spliced.ce_loss, zero.ce_loss),
            "ce_loss_score_mean": _recovered(clean.ce_loss, spliced.ce_loss, mean.ce_loss),
            "accuracy_without_sae": clean.accuracy,
            "accuracy_with_sae": spliced.accuracy,
            "accuracy_with_ablation": zero.accuracy,
            "accuracy_with_mean_ablation": mean.accuracy,
            "kl_div_with_sae": spliced.kl_div,
            "kl_div_with_ablation": zero.kl_div,
            "kl_div_score": _recovered(0.0, spliced.kl_div, zero.kl_div),
            "embedding_cossim_with_sae": spliced.cossim,
            "embedding_cossim_with_ablation": zero.cossim,
            "embedding_cossim_with_mean_ablation": mean.cossim,
            "embedding_change": spliced.change,
            "embedding_score": _recovered(-1.0, -spliced.cossim, -zero.cossim),
            "embedding_score_mean": _recovered(-1.0, -spliced.cossim, -mean.cossim),
            "images": float(len(self._images.index(fit=False))),
        }

    @remembered
    def downstream(self) -> dict[str, Downstream]:
        """Outputs of the model by name ("clean", "spliced", "zero", "mean"), {} if it cannot run."""
        return {} if self.reason else self._run()

    @property
    def reason(self) -> str:
        """Why there are no downstream metrics; "" where there are."""
        if self.context.intervene is None:
            return self.context.no_intervention
        if self.context.reconstruct is None:
            return f"the latents ({self.context.source}) cannot be decoded"
        none = not len(self._images.index(fit=False)) or not self._fit_tokens
        return "there is no image in one of the halves" if none else ""

    def _run(self) -> dict[str, Downstream]:
        intervene, reconstruct = self.context.intervene, self.context.reconstruct
        assert intervene is not None and reconstruct is not None
        mean = (self._fit_sum / self._fit_tokens).float()

        def splice(x: Tensor) -> Tensor:
            return reconstruct(x.flatten(0, 1))[1].reshape(x.shape)

        edits: dict[str, Callable[[Tensor], Tensor] | None] = {
            "clean": None,
            "spliced": splice,
            "zero": torch.zeros_like,
            "mean": lambda x: mean.to(x.device).expand_as(x),
        }
        index = torch.from_numpy(self._images.index(fit=False))
        results = {name: intervene(index, edit) for name, edit in edits.items()}
        return {name: self._seen(result, results["clean"]) for name, result in results.items()}

    def _seen(self, result: InterventionResult, clean: InterventionResult) -> Downstream:
        ce_loss = accuracy = kl_div = float("nan")
        head = head_of(self.context.intervene)
        if result.logits is not None and clean.logits is not None:
            before, after = (r.double().log_softmax(1) for r in (clean.logits, result.logits))
            kl_div = float(kl_divergence(before, after).mean())
        if head is not None:
            labels = self._images.labels(fit=False)
            labelled = np.flatnonzero(np.isin(labels, head.classes))
            log_probs = head(result)[labelled]
            p = class_probabilities(log_probs, head.classes, len(self.taxonomy.classes))
            own = p[np.arange(len(labelled)), labels[labelled]].clamp(min=1e-300)
            ce_loss = summary.mean(-own.log().numpy())
            accuracy = summary.mean(head.classes[log_probs.argmax(1).numpy()] == labels[labelled])
        one, other = clean.embedding.double(), result.embedding.double()
        return Downstream(
            ce_loss,
            accuracy,
            kl_div,
            cossim=float(torch.cosine_similarity(one, other).mean()),
            change=summary.mean(summary.ratio((other - one).norm(dim=1), one.norm(dim=1))),
        )

    def tables(self) -> dict[str, pd.DataFrame]:
        """`latents`: firing rate of each. `splicing`: the four runs, or why there are none."""
        rows = [
            {"run": run, **vars(found), "reason": ""} for run, found in self.downstream().items()
        ]
        nothing = dict.fromkeys(Downstream.__dataclass_fields__, float("nan"))
        density = self.density
        latents = {
            "latent": np.arange(len(density)),
            "token_density": density,
            "image_density": self._rate.rate,
            "mean_activation": summary.ratio(self._rate.total, self._rate.fired),
        }
        return {
            "latents": pd.DataFrame(latents),
            "splicing": pd.DataFrame(rows or [{"run": "none", **nothing, "reason": self.reason}]),
        }

    def figures(self) -> dict[str, Figure]:
        """`density`: firing rates of latents. `splicing`: final embedding of the four runs."""
        density = self._rate.rate if not self._tokens else self.density
        drawing = summary.histograms(
            "Firing rates of latents, without dead ones",
            "log₁₀ share of the tokens",
            {"latents": np.log10(density[density > 0])},
        )
        drawings = {"density": drawing}
        if runs := self.downstream():
            drawing = summary.figure("Model with replaced activations", "", "cosine")
            drawing.add_bar(
                x=list(runs),
                y=[found.cossim for found in runs.values()],
                name="final embedding, cosine with the unmodified one",
                marker={"color": summary.VALUE},
            )
            if np.isfinite(runs["clean"].accuracy):
                drawing.add_bar(
                    x=list(runs),
                    y=[found.accuracy for found in runs.values()],
                    name="accuracy of the model's head",
                    marker={"color": summary.OTHER},
                )
            drawings["splicing"] = drawing
        return drawings


def _recovered(clean: float, spliced: float, ablated: float) -> float:
    """(ablated − spliced) / (ablated − clean)."""
    cost = ablated - clean
    return float(summary.ratio(ablated - spliced, cost if abs(cost) > TINY else 0))
