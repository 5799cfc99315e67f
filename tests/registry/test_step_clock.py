"""The counter of steps: what it counts, what is saved of it, and the random numbers of a step."""

from __future__ import annotations

import copy

import pytest
import torch
from taxolens.registry.architectures.parts.step_clock import StepClock

CPU = torch.device("cpu")


def test_it_counts_and_saves_what_it_counts() -> None:
    clock = StepClock(0, CPU)
    assert [clock.tick() for _ in range(3)] == [0, 1, 2]
    assert int(clock.count) == 3
    copied = copy.deepcopy(clock)
    assert (copied.tick(), clock.tick(), int(copied.count)) == (3, 3, 4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_loaded_state(dtype: torch.dtype) -> None:
    """SAELens casts what it loads to the type of the weights."""
    clock = StepClock(0, CPU)
    clock.tick()
    clock.load_state_dict({"count": torch.tensor(40).to(dtype)})
    assert [clock.tick(), clock.tick()] == [40, 41]
    assert clock.count.dtype == torch.int64 and int(clock.count) == 42


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    to_int = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: asked.append(1) or to_int(self))
    clock = StepClock(0, CPU)
    for _ in range(3):
        clock.tick()
    assert len(asked) == 1


def test_random_numbers_depend_on_seed_and_step_alone() -> None:
    def drawn(seed: int, step: int) -> float:
        return float(torch.rand((), generator=StepClock(seed, CPU).generator(step, CPU)))

    numbers = [drawn(seed, step) for seed in range(4) for step in range(4)]
    assert len(set(numbers)) == 16
    assert numbers == [drawn(seed, step) for seed in range(4) for step in range(4)]
