"""The counter of steps: what it counts, what is saved of it, and the random numbers of a step."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from taxolens.registry.architectures.parts.step_clock import StepClock
from taxolens.registry.architectures.parts.tree_growth import TreeGrowth
from taxolens.registry.architectures.tree import TreeTrainingSAE, TreeTrainingSAEConfig

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


def test_of_an_earlier_state_in_float16_infinity_is_no_negative_count() -> None:
    clock = StepClock(0, CPU)
    clock.load_state_dict({"count": torch.tensor(70_000).to(torch.float16)})
    assert clock.tick() == 65_504


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_counts_of_a_loaded_sae_in_half_precision_are_those_saved(
    tmp_path: Path, dtype: str
) -> None:
    """SAELens casts what it loads; an SAE that is moved is cast too."""
    settings = {"d_in": 4, "d_sae": 12, "k": 6, "level_widths": [3, 9], "dtype": dtype}
    sae = TreeTrainingSAE(TreeTrainingSAEConfig(**settings))
    numbers = {
        "clock.count": torch.tensor(70_001),
        "growth.idle_steps": torch.arange(70_001, 70_013),
        "growth.interval": torch.tensor(10_001),
        "growth.waited": torch.tensor(9_999),
        "growth.capacity": torch.rand(2, 13) + 1e5,
    }
    for name, number in numbers.items():
        sae.get_buffer(name).copy_(number)
    sae.save_model(tmp_path)
    loaded = TreeTrainingSAE.load_from_disk(tmp_path)
    for name, number in numbers.items():
        assert torch.equal(loaded.get_buffer(name), number), name
        assert loaded.get_buffer(name).dtype == number.dtype
    for _ in range(3):
        loaded.growth.observe(torch.zeros(12, dtype=torch.bool), torch.tensor(0.25))
    assert float(loaded.growth.capacity[1, -1]) == float(numbers["growth.capacity"][1, -1]) + 0.75

    # what earlier versions saved: the numbers themselves
    file = tmp_path / "sae_weights.safetensors"
    save_file({**load_file(file), **numbers}, file)
    resumed = TreeTrainingSAE(TreeTrainingSAEConfig(**settings))
    resumed.load_weights_from_checkpoint(tmp_path)
    for name, number in numbers.items():
        assert torch.equal(resumed.get_buffer(name), number), name
    numbers["growth.capacity"] /= 2  # now numbers of float16
    save_file({**load_file(file), **numbers}, file)
    rounded = TreeTrainingSAE.load_from_disk(tmp_path)
    assert rounded.clock.tick() == {"bfloat16": 70_144, "float16": 65_504}[dtype]


def test_a_sum_that_is_infinite_is_seen_in_the_state() -> None:
    """A training that has diverged is found by the tensors of its state."""
    growth = TreeGrowth([2, 3], 5, CPU)
    growth.observe(torch.ones(5, dtype=torch.bool), torch.tensor(float("inf")))
    assert growth.state_dict()["capacity"].isinf().any()
    again = TreeGrowth([2, 3], 5, CPU)
    again.load_state_dict(growth.state_dict())
    assert torch.equal(again.capacity, growth.capacity)


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
