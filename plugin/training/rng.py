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
    step = trainer.step
    # `torch.manual_seed` formats the call stack for each kind of device that is absent: a millisecond.
    on_cpu = trainer.sae.device.type == "cpu"
    set_seed = torch.default_generator.manual_seed if on_cpu else torch.manual_seed

    def seeded_step(batch: torch.Tensor) -> Any:
        numbers = np.random.SeedSequence([seed, trainer.n_training_steps])
        set_seed(int(numbers.generate_state(1, np.uint64)[0]))
        return step(batch)

    trainer.step = seeded_step
