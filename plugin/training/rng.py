"""The global random state of torch: isolated and seeded.

Images, tokens and their order have separate generators. The global state determines the initial
weights and what an architecture draws while it trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def set_apart() -> Iterator[None]:
    """Restore the caller's random state at the end."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` meanwhile; restore the caller's random state at the end."""
    with set_apart():
        torch.manual_seed(seed)
        yield


def draw_by_step(trainer: Any, seed: int) -> None:
    """Make what an architecture draws in a step of SAELens's trainer depend on the seed and the step alone.

    It does then not depend on other SAEs that train beside it, on other processes, nor on whether the run was
    stopped. Wraps `step`, SAELens's public seam.
    """
    step, device = trainer.step, trainer.sae.device

    def seeded_step(batch: torch.Tensor) -> Any:
        numbers = np.random.SeedSequence([seed, trainer.n_training_steps])
        _set_seed(int(numbers.generate_state(1, np.uint64)[0]), device)
        return step(batch)

    trainer.step = seeded_step


def _set_seed(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of `device`, as `torch.manual_seed` seeds all.

    That formats the call stack for each kind of device that is absent: a millisecond.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
