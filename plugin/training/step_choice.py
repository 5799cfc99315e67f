"""Which training step the SAEs of a run have: the sparse one or SAELens's, and Adam in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE

from ...registry.architectures.parts.sparse_step import SparseStep, with_sparse_step
from ...registry.ranks import Ranks
from .data_parallel import OVER_THE_BATCH

FUSED_ON = ("cpu", "cuda")


def with_step_of(cfg: Any, sae: TrainingSAE[Any], n_ranks: int | None = None) -> TrainingSAE[Any]:
    """The SAE itself, with the step that a run trains it by.

    Args:
        cfg: config of a runner.
        sae: a new SAE, one that is given in its place, or one of the same config.
        n_ranks: processes of the job; None: those that torchrun has started.
    """
    n_ranks = Ranks.here().size if n_ranks is None else n_ranks
    # A compiled SAE is traced by torch, which takes no sparse products.
    compiled = getattr(cfg, "compile_sae", False)
    # The one SAE of several processes chooses over the batches of all of them; many are dealt.
    divided = hasattr(cfg, "sae") and n_ranks > 1 and sae.cfg.architecture() in OVER_THE_BATCH
    return with_sparse_step(sae, cfg.sparse_step and not compiled and not divided)


def tell_when_none_is_dead(trainer: Any) -> None:
    """Tell the sparse step of the steps in which SAELens's trainer can count no latent as dead yet.

    Wraps `step`, SAELens's public seam.
    """
    step, sae = trainer.step, trainer.sae
    if not isinstance(sae, SparseStep):
        return

    def told_step(batch: torch.Tensor) -> Any:
        sae.none_is_dead = trainer.n_training_steps <= trainer.cfg.dead_feature_window
        try:
            return step(batch)
        finally:
            sae.none_is_dead = False

    trainer.step = told_step


def fuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam update weights on CUDA and on the CPU in one kernel (torch's `fused`), others as by default.

    By default it passes over the weights once for each of its operations. The form follows from where the
    weights lie, also after a checkpoint of the other form was loaded; the two differ by rounding.
    """
    for group in optimizer.param_groups:
        weights = group["params"]
        fused = all(w.device.type in FUSED_ON and w.is_floating_point() for w in weights)
        group["fused"] = fused or None
        for weight in weights:
            if state := optimizer.state.get(weight):
                state["step"] = state["step"].to(weight.device if fused else "cpu")
