"""The global random state of torch: isolated, seeded, saved and restored.

Images, tokens and their order have separate generators. The global state determines the initial
weights and what an architecture draws while it trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...registry.errors import CheckpointError
from ...registry.files import why

RNG_STATE_FILENAME = "rng_state.pt"


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


def save_rng_state(folder: Path) -> None:
    """Save the random state of the CPU and of every GPU."""
    state = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
    torch.save(state, folder / RNG_STATE_FILENAME)


def load_rng_state(folder: Path) -> None:
    """Restore what `save_rng_state` saved, of the GPUs that still exist.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        state = torch.load(folder / RNG_STATE_FILENAME, map_location="cpu", weights_only=True)
        torch.set_rng_state(state["cpu"])
        for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)
    except Exception as error:  # torch raises nearly anything
        problem = f"damaged: {RNG_STATE_FILENAME}: {why(error)}"
        raise CheckpointError(f"checkpoint {folder}", problem) from error
