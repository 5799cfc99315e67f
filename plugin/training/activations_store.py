"""Adapter: an ActivationStream behind the interface of SAELens's ActivationsStore."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...hooks.activations.stream import ActivationStream
from ...hooks.models.evals import ImageTokens
from ...registry.errors import CheckpointError
from ...registry.files import UnreadableError, read_json_object, reason, write_atomically

STREAM_STATE_FILENAME = "activations_store_state.json"


class VisionActivationsStore:
    """The part of SAELens's `ActivationsStore` that a runner and `run_evals` call, over an `ActivationStream`.

    It differs in two points, which make a resumed run exact:

    - A checkpoint records the position after the last batch that the trainer has received, which is
      `n_consumed` batches from the start; a prefetching thread may have read further.
    - Nothing is read before `open()`: SAELens starts its prefetching thread before it loads a
      checkpoint.

    Args:
        stream: the activations of one or many hook points.
        hook_name: the hook point of plain iteration, or a `head_key`; None where only `get_multi_hook_data_loader`
            is used.
    """

    def __init__(self, stream: ActivationStream, hook_name: str | None = None) -> None:
        self.stream = stream
        self.hook_name = hook_name
        self.n_consumed = 0
        self._opened = threading.Event()
        self._ended = False
        self._images: tuple[int, Iterator[ImageTokens]] | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        """Activations at `hook_name`: (train_batch_size_tokens, d)."""
        if self.hook_name is None:
            raise TypeError("a store of many hook points is read by get_multi_hook_data_loader()")
        return self._next()[self.hook_name]

    def get_multi_hook_data_loader(self) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches `{hook point: (train_batch_size_tokens, d)}`, each of the same tokens."""
        return _MultiHookLoader(self)

    def open(self) -> None:
        """Allow batches to be read."""
        self._opened.set()

    def end(self) -> None:
        """End the iteration, in any thread."""
        self._ended = True
        self._opened.set()

    def save_to_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Write the position after the last consumed batch."""
        state = self.stream.state_after(self.n_consumed)
        write_atomically(Path(checkpoint_path) / STREAM_STATE_FILENAME, json.dumps(state))

    def load_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Go to the position in the checkpoint.

        Raises:
            CheckpointError: the file is missing or not readable.
        """
        path = Path(checkpoint_path) / STREAM_STATE_FILENAME
        try:
            state = read_json_object(path)
        except (OSError, UnreadableError) as error:
            problem = f"not a position in the activations: {reason(error)}"
            raise CheckpointError(path, problem) from error
        self.stream.seek(state)
        self.n_consumed = 0

    @property
    def context_size(self) -> int:
        """Tokens of an image that the store gives."""
        return self.stream.tokens_per_image

    @property
    def store_batch_size_prompts(self) -> int:
        """Images of a batch of `get_batch_tokens` without another number."""
        return self.stream.images_per_batch

    def get_batch_tokens(self, batch_size: int | None = None) -> ImageTokens:
        """The next images in the order of the dataset, over and over; the training loses none.

        Another number of images than before begins at the first image again.

        Raises:
            ConfigError: the store reads a cache, which has no images; or there are fewer images.
        """
        size = batch_size or self.store_batch_size_prompts
        if self._images is None or self._images[0] != size:
            self._images = size, self.stream.image_tokens(size)
        return next(self._images[1])

    def reset_input_dataset(self) -> None:
        """Begin `get_batch_tokens` at the first image again."""
        self._images = None

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
