"""Decoded, preprocessed batches of images, made in worker processes ahead of the model."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ...registry.errors import ConfigError, CorruptImageError, DataError, TaxolensError
from .raw import ImageReader, Job, Limits, RawImage, decode_raw, source_of
from .workers import (
    made_apart,
    main_left_out,
    may_start_workers,
    prepare_worker,
    stopped_are_killed,
    worker_context,
    workers_for,
)

if TYPE_CHECKING:  # not needed by the worker processes
    from .dataset import ImageDataset

logger = logging.getLogger(__name__)

Preprocess: TypeAlias = Callable[[Image.Image], np.ndarray]

PATIENCE = 40  # seconds without an image, after which a warning is given
POLL = 1  # seconds of waiting for an image, after which it is checked whether reading was stopped
MIN_IMAGES = 20  # below this many images the share of corrupt ones carries no information
FALSE_ALARM = 1e-6  # chance of stopping early although the share of corrupt images is as allowed


@dataclass
class ImageBatch:
    """Decoded images in the requested order, and the failures of the others.

    Attributes:
        pixel_values: float32 (b, 3, H, W); uint8 where there are `tables`.
        indices: int64 (b,), place of each image in the dataset.
        labels: int64 (b,), -1 where there is none.
        sources: what each image is called (its path or row).
        failures: (index, source, reason) of each image that is missing here.
        tables: float32 (3, 256), the final value of each 8-bit value in each channel; or None.
    """

    pixel_values: Tensor
    indices: Tensor
    labels: Tensor
    sources: list[str] = field(default_factory=list)
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    tables: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def pin_memory(self) -> ImageBatch:
        """The same batch in page-locked memory; called by torch's DataLoader."""
        return replace(self, pixel_values=self.pixel_values.pin_memory())

    def on(self, device: torch.device) -> Tensor:
        """float32 (b, 3, H, W) on a device; values are looked up there, so that they are equal to the bit."""
        pixels = self.pixel_values.to(device, non_blocking=True)
        if self.tables is None:
            return pixels
        tables = self.tables.to(device, non_blocking=True)
        channels = [table[values.long()] for table, values in zip(tables, pixels.unbind(1))]
        return torch.stack(channels, dim=1)


