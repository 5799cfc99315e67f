"""Images with their labels, read undecoded from any `datasets` image dataset and decoded here.

Reading stays undecoded (`datasets.Image(decode=False)`) so that one corrupt image is a separate
error (`CorruptImageError`) and does not end a run. `ImageLoader` decodes in worker processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset
from PIL import Image

from ...registry.errors import ConfigError, DataError
from ...registry.hashing import fingerprint
from .columns import declared_names, features_of, find_image_column, find_label_column, undecoded
from .decode import MAX_IMAGE_PIXELS
from .holdout import Part
from .raw import DEFAULT_LIMITS, ImageReader, Limits, RawImage, decode_raw, read_bytes, source_of
from .source import ImageSource
from .sources import open_dataset, pick_split
from .workers import worker_context

SUBSET_SEED = 0  # of the permutation whose first `max_images` entries are kept
FINGERPRINT_IMAGES = 256


class ImageDataset:
    """Images by index (map-style) or in order (streaming), with integer labels and class names.

    Args:
        data: a `datasets` dataset with a column of images.
        image_column: its name; found automatically where there is one column of images.
        label_column: its name; found automatically (see `find_label_column`). May be absent.
        root: the folder that image paths are named relative to.
        folder: the folder that relative paths of rows are relative to; None: the current one.
        max_images: keep this many: map-style the first of a seeded permutation of all images (in
            their own order), streaming the first that come.
        name: what to call the dataset in messages.
        limits: what reading one image may cost.
        part: keep this part of a hold-out; `max_images` counts within it.

    Raises:
        ConfigError: a column does not exist or cannot be chosen; the message lists the columns.
        DataError: there are no images.
    """

    def __init__(
        self,
        data: Dataset | IterableDataset,
        *,
        image_column: str | None = None,
        label_column: str | None = None,
        root: str | Path | None = None,
        folder: str | None = None,
        max_images: int | None = None,
        name: str = "dataset",
        limits: Limits = DEFAULT_LIMITS,
        part: Part | None = None,
    ) -> None:
        if max_images is not None and max_images < 1:
            allowed = "1 or more, or None for all"
            raise ConfigError("max_images", "too small", given=max_images, allowed=allowed)
        if limits.max_image_pixels < 1:
            given, allowed = limits.max_image_pixels, "1 or more"
            raise ConfigError("max_image_pixels", "too small", given=given, allowed=allowed)
        if limits.jpeg_edge is not None and limits.jpeg_edge < 1:
            given, allowed = limits.jpeg_edge, "1 or more, or None"
            raise ConfigError("jpeg_edge", "too small", given=given, allowed=allowed)
        self.name = name
        self.limits = limits
        self.part = part
        self.root = None if root is None else os.path.abspath(root)
        self.folder = folder
        self.is_streaming = isinstance(data, IterableDataset)
        if isinstance(data, Dataset) and len(data) == 0:
            raise DataError(name, "no images")
        data = data.with_format(None)  # a transform, or a format, of the dataset would change rows
        features = features_of(data, name)
        self.image_column = find_image_column(features, image_column)
        self.label_column = find_label_column(features, label_column, self.image_column)
        self._label_feature = features[self.label_column] if self.label_column else None
        columns = [c for c in (self.image_column, self.label_column) if c is not None]
        data = data.select_columns(columns)
        self._data = undecoded(data, self.image_column)
        self._limit = max_images
        if part is not None and self.is_streaming:
            problem = "images that are streamed cannot be divided by class"
            raise ConfigError("holdout", problem, given=part.share, allowed="streaming=False")
        self._rows: np.ndarray | None = None if part is None else part.rows(self._all_labels[0])
        if self._rows is not None and not len(self._rows):
            problem = "no class has images enough for both parts"
            raise DataError("holdout", problem, given=part and part.share, allowed="more images")
        if isinstance(data, Dataset) and max_images is not None and max_images < len(self):
            order = np.sort(np.random.default_rng(SUBSET_SEED).permutation(len(self))[:max_images])
            self._rows = order if self._rows is None else self._rows[order]

    @classmethod
    def of(cls, source: ImageSource) -> ImageDataset:
        """The images of a source. Raises what `load_images` raises."""
        if source.num_workers:  # None: only once the number of images is known
            worker_context()  # they are ready when the model is
        options: dict[str, Any] = {
            "image_column": source.image_column,
            "label_column": source.label_column,
            "max_images": source.max_images,
            "limits": source.limits,
            "part": source.part,
        }
        data, split = source.dataset_path, source.split or "train"
        if isinstance(data, dict):  # DatasetDict, IterableDatasetDict
            data = pick_split(data, split)
        if isinstance(data, Dataset | IterableDataset):
            return cls(data, **options)
        opened, root, folder, retyped = open_dataset(
            data,
            split=split,
            name=source.name,
            streaming=source.streaming,
            trust_remote_code=source.trust_remote_code,
            image_column=source.image_column,
        )
        images = cls(opened, root=root, folder=folder, name=source.title, **options)
        if text := retyped.get(images.label_column or ""):
            raise ConfigError(
                "label_column",
                f"in metadata.csv the label {text!r} of {images.label_column!r} is read as a number or as none",
                given=str(source.dataset_path),
                allowed="metadata.jsonl, or a table of another name beside the images, which keep the text",
            )
        images._check_paths()
        return images

    def _check_paths(self) -> None:
        """Check that a relative path of a table can mean a file: with the first one, before any is read.

        Raises:
            ConfigError: it cannot.
        """
        if self.folder is None or self.is_streaming:  # streamed images say so one by one
            return
        if problem := self.reader(0).misplaced:
            raise ConfigError(
                self.name,
                f"image 0: {problem}",
                allowed="paths relative to the folder of the table, or absolute ones",
            )

    def limited(self, max_images: int | None) -> ImageDataset:
        """Those of the images that `max_images` keeps, None all; the dataset is not opened again."""
        return self._again(max_images, self.part)

    def of_each_class(self, n: int) -> ImageDataset:
        """At most `n` of the images of every class, by a fixed seed; the dataset is not opened again."""
        labels = self.labels
        order = np.random.default_rng(SUBSET_SEED).permutation(len(self))
        order = order[np.argsort(labels[order], kind="stable")]
        among_its_class = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
        kept = np.sort(order[among_its_class < n])
        chosen = self._again(self._limit, self.part)
        chosen._rows = kept if chosen._rows is None else chosen._rows[kept]
        return chosen

    def parted(
        self, part: Part | None, max_images: int | None = None, *, limits: Limits | None = None
    ) -> ImageDataset:
        """That part of the split that was opened, None all of it; the dataset is not opened again.

        Read within `limits`, where they are given, in place of its own.
        """
        return self._again(max_images, part, limits)

    def _again(
        self, max_images: int | None, part: Part | None, limits: Limits | None = None
    ) -> ImageDataset:
        return ImageDataset(
            self._data,
            image_column=self.image_column,
            label_column=self.label_column,
            root=self.root,
            folder=self.folder,
            max_images=max_images,
            name=self.name,
            limits=limits or self.limits,
            part=part,
        )

    @property
    def positions(self) -> np.ndarray:
        """int64 (N,): the place of each image in the split that was opened.

        Raises:
            TypeError: the dataset is streaming.
        """
        return np.arange(len(self)) if self._rows is None else self._rows

    def __len__(self) -> int:
        """Number of images.

        Raises:
            TypeError: the dataset is streaming: the number is not known.
        """
        if isinstance(self._data, IterableDataset):
            raise TypeError(f"{self.name} is streaming: its length is not known.")
        return len(self._data) if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        size = "streaming" if self.is_streaming else f"{len(self)} images"
        return f"ImageDataset({self.name!r}, {size}, {len(self.class_names)} classes)"

    @property
    def map_style(self) -> Dataset:
        """The `datasets` dataset behind a map-style one.

        Raises:
            ConfigError: the dataset is streaming.
        """
        if isinstance(self._data, IterableDataset):
            problem = f"the images of {self.name} cannot be read by index"
            raise ConfigError("streaming", problem, given=True, allowed="False")
        return self._data

    @cached_property
    def reader(self) -> ImageReader:
        """Reads raw images by index; picklable, so that worker processes can have it."""
        data = self.map_style.select_columns([self.image_column])
        return ImageReader(data, self.image_column, self._rows, self.folder)

    def decode(self, index: int) -> Image.Image:
        """Image `index` as an upright RGB image (see `decode.py`).

        Raises:
            CorruptImageError: it cannot be read.
        """
        return decode_raw(self.reader(index), self.root, self.limits)

    def source(self, index: int) -> str:
        """The name of image `index` in messages: its path, or its row."""
        return source_of(self.reader(index), self.root)

    def files(self) -> list[str] | None:
        """The path of each image; None where they are no local files: streamed, rows with bytes, remote."""
        if self.is_streaming or self.reader(0).data is not None:
            return None
        column = self.reader.data.with_format("arrow")[:][self.image_column]
        if any(chunk.field("bytes").null_count < len(chunk) for chunk in column.chunks):
            return None
        paths = [path or "" for chunk in column.chunks for path in chunk.field("path").to_pylist()]
        chosen = (paths[i] for i in self.positions)
        found = [RawImage(0, None, path, folder=self.folder).place or "" for path in chosen]
        return None if any("://" in path for path in found) else found

    # -- labels ---------------------------------------------------------------------------------

    @cached_property
    def _all_labels(self) -> tuple[np.ndarray, list[str]]:
        """The label of each image of the split, and the names of the classes."""
        column = self.label_column
        if column is None:
            return np.full(len(self.map_style), -1, dtype=np.int64), []
        values = self.map_style.select_columns([column]).with_format("arrow")[:][column]
        if isinstance(self._label_feature, datasets.ClassLabel):
            labels = values.to_pandas().fillna(-1).to_numpy().astype(np.int64)
            names = declared_names(self._label_feature)
            if len(labels) and labels.max() >= len(names):
                raise DataError(
                    f"label column {column!r}",
                    "a label has no name",
                    given=int(labels.max()),
                    allowed=f"below {len(names)}, the number of names",
                )
        else:
            encoded = values.combine_chunks().dictionary_encode()
            found = encoded.dictionary.to_pylist()
            # -1 and the empty text stand for no class, as in splits whose labels are kept back.
            named = [i for i, value in enumerate(found) if value not in (-1, "")]
            order = sorted(named, key=lambda i: found[i])
            rank = np.full(len(found) + 1, -1, dtype=np.int64)  # the last one is of missing labels
            rank[order] = np.arange(len(order))
            labels = rank[encoded.indices.to_pandas().fillna(-1).to_numpy().astype(np.int64)]
            names = [str(found[i]) for i in order]
        return labels, names

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,): index of each image's class in `class_names`; -1 where there is no label."""
        labels, _ = self._all_labels
        return labels if self._rows is None else labels[self._rows]

    @cached_property
    def class_names(self) -> list[str]:
        """What the labels mean: the dataset's own names, else the sorted distinct values as text.

        Empty without labels, and for a streaming dataset that does not declare its names.
        """
        if not self.is_streaming:
            return self._all_labels[1]
        return declared_names(self._label_feature)

    def require_labels(self) -> np.ndarray:
        """int64 (N,): `labels`, where the work ahead needs one for every image.

        Raises:
            ConfigError: there is no label column.
            DataError: some images have no label.
        """
        if self.label_column is None and self.root is not None:
            raise ConfigError(
                "dataset_path",
                f"the images of {self.name} lie in no class folder, and no file names their classes",
                allowed="class folders, or a file of labels beside the images: docs/data.md",
            )
        if self.label_column is None:
            raise ConfigError(
                "label_column",
                f"no column of labels is recognised in {self.name}, beside the image column "
                f"{self.image_column!r}",
                given=None,
                allowed="the name of the column of classes",
            )
        labels = self.labels
        missing = int((labels < 0).sum())
        if missing:
            raise DataError(
                f"label column {self.label_column!r}",
                f"{missing} of {len(labels)} images have no label, the first of them image "
                f"{int(np.argmax(labels < 0))}",
            )
        return labels

    # -- streaming ------------------------------------------------------------------------------

    @property
    def n_shards(self) -> int:
        """Number of shards of a streaming dataset that can be read apart; one where `max_images` is set.

        Raises:
            ConfigError: the dataset is not streaming.
        """
        return 1 if self._limit is not None else self._stream.num_shards

    @property
    def _stream(self) -> IterableDataset:
        if not isinstance(self._data, IterableDataset):
            problem = f"{self.name} is read by index"
            raise ConfigError("streaming", problem, given=False, allowed="True")
        return self._data

    @property
    def n_at_most(self) -> int | None:
        """Number of images, of a streaming dataset `max_images`; None where it has none."""
        return self._limit if self.is_streaming else len(self)

    def stream(
        self,
        *,
        seed: int | None = None,
        epoch: int = 0,
        skip: int = 0,
        shuffle_buffer: int = 2000,
        shards: Iterable[int] | None = None,
    ) -> Iterator[RawImage]:
        """The images of one epoch of a streaming dataset, raw, after the first `skip`.

        With a `seed` the shards come in an order that `seed` and `epoch` make, and their images
        through a buffer of `shuffle_buffer`, each time the next image takes the place of a random
        one. Without one `shards` are read in their order, by default all. `index` is the place in the
        stream (within a shard of several: counted from shard * 2**32) whatever the order.
        """
        if seed is None:
            raws = self._streamed(range(self.n_shards) if shards is None else shards)
        else:
            generator = np.random.default_rng([seed, epoch])
            order = generator.permutation(self.n_shards)
            raws = _shuffled(self._streamed(order), generator, shuffle_buffer)
        return islice(raws, skip, None)

    def _streamed(self, shards: Iterable[int]) -> Iterator[RawImage]:
        data, n_shards = self._stream, self.n_shards
        for shard in shards:
            part = data if n_shards == 1 else data.shard(n_shards, int(shard))
            for place, example in enumerate(islice(part, self._limit)):
                image = example[self.image_column] or {}
                label = example.get(self.label_column) if self.label_column else None
                yield RawImage(
                    int(shard) << 32 | place,
                    image.get("bytes"),
                    image.get("path"),
                    label if isinstance(label, int) else -1,
                    self.folder,
                )

    # -- identity -------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the images, the same wherever the files lie.

        Made of the number of images, all labels, the class names, and names and bytes of 256
        images spread evenly (streaming: of the first 16); and of `jpeg_edge`, where it is given.
        """
        sample: Iterator[RawImage]
        if self.is_streaming:
            parts: list[str | bytes] = [repr(("streaming", self._limit, self.class_names))]
            sample = islice(self.stream(), 16)
        else:
            parts = [repr((len(self), self.class_names))]
            parts.append(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
            spread = np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_IMAGES).astype(int))
            sample = (self.reader(int(index)) for index in spread)
        if self.limits.jpeg_edge is not None:
            parts.append(f"jpeg_edge {self.limits.jpeg_edge}")
        for raw in sample:
            parts.append(os.path.basename(raw.path or ""))
            try:
                parts.append(bytes.fromhex(fingerprint([read_bytes(raw, self.limits)], digits=64)))
            except ValueError:
                parts.append("unreadable")
        return fingerprint(parts)


def load_images(
    dataset_path: str
    | Path
    | Dataset
    | IterableDataset
    | datasets.DatasetDict
    | datasets.IterableDatasetDict,
    *,
    split: str = "train",
    name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    trust_remote_code: bool = False,
    max_images: int | None = None,
    remote_images: bool = False,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    jpeg_edge: int | None = None,
) -> ImageDataset:
    """Images from anything that the `datasets` library can read.

    Args:
        dataset_path: a dataset on the Hugging Face hub; a folder of class folders (nested ones
            too: the class is the innermost folder), with or without a folder for each split above
            them; a parquet, arrow, tar, csv or json file, or a glob pattern of
            such; a folder of them; a folder written by `save_to_disk`; or a `datasets` object; "demo:pictures", the packaged ones.
        split: which split; slices such as ``"train[:10%]"`` work unless streaming.
        name: the configuration of a dataset on the hub, or of a folder with a card, that has
            several.
        image_column: see `ImageDataset`.
        label_column: see `ImageDataset`.
        streaming: read in order without downloading or indexing first.
        trust_remote_code: passed on to `datasets` (which no longer runs loading scripts).
        max_images: see `ImageDataset`.
        remote_images: fetch images that rows name by an address (http://, hf://, zip://).
        max_image_pixels: a larger picture counts as corrupt.
        jpeg_edge: decode JPEGs at 1/2, 1/4 or 1/8 of their size, as long as both edges keep so many
            pixels. It is faster and changes pixel values.

    Raises:
        ConfigError: no such path, split, configuration or column; the message lists what there is.
        DataError: no images, a damaged file, or the hub cannot be reached.
    """
    source = ImageSource(
        dataset_path,
        name,
        split=split,
        image_column=image_column,
        label_column=label_column,
        streaming=streaming,
        trust_remote_code=trust_remote_code,
        max_images=max_images,
        remote_images=remote_images,
        max_image_pixels=max_image_pixels,
        jpeg_edge=jpeg_edge,
    )
    return ImageDataset.of(source)


def _shuffled(
    raws: Iterator[RawImage], generator: np.random.Generator, size: int
) -> Iterator[RawImage]:
    buffer = list(islice(raws, size))
    for raw in raws:
        place = int(generator.integers(size))
        yield buffer[place]
        buffer[place] = raw
    for place in generator.permutation(len(buffer)):
        yield buffer[place]
