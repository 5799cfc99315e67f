"""What the base class of evaluators gives its subclasses: preparation and a memo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.base import EvaluationContext, Evaluator, remembered, stream
from taxolens.registry.evaluators.parts.accumulators import FiringRate

LABELS = np.arange(24) % 12


class Counting(Evaluator):
    """Counts how often each of its methods does its work."""

    name = "counting"
    description = "counts"
    higher_is_better = {"mean": None}

    def prepare(self) -> None:
        self.calls: list[Any] = [("prepared", self.options, self.taxonomy)]
        self.rate = self.context.share(FiringRate)

    @remembered
    def work(self, nodes: np.ndarray, permutation: Any = None, shuffled: bool = False) -> float:
        self.calls.append((nodes.tolist(), permutation is None, shuffled))
        return self.rate.mean_l0

    @property
    @remembered
    def fact(self) -> int:
        self.calls.append("fact")
        return self.rate.n

    def compute(self, *, permutation: Any = None, shuffled: bool = False) -> dict[str, float]:
        return {"mean": self.work(np.arange(2), permutation, shuffled)}


class WithConstructor(Counting):
    """As evaluators were written before there was `prepare`."""

    def __init__(self, context: EvaluationContext, options: Any = None) -> None:
        super().__init__(context, options)
        self.more = context.share(FiringRate)


@pytest.fixture
def context(animals) -> EvaluationContext:
    return EvaluationContext(animals, 24, 5, 3)


def test_preparing_comes_once_after_the_options(context) -> None:
    evaluator = Counting(context)
    assert evaluator.calls == [("prepared", evaluator.options, context.taxonomy)]
    assert evaluator.rate is WithConstructor(context).more


def test_work_is_done_once_for_equal_arguments(context, animals) -> None:
    evaluator = Counting(context)
    evaluator.calls.clear()
    for _ in range(2):
        evaluator.work(np.arange(2))
        evaluator.work(np.arange(2), None, False)
        evaluator.work(shuffled=False, nodes=np.arange(2), permutation=None)
        evaluator.work(np.arange(2), animals.permutation(0))
        evaluator.work(np.arange(2), animals.permutation(1))
        evaluator.work(np.arange(2), shuffled=True)
        evaluator.work(np.arange(3))
        assert evaluator.fact == 0
    both, three = [0, 1], [0, 1, 2]
    assert evaluator.calls == [
        (both, True, False),
        (both, False, False),
        (both, False, False),
        (both, True, True),
        (three, True, False),
        "fact",
    ]


def test_each_evaluator_and_method_has_its_own_memory(context) -> None:
    class Other(Counting):
        @remembered
        def twice(self, nodes: np.ndarray, permutation: Any = None, shuffled: bool = False) -> Any:
            return "twice"

    one, other = Other(context), Other(context)
    one.work(np.arange(2))
    assert one.twice(np.arange(2)) == "twice" and np.isnan(one.work(np.arange(2)))
    other.work(np.arange(2))
    assert len(one.calls) == len(other.calls) == 2


def test_a_batch_ends_what_is_remembered(context, one_batch) -> None:
    z = torch.zeros(24, 3)
    z[:, 0] = 1
    evaluator = Counting(context)
    assert np.isnan(evaluator.compute()["mean"]) and evaluator.fact == 0
    context.update(one_batch(z, LABELS))
    assert evaluator.compute() == {"mean": 1} and evaluator.fact == 24
    context.update(one_batch(0 * z, LABELS))
    assert evaluator.compute() == {"mean": 0.5} and evaluator.fact == 48


def test_shuffled_labels_are_refused_where_there_are_none(animals, one_batch) -> None:
    context = EvaluationContext(animals, 24, 5, 3, shuffled=False)
    done = stream(context, {"counting": (Counting, None)}, [one_batch(torch.ones(24, 3), LABELS)])
    with pytest.raises(ConfigError, match=r"counting\.compute\(shuffled=True\).*shuffled=False"):
        done.evaluators["counting"].compute(shuffled=True)
    assert done.evaluators["counting"].compute() == {"mean": 3}


def test_members_follow_the_permutation(context, animals) -> None:
    permutation = animals.permutation(2)
    nodes = animals.distinct_nodes[::3]
    found = Counting(context).members(nodes, permutation)
    for c, place in enumerate(permutation):
        assert np.array_equal(found[c], animals.membership[place, nodes])
    assert np.array_equal(Counting(context).members(nodes), animals.membership[:, nodes])
