"""Training of one SAE by several processes: each computes a share of every batch, and gradients are averaged.

Every rank has the whole batch, the same weights, which are those of rank 0 at the start, and the same state of the optimizer. Within a step are
reduced over the ranks: the gradient of each parameter when it has been accumulated, before SAELens clips
its norm; the counts of firings; the steps since each latent has fired; the k·n largest pre-activations of
architectures that choose them over the batch, and their threshold. The result is that of one process on the
whole batch up to the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor

from ...registry.errors import ConfigError
from ...registry.ranks import Ranks

# Their loss is a mean over the inputs, and beside it they compute nothing from the batch but what is reduced.
DIVISIBLE = ("topk", "batchtopk", "jumprelu", "matryoshka_batchtopk", "mp")
OVER_THE_BATCH = ("batchtopk", "matryoshka_batchtopk")


def check_divisible(cfg: Any, ranks: Ranks) -> None:
    """Check that one SAE can be trained by all ranks.

    Raises:
        ConfigError: its architecture computes from the batch what cannot be reduced, or a batch has no equal shares.
    """
    if ranks.size == 1:
        return
    architecture, batch = cfg.sae.architecture(), cfg.train_batch_size_tokens
    if architecture not in DIVISIBLE:
        problem = f"{architecture} computes from a batch what {ranks.size} processes cannot reduce"
        allowed = f"one process, or {', '.join(DIVISIBLE)}"
        raise ConfigError("architecture", problem, given=architecture, allowed=allowed)
    if batch % ranks.size:
        problem = f"{ranks.size} processes cannot have equal shares of it"
        allowed = f"a multiple of {ranks.size}"
        raise ConfigError("train_batch_size_tokens", problem, given=batch, allowed=allowed)
    if cfg.compile_sae:
        problem = "a compiled SAE cannot exchange within a step"
        raise ConfigError("compile_sae", problem, given=True, allowed="False, or one process")


@torch.no_grad()
def share_start(sae: TrainingSAE[Any], ranks: Ranks) -> None:
    """Give every rank the weights and buffers of rank 0, to the bit; each may have drawn others."""
    if ranks.size == 1:
        return
    for tensor in (*sae.parameters(), *sae.buffers()):
        first = ranks.from_first(tensor.cpu() if ranks.is_first else None)
        assert first is not None
        tensor.copy_(first)


def share_steps(trainer: Any, ranks: Ranks) -> None:
    """Make each step of SAELens's trainer of one SAE one of all ranks.

    Args:
        trainer: its `step` is wrapped, which gets the whole batch: (n, d), n a multiple of the ranks.
        ranks: the processes; one of them leaves all as it is.
    """
    if ranks.size == 1:
        return
    sae: TrainingSAE[Any] = trainer.sae
    for parameter in sae.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: _average(p, ranks))
    if sae.cfg.architecture() in OVER_THE_BATCH:
        sae.activation_fn = SharedBatchTopK(sae.activation_fn.k, ranks)
    step = trainer.step

    def shared_step(batch: Tensor) -> Any:
        before = trainer.act_freq_scores.clone()
        share = batch.chunk(ranks.size)[ranks.rank]
        output = step(share)
        trainer.n_training_samples += len(batch) - len(share)
        fired = ranks.reduce(trainer.act_freq_scores - before, "sum")
        trainer.act_freq_scores = before + fired
        trainer.n_forward_passes_since_fired = ranks.reduce(
            trainer.n_forward_passes_since_fired, "min"
        )
        if isinstance(threshold := getattr(sae, "topk_threshold", None), Tensor):
            # Each rank has moved it from the same value towards the least of its firings, if it has any.
            has_fired = bool((output.feature_acts > 0).any())
            moved = threshold if has_fired else torch.full_like(threshold, torch.inf)
            least = ranks.reduce(moved, "min")
            threshold.copy_(torch.where(least.isinf(), threshold, least))
        return output

    trainer.step = shared_step


class SharedBatchTopK(BatchTopK):
    """The k·n largest activations of the batch of all ranks; equal ones at the end are all kept."""

    def __init__(self, k: float, ranks: Ranks) -> None:
        super().__init__(k)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """(n, m) pre-activations of this rank -> activations, 0 where they are not among the largest."""
        acts = x.relu()
        if not self.training:
            return super().forward(x)
        n = int(self.k * acts.shape[:-1].numel() * self.ranks.size)
        own = acts.detach().flatten()
        largest = own.topk(min(n, len(own))).values.cpu()
        least = torch.cat(self.ranks.gather(largest)).topk(n).values[-1].to(acts.device)
        return acts * (acts >= least)


def _average(parameter: Tensor, ranks: Ranks) -> None:
    assert parameter.grad is not None  # torch calls this when there is one
    parameter.grad.copy_(ranks.reduce(parameter.grad, "sum") / ranks.size)
