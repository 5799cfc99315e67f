"""The work of filling caches: by one process into one folder each, by the ranks of a job into parts."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from tqdm.auto import tqdm

from ...registry.errors import ConfigError
from ...registry.files import only_writer
from ...registry.ranks import Ranks
from ..images.dataset import ImageDataset
from ..images.loader import ImageLoader
from ..images.raw import Limits
from .cache_reader import (
    INDEX_FILE,
    PARTS_SCHEMA,
    failures_of,
    is_parted,
    part_folder,
    read_index,
    read_parts,
)
from .cache_writer import CacheWriter, matching_index, write_index
from .division import Batches, Division, batches_of, images_in_part
from .extract import TokenExtractor, extract

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 15.0  # at most this much work is lost when the process is killed


@dataclass
class Plan:
    """What is still to be done in a folder; made by rank 0, the same on every rank.

    Attributes:
        index: of the folder; None: a new cache of one folder.
        done: the parts that are complete.
        seen: images that are in, of each part, or of the one folder.
        failures: image -> source and reason, of those of them that are corrupt.
        job: a name of this work, of which the shared counters have theirs.
    """

    index: dict[str, Any] | None
    done: frozenset[int]
    seen: dict[str, int]
    failures: dict[int, str]
    job: str

    @classmethod
    def of(
        cls,
        folder: Path,
        facts: dict[str, Any],
        images: ImageDataset,
        *,
        batch_size: int,
        n_ranks: int,
    ) -> Plan:
        """That of a folder. A new cache of several ranks is begun in it.

        Raises:
            ConfigError: the folder holds other activations, or images are left out of it that are read now.
            DataError: its files are damaged.
        """
        index = matching_index(folder, facts)
        if index is None and n_ranks > 1:
            part_images = images_in_part(images, batch_size, n_ranks)
            index = {
                "schema": PARTS_SCHEMA,
                "facts": facts,
                "complete": False,
                "class_names": images.class_names,
                "batch_size": batch_size,
                "part_images": part_images,
                "n_parts": Division(images, part_images).n_parts,
            }
            write_index(folder, index)
        parts: dict[Path, dict[str, Any]] = {}
        if index is not None and not index["complete"]:
            parts = read_parts(folder, index) if is_parted(index) else {folder: index}
            check_limits(folder, failures_of(parts), images.limits)
        return cls(
            index,
            frozenset(int(p.name[5:]) for p, part in parts.items() if part["complete"]),
            {"" if p == folder else p.name: part["n_seen"] for p, part in parts.items()},
            failures_of(parts),
            f"cache {uuid4().hex}",
        )

    @property
    def n_seen(self) -> int:
        """Images that are in."""
        return sum(self.seen.values())

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.index is not None and self.index["complete"]

    def is_as_far(self, other: Plan) -> bool:
        """Whether the same images are in, of the same division: both folders can be filled together."""
        mine, others = (
            None if plan.index is None else (is_parted(plan.index), plan.index.get("part_images"))
            for plan in (self, other)
        )
        return mine == others and self.done == other.done and self.seen == other.seen


def check_limits(folder: Path, failures: dict[int, str], limits: Limits) -> None:
    """Check that the images that were left out of a cache are left out now. Raises ConfigError."""
    for image, text in failures.items():
        if limits.would_admit(text):
            raise ConfigError(
                f"cache {folder}",
                f"image {image} was left out ({text}), and these settings admit it",
                given=f"max_image_pixels={limits.max_image_pixels}, remote_images={limits.remote_images}",
                allowed="the settings of then, another folder, or delete this one",
            )


@dataclass
class Target:
    """A folder that is filled.

    Attributes:
        folder: of the cache.
        plan: what is still to be done.
        facts: what the activations are of.
        extractor: of the activations.
    """

    folder: Path
    plan: Plan
    facts: dict[str, Any]
    extractor: TokenExtractor


class Filling:
    """Fills folders after their plans; every rank of the job makes one and calls `run`.

    Args:
        targets: the folders, all as far as the first one; their activations come from one forward
            pass of each batch.
        loader: of the images; its failures become those of this rank and of all before.
        ranks: that share the work.
    """

    def __init__(self, targets: Sequence[Target], loader: ImageLoader, ranks: Ranks) -> None:
        self.targets, self.loader, self.ranks = targets, loader, ranks
        self.folder, self.plan = targets[0].folder, targets[0].plan
        self.total = None if loader.images.is_streaming else len(loader.images)
        self.row_bytes: dict[str, int] = {}
        self.division: Division | None = None
        if self.plan.index is not None and is_parted(self.plan.index):
            self.division = Division(loader.images, self.plan.index["part_images"])
        loader.failures = dict(self.plan.failures)
        loader.n_failed, loader.n_processed = len(self.plan.failures), self.plan.n_seen

    def n_seen(self, more: int = 0) -> int:
        """Images that all ranks have done, after `more` of this one."""
        return self.plan.n_seen + self.ranks.add(self.plan.job, more)

    def n_missing(self) -> int | None:
        """Images that are still to be done by any rank; None where their number is not known."""
        return None if self.total is None else self.total - self.n_seen()

    def run(self, progress: bool) -> None:
        """Compute and write the rows that are missing, until every rank has done its part of them.

        Raises:
            DataError: too many corrupt images, activations that are not finite, or a full disk.
            LostRankError: another rank has failed.
        """
        n_ranks = self.ranks.size
        if n_ranks > 1 and self.ranks.is_first:
            logger.info("%s", self._described())
        bar = tqdm(
            total=self.total,
            initial=self.plan.n_seen,
            desc="activations" + (f" ({n_ranks} ranks)" if n_ranks > 1 else ""),
            unit=" images",
            disable=not (progress and self.ranks.is_first),
        )
        with bar:
            self._fill(lambda seen: bar.update(seen - bar.n))
            for _ in self.ranks.waiting(self.plan.job):
                bar.update(self.n_seen() - bar.n)
            bar.update(self.n_seen() - bar.n)
        if self.division is not None:
            if self.ranks.is_first:
                for target in self.targets:
                    self._join(target)
            self.ranks.wait()

    def _fill(self, show: Callable[[int], Any]) -> None:
        # of the images being decoded
        opened: deque[tuple[ExitStack, list[CacheWriter], bool]] = deque()
        extractors = [target.extractor for target in self.targets]
        with ExitStack() as on_error:

            def groups() -> Batches:
                for number, batches in self._places():
                    held = on_error.enter_context(ExitStack())
                    writers = [self._writer(target, number, held) for target in self.targets]
                    for jobs in batches(self.loader.batch_size, writers[0].n_seen):
                        opened.append((held, writers, False))
                        yield jobs
                    opened.append((held, writers, True))
                    yield []

            committed = time.monotonic()
            for batch in self.loader.grouped(groups()):
                held, writers, is_end = opened.popleft()
                if is_end:
                    if self.division is None and not writers[0].n_rows:
                        raise self.loader.nothing_readable()
                    for writer in writers:
                        writer.commit(complete=True)
                    held.close()
                    continue
                found = extract(extractors, batch) if len(batch) else [{} for _ in writers]
                counts = [w.append(each, batch) for w, each in zip(writers, found, strict=True)]
                show(self.n_seen(counts[0]))
                if time.monotonic() - committed > COMMIT_SECONDS:
                    for writer in writers:
                        writer.commit()
                    committed = time.monotonic()

    def _places(self) -> Iterator[tuple[int | None, Callable[[int, int], Batches]]]:
        """The parts that this rank fills, each with its images; None for a cache of one folder."""
        images = self.loader.images
        if self.division is not None:
            yield from self.division.parts(self._dealt())
        elif self.ranks.is_first:
            yield None, lambda size, skip: batches_of(images, size, skip)

    def _dealt(self) -> Iterator[int]:
        """The numbers of the parts that are dealt to this rank, of those that are not complete."""
        missing = (number for number in count() if number not in self.plan.done)
        place = -1
        while True:
            mine = self.ranks.add(f"{self.plan.job} parts") - 1
            yield next(islice(missing, mine - place - 1, None))
            place = mine

    def _writer(self, target: Target, number: int | None, held: ExitStack) -> CacheWriter:
        """A writer of a folder or of one of its parts, which `held` locks and closes."""
        folder, index = target.folder, target.plan.index
        if number is not None:
            folder = part_folder(folder, number)
            held.enter_context(only_writer(folder, f"cache {folder}"))
            index = read_index(folder) if (folder / INDEX_FILE).exists() else None
        names = self.loader.images.class_names
        return held.enter_context(CacheWriter(folder, target.facts, names, index, self))

    def _join(self, target: Target) -> None:
        """Record that all parts are complete.

        Raises:
            DataError: too many of all images are corrupt, or all.
        """
        assert self.division is not None and target.plan.index is not None
        index = {**target.plan.index, "complete": True, "n_parts": self.division.n_parts}
        parts = read_parts(target.folder, index)
        known, loader = self.loader.failures, self.loader
        failures = failures_of(parts)
        for image, text in failures.items():
            if image not in known:
                logger.warning("image %d is corrupt and left out: %s", image, text)
        loader.failures, loader.n_failed, loader.n_elsewhere = failures, len(failures), 0
        loader.n_processed = sum(part["n_seen"] for part in parts.values())
        loader.check_share()
        if not any(part["n_rows"] for part in parts.values()):
            raise loader.nothing_readable()
        write_index(target.folder, index)

    def _described(self) -> str:
        """How the images are divided among the ranks."""
        n, images = self.ranks.size, self.loader.images
        if self.division is None:
            return (
                f"cache {self.folder}: begun by one process in one folder, and finished by rank 0 alone; "
                f"without that folder {n} ranks would begin anew."
            )
        n_parts, of = self.division.n_parts, self.division.part_images
        if of is None:
            what = f"{images.n_shards:,} shards of a stream in {n_parts} parts"
        elif images.is_streaming:
            what = (
                f"{images.n_shards} shard(s) of a stream by rows, {of:,} images a part: with fewer shards than "
                "ranks every rank reads the stream to its end, and decodes its own images"
            )
        else:
            what = f"{len(images):,} images in {n_parts} parts of {of:,}"
        return f"cache {self.folder}: {n} ranks; {what}."
