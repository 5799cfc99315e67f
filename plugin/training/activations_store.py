"""What SAELens's runners see in place of their `ActivationsStore`: images, not texts, behind it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...hooks.activations.stream import ActivationStream
from ...registry.errors import CheckpointError
from ...registry.files import write_atomically

STREAM_STATE_FILENAME = "activations_store_state.json"


class VisionActivationsStore:
    """The part of SAELens's `ActivationsStore` that a runner calls, over an `ActivationStream`.

    Two things differ, and make a resumed run exact:

    - The position written into a checkpoint is that of the last batch the trainer has *had*,
      which is `n_consumed` batches on; a prefetching thread may be further ahead.
    - Nothing is read before `open()`: SAELens starts its prefetching thread before it loads a
      checkpoint.

    Args:
        stream: the activations of one or many hook points.
        hook_name: the hook point that plain iteration gives; None where only
            `get_multi_hook_data_loader` is used.
    """

    def __init__(self, stream: ActivationStream, hook_name: str | None = None) -> None:
        self.stream = stream
        self.hook_name = hook_name
        self.n_consumed = 0
        self._opened = threading.Event()
        self._ended = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        """Activations at `hook_name`: (train_batch_size_tokens, d)."""
        if self.hook_name is None:
            raise TypeError("a store of many hook points is read by get_multi_hook_data_loader()")
        return self._next()[self.hook_name]

    def get_multi_hook_data_loader(self) -> Iterator[dict[str, torch.Tensor]]:
        """Endless `{hook point: (train_batch_size_tokens, d)}`, all of the same tokens."""
        return _MultiHookLoader(self)

    def open(self) -> None:
        """Let batches through."""
        self._opened.set()

    def end(self) -> None:
        """End the iteration, in whatever thread it goes on."""
        self._ended = True
        self._opened.set()

    def save_to_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Write where the batch after the last consumed one begins."""
        state = self.stream.state_after(self.n_consumed)
        write_atomically(Path(checkpoint_path) / STREAM_STATE_FILENAME, json.dumps(state))

    def load_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Go to where the checkpoint was written."""
        path = Path(checkpoint_path) / STREAM_STATE_FILENAME
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(path, f"not a position in the activations: {error}") from error
        self.stream.seek(state)
        self.n_consumed = 0

    def _next(self) -> dict[str, torch.Tensor]:
        self._opened.wait()
        if self._ended:
            raise StopIteration
        return next(self.stream)


class _MultiHookLoader(Iterator[dict[str, torch.Tensor]]):
    def __init__(self, store: VisionActivationsStore) -> None:
        self._store = store

    def __next__(self) -> dict[str, Any]:
        return self._store._next()
