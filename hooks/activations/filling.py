"""The work of filling a cache: by one process into one folder, by the ranks of a job into parts."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from tqdm.auto import tqdm

from ...registry.files import only_writer
from ...registry.ranks import Ranks
from ..images.dataset import ImageDataset
from ..images.loader import ImageLoader
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
from .extract import TokenExtractor

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 15.0  # at most this much work is lost when the process is killed


@dataclass
class Plan:
    """What is still to be done in a folder; made by rank 0, the same on every rank.

    Attributes:
        index: of the folder; None: a new cache of one folder.
        done: the parts that are complete.
        n_seen: images that are in.
        failures: image -> source and reason, of those of them that are corrupt.
        job: a name of this work, of which the shared counters have theirs.
    """

    index: dict[str, Any] | None
    done: frozenset[int]
    n_seen: int
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
            ConfigError: the folder holds other activations.
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
        return cls(
            index,
            frozenset(int(p.name[5:]) for p, part in parts.items() if part["complete"]),
            sum(part["n_seen"] for part in parts.values()),
            failures_of(parts),
            f"cache {uuid4().hex}",
        )

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.index is not None and self.index["complete"]


class Filling:
    """Fills a folder after a plan; every rank of the job makes one and calls `run`.

    Args:
        folder: of the cache.
        plan: what is still to be done.
        facts: what the activations are of.
        loader: of the images; its failures become those of this rank and of all before.
        ranks: that share the work.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        facts: dict[str, Any],
        loader: ImageLoader,
        ranks: Ranks,
    ) -> None:
        self.folder, self.plan, self.facts = folder, plan, facts
        self.loader, self.ranks = loader, ranks
        self.total = None if loader.images.is_streaming else len(loader.images)
        self.division: Division | None = None
        if plan.index is not None and is_parted(plan.index):
            self.division = Division(loader.images, plan.index["part_images"])
        loader.failures = dict(plan.failures)
        loader.n_failed, loader.n_processed = len(plan.failures), plan.n_seen

    def n_seen(self, more: int = 0) -> int:
        """Images that all ranks have done, after `more` of this one."""
        return self.plan.n_seen + self.ranks.add(self.plan.job, more)

    def n_missing(self) -> int | None:
        """Images that are still to be done by any rank; None where their number is not known."""
        return None if self.total is None else self.total - self.n_seen()

    def run(self, extractor: TokenExtractor, progress: bool) -> None:
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
            self._fill(extractor, lambda seen: bar.update(seen - bar.n))
            for _ in self.ranks.waiting(self.plan.job):
                bar.update(self.n_seen() - bar.n)
            bar.update(self.n_seen() - bar.n)
        if self.division is not None:
            if self.ranks.is_first:
                self._join()
            self.ranks.wait()

    def _fill(self, extractor: TokenExtractor, show: Callable[[int], Any]) -> None:
        opened: deque[tuple[ExitStack, CacheWriter, bool]] = deque()  # of the images being decoded
        with ExitStack() as on_error:

            def groups() -> Batches:
                for folder, batches in self._places():
                    held = on_error.enter_context(ExitStack())
                    writer = self._writer(folder, held)
                    for jobs in batches(self.loader.batch_size, writer.n_seen):
                        opened.append((held, writer, False))
                        yield jobs
                    opened.append((held, writer, True))
                    yield []

            committed = time.monotonic()
            for batch in self.loader.grouped(groups()):
                held, writer, is_end = opened.popleft()
                if is_end:
                    if self.division is None and not writer.n_rows:
                        raise self.loader.nothing_readable()
                    writer.commit(complete=True)
                    held.close()
                    continue
                activations = extractor(batch) if len(batch) else {}
                show(self.n_seen(writer.append(activations, batch)))
                if time.monotonic() - committed > COMMIT_SECONDS:
                    writer.commit()
                    committed = time.monotonic()

    def _places(self) -> Iterator[tuple[Path, Callable[[int, int], Batches]]]:
        """The folders that this rank fills, each with its images."""
        images = self.loader.images
        if self.division is not None:
            for number, batches in self.division.parts(self._dealt()):
                yield part_folder(self.folder, number), batches
        elif self.ranks.is_first:
            yield self.folder, lambda size, skip: batches_of(images, size, skip)

    def _dealt(self) -> Iterator[int]:
        """The numbers of the parts that are dealt to this rank, of those that are not complete."""
        missing = (number for number in count() if number not in self.plan.done)
        place = -1
        while True:
            mine = self.ranks.add(f"{self.plan.job} parts") - 1
            yield next(islice(missing, mine - place - 1, None))
            place = mine

    def _writer(self, folder: Path, held: ExitStack) -> CacheWriter:
        """A writer of a folder, which `held` locks and closes."""
        index = self.plan.index
        if self.division is not None:
            held.enter_context(only_writer(folder, f"cache {folder}"))
            index = read_index(folder) if (folder / INDEX_FILE).exists() else None
        names = self.loader.images.class_names
        return held.enter_context(CacheWriter(folder, self.facts, names, index, self))

    def _join(self) -> None:
        """Record that all parts are complete.

        Raises:
            DataError: too many of all images are corrupt, or all.
        """
        assert self.division is not None and self.plan.index is not None
        index = {**self.plan.index, "complete": True, "n_parts": self.division.n_parts}
        parts = read_parts(self.folder, index)
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
        write_index(self.folder, index)

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