class ImageLoader:
    """Decodes and preprocesses images, in order, in `num_workers` processes.

    Args:
        images: the dataset.
        preprocess: PIL image -> float32 (3, H, W); picklable (see `preprocess.py`).
        batch_size: images per batch.
        num_workers: processes that decode ahead; 0 decodes in the calling thread; None: see
            `workers_for`. A script that defines `preprocess` itself and has no
            ``if __name__ == "__main__":`` decodes in the calling thread too.
        max_corrupt_share: the largest share of images, between 0 and 1, that may be corrupt.
        pin_memory: for a GPU: hand out page-locked batches, which copy to it while it computes, and
            8-bit pixels where the preprocessing ends with a table (see `ImageBatch.on`).
        n_ranks: processes that each read as many of the images at the same time. Those that the others have
            read count as readable until it is known which are not.

    A corrupt image is left out of its batch, logged once as a warning and kept in `failures`.
    Workers are started by a server process that holds neither threads nor a CUDA context,
    so that iterating from a background thread is safe; they end with the iterator.
    """

    def __init__(
        self,
        images: ImageDataset,
        preprocess: Preprocess,
        *,
        batch_size: int,
        num_workers: int | None = None,
        max_corrupt_share: float = 0.01,
        pin_memory: bool = False,
        n_ranks: int = 1,
        prefetch_factor: int = 4,
    ) -> None:
        if batch_size < 1:
            raise ConfigError("batch_size", "too small", given=batch_size, allowed="1 or more")
        num_workers = workers_for(num_workers, None if images.is_streaming else len(images))
        if num_workers < 0:
            raise ConfigError("num_workers", "too small", given=num_workers, allowed="0 or more")
        if not 0.0 <= max_corrupt_share <= 1.0:
            share = max_corrupt_share
            raise ConfigError("max_corrupt_share", "out of range", given=share, allowed="0 to 1")
        self.images = images
        self.preprocess = preprocess
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.max_corrupt_share = max_corrupt_share
        self.pin_memory = pin_memory
        self.n_ranks = n_ranks
        self.prefetch_factor = prefetch_factor
        self.failures: dict[int, str] = {}
        self.n_processed = 0
        self.n_failed = 0
        self.n_elsewhere = 0
        self._context = worker_context() if num_workers else None

    def batches(self, indices: Iterable[Job]) -> Iterator[ImageBatch]:
        """Batches of up to `batch_size` images in the order of `indices`, read lazily.

        Raises:
            DataError: more than `max_corrupt_share` of the images are corrupt.
            ConfigError: preprocessing leaves images of different sizes.
        """
        return (batch for batch in self.grouped(chunks(indices, self.batch_size)) if len(batch))

    def grouped(
        self,
        groups: Iterable[Sequence[Job]],
        is_stopped: Callable[[], bool] = lambda: False,
        *,
        counted: bool = True,
    ) -> Iterator[ImageBatch]:
        """As `batches`, but exactly one batch, empty if need be, for each group of images.

        They end soon after `is_stopped` returns True, which another thread or a signal decides. Without `counted`
        the caller calls `count` for each batch.
        """
        reader = None if self.images.is_streaming else self.images.reader
        in_bytes = self.pin_memory and getattr(self.preprocess, "ends_with_table", False)
        task = _DecodeTask(reader, self.preprocess, self.images.root, self.images.limits, in_bytes)
        if self.num_workers and not may_start_workers(task):
            logger.warning(
                "num_workers: images are decoded in this process, since each worker would run the "
                "whole script again, which defines part of how images are read and has no "
                '`if __name__ == "__main__":`.'
            )
            self.num_workers, self._context = 0, None
        loader = DataLoader(
            task,  # type: ignore[arg-type]
            batch_sampler=groups,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory,
            worker_init_fn=prepare_worker if self.num_workers else None,
            multiprocessing_context=self._context,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            timeout=POLL if self.num_workers else 0,
            generator=torch.Generator(),  # else each iterator draws from the global one
        )
        left_out = True

        def start() -> Iterator[Any]:
            nonlocal left_out
            with main_left_out(task) as left_out:
                return iter(loader)  # starts the workers

        iterator = made_apart(start, is_stopped) if self.num_workers else iter(loader)
        if iterator is None:
            return
        watching = stopped_are_killed(PATIENCE) if self.num_workers else nullcontext([])
        try:
            with watching as killed:
                for batch in self._read(iterator, killed, left_out, is_stopped):
                    if counted:
                        self.count(batch.failures, len(batch) + len(batch.failures))
                    yield batch
        finally:
            del iterator  # ends the workers

    def _read(
        self,
        iterator: Iterator[Any],
        killed: list[int | None],
        left_out: bool,
        is_stopped: Callable[[], bool],
    ) -> Iterator[ImageBatch]:
        """The batches of a loader's iterator, checked."""
        waited = 0
        while not is_stopped():
            try:
                batch: ImageBatch | str = next(iterator)
                waited = 0
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if killed:
                    problem = f"processes that decode images were stopped: {killed}"
                    raise TaxolensError(
                        "num_workers", problem, allowed="0, which uses none"
                    ) from None
                if "timed out" in str(error):
                    waited += POLL
                    if waited % PATIENCE == 0:
                        logger.warning("no image was decoded for %d seconds: waiting.", waited)
                    continue
                if not isinstance(error, RuntimeError):
                    raise
                raise _explained(error, left_out) from error
            if isinstance(batch, str):
                problem = f"preprocessing leaves images of different shapes ({batch})"
                raise ConfigError("image_size", problem, allowed="one size, in pixels")
            if not self.images.is_streaming:
                batch.labels = torch.from_numpy(self.images.labels[batch.indices.numpy()])
            yield batch

    def count(self, failures: Sequence[tuple[int, str, str]], n_images: int) -> None:
        """Count `n_images` images more, and those of them that could not be read.

        Raises:
            DataError: more than `max_corrupt_share` of the images are corrupt.
        """
        self.n_processed += n_images
        self.n_elsewhere += (self.n_ranks - 1) * n_images
        self.n_failed += len(failures)
        for index, source, reason in failures:
            if index in self.failures:
                continue
            self.failures[index] = f"{source}: {reason}"
            logger.warning("image %d (%s) is corrupt and left out: %s", index, source, reason)
        if failures:
            self.check_share()

    def check_share(self) -> None:
        """Check the share of corrupt images so far. Raises DataError."""
        if self._too_many():
            found = f"{self.n_failed} of the {self.n_processed} images read so far from"
            problem = f"{found} {self.images.name} are corrupt: {self.shown_failures(5)}"
            allowed = "a dataset without them, or a larger share"
            raise DataError(
                "max_corrupt_share", problem, given=self.max_corrupt_share, allowed=allowed
            )

    def _too_many(self) -> bool:
        """Whether the share of corrupt images is, or will almost surely be, above the allowed one.

        Certain when those found exceed it for the whole dataset, of which one alone is allowed
        unless the share is 0; before, and where the size is not known, by the Chernoff bound on a
        binomial tail, so that a single corrupt image among the first ones does not end a long run.
        """
        share = self.max_corrupt_share
        n_images = None if self.images.is_streaming else len(self.images)
        if n_images is not None and n_images < MIN_IMAGES:
            return False
        if n_images is not None and len(self.failures) > max(share * n_images, share > 0):
            return True
        if self.n_processed < MIN_IMAGES:
            return False
        n_processed = self.n_processed + self.n_elsewhere
        found = self.n_failed / n_processed
        if found <= share or (n_images is not None and self.n_processed > n_images):
            return False
        return n_processed * _divergence(found, share) > -math.log(FALSE_ALARM)

    def shown_failures(self, n: int) -> str:
        """The first `n` corrupt images, and how many more there are."""
        shown = [f"image {i} ({text})" for i, text in list(self.failures.items())[:n]]
        more = len(self.failures) - len(shown)
        return "; ".join([*shown, f"and {more} more"] if more else shown)

    def nothing_readable(self) -> DataError:
        """The error where all images are corrupt, or there are none."""
        shown = self.shown_failures(3) or "there is none"
        return DataError(self.images.name, f"not one image can be read: {shown}")


