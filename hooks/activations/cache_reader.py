"""Reader of a cache of activations, whose files docs/formats/activations.md defines."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...registry.coerce import coerce
from ...registry.errors import ConfigError, DataError, UnknownNameError
from ...registry.files import UnreadableError, open_regular, read_json, reason
from ...registry.heads import columns_of
from ...registry.names import unknown_name_message
from .joined_rows import JoinedRows, Rows

SCHEMA = "taxolens.activations/1"
PARTS_SCHEMA = "taxolens.activation_parts/1"
INDEX_FILE = "cache.json"


@dataclass
class _AnyIndex:
    """The types of what every index file has."""

    facts: dict[str, Any]
    complete: bool
    class_names: list[str]


@dataclass
class _Index(_AnyIndex):
    """The types of the index file of a folder of arrays."""

    failures: dict[str, str]
    n_seen: int
    n_rows: int

    @property
    def is_possible(self) -> bool:
        return self.n_rows >= 0 and all(image.isdecimal() for image in self.failures)


@dataclass
class _PartsIndex(_AnyIndex):
    """The types of the index file of a folder of parts."""

    batch_size: int
    part_images: int | None
    n_parts: int | None

    @property
    def is_possible(self) -> bool:
        numbers = (self.batch_size, self.part_images, self.n_parts)
        known = not self.complete or self.n_parts is not None
        return known and all(number is None or number > 0 for number in numbers)


FACTS = {"hook_names": list[str], "tokens": str, "mean_patch": bool}  # that reading depends on


class CacheReader:
    """Activations on disk: one memory-mapped ``.npy`` file for each hook point, or one in each part.

    Rows are images, in the order of the dataset, without the corrupt ones. The parts that many processes have
    written are read as one cache. A hook point is read under its name, one of its heads under a `head_key`.

    Attributes:
        path: the folder.
        facts: what the activations are of: fingerprints of model and images, preprocessing,
            hook_names, tokens, mean_patch, dtype, autocast.
        complete: whether all images are in.
        is_parted: whether it lies in parts.
        labels: int64 (n,), class of each row, -1 where there is none.
        indices: int64 (n,), place of each row's image in the dataset.
        class_names: what the labels mean.
        failures: image index -> source and reason, of the corrupt images left out.
        n_seen: images that are in, the corrupt ones counted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = read_index(self.path)
        self.facts: dict[str, Any] = index["facts"]
        self.complete: bool = index["complete"]
        self.class_names: list[str] = index["class_names"]
        self.is_parted = is_parted(index)
        parts = read_parts(self.path, index) if self.is_parted else {self.path: index}
        self.failures = failures_of(parts)
        self.n_seen = sum(part["n_seen"] for part in parts.values())
        self._rows: dict[Path, int] = {folder: part["n_rows"] for folder, part in parts.items()}
        if self.is_parted:  # a part whose images are all corrupt has no arrays
            self._rows = {folder: n for folder, n in self._rows.items() if n}
        self.labels = self._read("labels")
        self.indices = self._read("indices")

    def __len__(self) -> int:
        """Number of rows: images that are in."""
        return sum(self._rows.values())

    @property
    def hook_names(self) -> list[str]:
        """The hook points that the cache holds."""
        return list(self.facts["hook_names"])

    def activations(self, hook_name: str) -> Rows:
        """(n, k, d), memory-mapped, read-only; of a cache in parts `JoinedRows`.

        Raises:
            UnknownNameError: no such hook point in this cache; the nearest names are listed.
        """
        name, columns = self._known(hook_name)
        return self._array(name)[:, :, columns]

    def mean_patch(self, hook_name: str) -> Rows | None:
        """(n, d), as `activations`: the mean over the patches; None where it is not kept."""
        name, columns = self._known(hook_name)
        if self.facts["tokens"] == "mean_patch":
            return self._array(name)[:, 0, columns]
        return self._array(f"{name}.mean_patch")[:, columns] if self.facts["mean_patch"] else None

    def joined(self, hook_name: str, tokens: str | None = None) -> JoinedRows:
        """(n, k, d), memory-mapped: `tokens` at a hook point; None: those the cache is made of.

        Raises:
            UnknownNameError, ConfigError: the cache does not hold them.
            DataError: it holds no rows, or is damaged.
        """
        (name, columns), kept = self._known(hook_name), self.facts["tokens"]
        if tokens in (None, kept):
            return self._joined(name)[:, :, columns]
        if tokens == "mean_patch" and self.facts["mean_patch"]:
            return self._joined(f"{name}.mean_patch")[:, None, columns]
        also = " and mean_patch" if self.facts["mean_patch"] else ""
        problem = f"the cache {self.path} has others"
        raise ConfigError(
            "tokens", problem, given=tokens, allowed=f"{kept}{also}, or another cache"
        )

    def tensor(self, hook_name: str, tokens: str | None = None) -> Tensor:
        """(n, k, d), as `joined`: memory-mapped, and of a cache in parts a copy in memory.

        Writing to it changes memory only, never the file.

        Raises:
            UnknownNameError, ConfigError, DataError: as `joined`.
        """
        return self.joined(hook_name, tokens).tensor()

    def iter_batches(
        self, hook_name: str, batch_size: int, order: np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x (b, k, d) float32, labels (b,), indices (b,)) over all rows, or those in `order`.

        Args:
            hook_name: a hook point of the cache.
            batch_size: rows in a batch.
            order: row numbers in the order wanted; each batch is read in the order of the file.
        """
        column = self.joined(hook_name)
        rows = torch.arange(len(self)) if order is None else torch.as_tensor(order).long()
        labels, indices = torch.from_numpy(self.labels), torch.from_numpy(self.indices)
        for batch in rows.split(batch_size):
            in_file_order, places = batch.sort()
            x = torch.empty(len(batch), *column.shape[1:])
            x[places] = column.gather(in_file_order).float()
            yield x, labels[batch], indices[batch]

    def _known(self, hook_name: str) -> tuple[str, slice]:
        hook_name, columns = columns_of(hook_name)
        if hook_name not in self.facts["hook_names"]:
            kind = f"hook point of the cache {self.path}"
            raise UnknownNameError(unknown_name_message(kind, hook_name, self.hook_names))
        return hook_name, columns

    def _read(self, name: str) -> np.ndarray:
        """A column of whole numbers, in memory."""
        columns = [_mapped(folder, name, n) for folder, n in self._rows.items()]
        return np.concatenate(columns) if columns else np.empty(0, dtype=np.int64)

    def _array(self, name: str) -> Rows:
        if self.is_parted:
            return self._joined(name)
        return _mapped(self.path, name, len(self))

    def _joined(self, name: str) -> JoinedRows:
        if not self.is_parted:
            return JoinedRows([torch.from_numpy(_mapped(self.path, name, len(self), mode="c"))])
        if not self._rows:
            raise DataError(f"cache {self.path}", "no activations: no image could be read")
        return JoinedRows([_mapped_tensor(folder, name, n) for folder, n in self._rows.items()])


def _mapped(folder: Path, name: str, n_rows: int, mode: Any = "r") -> np.ndarray:
    """The first `n_rows` rows of a column's file, memory-mapped."""
    file = file_of(folder, name)
    try:
        open_regular(file).close()
        array = np.load(file, mmap_mode=mode, allow_pickle=False)
    except Exception as error:  # of a damaged header numpy raises nearly anything
        raise _damaged(file, error) from error
    if not isinstance(array, np.ndarray) or not array.ndim:
        raise DataError(f"cache {folder}", f"{file.name} holds no rows")
    _check_rows(file, len(array), n_rows)
    return array[:n_rows]


