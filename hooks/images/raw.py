"""One image as it is stored: its position, its encoded bytes or their path, and its label."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import fsspec
import numpy as np
from PIL import Image

from ...registry.errors import CorruptImageError
from .decode import decode_rgb

if TYPE_CHECKING:  # not needed by the worker processes that decode a stream
    from datasets import Dataset


class RawImage(NamedTuple):
    """One undecoded image: its place, its bytes (or the path to read them from) and its label."""

    index: int
    data: bytes | None
    path: str | None
    label: int = -1


Job: TypeAlias = int | RawImage  # an index of a map-style dataset, or a streamed image


@dataclass(frozen=True)
class ImageReader:
    """The part of a map-style `ImageDataset` that worker processes need: raw images by index."""

    data: Dataset
    column: str
    rows: np.ndarray | None = None

    def __call__(self, index: int) -> RawImage:
        """Image `index` of the dataset."""
        row = int(index if self.rows is None else self.rows[index])
        value = self.data[row][self.column] or {}
        return RawImage(int(index), value.get("bytes"), value.get("path"))


def read_bytes(raw: RawImage) -> bytes:
    """The encoded bytes of an image, from memory, the disk or a remote address.

    Raises:
        ValueError: there are none; the message says why.
    """
    if raw.data is not None:
        return raw.data
    if raw.path is None:
        raise ValueError("neither bytes nor a path is stored")
    try:
        if "://" in raw.path:
            with fsspec.open(raw.path, "rb") as file:
                return cast(bytes, file.read())  # type: ignore[attr-defined]
        return Path(raw.path).read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be opened: {error}") from error


def decode_raw(raw: RawImage, root: str | None = None) -> Image.Image:
    """Decode one raw image to RGB.

    Raises:
        CorruptImageError: it cannot be opened or decoded.
    """
    try:
        return decode_rgb(read_bytes(raw))
    except ValueError as error:
        raise CorruptImageError(raw.index, source_of(raw, root), str(error)) from error


def source_of(raw: RawImage, root: str | None = None) -> str:
    """The name of an image in messages: its path (relative to the dataset's folder) or its row."""
    if not raw.path:
        return f"row {raw.index}"
    return os.path.relpath(raw.path, root) if root and os.path.isabs(raw.path) else raw.path