@dataclass(frozen=True)
class _DecodeTask:
    """The work of a worker: images -> one batch, or their shapes where these differ."""

    reader: ImageReader | None
    preprocess: Preprocess
    root: str | None
    limits: Limits
    in_bytes: bool = False

    def __getitems__(self, jobs: Sequence[Job]) -> ImageBatch | str:
        pixels: list[np.ndarray] = []
        done: list[RawImage] = []
        failures: list[tuple[int, str, str]] = []
        of: Any = self.preprocess
        preprocess, tables = of, None
        if self.in_bytes:
            preprocess, tables = of.eight_bit, torch.from_numpy(of.tables)
        for job in jobs:
            raw = self._raw(job)
            try:
                pixels.append(preprocess(decode_raw(raw, self.root, self.limits)))
                done.append(raw)
            except CorruptImageError as error:
                failures.append((error.index, error.source, error.reason))
        if len({array.shape for array in pixels}) > 1:
            return f"{sorted({array.shape for array in pixels})[:3]}"
        return ImageBatch(
            torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 3, 0, 0),
            torch.tensor([raw.index for raw in done], dtype=torch.int64),
            torch.tensor([raw.label for raw in done], dtype=torch.int64),
            [source_of(raw, self.root) for raw in done],
            failures,
            tables,
        )

    def _raw(self, job: Job) -> RawImage:
        if isinstance(job, tuple):
            return job
        assert self.reader is not None
        return self.reader(job)


def _as_it_is(batch: Any) -> Any:
    return batch


def chunks(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """`jobs` in lists of `size`, the last perhaps shorter, read lazily."""
    iterator = iter(jobs)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _divergence(found: float, allowed: float) -> float:
    """Kullback-Leibler divergence of Bernoulli(found) from Bernoulli(allowed), in nats."""
    if allowed in (0.0, 1.0):
        return math.inf if found != allowed else 0.0
    rest = 0.0 if found == 1.0 else (1 - found) * math.log((1 - found) / (1 - allowed))
    return rest + (0.0 if found == 0.0 else found * math.log(found / allowed))


def _explained(error: RuntimeError, main_left_out: bool) -> Exception:
    if "DataLoader worker" not in str(error) or "Original Traceback" in str(error):
        return error
    guard = (
        f"the script {sys.argv[0]!r}, which defines part of how images are read, starts work "
        'outside of `if __name__ == "__main__":`'
    )
    return TaxolensError(
        "num_workers",
        f"a process that decodes images died ({error}): it ran out of (shared) memory, or was "
        f"killed{'' if main_left_out else ', or ' + guard}",
        allowed="0, which uses none",
    )
