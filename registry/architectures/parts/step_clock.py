"""Saved step counter, from which randomness and schedules are reproduced exactly on resume."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from .exact_buffers import ExactBuffers


class StepClock(ExactBuffers):
    """Counts training steps in a buffer, and provides a random generator for each step.

    SAELens's checkpoints contain neither the global generator's state nor the exact step number, so
    random numbers of a training step depend on (seed, this counter) only.
    """

    exact = ("count",)
    count: Tensor

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        self._known: int | None = None  # the count, for which a GPU is then not waited for

    @torch.no_grad()
    def tick(self) -> int:
        """Advance by one; return the number of the new step, from 0."""
        step = int(self.count) if self._known is None else self._known
        self.count += 1
        self._known = step + 1
        return step

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "count" in state_dict:
            self._known = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def generator(self, step: int, device: torch.device) -> torch.Generator:
        """The generator of one step; the same for every run with this seed."""
        # Large odd factor, so that nearby (seed, step) pairs have different streams.
        seed = (self.seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63
        return torch.Generator(device=device).manual_seed(seed)
