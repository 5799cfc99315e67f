"""Activations of all images at many hook points, computed in one pass and kept on disk."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...registry.errors import ConfigError, DataError, UnknownNameError
from ...registry.table import unknown_name_message
from ..images.loader import ImageLoader, chunks
from ..images.preprocess import preprocess_for
from .extract import TokenExtractor, model_fingerprint, torch_dtype

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

if TYPE_CHECKING:
    from ..images.dataset import ImageDataset
    from ..images.loader import ImageBatch, Job
    from ..models.load import VisionModel

SCHEMA = "taxolens.activations/1"
INDEX_FILE = "cache.json"
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # EDQUOT: the user's share
COMMIT_SECONDS = 15.0  # at most this much work is lost when the process is killed


class ActivationCache:
    """Activations on disk: one memory-mapped ``.npy`` file for each hook point.

    Rows are images, in the order of the dataset, without the corrupt ones. Made by `build`, which
    can be killed at any time and goes on where it was; `open` reads a finished or unfinished one.

    Attributes:
        path: the folder.
        facts: what the activations are of: fingerprints of model and images, preprocessing,
            hook_names, tokens, mean_patch, dtype, autocast.
        complete: whether all images are in.
        labels: int64 (n,), class of each row, -1 where there is none.
        indices: int64 (n,), place of each row's image in the dataset.
        class_names: what the labels mean.
        failures: image index -> source and reason, of the corrupt images left out.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        self.facts: dict[str, Any] = index["facts"]
        self.complete: bool = index["complete"]
        self.class_names: list[str] = index["class_names"]
        self.failures = {int(i): text for i, text in index["failures"].items()}
        self._n_rows: int = index["n_rows"]
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.labels = np.array(self._mapped("labels"))
        self.indices = np.array(self._mapped("indices"))

    @classmethod
    def open(cls, path: str | Path) -> ActivationCache:
        """Read the cache in the folder `path`.

        Raises:
            ConfigError: there is none.
            DataError: it is damaged.
        """
        return cls(path)

    @classmethod
    def build(
        cls,
        model: VisionModel,
        images: ImageDataset,
        hook_names: Sequence[str],
        *,
        path: str | Path | None = None,
        tokens: str = "class",
        mean_patch: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        image_size: int | None = None,
        dtype: str | torch.dtype = "float32",
        autocast: bool = False,
        max_corrupt_share: float = 0.01,
        progress: bool = True,
    ) -> ActivationCache:
        """Run all images through the model once and keep what is asked for.

        A folder that holds the same activations already is used as it is, an unfinished one is
        finished. Hook points beyond those asked for do no harm.

        Args:
            path: the folder; None: a temporary one that goes with the object.
            tokens: one of `TOKEN_CHOICES`.
            mean_patch: keep the mean over the patches too, from the same forward pass.
            batch_size: images per forward pass.
            dtype: "float32", "float16", or "bfloat16", which is stored as float32.
            image_size, num_workers, autocast, max_corrupt_share: as for `ActivationStream`.
            progress: show a progress bar.

        Raises:
            ConfigError: the folder holds other activations (the message says what differs), or
                another process is writing there.
            DataError: too many corrupt images, activations that are not finite, or a full disk;
                what is done stays, and the next call goes on from there.
        """
        temporary = None
        if path is None:
            temporary = tempfile.TemporaryDirectory(prefix="taxolens-activations-")
            path = temporary.name
        preprocess = preprocess_for(model, image_size)
        stored = torch_dtype(dtype)
        facts = {
            "model": model_fingerprint(model),
            "model_name": str(getattr(model.cfg, "model_name", "")),
            "images": images.fingerprint,
            "preprocessing": preprocess.describe(),
            "hook_names": list(hook_names),
            "tokens": tokens,
            "mean_patch": mean_patch and tokens != "mean_patch",
            "dtype": str(stored).removeprefix("torch."),
            "autocast": autocast,
        }
        extractor = _extractor(model, facts, stored)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with _only_writer(folder):
            index = _matching_index(folder, facts)
            if index is not None and index["complete"]:
                return cls._opened(folder, temporary)
            if index is not None:  # unfinished, perhaps with more hook points
                extractor = _extractor(model, index["facts"], stored)
            loader = ImageLoader(
                images,
                preprocess,
                batch_size=batch_size,
                num_workers=num_workers,
                max_corrupt_share=max_corrupt_share,
                pin_memory=extractor.device.type == "cuda",
            )
            with _Writer(folder, loader, facts, index) as writer:
                writer.fill(extractor, progress)
        return cls._opened(folder, temporary)

    @classmethod
    def _opened(
        cls, folder: Path, temporary: tempfile.TemporaryDirectory[str] | None
    ) -> ActivationCache:
        cache = cls(folder)
        cache._temporary = temporary
        return cache

    def __len__(self) -> int:
        """Number of rows: images that are in."""
        return self._n_rows

    @property
    def hook_names(self) -> list[str]:
        return list(self.facts["hook_names"])

    def activations(self, hook_name: str) -> np.ndarray:
        """(n, k, d), memory-mapped, read-only.

        Raises:
            UnknownNameError: no such hook point in this cache; the nearest names are listed.
        """
        return self._mapped(self._known(hook_name))

    def mean_patch(self, hook_name: str) -> np.ndarray | None:
        """(n, d), memory-mapped, read-only: the mean over the patches; None where it is not kept."""
        name = self._known(hook_name)
        if self.facts["tokens"] == "mean_patch":
            return self._mapped(name)[:, 0]
        return self._mapped(f"{name}.mean_patch") if self.facts["mean_patch"] else None

    def tensor(self, hook_name: str, tokens: str | None = None) -> Tensor:
        """(n, k, d), memory-mapped: `tokens` at a hook point; None: those the cache is made of.

        Writing to it changes memory only, never the file.

        Raises:
            UnknownNameError, ConfigError: the cache does not hold them.
        """
        name, kept = self._known(hook_name), self.facts["tokens"]
        if tokens in (None, kept):
            return torch.from_numpy(self._mapped(name, mode="c"))
        if tokens == "mean_patch" and self.facts["mean_patch"]:
            return torch.from_numpy(self._mapped(f"{name}.mean_patch", mode="c")[:, None])
        also = " and mean_patch" if self.facts["mean_patch"] else ""
        raise ConfigError(
            f"tokens={tokens!r}: the cache {self.path} holds {kept}{also}; build another for these."
        )

    def iter_batches(
        self, hook_name: str, batch_size: int, order: np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x (b, k, d) float32, labels (b,), indices (b,)) over all rows, or those in `order`.

        Args:
            order: row numbers in the order wanted; each batch is read in the order of the file.
        """
        column = self.tensor(hook_name)
        rows = torch.arange(len(self)) if order is None else torch.as_tensor(order).long()
        labels, indices = torch.from_numpy(self.labels), torch.from_numpy(self.indices)
        for batch in rows.split(batch_size):
            in_file_order, places = batch.sort()
            x = torch.empty(len(batch), *column.shape[1:])
            x[places] = column.index_select(0, in_file_order).float()
            yield x, labels[batch], indices[batch]

    def _known(self, hook_name: str) -> str:
        if hook_name not in self.facts["hook_names"]:
            message = unknown_name_message("hook point", hook_name, self.hook_names)
            raise UnknownNameError(f"cache {self.path}: {message}")
        return hook_name

    def _mapped(self, name: str, mode: Any = "r") -> np.ndarray:
        file = _file(self.path, name)
        try:
            array = np.load(file, mmap_mode=mode)
        except (OSError, ValueError) as error:
            raise DataError(f"cache {self.path}: {file.name} cannot be read: {error}") from error
        if len(array) < self._n_rows:
            raise DataError(
                f"cache {self.path}: {file.name} has {len(array)} rows and should have "
                f"{self._n_rows}; delete the folder and build it again."
            )
        return array[: self._n_rows]


class _Column:
    """A ``.npy`` file that grows by rows, and holds what was committed whatever happens."""

    def __init__(
        self, file: Path, shape: tuple[int, ...], dtype: np.dtype[Any], n_rows: int
    ) -> None:
        self._shape, self._dtype = shape, dtype
        header = self._header(n_rows)
        size = len(header) + n_rows * self.row_bytes
        if n_rows and (not file.exists() or file.stat().st_size < size):
            raise DataError(f"{file} is shorter than {INDEX_FILE} says; delete the folder.")
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
        """Have `n_rows` rows on the disk, and say so in the header, which keeps its length."""
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


class _Writer:
    """Fills the folder of a cache, from where it stands."""

    def __init__(
        self,
        folder: Path,
        loader: ImageLoader,
        facts: dict[str, Any],
        index: dict[str, Any] | None,
    ) -> None:
        self.folder, self.loader = folder, loader
        if index is not None:
            loader.failures = {int(i): text for i, text in index["failures"].items()}
            loader.n_failed, loader.n_processed = len(loader.failures), index["n_seen"]
        self.index: dict[str, Any] = index or {
            "schema": SCHEMA,
            "facts": facts,
            "complete": False,
            "class_names": loader.images.class_names,
            "failures": {},
            "n_seen": 0,
            "n_rows": 0,
        }
        self._n_seen, self._n_rows = self.index["n_seen"], self.index["n_rows"]
        self._columns: dict[str, _Column] = {}
        self._row_bytes = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._columns:
            with suppress(DataError):  # the first error is the one to see
                self._commit()
        for column in self._columns.values():
            column.close()

    def fill(self, extractor: TokenExtractor, progress: bool) -> None:
        images = self.loader.images
        total = None if images.is_streaming else len(images)
        jobs: Iterator[Job] = (
            images.stream(skip=self._n_seen) if total is None else iter(range(self._n_seen, total))
        )
        committed = time.monotonic()
        bar = tqdm(
            total=total,
            initial=self._n_seen,
            desc="activations",
            unit=" images",
            disable=not progress,
        )
        with bar:
            for batch in self.loader.grouped(chunks(jobs, self.loader.batch_size)):
                if len(batch):
                    self._write(extractor(batch), batch, total)
                n_seen = len(batch) + len(batch.failures)
                self._n_seen += n_seen
                bar.update(n_seen)
                if time.monotonic() - committed > COMMIT_SECONDS:
                    self._commit()
                    committed = time.monotonic()
        if not self._n_rows:
            shown = "; ".join(
                f"image {i} ({why})" for i, why in list(self.loader.failures.items())[:3]
            )
            raise DataError(f"{images.name}: not one image can be read: {shown or 'empty'}.")
        self._commit(complete=True)

    def _write(self, activations: dict[str, Tensor], batch: ImageBatch, total: int | None) -> None:
        rows = {"labels": batch.labels.numpy(), "indices": batch.indices.numpy()}
        for name, tensor in activations.items():
            array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
            if self.index["facts"]["mean_patch"]:
                rows[f"{name}.mean_patch"] = array[:, -1]
                array = array[:, :-1]
            rows[name] = array
        try:
            if not self._columns:
                self._open_columns(rows, total)
            for name, array in rows.items():
                self._columns[name].append(array)
        except OSError as error:
            raise self._explained(error, total) from error
        self._n_rows += len(batch)

    def _open_columns(self, rows: dict[str, np.ndarray], total: int | None) -> None:
        self._row_bytes = sum(array[0].nbytes for array in rows.values())
        if total is not None:
            missing = (total - self._n_seen) * self._row_bytes
            free = shutil.disk_usage(self.folder).free
            if missing > free:
                raise OSError(errno.ENOSPC, "not enough space")
        for name, array in rows.items():
            file = _file(self.folder, name)
            self._columns[name] = _Column(file, array.shape[1:], array.dtype, self._n_rows)

    def _explained(self, error: OSError, total: int | None) -> Exception:
        if error.errno not in DISK_FULL:
            return DataError(f"cache {self.folder} cannot be written: {error}")
        needed = ""
        if total is not None:
            all_bytes, missing = (n * self._row_bytes for n in (total, total - self._n_seen))
            needed = (
                f" The activations need {all_bytes:,} bytes, {missing:,} of them still to come."
            )
        free = shutil.disk_usage(self.folder).free
        return DataError(
            f"the disk is full: {self.folder} has {free:,} bytes free.{needed} What is done is "
            "kept; make room, or choose fewer hook points or tokens or dtype='float16'."
        )

    def _commit(self, complete: bool = False) -> None:
        """Put what was written on the disk, then say so."""
        try:
            for column in self._columns.values():
                column.commit(self._n_rows)
            self.index |= {
                "complete": complete,
                "failures": {str(i): text for i, text in self.loader.failures.items()},
                "n_seen": self._n_seen,
                "n_rows": self._n_rows,
            }
            _write_index(self.folder, self.index)
        except OSError as error:
            total = None if self.loader.images.is_streaming else len(self.loader.images)
            raise self._explained(error, total) from error


def _file(folder: Path, name: str) -> Path:
    return folder / (re.sub(r"[^\w.-]", "_", name) + ".npy")


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX_FILE
    try:
        index = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"cache: there is no {INDEX_FILE} in {folder}.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cache: {file} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("schema") != SCHEMA:
        raise DataError(f"cache: {file} is not of the kind {SCHEMA}.")
    return index


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    new = folder / f"{INDEX_FILE}.new"
    with new.open("w") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, folder / INDEX_FILE)


def _extractor(model: VisionModel, facts: dict[str, Any], dtype: torch.dtype) -> TokenExtractor:
    tokens = [facts["tokens"], *(["mean_patch"] if facts["mean_patch"] else [])]
    return TokenExtractor(
        model, facts["hook_names"], tokens, dtype=dtype, autocast=facts["autocast"]
    )


def _matching_index(folder: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    """The index of the cache in `folder`, which holds these activations or is to; None: no cache.

    Raises:
        ConfigError: it holds others.
    """
    if not (folder / INDEX_FILE).exists():
        return None
    index = _read_index(folder)
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
        raise ConfigError(
            f"the activations in {folder} are others: {listed}. Choose another folder or delete it."
        )
    return index


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into `folder`; the lock goes with the process."""
    if fcntl is None:
        warnings.warn("no file locks on this system: build each cache in one process.")
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is building the cache in {folder}.") from None
        except OSError:  # a file system without locks
            pass
        yield
