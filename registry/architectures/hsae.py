"""`hsae`: SAEs of growing width, trained together so that a latent equals the sum of its children.

Source: "From Atoms to Trees: Building a Structured Feature Forest with Hierarchical Sparse
Autoencoders" (Luo et al. 2026, arXiv 2602.11881), section 3. With f_i(x) = z_i D_i the contribution
of latent i, the loss is sum_l ||x - SAE_l(x)||^2 + rho sum_p ||f_p - sum_{c in C(p)} f_c||^2, rho =
.01 (section 3.1). In the reconstruction each latent is replaced by the sum of its children with
probability 5 % (section 3.2). Every 5,000 steps each latent chooses as parent the latent of the
level above with the most similar encoder vector (cosine), and the least similar 20 % have none
(section 3.3). All levels have the same target number of active latents.

Deviations: each level is TopK with SAELens's auxiliary loss for dead latents, where the paper has
JumpReLU with a controlled sparsity weight and ghost gradients; levels share b_dec; latents are
ranked by the norm of their contribution in place of renormalised rows. The paper keeps L
reconstructions; the output is their mean (own definition), so that it depends on every latent.

Saved as `hsae`, with the forest in its config as `parents`; needs taxolens to load.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor
from typing_extensions import override

from ..errors import ConfigError
from ..table import Architecture
from .parts.forest import ROOT, Forest, RecordsForest, check_parents
from .parts.levels import (
    check_levels,
    dead_latent_loss,
    level_slices,
    positive_topk,
    split_by_shares,
)
from .parts.plugin_config import PluginTrainingSAEConfig, check_k, refuse_input_normalisation
from .parts.step_clock import StepClock

# The paper's four levels: 2048, 4096, 8192 and 16384 latents.
DEFAULT_SHARES = (1, 2, 4, 8)


@dataclass
class HSAEConfig(SAEConfig):
    """Settings of a saved `hsae`.

    Args:
        k: active latents of each level.
        level_widths: latents of each level, in order.
        parents: parent of each latent, -1 for none.
    """

    k: int = 32
    level_widths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "hsae"


@dataclass
class HSAETrainingSAEConfig(PluginTrainingSAEConfig):
    """Settings of `hsae`.

    Args:
        k: active latents of each level; in a level narrower than k, all may fire.
        level_widths: latents of each level; by default 1/15, 2/15, 4/15 and 8/15 of them.
        parents: the initial forest; by default assigned at the first step.
        family_coefficient: rho, weight of the difference between a latent and its children.
        swap_probability: probability that children replace their latent in the reconstruction.
        reassign_every: steps between assignments of parents.
        unassigned_share: share of each level without a parent.
        aux_loss_coefficient: weight of the auxiliary loss for dead latents of each level.
        rescale_acts_by_decoder_norm: rank latents by the norm of their contribution.
        seed: seed of the swaps.
    """

    k: int = 32
    level_widths: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    family_coefficient: float = 0.01
    swap_probability: float = 0.05
    reassign_every: int = 5000
    unassigned_share: float = 0.2
    aux_loss_coefficient: float = 1 / 32
    rescale_acts_by_decoder_norm: bool = True
    seed: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "hsae"

    @override
    def __post_init__(self) -> None:
        refuse_input_normalisation(self)
        check_k(self)
        check_levels("hsae", self.d_sae, self.widths, _budgets(self.k, self.widths))
        check_parents(self.parents, self.widths, next_level_only=True)
        for name in ("swap_probability", "unassigned_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    name, "out of range", given=getattr(self, name), allowed="a number in [0, 1]"
                )
        if self.reassign_every < 1:
            raise ConfigError(
                "reassign_every", "out of range", given=self.reassign_every, allowed="at least 1"
            )
        super().__post_init__()

    @property
    def widths(self) -> list[int]:
        """Number of latents of each level."""
        return self.level_widths or split_by_shares(self.d_sae, DEFAULT_SHARES)

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return HSAEConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        return {**super().get_inference_sae_cfg_dict(), "level_widths": self.widths}


def _budgets(k: int, widths: Sequence[int]) -> list[int]:
    return [min(k, width) for width in widths]


def level_activations(hidden_pre: Tensor, k: int, widths: Sequence[int]) -> Tensor:
    """TopK within each level, (..., m)."""
    slices = level_slices(widths)
    parts = [positive_topk(hidden_pre[..., s], b) for s, b in zip(slices, _budgets(k, widths))]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def most_similar_parents(
    encoder_rows: Tensor, widths: Sequence[int], unassigned_share: float, block: int = 1024
) -> Tensor:
    """Parents (m,) by cosine of encoder vectors (m, d) between neighbouring levels."""
    rows = F.normalize(encoder_rows, dim=1)
    parents = torch.full((rows.shape[0],), ROOT, dtype=torch.int64, device=rows.device)
    slices = level_slices(widths)
    for above, latents in itertools.pairwise(slices):
        best = [(part @ rows[above].T).max(dim=1) for part in rows[latents].split(block)]
        similarity = torch.cat([b.values for b in best])
        chosen = torch.cat([b.indices for b in best]) + above.start
        n_without = int(unassigned_share * len(chosen))
        chosen[similarity.argsort(stable=True)[:n_without]] = ROOT
        parents[latents] = chosen
    return parents


def family_loss(
    acts: Tensor, atoms: Tensor, parents: Tensor, widths: Sequence[int], k: int
) -> Tensor:
    """Scalar: mean over inputs of sum_p ||f_p - sum_{c in C(p)} f_c||^2 over parents p with children.

    Only active latents contribute, so the squared norms are summed over pairs of active members of
    a family: O(n k^2) comparisons and few products of decoder rows.
    """
    loss = acts.new_zeros(())
    slices, budgets = level_slices(widths), _budgets(k, widths)
    has_children = torch.zeros_like(parents, dtype=torch.bool)
    has_children[parents[parents != ROOT]] = True
    for level in range(len(widths) - 1):
        signed, index, family = [], [], []
        for latents, budget, sign in zip(slices[level : level + 2], budgets[level:], (1.0, -1.0)):
            values, local = acts[:, latents].topk(budget, dim=-1)
            latent = local + latents.start
            if sign > 0:
                mine = torch.where(has_children[latent], latent, ROOT)
            else:
                mine = parents[latent]
            signed.append(sign * values)
            index.append(latent)
            family.append(torch.where(values > 0, mine, ROOT))
        s, i, f = (torch.cat(part, dim=1) for part in (signed, index, family))
        own = torch.where(f != ROOT, s.square() * atoms.square().sum(dim=1)[i], 0.0)
        related = ((f[:, :, None] == f[:, None, :]) & (f != ROOT)[:, :, None]).triu(diagonal=1)
        row, a, b = related.nonzero(as_tuple=True)
        inner = (atoms[i[row, a]] * atoms[i[row, b]]).sum(dim=1)
        loss = loss + (own.sum() + 2 * (s[row, a] * s[row, b] * inner).sum()) / acts.shape[0]
    return loss


class HSAEModel(StandardSAE):
    """`hsae` at inference."""

    cfg: HSAEConfig  # type: ignore[assignment]
    l0_rule = "counted"

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.forest = Forest(self.cfg.parents, self.cfg.d_sae, self.device)

    @override
    def encode(self, x: Tensor) -> Tensor:
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        acts = level_activations(hidden_pre, self.cfg.k, self.cfg.level_widths)
        return self.hook_sae_acts_post(acts)

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        return super().decode(feature_acts / len(self.cfg.level_widths))

    @override
    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError(
            "Folding decoder norms into a saved hsae would change which latents are the strongest."
        )


class HSAETrainingSAE(RecordsForest, TopKTrainingSAE):
    """Trains `hsae`."""

    cfg: HSAETrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: HSAETrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)  # type: ignore[arg-type]
        self.forest = Forest(cfg.parents, cfg.d_sae, self.device)
        self.clock = StepClock(cfg.seed, self.device)

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return self.activate

    def activate(self, hidden_pre: Tensor) -> Tensor:
        """(..., m) pre-activations -> (..., m) activations."""
        return level_activations(hidden_pre, self.cfg.k, self.cfg.widths)

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        return super().decode(feature_acts / len(self.cfg.widths))

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        cfg, x, dead = self.cfg, step_input.sae_in, step_input.dead_neuron_mask
        step = self.clock.tick()
        if step % cfg.reassign_every == 0 and not (step == 0 and cfg.parents):
            self.reassign()
        acts, hidden_pre = self.encode_with_hidden_pre(x)
        sae_out = self.decode(acts)
        mse = self.mse_loss_fn(sae_out, x).sum(dim=-1).mean()
        losses: dict[str, Tensor] = {"mse_loss": mse}

        atoms = self.W_dec
        if cfg.rescale_acts_by_decoder_norm:
            atoms = atoms / atoms.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        aux = x.new_zeros(())
        for level, (latents, total) in enumerate(self._level_outputs(acts, atoms, step)):
            out = self.reshape_fn_out(total, self.d_head)
            losses[f"level_{level}_mse"] = self.mse_loss_fn(out, x).sum(dim=-1).mean()
            if dead is not None:
                aux = aux + dead_latent_loss(
                    hidden_pre[:, latents], dead[latents], atoms[latents], x - out
                )
        family = family_loss(acts, atoms, self.forest.parents, cfg.widths, cfg.k)
        losses["family_loss"] = cfg.family_coefficient * family
        losses["auxiliary_reconstruction_loss"] = cfg.aux_loss_coefficient * aux
        loss = torch.stack([part for name, part in losses.items() if name != "mse_loss"]).sum()
        return TrainStepOutput(x, sae_out, acts, hidden_pre, loss, losses)

    def _level_outputs(self, acts: Tensor, atoms: Tensor, step: int) -> list[tuple[slice, Tensor]]:
        """Latents and reconstruction of each level, some latents replaced by their children."""
        parents = self.forest.parents
        swapped = self._draw_swaps(step)
        by_parent = torch.where(parents == ROOT, False, swapped[parents.clamp_min(0)])
        slices = level_slices(self.cfg.widths)
        outputs = []
        for level, latents in enumerate(slices):
            total = (acts[:, latents] * ~swapped[latents]) @ atoms[latents] + self.b_dec
            if level + 1 < len(slices) and bool(swapped[latents].any()):
                below = slices[level + 1]
                total = total + (acts[:, below] * by_parent[below]) @ atoms[below]
            outputs.append((latents, total))
        return outputs

    def _draw_swaps(self, step: int) -> Tensor:
        """(m,) bool, the latents with children that these replace in this step."""
        m, parents = self.cfg.d_sae, self.forest.parents
        generator = self.clock.generator(step, self.device)
        drawn = torch.rand(m, generator=generator, device=self.device) < self.cfg.swap_probability
        has_children = torch.zeros_like(drawn)
        has_children[parents[parents != ROOT]] = True
        return drawn & has_children

    @torch.no_grad()
    def reassign(self) -> None:
        """Assign the parents of all latents again."""
        self.forest.parents.copy_(
            most_similar_parents(self.W_enc.T, self.cfg.widths, self.cfg.unassigned_share)
        )

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["clock.count"]


HSAE = Architecture(
    name="hsae",
    training_class=HSAETrainingSAE,
    training_config_class=HSAETrainingSAEConfig,
    sae_class=HSAEModel,
    sae_config_class=HSAEConfig,
    description="SAEs of growing width whose latents equal the sum of their children.",
    source="Luo et al. 2026, arXiv 2602.11881",
)
