"""`tree`: children fire only where their parent fires, and every level reconstructs.

Source: "Tree SAE: Learning Hierarchical Feature Structures in Sparse Autoencoders" (Cao et al.
2026, arXiv 2605.07922), section 4: latents lie in levels; each latent after the first level has one
parent among all earlier latents, or the always-active root (eq. 6); each level keeps its k_l
strongest among those whose parent fires; the loss is sum_l ||x - x_hat_{<=l}||^2 over the
cumulative reconstructions (eq. 7), with the auxiliary loss for dead latents on the first level
(eq. 8, weight 1/32). Dead children move to parents with capacity (algorithms 1 and 2, see
`tree_growth`).

Deviations: latents are ranked by the norm of their contribution (`rescale_acts_by_decoder_norm`) in
place of renormalised decoder rows; errors are not divided by the variance of the input; whether a
child is dead is SAELens's count (`dead_feature_window` steps).

Saved as `tree`, with the forest in its config as `parents`; needs taxolens to load.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
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
from .parts.plugin_config import PluginTrainingSAEConfig, refuse_input_normalisation
from .parts.step_clock import StepClock
from .parts.tree_growth import TreeGrowth

# The paper's four levels: 1536, 3072, 9216 and 10752 of 24576 latents.
DEFAULT_SHARES = (1, 2, 6, 7)


@dataclass
class TreeSAEConfig(SAEConfig):
    """Settings of a saved `tree`.

    Args:
        level_widths: latents of each level, in order.
        level_k: active latents of each level.
        parents: parent of each latent, -1 for the root.
    """

    level_widths: list[int] = field(default_factory=list)
    level_k: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "tree"

    @override
    def __post_init__(self) -> None:
        check_parents(self.parents, self.level_widths)
        super().__post_init__()


@dataclass
class TreeTrainingSAEConfig(PluginTrainingSAEConfig):
    """Settings of `tree`.

    Args:
        k: active latents over all levels, where `level_k` is not given: split evenly, at least 1 each.
        level_widths: latents of each level; by default 1/16, 1/8, 3/8 and 7/16 of them.
        level_k: active latents of each level.
        parents: the initial forest; by default a random one.
        reallocate_every: steps to the first reallocation of dead children.
        reallocate_growth: factor by which the interval grows after each.
        reallocate_at_most_every: the longest interval.
        root_reset_step: step at which dead children get the root as parent; then the forest is fixed.
        parent_eligibility_steps: a parent gets children if it fired within this many steps.
        aux_loss_coefficient: weight of the auxiliary loss on the first level.
        rescale_acts_by_decoder_norm: rank latents by the norm of their contribution.
        seed: seed of the initial forest.
    """

    k: int = 32
    level_widths: list[int] = field(default_factory=list)
    level_k: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reallocate_every: int = 3000
    reallocate_growth: float = 2.0
    reallocate_at_most_every: int = 10_000
    root_reset_step: int | None = 50_000
    parent_eligibility_steps: int = 10
    aux_loss_coefficient: float = 1 / 32
    rescale_acts_by_decoder_norm: bool = True
    seed: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "tree"

    @override
    def __post_init__(self) -> None:
        refuse_input_normalisation(self)
        k = None if self.level_k else self.k
        if k is not None and k < len(self.widths):  # of which each level would get one
            allowed = f"at least the number of levels, {len(self.widths)}; or fewer level_widths"
            raise ConfigError("k", "out of range", given=k, allowed=allowed)
        check_levels("tree", self.d_sae, self.widths, self.budgets, k)
        check_parents(self.parents, self.widths)
        super().__post_init__()

    @property
    def widths(self) -> list[int]:
        """Number of latents of each level."""
        return self.level_widths or split_by_shares(self.d_sae, DEFAULT_SHARES)

    @property
    def budgets(self) -> list[int]:
        """Number of active latents of each level."""
        return self.level_k or split_by_shares(self.k, [1] * len(self.widths))

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TreeSAEConfig

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        saved = super().get_inference_sae_cfg_dict()
        return {**saved, "level_widths": self.widths, "level_k": self.budgets}


def tree_activations(
    hidden_pre: Tensor, parents: Tensor, widths: Sequence[int], budgets: Sequence[int]
) -> Tensor:
    """Activations (..., m): per level the strongest latents with an active parent."""
    acts: list[Tensor] = []
    for level, (latents, k) in enumerate(zip(level_slices(widths), budgets)):
        scores = hidden_pre[..., latents]
        if level:
            above = torch.cat(acts, dim=-1) > 0
            with_root = torch.cat([above, torch.ones_like(above[..., :1])], dim=-1)
            parent = parents[latents]
            parent = torch.where(parent == ROOT, latents.start, parent)
            scores = torch.where(with_root[..., parent], scores, 0.0)
        acts.append(positive_topk(scores, k))
    return torch.cat(acts, dim=-1)


def random_forest(widths: Sequence[int], seed: int) -> list[int]:
    """(m,) for each latent after the first level a uniform earlier-level latent or the root."""
    generator = torch.Generator().manual_seed(seed)
    parents = [ROOT] * widths[0]
    for latents, width in list(zip(level_slices(widths), widths))[1:]:
        drawn = torch.randint(latents.start + 1, (width,), generator=generator)
        parents += [ROOT if p == latents.start else int(p) for p in drawn]
    return parents


class TreeSAE(StandardSAE):
    """`tree` at inference."""

    cfg: TreeSAEConfig  # type: ignore[assignment]
    l0_rule = "counted"

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.forest = Forest(self.cfg.parents, self.cfg.d_sae, self.device)

    @override
    def encode(self, x: Tensor) -> Tensor:
        hidden_pre = self.process_sae_in(x) @ self.W_enc + self.b_enc
        acts = tree_activations(
            self.hook_sae_acts_pre(hidden_pre),
            self.forest.parents,
            self.cfg.level_widths,
            self.cfg.level_k,
        )
        return self.hook_sae_acts_post(acts)

    @override
    def fold_W_dec_norm(self) -> None:
        raise NotImplementedError(
            "Folding decoder norms into a saved tree would change which latents are the strongest."
        )


class TreeTrainingSAE(RecordsForest, TopKTrainingSAE):
    """Trains `tree`."""

    cfg: TreeTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: TreeTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)  # type: ignore[arg-type]
        parents = cfg.parents or random_forest(cfg.widths, cfg.seed)
        self.forest = Forest(parents, cfg.d_sae, self.device)
        self.growth = TreeGrowth(cfg.widths, cfg.reallocate_every, self.device)
        self.clock = StepClock(cfg.seed, self.device)

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return self.activate

    def activate(self, hidden_pre: Tensor) -> Tensor:
        """(..., m) pre-activations -> (..., m) activations."""
        return tree_activations(hidden_pre, self.forest.parents, self.cfg.widths, self.cfg.budgets)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        step = self.clock.tick()
        x, dead = step_input.sae_in, step_input.dead_neuron_mask
        acts, hidden_pre = self.encode_with_hidden_pre(x)
        sae_out = self.decode(acts)
        mse = self.mse_loss_fn(sae_out, x).sum(dim=-1).mean()
        losses: dict[str, Tensor] = {"mse_loss": mse}
        loss = mse

        atoms = self.W_dec
        if self.cfg.rescale_acts_by_decoder_norm:
            atoms = atoms / atoms.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        total = self.b_dec
        for level, latents in enumerate(level_slices(self.cfg.widths)[:-1]):
            total = total + acts[:, latents] @ atoms[latents]
            out = self.reshape_fn_out(total, self.d_head)
            losses[f"level_{level}_mse"] = self.mse_loss_fn(out, x).sum(dim=-1).mean()
            loss = loss + losses[f"level_{level}_mse"]
            if level == 0 and dead is not None:
                aux = self.cfg.aux_loss_coefficient * dead_latent_loss(
                    hidden_pre[:, latents], dead[latents], atoms[latents], x - out
                )
                losses["auxiliary_reconstruction_loss"] = aux
                loss = loss + aux

        self._grow(step, acts, loss, dead)
        return TrainStepOutput(x, sae_out, acts, hidden_pre, loss, losses)

    @torch.no_grad()
    def _grow(self, step: int, acts: Tensor, loss: Tensor, dead: Tensor | None) -> None:
        """Count firings, and reallocate dead children when due."""
        cfg, growth, parents = self.cfg, self.growth, self.forest.parents
        growth.observe((acts > 0).any(dim=0), loss)
        if dead is None or (cfg.root_reset_step is not None and step > cfg.root_reset_step):
            return
        if step == cfg.root_reset_step:
            parents[dead] = ROOT
        elif growth.due():
            parents.copy_(growth.reallocate(parents, dead, cfg.parent_eligibility_steps))
            growth.schedule(cfg.reallocate_growth, cfg.reallocate_at_most_every)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        for name in [n for n in state_dict if n.startswith(("growth.", "clock."))]:
            del state_dict[name]


TREE = Architecture(
    name="tree",
    training_class=TreeTrainingSAE,
    training_config_class=TreeTrainingSAEConfig,
    sae_class=TreeSAE,
    sae_config_class=TreeSAEConfig,
    description="Children fire only where their parent fires; every level reconstructs.",
    source="Cao et al. 2026, arXiv 2605.07922",
)
