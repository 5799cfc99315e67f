"""Writer of a cache of activations: files that grow by rows and stay valid when it is killed."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...registry.errors import ConfigError, DataError
from ...registry.files import write_atomically
from ..images.loader import ImageBatch
from .cache_reader import INDEX_FILE, SCHEMA, file_of, read_index

DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # EDQUOT: the user's share


class _Column:
    """A ``.npy`` file that grows by rows and always has the committed ones."""

    def __init__(
        self, file: Path, shape: tuple[int, ...], dtype: np.dtype[Any], n_rows: int
    ) -> None:
        self._shape, self._dtype = shape, dtype
        header = self._header(n_rows)
        size = len(header) + n_rows * self.row_bytes
        if n_rows and (not file.exists() or file.stat().st_size < size):
            problem = f"shorter than {INDEX_FILE} says"
            raise DataError(str(file), problem, allowed="delete the folder and build it again")
        self._file: IO[bytes] = file.open("r+b" if n_rows else "w+b", buffering=0)
        self._file.truncate(size if n_rows else 0)  # rows after the last commit are made again
        self._file.write(header)
        self._file.seek(size)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self._shape)) * self._dtype.itemsize

    def append(self, rows: np.ndarray) -> None:
        data = np.ascontiguousarray(rows, dtype=self._dtype).data.cast("B")
        while data:  # an unbuffered write may be partial, and fails here when the disk is full
            data = data[self._file.write(data) :]

    def commit(self, n_rows: int) -> None:
        """Sync `n_rows` rows to the disk, then write their number into the header of fixed length."""
        end = self._file.tell()
        self._file.seek(0)
        self._file.write(self._header(n_rows))
        self._file.seek(end)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _header(self, n_rows: int) -> bytes:
        buffer = io.BytesIO()
        fields = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (n_rows, *self._shape),
        }
        np.lib.format.write_array_header_1_0(buffer, fields)  # padded for the rows to grow
        return buffer.getvalue()


class Work(Protocol):
    """The extraction that a writer is part of.

    Attributes:
        total: number of images, those of all ranks; None where it is not known.
        row_bytes: what the rows of an image take, of each cache that is filled, by its facts.
    """

    total: int | None
    row_bytes: dict[str, int]

    def n_missing(self) -> int | None:
        """How many of them are still to come."""
        ...


class CacheWriter:
    """Appends rows to a folder of arrays, continuing after the rows that exist.

    Args:
        folder: of the cache, or of one of its parts.
        facts: what the activations are of.
        class_names: what the labels mean.
        index: of the folder, where it has one.
        work: how many images are still to come, for the check of free space.

    Attributes:
        n_seen: images that are in, those that could not be read among them.
        n_rows: rows that are in.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        class_names: list[str],
        index: dict[str, Any] | None,
        work: Work,
    ) -> None:
        self.folder, self._work = folder, work
        self.index: dict[str, Any] = index or {
            "schema": SCHEMA,
            "facts": facts,
            "complete": False,
            "class_names": class_names,
            "failures": {},
            "n_seen": 0,
            "n_rows": 0,
        }
        self.n_seen, self.n_rows = self.index["n_seen"], self.index["n_rows"]
        self._failures = dict(self.index["failures"])
        self._columns: dict[str, _Column] = {}

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._columns:
            with suppress(DataError):  # the first error is the one to report
                self.commit()
        for column in self._columns.values():
            column.close()

    def append(self, activations: dict[str, Tensor], batch: ImageBatch) -> int:
        """Write the rows of a batch, and return how many images it was made of.

        Raises:
            DataError: they cannot be written.
        """
        if len(batch):
            self._write(activations, batch)
        self._failures |= {str(i): f"{source}: {why}" for i, source, why in batch.failures}
        n_seen = len(batch) + len(batch.failures)
        self.n_seen += n_seen
        return n_seen

    def _write(self, activations: dict[str, Tensor], batch: ImageBatch) -> None:
        rows = {"labels": batch.labels.numpy(), "indices": batch.indices.numpy()}
        for name, tensor in activations.items():
            array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
            if self.index["facts"]["mean_patch"]:
                rows[f"{name}.mean_patch"] = array[:, -1]
                array = array[:, :-1]
            rows[name] = array
        try:
            if not self._columns:
                self._open_columns(rows)
            for name, array in rows.items():
                self._columns[name].append(array)
        except OSError as error:
            raise self._explained(error) from error
        self.n_rows += len(batch)

    def _open_columns(self, rows: dict[str, np.ndarray]) -> None:
        row_bytes = self._work.row_bytes
        row_bytes[repr(self.index["facts"])] = sum(array[0].nbytes for array in rows.values())
        missing = self._work.n_missing()
        if missing is not None:
            free = shutil.disk_usage(self.folder).free
            if missing * sum(row_bytes.values()) > free:
                raise OSError(errno.ENOSPC, "not enough space")
        for name, array in rows.items():
            file = file_of(self.folder, name)
            self._columns[name] = _Column(file, array.shape[1:], array.dtype, self.n_rows)

    def _explained(self, error: OSError) -> Exception:
        if error.errno not in DISK_FULL:
            return DataError(f"cache {self.folder}", f"cannot be written: {error}")
        needed = ""
        if (missing := self._work.n_missing()) is not None and self._work.total is not None:
            of_an_image = sum(self._work.row_bytes.values())
            all_bytes, missing = (n * of_an_image for n in (self._work.total, missing))
            needed = (
                f"; the activations need {all_bytes:,} bytes, {missing:,} of them still to come"
            )
        free = shutil.disk_usage(self.folder).free
        return DataError(
            f"cache {self.folder}",
            f"the disk is full: {free:,} bytes are free{needed}; what is done is kept",
            allowed="more room, fewer hook points or tokens, or dtype='float16'",
        )

    def commit(self, complete: bool = False) -> None:
        """Sync the written rows to the disk, then record their number."""
        try:
            for column in self._columns.values():
                column.commit(self.n_rows)
            self.index |= {
                "complete": complete,
                "failures": self._failures,
                "n_seen": self.n_seen,
                "n_rows": self.n_rows,
            }
            write_index(self.folder, self.index)
        except OSError as error:
            raise self._explained(error) from error


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Replace the index file of a folder. Raises OSError."""
    write_atomically(folder / INDEX_FILE, json.dumps(index, indent=1))


def matching_index(folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The index of the cache of these activations in `folder`; None where there is no cache.

    Raises:
        ConfigError: it holds others.
    """
    if not (folder / INDEX_FILE).exists():
        return None
    index = read_index(folder)
    there = index["facts"]
    differing = [
        key
        for key, wanted in facts.items()
        if key not in ("hook_names", "model_name", "mean_patch") and there.get(key) != wanted
    ]
    if not set(facts["hook_names"]) <= set(there["hook_names"]):
        differing.append("hook_names")
    if facts["mean_patch"] and not there["mean_patch"]:
        differing.append("mean_patch")
    if differing:
        listed = "; ".join(f"{k}: {there.get(k)!r} there, {facts[k]!r} wanted" for k in differing)
        allowed = "another folder, or delete this one"
        raise ConfigError(f"cache {folder}", f"other activations: {listed}", allowed=allowed)
    return index
