"""Log-probabilities of classes from the outputs of a model under intervention."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..base import Intervention, InterventionResult
from .logistic import multinomial

PENALTY = 1e-2
STEPS = 100


class HeadReadout:
    """The model's own classification head.

    `classes (O,)`: the class of each output, −1 where it has none in the taxonomy.
    """

    name = "head"

    def __init__(self, classes: np.ndarray) -> None:
        self.classes = classes

    def __call__(self, result: InterventionResult) -> Tensor:
        """(n, O) log-probabilities of the outputs."""
        assert result.logits is not None
        return result.logits.double().log_softmax(1)


class ProbeReadout:
    """A multinomial logistic regression on the final embedding, for models without a head.

    Own definition: features standardised on the images it is fitted on, cross-entropy +
    PENALTY/2·‖W‖², L-BFGS from 0. Classes without an image have no probability.

    Args:
        embedding: (n, e) of the unmodified model.
        labels: (n,) classes.
        n_classes: C.
    """

    name = "probe"

    def __init__(self, embedding: Tensor, labels: Tensor, n_classes: int) -> None:
        self.classes = np.arange(n_classes)
        x = embedding.double()
        self._probes = multinomial(x, labels, n_classes, penalty=PENALTY, steps=STEPS)

    def __call__(self, result: InterventionResult) -> Tensor:
        """(n, C) log-probabilities of the classes."""
        scores = result.embedding.double() @ self._probes.weight.T + self._probes.bias
        return scores.log_softmax(1)


Readout = HeadReadout | ProbeReadout


def head_of(intervene: Intervention | None) -> HeadReadout | None:
    """The model's head, or None where it has none for classes of the taxonomy."""
    if intervene is None or intervene.logit_classes is None:
        return None
    return HeadReadout(intervene.logit_classes)


def kl_divergence(clean: Tensor, edited: Tensor) -> Tensor:
    """(n,) KL(clean ‖ edited) in nats, of log-probabilities (n, O)."""
    p = clean.exp()
    return torch.where(p > 0, p * (clean - edited), 0.0).sum(1)


def class_probabilities(log_probs: Tensor, classes: np.ndarray, n_classes: int) -> Tensor:
    """(n, C) the sum over the outputs of each class, from log-probabilities (n, O)."""
    labelled = torch.from_numpy(np.flatnonzero(classes >= 0))
    target = torch.from_numpy(classes)[labelled]
    p = torch.zeros(len(log_probs), n_classes, dtype=log_probs.dtype)
    return p.index_add_(1, target, log_probs[:, labelled].exp())
