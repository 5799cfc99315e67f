"""Division of the images of a cache into parts, the same whatever the number of processes.

A part is a run of whole forward passes of the one order of images, so that the batches, and with them the bits
of the activations, are those of one process. A forward pass never has images of two groups of shards of a stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice

from ..images.dataset import ImageDataset
from ..images.loader import chunks
from ..images.raw import Job

Batches = Iterator[list[Job]]

SHARD_GROUPS = 128
"""Groups of consecutive shards of a stream, at most; where each rank reads shards of its own, they are the parts."""
STREAM_BATCHES = 16
"""Forward passes in a part of a stream whose length is not known."""


def batches_of(images: ImageDataset, batch_size: int, skip: int) -> Batches:
    """The images of each forward pass of one process, after the first `skip` images."""
    if not images.is_streaming:
        yield from chunks(range(skip, len(images)), batch_size)
        return
    for group in shard_groups(images):
        jobs = images.stream(shards=group)
        skip -= sum(1 for _ in islice(jobs, skip))
        yield from chunks(jobs, batch_size)


def shard_groups(images: ImageDataset) -> list[range]:
    """The numbers of the shards of a stream in up to `SHARD_GROUPS` consecutive groups of about one size."""
    n = images.n_shards
    n_groups = min(n, SHARD_GROUPS)
    return [range(i * n // n_groups, (i + 1) * n // n_groups) for i in range(n_groups)]


def images_in_part(images: ImageDataset, batch_size: int, n_ranks: int) -> int | None:
    """Number of images in each part but the last; None: a part is a group of shards of a stream.

    At most 64 parts of one to eight forward passes, about 512 parts of more. Every part costs some
    files and their sync, and the ranks end within one part of each other. A stream is divided by shards where
    there are as many groups as ranks.
    """
    if images.is_streaming and len(shard_groups(images)) >= n_ranks > 1:
        return None
    if images.n_at_most is None:
        return STREAM_BATCHES * batch_size
    n_batches = -(-images.n_at_most // batch_size)
    return max(1, min(-(-n_batches // 64), 64), -(-n_batches // 512)) * batch_size


class Division:
    """The parts of the images of a cache.

    Args:
        images: the images.
        part_images: images in each part but the last; None: a part is a group of shards.

    Attributes:
        n_parts: how many there are; None where it is known only at the end of the stream.
    """

    def __init__(self, images: ImageDataset, part_images: int | None) -> None:
        self.images = images
        self.part_images = part_images
        self.n_parts: int | None = None
        if part_images is None:
            self.n_parts = len(shard_groups(images))
        elif not images.is_streaming:
            self.n_parts = -(-len(images) // part_images)

    def parts(self, numbers: Iterator[int]) -> Iterator[tuple[int, Callable[[int, int], Batches]]]:
        """Those of the parts `numbers`, which ascend without end, that exist.

        Each is its number and a function (batch_size, skip) -> the images of its forward passes after the first
        `skip` images, to be read before the next part.
        """
        for number, jobs in self._walk(numbers) if self.n_parts is None else self._some(numbers):
            yield number, lambda size, skip, jobs=jobs: chunks(islice(jobs, skip, None), size)

    def _some(self, numbers: Iterator[int]) -> Iterator[tuple[int, Iterator[Job]]]:
        for number in numbers:
            if number >= (self.n_parts or 0):
                return
            if self.part_images is None:
                yield number, self.images.stream(shards=shard_groups(self.images)[number])
            else:
                start = number * self.part_images
                yield number, iter(range(start, min(start + self.part_images, len(self.images))))

    def _walk(self, numbers: Iterator[int]) -> Iterator[tuple[int, Iterator[Job]]]:
        """The same of a stream whose every image is read, to its end, which sets `n_parts`."""
        assert self.part_images is not None
        number, wanted = 0, next(numbers)
        for group in shard_groups(self.images):
            jobs = self.images.stream(shards=group)
            for first in jobs:
                rest = islice(jobs, self.part_images - 1)
                if number == wanted:
                    yield number, chain([first], rest)
                    wanted = next(numbers)
                deque(rest, maxlen=0)
                number += 1
        self.n_parts = number
