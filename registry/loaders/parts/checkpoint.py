"""A file of another library's SAE: its path, its content, and the config beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import files
from ...errors import CheckpointError, ConfigError
from . import safe_pickle
from .safe_pickle import Record, fields_of

SUFFIXES = (".pt", ".pth", ".pkl", ".pkl.gz", ".safetensors")
SAE_LENS_FILES = ("cfg.json", "sae_weights.safetensors")
MAX_HEADER_BYTES = 2**20


class Checkpoint(os.PathLike[str]):
    """The file of weights at a path; it is read when its content is first needed.

    Args:
        path: a file of weights, or a folder with one (and other files, as libraries save them), or
            a folder in SAELens's own form.

    Raises:
        ConfigError: no such file, no file of weights, or several of them, which are then listed.
    """

    def __init__(self, path: str | Path) -> None:
        if not files.is_path(str(path)):
            raise ConfigError("path", "not a path", given=str(path), allowed="a file or a folder")
        self.given = Path(path).expanduser()
        self.path = _weights_file(self.given)

    @classmethod
    def of(cls, path: str | Path | Checkpoint) -> Checkpoint:
        """The checkpoint at `path`, or `path` itself where it is one."""
        return path if isinstance(path, Checkpoint) else cls(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def folders(self) -> list[str]:
        """The names of the folders above the file, the nearest first.

        Links are not followed: the cache of huggingface_hub links to files without these names.
        """
        return [folder.name for folder in Path(os.path.abspath(self.path)).parents]

    @property
    def is_sae_lens(self) -> bool:
        """Whether it is a folder in SAELens's layout."""
        return self.path.is_dir()

    @cached_property
    def header(self) -> dict[str, Any] | None:
        """The line of JSON before the weights, as saev writes it; None where there is none."""
        if self.path.is_dir():
            return None
        with files.open_regular(self.path) as file:
            if file.read(1) != b"{":
                return None
            file.seek(0)
            line = file.readline(MAX_HEADER_BYTES)
        try:
            found = files.parse_json(line.decode())
        except ValueError:
            return None
        self._content_from = len(line)
        return found if isinstance(found, dict) else None

    @cached_property
    def content(self) -> Any:
        """The content of the file; see `safe_pickle.load`.

        Raises:
            CheckpointError: the file is damaged.
        """
        if self.path.is_dir():
            return None
        if self.path.suffix == ".safetensors":
            from safetensors.torch import load_file

            try:
                return load_file(self.path)
            except Exception as error:
                raise CheckpointError(str(self.path), f"it cannot be read: {error}") from None
        return safe_pickle.load(self.path, offset=self._content_from if self.header else 0)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json beside the weights, {} where there is none."""
        return read_json(self.folder / "config.json")

    def describe(self) -> str:
        """The type of the content and its keys, for messages."""
        if isinstance(self.content, dict):
            keys = [str(key)[:40] for key in list(self.content)[:12]]
            more = ", ..." if len(self.content) > 12 else ""
            return f"a dict with the keys {', '.join(keys)}{more}"
        if isinstance(self.content, Record):
            return f"an object of {self.content.kind[:100]}"
        return f"a {type(self.content).__name__}"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file.

    Raises:
        CheckpointError: the file is damaged or too long.
    """
    if not file.is_file():
        return {}
    try:
        found = files.read_json(file)
    except (OSError, files.UnreadableError) as error:
        raise CheckpointError(str(file), f"it is not JSON ({files.reason(error)})") from None
    return found if isinstance(found, dict) else {}


def tensors_of(value: Any) -> dict[str, Tensor]:
    """The tensors, of any shape, of a state dict or of a pickled module, by name."""
    if isinstance(value, Record):
        return _module_tensors(value)
    items = value.items() if isinstance(value, dict) else ()
    return {str(key): item for key, item in items if isinstance(item, Tensor)}


def take_tensors(
    checkpoint: Checkpoint,
    found: dict[str, Tensor],
    needed: Iterable[str],
    optional: Iterable[str] = (),
    of: str = "its SAE",
) -> dict[str, Tensor]:
    """The tensors `found`, in their own shapes, after a check of their names.

    Raises:
        CheckpointError: some of `needed` are missing.
        ConfigError: there are others than `needed` and `optional`, whose use is not known.
    """
    needed, optional = list(needed), list(optional)
    if absent := [name for name in needed if name not in found]:
        raise CheckpointError(str(checkpoint), f"{', '.join(absent)} of {of} not in it")
    if unknown := sorted(set(found) - {*needed, *optional}):
        raise ConfigError(
            str(checkpoint),
            f"it has tensors that {of} does not have",
            given=", ".join(unknown)[:200],
            allowed=", ".join([*needed, *optional]),
        )
    return dict(found)


def _module_tensors(module: Record) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    todo, seen = [("", module)], set()
    while todo:
        prefix, record = todo.pop()
        if id(record) in seen:
            continue
        seen.add(id(record))
        for group in ("_parameters", "_buffers"):
            for name, tensor in tensors_of(record.fields.get(group)).items():
                found[prefix + name] = tensor
        for name, child in fields_of(record.fields.get("_modules")).items():
            if isinstance(child, Record):
                todo.append((f"{prefix}{name}.", child))
    return found


def as_tensor(value: Any) -> Tensor | None:
    """A tensor, an array (also one in a pickle) or a number as a tensor of the same shape; else None."""
    if isinstance(value, Record):
        value = value.fields.get("array")
    if isinstance(value, (Tensor, np.ndarray)):
        return torch.as_tensor(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return torch.tensor(value, dtype=torch.float64) if is_number else None


def as_number(value: Any) -> float | None:
    """A number, or a tensor or array of one, as a float; None for anything else."""
    tensor = as_tensor(value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def _weights_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix == ".json" or (path.name in SAE_LENS_FILES and _is_sae_lens(path.parent)):
            problem, allowed = "a file of a folder that is read as one", f"{path.parent}"
            raise ConfigError("path", problem, given=str(path), allowed=allowed)
        return path
    if not path.is_dir():
        raise ConfigError("path", "not found", given=str(path), allowed="a file or a folder")
    if _is_sae_lens(path):
        return path
    found = [file for file in sorted(path.iterdir()) if _holds_weights(file)]
    found = found or [file for file in sorted(path.rglob("*")) if _holds_weights(file)]
    final = [file for file in found if file.name == "ae.pt"]
    found = final if len(final) == 1 else found
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(file.relative_to(path)) for file in found[:8])
    several = f"which of {names}{', ...' if len(found) > 8 else ''}?"
    raise ConfigError(
        "path",
        several if found else "it holds no weights",
        given=str(path),
        allowed=f"a file of weights ({' '.join(SUFFIXES)}), a folder with one, or with "
        f"{' and '.join(SAE_LENS_FILES)}",
    )


def _is_sae_lens(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SAE_LENS_FILES)


def is_weights_name(name: str) -> bool:
    """Whether a file of this name, or path, can hold the weights of an SAE."""
    return name.endswith(SUFFIXES) and not name.endswith("_log_feature_sparsity.pt")


def _holds_weights(file: Path) -> bool:
    return file.is_file() and is_weights_name(file.name)
