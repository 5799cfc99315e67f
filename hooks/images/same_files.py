"""Byte-identical files among the images of two sets, of which only files of equal size are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from ...registry import files

Value = TypeVar("Value")

BLOCK = 4096  # bytes in the middle of a file, by which most files of equal size differ
THREADS = 16  # a file system over a network answers many at a time
SLICE = 1000  # files that a thread takes at once


def same_files(
    one: Sequence[str], other: Sequence[str], *, progress: bool = False
) -> dict[int, str]:
    """Place in `other` -> a file of `one` with the same bytes, for those that have one.

    Every file is asked for its size; of those of equal size the middle is read, and the whole only
    where that is the same. Files that cannot be read, and empty ones, are like no other.

    Args:
        one: paths.
        other: paths.
        progress: show a progress bar from two seconds on.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        every = [*one, *other]
        sizes = np.array([*_each(pool, _size, every, progress, "sizes of images")], dtype=np.int64)
        mine, theirs = sizes[: len(one)], sizes[len(one) :]
        common = np.intersect1d(mine, theirs)
        places = np.flatnonzero(np.isin(sizes, common[common > 0]))
        chosen = [every[i] for i in places]
        middles = [*_each(pool, _middle, chosen, progress, "images of equal size")]
    digest = cache(_digest)
    first: dict[Any, list[str]] = {}
    found: dict[int, str] = {}
    for place, path, middle in zip(places.tolist(), chosen, middles, strict=True):
        if middle is None:
            continue
        alike = first.setdefault((sizes[place], middle), [])
        if place < len(one):
            alike.append(path)
        elif alike and (wanted := digest(path)) is not None:
            same = next((p for p in alike if p == path or digest(p) == wanted), None)
            if same is not None:
                found[place - len(one)] = same
    return found


def _each(
    pool: ThreadPoolExecutor,
    work: Callable[[str], Value],
    paths: Sequence[str],
    progress: bool,
    what: str,
) -> Iterator[Value]:
    """`work` of each path, in order."""
    slices = [paths[i : i + SLICE] for i in range(0, len(paths), SLICE)]
    done = pool.map(lambda some: [work(path) for path in some], slices)
    title = f"looking for held-out images that are trained on: {what}"
    bar = tqdm(total=len(paths), desc=title, unit=" files", delay=2, disable=not progress)
    with bar:
        for some in done:
            bar.update(len(some))
            yield from some


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0


def _middle(path: str) -> bytes | None:
    """A digest of it, which takes less memory."""
    try:
        with files.open_regular(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - BLOCK) // 2)
            return hashlib.blake2b(file.read(BLOCK), digest_size=16).digest()
    except (OSError, ValueError):
        return None


def _digest(path: str) -> str | None:
    try:
        return files.file_digest(path)
    except (OSError, ValueError):
        return None
