"""The `evaluator` of SAELens's trainers, which does not affect the training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from sae_lens.multi_sae_training_runner import PerSAEEvaluator
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from ...hooks.activations.stream import ActivationStream
from ...registry.heads import key_of
from ...registry.ranks import ALONE, Ranks
from .interrupts import StepGate
from .rng import set_apart
from .shared_logs import gathered_logs

logger = logging.getLogger(__name__)


class EvaluationSlot:
    """Runs evaluators of one SAE each, for either trainer.

    They read separate batches, not those of the training, and the global random state is restored:
    weights do not depend on whether, or how often, a run is evaluated. The prefetching thread
    waits meanwhile, since it uses the same model. An evaluator that fails is logged; the training
    goes on. A signal ends the evaluation, without metrics, and then the training.

    Args:
        open_stream: makes a stream of activations; called when an evaluator first reads one.
        ranks: the processes of the job; the metrics of all their SAEs go to the first.

    Attributes:
        evaluators: SAELens's signature, `(sae, data_provider, activation_scaler) -> metrics`.
    """

    def __init__(self, open_stream: Callable[[], ActivationStream], ranks: Ranks = ALONE) -> None:
        self.evaluators: list[PerSAEEvaluator] = []
        self._open_stream = open_stream
        self._ranks = ranks

    def one(
        self, sae: TrainingSAE[Any], data_provider: Any, activation_scaler: ActivationScaler
    ) -> dict[str, Any]:
        """The evaluator of `SAETrainer`; of an SAE that several ranks train, the first evaluates."""
        if not self._ranks.is_first:
            return {}
        return self._set_apart(data_provider, lambda: self._evaluate(sae, activation_scaler))

    def many(
        self,
        saes: Mapping[str, TrainingSAE[Any]],
        data_provider: Any,
        activation_scalers: Mapping[str, ActivationScaler],
        hook_names: Mapping[str, str],
    ) -> dict[str, Any]:
        """The evaluator of `MultiSAETrainer`: each SAE's metrics under its name."""
        metrics = self._set_apart(
            data_provider,
            lambda: {
                f"{name}/{metric}": value
                for name, sae in saes.items()
                for metric, value in self._evaluate(sae, activation_scalers[name]).items()
            },
        )
        return gathered_logs(self._ranks, "evaluation", metrics, saes)

    def _evaluate(self, sae: TrainingSAE[Any], scaler: ActivationScaler) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        for evaluator in self.evaluators:
            batches = _OwnBatches(self._open_stream, key_of(sae))
            try:
                metrics |= evaluator(sae, batches, scaler)
            except Exception:
                logger.exception("an evaluation during training failed; training goes on.")
        return metrics

    @staticmethod
    def _set_apart(data_provider: Any, evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not isinstance(data_provider, StepGate):
            with set_apart():
                return evaluate()

        def apart() -> dict[str, Any]:
            with data_provider.paused(), set_apart():
                return evaluate()

        return data_provider.unless_stopped(apart)


class _OwnBatches(Iterator[torch.Tensor]):
    """Activations at one hook point, or of one head there, from a stream that is opened at first use."""

    def __init__(self, open_stream: Callable[[], ActivationStream], key: str) -> None:
        self._open_stream = open_stream
        self._key = key
        self._stream: ActivationStream | None = None

    def __next__(self) -> torch.Tensor:
        if self._stream is None:
            self._stream = self._open_stream()
        return next(self._stream)[self._key]
