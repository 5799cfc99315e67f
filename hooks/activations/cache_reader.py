"""Reader of a cache of activations, whose files docs/formats/activations.md defines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...registry.errors import ConfigError, DataError, UnknownNameError
from ...registry.names import unknown_name_message

SCHEMA = "taxolens.activations/1"
INDEX_FILE = "cache.json"


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
            array = np.load(file, mmap_mode=mode)
        except (OSError, ValueError) as error:
            problem = f"{file.name} cannot be read: {error}"
            raise DataError(f"cache {self.path}", problem) from error
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
        index = json.loads(file.read_text())
    except FileNotFoundError:
        allowed = "a folder of ActivationCache.build"
        raise ConfigError(f"cache {folder}", f"no {INDEX_FILE} in it", allowed=allowed) from None
    except (OSError, ValueError) as error:
        raise DataError(f"cache {folder}", f"{INDEX_FILE} cannot be read: {error}") from error
    if not isinstance(index, dict) or index.get("schema") != SCHEMA:
        raise DataError(f"cache {folder}", f"{INDEX_FILE} is of another schema", allowed=SCHEMA)
    return index
