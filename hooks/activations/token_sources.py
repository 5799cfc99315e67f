"""The sources of an `ActivationStream`: a model that reads images, and a cache."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...registry.errors import ConfigError, DataError
from ...registry.machine import processes_here
from ..images.loader import ImageBatch, ImageLoader
from ..images.raw import Job
from ..models.evals import ImageTokens, labels_of
from .cache_reader import CacheReader
from .extract import TokenExtractor, model_fingerprint
from .permutation import LazyPermutation

Batch = dict[str, Tensor]
State = dict[str, Any]

BAR_DELAY = 5  # seconds after which the progress through a window is shown
GATHERED_BYTES = 1 << 28  # read from a cache at once, in the order of the file
ROWS_AHEAD = 1 << 16  # rows numbered at once: of few, the calls cost more than the numbers
SHARE_OF_DEVICE = 0.2  # of the free memory of a GPU, up to which a cache is kept there whole


def passes_of_window(tokens_per_image: int, n_batches_in_buffer: int) -> int:
    """Forward passes whose tokens are shuffled together; one token an image is shuffled with its image."""
    return 1 if tokens_per_image == 1 else n_batches_in_buffer


@dataclass(frozen=True)
class Delivery:
    """How tokens are given out."""

    batch_size: int
    device: torch.device
    dtype: torch.dtype
    seed: int


@dataclass
class Place:
    """The position of the images of one forward pass in the epochs and windows."""

    epoch: int
    window: int
    ends_window: bool
    ends_epoch: bool


@dataclass
class _Window:
    """The tokens of one window, (n, d) for each hook point, and the order to give them out in."""

    place: Place
    tokens: Batch
    order: Tensor | None
    counts: tuple[int, int]  # of images read, and of corrupt ones, before it

    def __len__(self) -> int:
        return len(next(iter(self.tokens.values()))) if self.tokens else 0

    @property
    def following(self) -> tuple[int, int]:
        place = self.place
        return (place.epoch + 1, 0) if place.ends_epoch else (place.epoch, place.window + 1)

    def copy(self, start: int, end: int, to: Batch, at: int) -> None:
        """Write tokens number `start` to `end` into `to`, from row `at` on."""
        for name, tokens in self.tokens.items():
            target = to[name][at : at + end - start]
            if self.order is None:
                target.copy_(tokens[start:end])
            else:
                torch.index_select(tokens, 0, self.order[start:end], out=target)


class ModelSource:
    """Activations computed from images by a model, as they are needed.

    Once `stopped` is True, batches end at the next opportunity.
    """

    def __init__(
        self,
        loader: ImageLoader,
        extractor: TokenExtractor,
        delivery: Delivery,
        tokens_per_image: int,
        batches_per_window: int,
        *,
        progress: bool = False,
    ) -> None:
        self.loader = loader
        self.extractor = extractor
        self.delivery = delivery
        self.tokens_per_image = tokens_per_image
        self.batches_per_window = batches_per_window
        self.progress = progress
        self.stopped = False
        self._description: dict[str, Any] | None = None

    def start(self) -> State:
        """The position of the first batch."""
        return {"position": [0, 0, 0], "failures": {}, "n_processed": 0, "n_failed": 0}

    def state(self, mark: Any) -> State:
        """The position after the batch that came with `mark`."""
        position, n_failures, n_processed, n_failed = mark
        failures = list(self.loader.failures.items())[:n_failures]
        return {
            "position": list(position),
            "failures": {str(index): text for index, text in failures},
            "n_processed": n_processed,
            "n_failed": n_failed,
        }

    def failures(self) -> dict[int, str]:
        """Image index -> source and reason, of the corrupt images so far."""
        return dict(self.loader.failures)

    def describe(self) -> dict[str, Any]:
        """JSON-able: everything that decides which numbers come in which order."""
        if self._description is None:
            self._description = {
                "from": "model",
                "model": model_fingerprint(self.extractor.model),
                "images": self.loader.images.fingerprint,
                "preprocessing": _described(self.loader.preprocess),
                "tokens": self.extractor.tokens[0],
                "seed": self.delivery.seed,
                "store_batch_size_prompts": self.loader.batch_size,
                "batches_per_window": self.batches_per_window,
                "dtype": str(self.delivery.dtype),
                "autocast": self.extractor.autocast,
            }
        return dict(self._description)

    def batches(self, state: State) -> Iterator[tuple[Batch, Any]]:
        """The batches from a position on, each {hook point: (b, d)} with a mark of what follows."""
        loader, size = self.loader, self.delivery.batch_size
        loader.failures = {int(index): text for index, text in state["failures"].items()}
        loader.n_processed, loader.n_failed = state["n_processed"], state["n_failed"]
        epoch, first_window, offset = state["position"]
        batch: Batch = {}
        filled = 0
        for window in self._windows(epoch, first_window):
            while offset < len(window):
                if not batch:
                    batch = {
                        name: tokens.new_empty(size, tokens.shape[-1])
                        for name, tokens in window.tokens.items()
                    }
                end = min(len(window), offset + size - filled)
                window.copy(offset, end, batch, filled)
                filled, offset = filled + end - offset, end
                if filled == size:
                    if offset < len(window):
                        position = (window.place.epoch, window.place.window, offset)
                        counts = window.counts
                    else:
                        position = (*window.following, 0)
                        counts = (loader.n_processed, loader.n_failed)
                    yield batch, (position, len(loader.failures), *counts)
                    batch, filled = {}, 0
            offset = 0

    def image_tokens(self, batch_size: int) -> Iterator[ImageTokens]:
        """Full batches of images in the order of the dataset, over and over.

        Raises:
            ConfigError: there are fewer images than `batch_size`.
        """
        of, model, tokens = self.loader, self.extractor.model, self.extractor.tokens[0]
        images = of.images
        loader = ImageLoader(
            images,
            of.preprocess,
            batch_size=batch_size,
            num_workers=of.num_workers,
            max_corrupt_share=of.max_corrupt_share,
        )
        n_batches = 0
        while True:
            n_before = n_batches
            jobs = images.stream() if images.is_streaming else range(len(images))
            for batch in loader.batches(jobs):
                if len(batch) + len(batch.failures) < batch_size:  # run_evals counts whole ones
                    continue
                n_batches += 1
                labels = labels_of(model, images.class_names, batch.labels)
                pixels = batch.pixel_values
                yield ImageTokens.of(batch.indices, pixels, tokens, self.tokens_per_image, labels)
            if n_batches == n_before:
                problem = f"fewer images in {images.name} than in one batch"
                allowed = f"1 to {loader.n_processed}"
                raise ConfigError("batch_size_prompts", problem, given=batch_size, allowed=allowed)

    def _windows(self, epoch: int, first_window: int) -> Iterator[_Window]:
        """The windows from there on, without end."""
        rows = self.batches_per_window * self.loader.batch_size * self.tokens_per_image
        buffers: Batch = {}
        filled = 0
        counts = (self.loader.n_processed, self.loader.n_failed)
        whole_epoch, any_tokens = first_window == 0, False
        bar = self._bar()
        for place, tokens in self._passes(epoch, first_window):
            bar.update(self.loader.batch_size)
            if tokens:
                n = len(next(iter(tokens.values())))
                if self.batches_per_window == 1:
                    buffers, filled = tokens, n
                else:
                    if not buffers:
                        buffers = {k: t.new_empty(rows, t.shape[-1]) for k, t in tokens.items()}
                    for name, part in tokens.items():
                        buffers[name][filled : filled + n] = part
                    filled += n
            if place.ends_window:
                bar.close()
                any_tokens = any_tokens or filled > 0
                tokens = {name: buffer[:filled] for name, buffer in buffers.items()}
                yield _Window(place, tokens, self._order(place, filled), counts)
                counts, filled = (self.loader.n_processed, self.loader.n_failed), 0
                bar = self._bar()
            if place.ends_epoch:
                if whole_epoch and not any_tokens:
                    raise self.loader.nothing_readable()
                whole_epoch, any_tokens = True, False
        bar.close()

    def _passes(self, epoch: int, first_window: int) -> Iterator[tuple[Place, Batch]]:
        """The tokens of each forward pass from there on; none where no image can be read.

        Once `stopped` is True they end.
        """
        places: deque[Place] = deque()  # of the groups that are being decoded
        groups = self._groups(epoch, first_window, places)
        for decoded in self.loader.grouped(groups, lambda: self.stopped):
            if self.stopped:
                return
            yield places.popleft(), self._tokens(decoded) if len(decoded) else {}

    def _bar(self) -> tqdm[Any]:
        """The progress through one window; short windows show none."""
        images = self.loader.images
        total = self.batches_per_window * self.loader.batch_size
        return tqdm(
            total=total if images.is_streaming else min(total, len(images)),
            desc="activations",
            unit=" images",
            leave=False,
            delay=BAR_DELAY,
            disable=not self.progress,
        )

    def _groups(self, epoch: int, first_window: int, places: deque[Place]) -> Iterator[list[Job]]:
        """The images of each forward pass in turn; their positions are appended to `places`."""
        while True:
            size = self.loader.batch_size
            group = first_window * self.batches_per_window
            jobs = self._jobs(epoch, group * size)
            chunk = list(islice(jobs, size))
            if not chunk and group == 0:
                raise self.loader.nothing_readable()
            while chunk:
                following = list(islice(jobs, size))
                group += 1
                ends_epoch = not following
                places.append(
                    Place(
                        epoch,
                        (group - 1) // self.batches_per_window,
                        ends_epoch or group % self.batches_per_window == 0,
                        ends_epoch,
                    )
                )
                yield chunk
                chunk = following
            epoch, first_window = epoch + 1, 0

    def _jobs(self, epoch: int, skip: int) -> Iterator[Job]:
        images = self.loader.images
        if images.is_streaming:
            return images.stream(seed=self.delivery.seed, epoch=epoch, skip=skip)
        order = np.random.default_rng([self.delivery.seed, epoch]).permutation(len(images))
        return iter(order[skip:].tolist())

    def _tokens(self, decoded: ImageBatch) -> Batch:
        """(images * tokens, d) for each hook point, where they are delivered."""
        activations = self.extractor(decoded)
        found = next(iter(activations.values())).shape[1]
        if found != self.tokens_per_image:
            raise ConfigError(
                "image_size",
                f"images of {tuple(decoded.pixel_values.shape[2:])} pixels give {found} tokens "
                f"({self.extractor.tokens[0]}) each where {self.tokens_per_image} were expected",
                allowed="the image_size that is wanted",
            )
        return {
            name: tensor.flatten(0, 1).to(self.delivery.device)
            for name, tensor in activations.items()
        }

    def _order(self, place: Place, n_tokens: int) -> Tensor | None:
        if self.tokens_per_image == 1:
            return None
        generator = np.random.default_rng([self.delivery.seed, place.epoch, place.window, 1])
        return torch.from_numpy(generator.permutation(n_tokens)).to(self.delivery.device)


class CacheSource:
    """Activations read from a cache, in an order over the whole epoch."""

    def __init__(
        self, cache: CacheReader, hook_names: list[str], tokens: str, delivery: Delivery
    ) -> None:
        if not cache.complete:
            allowed = "build it to its end first"
            raise ConfigError(f"cache {cache.path}", "not complete", allowed=allowed)
        self.cache = cache
        self.delivery = delivery
        self.tokens = tokens
        self.stopped = False
        self._columns = {name: cache.joined(name, tokens).flatten() for name in hook_names}
        if not self._columns:
            raise ConfigError("hook_names", "none", given=hook_names, allowed="one or more")
        self.n_tokens = len(next(iter(self._columns.values())))
        if self.n_tokens == 0:
            raise DataError(f"cache {cache.path}", "no activations: no image could be read")
        self.tokens_per_image = self.n_tokens // len(cache)

    def start(self) -> State:
        """The position of the first batch."""
        return {"position": 0}

    def state(self, mark: Any) -> State:
        """The position after the batch that came with `mark`."""
        return {"position": mark}

    def failures(self) -> dict[int, str]:
        """Image index -> source and reason, of the corrupt images so far."""
        return dict(self.cache.failures)

    def describe(self) -> dict[str, Any]:
        """JSON-able: everything that decides which numbers come in which order."""
        return {
            "from": "cache",
            **{k: self.cache.facts.get(k) for k in ("model", "images", "preprocessing", "dtype")},
            "tokens": self.tokens,
            "seed": self.delivery.seed,
        }

    def batches(self, state: State) -> Iterator[tuple[Batch, Any]]:
        """The batches from a position on, each {hook point: (b, d)} with a mark of what follows."""
        position, size = int(state["position"]), self.delivery.batch_size
        row_bytes = sum(c.shape[-1] * c.dtype.itemsize for c in self._columns.values())
        at_once = size * max(1, min(GATHERED_BYTES // row_bytes, self.n_tokens) // size)
        for rows in self._rows_from(position, at_once):
            if self.stopped:
                return
            gathered = self._gather(rows)
            for start in range(0, at_once, size):
                position += size
                yield (
                    {name: rows[start : start + size] for name, rows in gathered.items()},
                    position,
                )

    def _rows_from(self, position: int, n: int) -> Iterator[Tensor]:
        """The numbers of the tokens from `position` on, n at a time, without end."""
        ahead = n * max(1, ROWS_AHEAD // n)
        while True:
            yield from self._rows(position, ahead).split(n)
            position += ahead

    def _rows(self, position: int, n: int) -> Tensor:
        """The numbers of the tokens at `position` and the n - 1 positions after it, over the epochs."""
        places = np.arange(position, position + n)
        rows = np.empty(n, dtype=np.int64)
        epochs = places // self.n_tokens
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            order = LazyPermutation(self.n_tokens, self.delivery.seed, epoch)
            rows[here] = order[places[here] % self.n_tokens]
        return torch.from_numpy(rows)

    @cached_property
    def _resident(self) -> Batch | None:
        """The whole cache on the device, where a fifth of the device's free memory holds it."""
        device, dtype = self.delivery.device, self.delivery.dtype
        width = sum(column.shape[-1] for column in self._columns.values())
        size = self.n_tokens * width * dtype.itemsize
        if size > SHARE_OF_DEVICE * _free_bytes(device):
            return None
        return {name: column.tensor().to(device, dtype) for name, column in self._columns.items()}

    def _gather(self, rows: Tensor) -> Batch:
        """Read in the order of the file, give back in the order asked for."""
        if self._resident is not None:
            rows = rows.to(self.delivery.device)
            return {name: kept.index_select(0, rows) for name, kept in self._resident.items()}
        in_file_order, order = rows.sort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        device, dtype = self.delivery.device, self.delivery.dtype
        back = back.to(device)
        return {
            name: column.gather(in_file_order).to(device, dtype).index_select(0, back)
            for name, column in self._columns.items()
        }


TokenSource: TypeAlias = ModelSource | CacheSource


def _free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, of which the processes that share it have an equal part each; 0 for other devices."""
    if device.type != "cuda":
        return 0
    sharing = math.ceil(processes_here() / torch.cuda.device_count())
    return torch.cuda.mem_get_info(device)[0] // sharing


def _described(preprocess: Any) -> Any:
    return preprocess.describe() if hasattr(preprocess, "describe") else repr(preprocess)