def _mapped_tensor(folder: Path, name: str, n_rows: int) -> Tensor:
    """The same as a tensor, writes to which change memory only.

    The file is not kept open: a cache of hundreds of parts has more files than a process may open.
    """
    file = file_of(folder, name)
    try:
        with open_regular(file) as opened:
            if np.lib.format.read_magic(opened) != (1, 0):
                raise ValueError("not version 1.0 of the format")
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(opened)
            start = opened.tell()
            size = os.fstat(opened.fileno()).st_size - start
        if is_fortran or dtype not in (np.float32, np.float16) or start % dtype.itemsize:
            raise ValueError(f"not rows of float32 or float16, but of {dtype}")
        row_size = math.prod(shape[1:])
        _check_rows(file, min(shape[0], size // max(1, row_size * dtype.itemsize)), n_rows)
        start //= dtype.itemsize
        flat = torch.from_file(
            str(file),
            shared=False,
            size=start + n_rows * row_size,
            dtype=torch.from_numpy(np.empty(0, dtype)).dtype,
        )
        return flat[start:].view(n_rows, *shape[1:])
    except DataError:
        raise
    except Exception as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> DataError:
    problem = f"{file.name} cannot be read: {error or type(error).__name__}"
    return DataError(f"cache {file.parent}", problem)


def _check_rows(file: Path, found: int, n_rows: int) -> None:
    if found < n_rows:
        problem = f"{file.name} has {found} rows and should have {n_rows}"
        allowed = "delete the folder and build it again"
        raise DataError(f"cache {file.parent}", problem, allowed=allowed)


def is_parted(index: dict[str, Any]) -> bool:
    """Whether an index is one of parts."""
    return index["schema"] == PARTS_SCHEMA


def failures_of(parts: Mapping[Path, dict[str, Any]]) -> dict[int, str]:
    """Image -> source and reason, of the corrupt images in the indexes of parts, or of one folder."""
    return {int(i): text for part in parts.values() for i, text in part["failures"].items()}


def part_folder(folder: Path, number: int) -> Path:
    """The folder of one part of a cache."""
    return folder / f"part-{number:05}"


def read_parts(folder: Path, index: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Folder -> index of the parts of a cache in their order: of all, or where it is unfinished of those begun.

    Raises:
        DataError: a part is missing or not complete, or is one of other activations.
    """
    if index["complete"]:
        numbers: Iterable[int] = range(index["n_parts"])
    else:
        found = (re.fullmatch(r"part-(\d{5,18})", entry.name) for entry in folder.iterdir())
        numbers = sorted(int(match[1]) for match in found if match)
    parts = {}
    for place in (part_folder(folder, number) for number in numbers):
        if not index["complete"] and not (place / INDEX_FILE).exists():
            continue
        try:
            part = read_index(place)
        except ConfigError as error:
            problem = f"{place.name} is not there, or has no {INDEX_FILE}"
            allowed = "delete the folder and build it again"
            raise DataError(f"cache {folder}", problem, allowed=allowed) from error
        is_whole = part["complete"] or not index["complete"]
        if part["schema"] != SCHEMA or part["facts"] != index["facts"] or not is_whole:
            problem = f"{place.name} is not complete, or one of another cache"
            allowed = "delete the folder and build it again"
            raise DataError(f"cache {folder}", problem, allowed=allowed)
        parts[place] = part
    return parts


def file_of(folder: Path, name: str) -> Path:
    """The file of one column: a hook point, its mean patch, "labels" or "indices"."""
    return folder / (re.sub(r"[^\w.-]", "_", name) + ".npy")


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of the index file of a cache, or of one of its parts.

    Raises:
        ConfigError: there is none.
        DataError: it is damaged, or of another kind.
    """
    file = folder / INDEX_FILE
    try:
        index = read_json(file)
    except FileNotFoundError:
        allowed = "a folder of ActivationCache.build"
        raise ConfigError(f"cache {folder}", f"no {INDEX_FILE} in it", allowed=allowed) from None
    except (OSError, UnreadableError) as error:
        problem = f"{INDEX_FILE} cannot be read: {reason(error)}"
        raise DataError(f"cache {folder}", problem) from error
    kinds = {SCHEMA: _Index, PARTS_SCHEMA: _PartsIndex}
    kind = kinds.get(str(index.get("schema"))) if isinstance(index, dict) else None
    if kind is None:
        allowed = " or ".join(kinds)
        raise DataError(f"cache {folder}", f"{INDEX_FILE} is of another schema", allowed=allowed)
    try:
        read = coerce(index, kind, INDEX_FILE)
        for name in FACTS:
            coerce(index["facts"][name], FACTS[name], f"{INDEX_FILE}.facts.{name}")
        if not read.is_possible:
            raise ValueError(f"{INDEX_FILE}: a number of rows, images or parts is not possible")
    except KeyError as error:
        raise DataError(f"cache {folder}", f"{INDEX_FILE}: facts lack {error}") from None
    except ValueError as error:
        raise DataError(f"cache {folder}", error) from None
    return index
