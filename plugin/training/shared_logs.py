"""W&B logs of the SAEs of all ranks, which rank 0 logs at the steps that SAELens would log them at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import wandb

from ...registry.ranks import Ranks

LOGS = "logs"  # the name of the point where the ranks meet


def gathered_logs(
    ranks: Ranks, point: str, logs: dict[str, Any], saes: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """On the first rank the logs of all ranks, on the others nothing; every rank calls this.

    Args:
        ranks: the processes of the job.
        point: the name of the point where they meet.
        logs: of this rank.
        saes: name -> SAE of this rank; the first one gets their histograms too, which SAELens logs there.
    """
    if ranks.size == 1:
        return logs
    if not ranks.is_first:
        for name, sae in saes.items():
            histograms = sae.log_histograms().items()
            logs |= {f"{name}/{key}": wandb.Histogram(value) for key, value in histograms}
    _, came = ranks.meet(point, logs)
    together = {
        key: value for each in came if isinstance(each, dict) for key, value in each.items()
    }
    return together if ranks.is_first else {}


@contextmanager
def histograms_of_any_range(saes: Iterable[Any]) -> Iterator[None]:
    """Meanwhile the histograms that SAELens logs are of float64.

    In float32 NumPy makes none of norms that are equal up to rounding, as those of a frozen decoder are.
    Wraps `log_histograms`, SAELens's public seam.
    """
    saes = list(saes)
    for sae in saes:
        plain = sae.log_histograms
        sae.log_histograms = partial(_in_float64, plain)
    try:
        yield
    finally:
        for sae in saes:
            del sae.log_histograms


def _in_float64(log_histograms: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return {key: np.asarray(value, np.float64) for key, value in log_histograms().items()}


def share_logs(ranks: Ranks, cfg: Any, trainers: Mapping[str, Any]) -> SharedLogs | None:
    """Begin to send the logs of the trainers of every rank to rank 0; None where nothing is logged."""
    if ranks.size == 1 or not cfg.logger.log_to_wandb:
        return None
    return SharedLogs(ranks, cfg, trainers)


class SharedLogs:
    """Wraps two public methods of SAELens's trainers: `step` and `maybe_reset_sparsity`.

    On rank 0 SAELens logs the SAEs of that rank itself.

    Args:
        ranks: the processes of the job.
        cfg: the runner's config.
        trainers: SAE name -> its trainer, of this rank, in the order in which they step.
    """

    def __init__(self, ranks: Ranks, cfg: Any, trainers: Mapping[str, Any]) -> None:
        self._ranks, self._cfg, self._trainers = ranks, cfg, trainers
        self._found: dict[str, Any] = {}
        last = list(trainers)[-1]
        for name, trainer in trainers.items():
            trainer.step = self._logged(name, trainer, trainer.step, name == last)
            trainer.maybe_reset_sparsity = self._noted(name, trainer.maybe_reset_sparsity)

    def finish(self) -> None:
        """Log the last window of sparsity, which SAELens logs when the training ends."""
        for name, trainer in self._trainers.items():
            self._note(name, trainer.full_sparsity_window_log())
        self._send(next(iter(self._trainers.values())).n_training_steps)

    def _note(self, name: str, logs: Mapping[str, Any]) -> None:
        if not self._ranks.is_first:
            self._found |= {f"{name}/{key}": value for key, value in logs.items()}

    def _noted(self, name: str, reset: Any) -> Any:
        def maybe_reset_sparsity() -> dict[str, Any]:
            logs = reset()
            self._note(name, logs)
            return logs

        return maybe_reset_sparsity

    def _logged(self, name: str, trainer: Any, step: Any, is_last: bool) -> Any:
        def logged_step(batch: torch.Tensor) -> Any:
            output = step(batch)
            n = trainer.n_training_steps
            logs_step = (n + 1) % self._cfg.logger.wandb_log_frequency == 0
            if logs_step and not self._ranks.is_first:
                samples = trainer.n_training_samples
                self._note(name, trainer.build_train_step_log_dict(output, samples))
            if is_last and (logs_step or (n and n % self._cfg.feature_sampling_window == 0)):
                self._send(n)
            return output

        return logged_step

    def _send(self, step: int) -> None:
        together = gathered_logs(self._ranks, LOGS, self._found)
        self._found = {}
        if together:
            wandb.log(together, step=step)
