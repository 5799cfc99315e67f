"""Reader of a cache of activations, whose files docs/formats/activations.md defines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...registry.coerce import coerce
from ...registry.errors import ConfigError, DataError, UnknownNameError
from ...registry.files import UnreadableError, open_regular, read_json, reason
from ...registry.names import unknown_name_message

SCHEMA = "taxolens.activations/1"
INDEX_FILE = "cache.json"


@dataclass
class _Index:
    """The types of the index file."""

    facts: dict[str, Any]
    complete: bool
    class_names: list[str]
    failures: dict[str, str]
    n_seen: int
    n_rows: int


FACTS = {"hook_names": list[str], "tokens": str, "mean_patch": bool}  # that reading depends on


class CacheReader:
    """Activations on disk: one memory-mapped ``.npy`` file for each hook point.

    Rows are images, in the order of the dataset, without the corrupt ones.

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
        index = read_index(self.path)
        self.facts: dict[str, Any] = index["facts"]
        self.complete: bool = index["complete"]
        self.class_names: list[str] = index["class_names"]
        self.failures = {int(i): text for i, text in index["failures"].items()}
        self._n_rows: int = index["n_rows"]
        self.labels = np.array(self._mapped("labels"))
        self.indices = np.array(self._mapped("indices"))

    def __len__(self) -> int:
        """Number of rows: images that are in."""
        return self._n_rows

    @property
    def hook_names(self) -> list[str]:
        """The hook points that the cache holds."""
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
        problem = f"the cache {self.path} has others"
        raise ConfigError(
            "tokens", problem, given=tokens, allowed=f"{kept}{also}, or another cache"
        )

    def iter_batches(
        self, hook_name: str, batch_size: int, order: np.ndarray | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(x (b, k, d) float32, labels (b,), indices (b,)) over all rows, or those in `order`.

        Args:
            hook_name: a hook point of the cache.
            batch_size: rows in a batch.
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
            kind = f"hook point of the cache {self.path}"
            raise UnknownNameError(unknown_name_message(kind, hook_name, self.hook_names))
        return hook_name

    def _mapped(self, name: str, mode: Any = "r") -> np.ndarray:
        file = file_of(self.path, name)
        try:
            open_regular(file).close()
            array = np.load(file, mmap_mode=mode, allow_pickle=False)
        except Exception as error:  # of a damaged header numpy raises nearly anything
            problem = f"{file.name} cannot be read: {error or type(error).__name__}"
            raise DataError(f"cache {self.path}", problem) from error
        if not isinstance(array, np.ndarray) or not array.ndim:
            raise DataError(f"cache {self.path}", f"{file.name} holds no rows")
        if len(array) < self._n_rows:
            problem = f"{file.name} has {len(array)} rows and should have {self._n_rows}"
            allowed = "delete the folder and build it again"
            raise DataError(f"cache {self.path}", problem, allowed=allowed)
        return array[: self._n_rows]


def file_of(folder: Path, name: str) -> Path:
    """The file of one column: a hook point, its mean patch, "labels" or "indices"."""
    return folder / (re.sub(r"[^\w.-]", "_", name) + ".npy")


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of a cache's index file.

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
    if not isinstance(index, dict) or index.get("schema") != SCHEMA:
        raise DataError(f"cache {folder}", f"{INDEX_FILE} is of another schema", allowed=SCHEMA)
    try:
        read = coerce(index, _Index, INDEX_FILE)
        for name in FACTS:
            coerce(index["facts"][name], FACTS[name], f"{INDEX_FILE}.facts.{name}")
        if read.n_rows < 0 or not all(image.isdecimal() for image in read.failures):
            raise ValueError(f"{INDEX_FILE}: a number of rows or an image is negative")
    except KeyError as error:
        raise DataError(f"cache {folder}", f"{INDEX_FILE}: facts lack {error}") from None
    except ValueError as error:
        raise DataError(f"cache {folder}", error) from None
    return index
