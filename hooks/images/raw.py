"""One image as it is stored: its position, its encoded bytes or their path, and its label."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import fsspec
import numpy as np
from PIL import Image

from ...registry import files
from ...registry.errors import CorruptImageError
from .decode import MAX_IMAGE_PIXELS, decode_rgb

if TYPE_CHECKING:  # not needed by the worker processes that decode a stream
    from datasets import Dataset


MAX_IMAGE_BYTES = 1 << 28  # of one encoded image


class RawImage(NamedTuple):
    """One undecoded image: its place, its bytes (or the path to read them from) and its label.

    A relative path is relative to `folder`: None is the current one, "" none that is known.
    """

    index: int
    data: bytes | None
    path: str | None
    label: int = -1
    folder: str | None = None

    @property
    def place(self) -> str | None:
        """The path, with the folder before it where it is relative to one; None without a path."""
        if self.path is None or not self.folder or "://" in self.path:
            return self.path
        return os.path.join(self.folder, self.path)

    @property
    def misplaced(self) -> str | None:
        """Why the relative path means no file: words for a message; None where it may mean one."""
        if self.data is not None or self.path is None or self.folder is None:
            return None
        if "://" in self.path or os.path.isabs(self.path):
            return None
        if not self.folder:
            return f"the path {self.path!r} is relative, and the tables lie in several folders"
        if os.path.exists(self.path) and not os.path.exists(str(self.place)):
            return (
                f"there is no file {str(self.place)!r}, and relative paths of a table are relative to "
                "its folder, not to the current one"
            )
        return None


IS_REMOTE = "an address, which only remote_images=True fetches"
TOO_LARGE = re.compile(r"(\d+) x (\d+) pixels exceed max_image_pixels=\d+$")


class Limits(NamedTuple):
    """What reading one image may cost: fetching it from a remote address, and its pixels.

    With `jpeg_edge`, JPEGs are decoded at a reduced size (see `decode_rgb`).
    """

    remote_images: bool = False
    max_image_pixels: int = MAX_IMAGE_PIXELS
    jpeg_edge: int | None = None

    def would_admit(self, reason: str) -> bool:
        """Whether an image was left out, for this `reason`, by limits that these are not."""
        if match := TOO_LARGE.search(reason):
            return int(match[1]) * int(match[2]) <= self.max_image_pixels
        return self.remote_images and reason.endswith(IS_REMOTE)


DEFAULT_LIMITS = Limits()
Job: TypeAlias = int | RawImage  # an index of a map-style dataset, or a streamed image


@dataclass(frozen=True)
class ImageReader:
    """The part of a map-style `ImageDataset` that worker processes need: raw images by index."""

    data: Dataset
    column: str
    rows: np.ndarray | None = None
    folder: str | None = None  # of relative paths: see `RawImage`

    def __call__(self, index: int) -> RawImage:
        """Image `index` of the dataset."""
        row = int(index if self.rows is None else self.rows[index])
        value = self.data[row][self.column] or {}
        data, path = value.get("bytes"), value.get("path")
        return RawImage(int(index), data, path, folder=self.folder)


def read_bytes(raw: RawImage, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The encoded bytes of an image, from memory, a regular file or, if allowed, a remote address.

    Raises:
        ValueError: there are none, or more than `MAX_IMAGE_BYTES`; the message says why.
    """
    if raw.data is not None:
        return raw.data
    if raw.path is None or raw.place is None:
        raise ValueError("neither bytes nor a path is stored")
    if problem := raw.misplaced:
        raise ValueError(problem)
    try:
        if "://" not in raw.path:
            return files.read_bytes(raw.place, MAX_IMAGE_BYTES)
        if not limits.remote_images:
            raise ValueError(IS_REMOTE)
        with fsspec.open(raw.path, "rb") as file:
            data = cast(bytes, file.read(MAX_IMAGE_BYTES + 1))  # type: ignore[attr-defined]
        if len(data) > MAX_IMAGE_BYTES:
            raise ValueError(f"longer than {MAX_IMAGE_BYTES:,} bytes")
        return data
    except Exception as error:  # of an address, whatever its file system raises
        raise ValueError(f"cannot be opened: {error or type(error).__name__}") from error


def decode_raw(
    raw: RawImage, root: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Image.Image:
    """Decode one raw image to RGB.

    Raises:
        CorruptImageError: it cannot be opened or decoded, or exceeds the limits.
    """
    try:
        return decode_rgb(read_bytes(raw, limits), limits.max_image_pixels, limits.jpeg_edge)
    except ValueError as error:
        raise CorruptImageError(raw.index, source_of(raw, root), str(error)) from error


def source_of(raw: RawImage, root: str | None = None) -> str:
    """The name of an image in messages: its path (relative to the dataset's folder) or its row."""
    if not raw.path:
        return f"row {raw.index}"
    return os.path.relpath(raw.path, root) if root and os.path.isabs(raw.path) else raw.path
