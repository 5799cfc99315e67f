"""From what a model gives to probabilities of classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from taxolens.registry.evaluators.base import InterventionResult
from taxolens.registry.evaluators.parts.image_positions import ImagePositions
from taxolens.registry.evaluators.parts.logistic import multinomial
from taxolens.registry.evaluators.parts.readout import (
    PENALTY,
    STEPS,
    HeadReadout,
    ProbeReadout,
    class_probabilities,
    head_of,
    kl_divergence,
)

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(4).repeat_interleave(30)
EMBEDDING = 2 * torch.eye(8)[LABELS] + 0.5 * torch.randn(120, 8, generator=GENERATOR) + 9


def test_outputs_of_one_class_are_added_and_those_of_none_left_out() -> None:
    logits = torch.randn(5, 4, generator=GENERATOR)
    head = HeadReadout(np.array([2, -1, 0, 2]))
    p = class_probabilities(head(InterventionResult(logits, logits)), head.classes, 3)
    expected = logits.double().softmax(1)
    assert torch.allclose(p[:, 0], expected[:, 2])
    assert torch.allclose(p[:, 1], torch.zeros(5).double())
    assert torch.allclose(p[:, 2], expected[:, 0] + expected[:, 3])


def test_kl() -> None:
    clean, edited = (torch.randn(5, 4, generator=GENERATOR).log_softmax(1) for _ in range(2))
    expected = torch.nn.functional.kl_div(edited, clean, log_target=True, reduction="none").sum(1)
    assert torch.allclose(kl_divergence(clean, edited), expected)
    impossible = torch.tensor([[0.0, -torch.inf]])
    assert kl_divergence(impossible, impossible).tolist() == [0.0]


def test_the_probe_is_at_its_optimum() -> None:
    x = EMBEDDING.double()
    mean, deviation = x.mean(0), x.std(0, unbiased=False)
    found = multinomial(x, LABELS, 4, penalty=PENALTY, steps=STEPS)
    weight = (found.weight * deviation).T.requires_grad_()
    bias = (found.bias + found.weight @ mean).requires_grad_()
    z = (x - mean) / deviation
    loss = torch.nn.functional.cross_entropy(z @ weight + bias, LABELS)
    (loss + PENALTY / 2 * weight.square().sum()).backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3


def test_the_probe_fits_its_images() -> None:
    probe = ProbeReadout(EMBEDDING, LABELS, 6)
    log_probs = probe(InterventionResult(None, EMBEDDING))
    assert (log_probs.argmax(1) == LABELS).float().mean() > 0.95
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(120).double())
    assert (log_probs[:, 4:] == -torch.inf).all()  # two classes without an image


def test_head_of(toy_model) -> None:
    assert head_of(None) is None
    assert head_of(toy_model(EMBEDDING, torch.eye(8))) is None
    head = head_of(toy_model(EMBEDDING, torch.eye(8), torch.eye(8), np.arange(8)))
    assert isinstance(head, HeadReadout) and head.classes.tolist() == list(range(8))


@pytest.mark.parametrize("size", [5, 24])
def test_positions_do_not_depend_on_batches(animals, one_batch, batches_of, size: int) -> None:
    from taxolens.registry.evaluators.base import EvaluationContext

    labels = np.arange(24) % 12
    batch = one_batch(np.zeros((24, 2), dtype=np.float32), labels)
    sample = ImagePositions(EvaluationContext(animals, 24, 5, 2), max_images=7)
    whole = ImagePositions(EvaluationContext(animals, 24, 5, 2), max_images=100)
    for part in batches_of(batch, size):
        sample.update(part)
        whole.update(part)
    halves = [set(batch.index[batch.is_fit == fit].tolist()) for fit in (False, True)]
    for fit in (False, True):
        index = sample.index(fit)
        assert len(index) == 7 and set(index) <= halves[fit]
        assert np.array_equal(sample.labels(fit), labels[index])
        assert set(whole.index(fit)) == halves[fit]
        assert np.array_equal(index, whole.index(fit)[:7])
        by_index = dict(zip(batch.index.tolist(), batch.shuffled_labels.tolist()))
        assert sample.labels(fit, shuffled=True).tolist() == [by_index[i] for i in index]
