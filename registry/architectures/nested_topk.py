"""`nested_topk`: Matryoshka over k. One encoder and decoder, reconstructions at several TopK levels.

Source: "Interpreting CLIP with Hierarchical Sparse Autoencoders" (Zaigrajew et al. 2025,
arXiv 2502.20578), section 3: loss = sum_i w_i NMSE_i / sum_i w_i over k_1 < ... < k_L, with all
weights equal ("uniform") or larger for smaller k ("reverse").

Deviations: NMSE is the batch's squared error over the batch's variance about its mean (own
definition; it does not change when data are shifted). Latents are ranked by the norm of their
contribution (`rescale_acts_by_decoder_norm` of SAELens). The
auxiliary loss for dead latents is SAELens's, divided by the same variance.

Saved as `topk` at `inference_k`, by default the largest k.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAEConfig
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigError
from ..table import Architecture
from .parts.plugin_config import check_k, refuse_input_normalisation
from .parts.sparse_step import FiredLatents, SparseTopK


@dataclass
class NestedTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """Settings of `nested_topk`, beside those of SAELens's `topk`.

    Args:
        k: the largest level; `ks` must end with it.
        ks: the levels, strictly increasing; by default k/8, k/4, k/2 and k.
        level_weights: "uniform", or "reverse": weight L for the smallest k, 1 for the largest.
        inference_k: the k of the saved SAE; by default `k`.
    """

    ks: list[int] = field(default_factory=list)
    level_weights: Literal["uniform", "reverse"] = "uniform"
    inference_k: int | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "nested_topk"

    @override
    def __post_init__(self) -> None:
        refuse_input_normalisation(self)
        check_k(self)
        levels = self.levels
        if levels != sorted(set(levels)) or levels[0] < 1 or levels[-1] != self.k:
            raise ConfigError(
                "ks",
                "out of range",
                given=self.ks,
                allowed=f"positive, strictly increasing, and k={self.k} at the end",
            )
        if self.level_weights not in ("uniform", "reverse"):
            raise ConfigError(
                "level_weights",
                "not possible",
                given=self.level_weights,
                allowed="'uniform' or 'reverse'",
            )
        if self.inference_k is not None:
            check_k(self, "inference_k")
        super().__post_init__()

    @property
    def levels(self) -> list[int]:
        """The levels, increasing; the last is k."""
        return self.ks or sorted({max(1, self.k // part) for part in (8, 4, 2, 1)})

    @property
    def weights(self) -> list[float]:
        """The weight of the loss of each level; their sum is 1."""
        n = len(self.levels)
        raw = [1.0] * n if self.level_weights == "uniform" else [float(n - i) for i in range(n)]
        return [weight / sum(raw) for weight in raw]

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        saved = super().get_inference_sae_cfg_dict()
        return {**saved, "k": self.inference_k or self.k}


class NestedTopKTrainingSAE(SparseTopK):
    """Trains `nested_topk`."""

    cfg: NestedTopKTrainingSAEConfig  # type: ignore[assignment]

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        with self.stepping(step_input):
            acts, hidden_pre = self.encode_with_hidden_pre(x)
            sae_out = self.decode(acts)
            inner = self._inner_outputs(acts)
            aux = self.calculate_aux_loss(step_input, acts, hidden_pre, sae_out)
        variance = (x - x.mean(dim=0)).square().sum(dim=-1).mean().clamp_min(1e-12)

        losses: dict[str, Tensor] = {}
        loss = x.new_zeros(())
        outputs = [*inner, sae_out]
        for k, weight, out in zip(self.cfg.levels, self.cfg.weights, outputs):
            squared_error = self.mse_loss_fn(out, x).sum(dim=-1).mean()
            loss = loss + weight * squared_error / variance
            losses[f"nmse_k{k}"] = squared_error / variance
        losses["mse_loss"] = squared_error
        losses.update(aux)
        loss = loss + sum(aux.values()) / variance
        return TrainStepOutput(x, sae_out, acts, hidden_pre, loss, losses)

    def _inner_outputs(self, acts: Tensor) -> list[Tensor]:
        """Reconstructions from the strongest latents, one for each level but the last."""
        levels = self.cfg.levels
        if len(levels) == 1:
            return []
        if acts.is_sparse:
            acts = acts.to_dense()
        if self.firings is None:
            values, columns = acts.topk(levels[-2], dim=-1)
        else:
            values, ranked = self.firings.values.unflatten(0, (len(acts), -1)).sort(descending=True)
            columns = self.firings.where.columns.unflatten(0, (len(acts), -1)).gather(1, ranked)
        outputs, total, start, norms = [], self.b_dec, 0, self.norms
        for k in levels[:-1]:
            part = FiredLatents.by_row(values[:, start:k], columns[:, start:k], self.cfg.d_sae)
            total = total + part.decoded(self.W_dec, norms)
            outputs.append(self.reshape_fn_out(total, self.d_head))
            start = k
        return outputs


NESTED_TOPK = Architecture(
    name="nested_topk",
    training_class=NestedTopKTrainingSAE,
    training_config_class=NestedTopKTrainingSAEConfig,
    description="Matryoshka over k: one dictionary that reconstructs at several TopK levels.",
    source="Zaigrajew et al. 2025, arXiv 2502.20578",
)
