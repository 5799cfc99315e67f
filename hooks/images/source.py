"""`ImageSource`: one value for the selection, the reading and the decoding of images."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...registry.packaged import packaged
from .decode import MAX_IMAGE_PIXELS
from .holdout import Part
from .raw import Limits

Setting = Callable[[str], Any]  # name of a run's setting -> its value, None where it has none

# What an SAE's metadata record of the settings of its run, beside SAELens's own dataset_path.
RECORDED_SETTINGS = (
    *("dataset_name", "split", "image_column", "label_column"),
    *("eval_dataset_path", "eval_dataset_name", "eval_split", "holdout", "holdout_seed"),
    "jpeg_edge",
)

DECODING = ("batch_size", "num_workers", "max_corrupt_share")  # the arguments of `ImageLoader`


def _setting(name: str, default: Any) -> Any:
    """A field that the settings of a run call `name`."""
    return field(default=default, metadata={"setting": name})


@dataclass(frozen=True)
class ImageSource:
    """Which images, how they are read and how they are decoded.

    Built once from the settings of a run and handed on. The size of the model's input is not part
    of it: SAEs of different models are evaluated on the same images.

    Attributes:
        dataset_path: see `load_images`.
        name: the configuration of a dataset that has several.
        split: the split, or a slice of it; None where one that is held out is still to be chosen.
        image_column, label_column: names of columns; None: found automatically.
        max_images: number of images to keep; None: all.
        streaming: read in order without downloading or indexing first.
        trust_remote_code: passed on to `datasets`; never from the settings of a file.
        remote_images: fetch images that rows name by an address (http://, hf://, zip://).
        max_image_pixels: a larger picture counts as corrupt.
        jpeg_edge: decode JPEGs at a reduced size whose edges are at least so long, which changes
            pixel values; None: at their own.
        batch_size: images decoded together, for one forward pass.
        num_workers: processes that decode; 0 decodes in the main process; None: see `workers_for`.
        max_corrupt_share: share of corrupt images, from 0 to 1, above which the work stops.
        holdout: share of every class that is held out from the split; None: none is.
        holdout_seed: of the choice of these images.
        is_held_out: whether this is the held-out part of the split, else the other.
    """

    dataset_path: Any = ""
    name: str | None = _setting("dataset_name", None)
    split: str | None = "train"
    image_column: str | None = None
    label_column: str | None = None
    max_images: int | None = None
    streaming: bool = False
    trust_remote_code: bool = _setting("dataset_trust_remote_code", False)
    remote_images: bool = False
    max_image_pixels: int = MAX_IMAGE_PIXELS
    jpeg_edge: int | None = None
    batch_size: int = _setting("store_batch_size_prompts", 32)
    num_workers: int | None = None
    max_corrupt_share: float = 0.01
    holdout: float | None = None
    holdout_seed: int = 0
    is_held_out: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_path", packaged(self.dataset_path))

    @classmethod
    def of(cls, setting: Setting) -> ImageSource:
        """The images that a run is trained on, from its settings."""
        found = {f.name: setting(f.metadata.get("setting", f.name)) for f in fields(cls)}
        return cls(**{name: value for name, value in found.items() if value is not None})

    def held_out(self, setting: Setting, **given: Any) -> ImageSource:
        """The images that the run is evaluated on: the same but for its `eval_*` settings.

        A configuration counts for the dataset that it is given with. A hold-out is of the split that
        is trained on; another split given without a hold-out replaces it.

        Args:
            setting: the run's settings.
            given: fields that replace what the settings say, except those that are None.
        """
        given = {field: value for field, value in given.items() if value is not None}
        source = self._at(setting("eval_dataset_path"), setting("eval_dataset_name"))
        source = source._at(given.pop("dataset_path", None), given.pop("name", None))
        chosen = {"streaming": False, "max_images": setting("eval_max_images"), "holdout": None}
        if "holdout" in given or (self.holdout is not None and "split" not in given):
            chosen |= {"split": self.split, "holdout": self.holdout, "is_held_out": True}
        else:
            chosen["split"] = setting("eval_split")
        return replace(source, **{**chosen, **given})

    def _at(self, path: Any, name: str | None) -> ImageSource:
        """The same of another dataset; without a `path`, of this one's configuration `name`."""
        if path is None or _real(path) == _real(self.dataset_path):
            name = name or self.name
        return replace(self, dataset_path=path or self.dataset_path, name=name)

    @property
    def dataset(self) -> str:
        """The dataset and its configuration, without the split."""
        return f"{self.dataset_path}/{self.name}" if self.name else str(self.dataset_path)

    @property
    def title(self) -> str:
        """The dataset and the split, as messages name them."""
        parts = (self.name, self.split, self.part)
        return f"{self.dataset_path} ({', '.join(str(part) for part in parts if part)})"

    @property
    def part(self) -> Part | None:
        """The part of the split; None without a hold-out."""
        if self.holdout is None:
            return None
        return Part(self.holdout, self.holdout_seed, self.is_held_out)

    @property
    def limits(self) -> Limits:
        """What reading one image may cost."""
        return Limits(self.remote_images, self.max_image_pixels, self.jpeg_edge)

    @property
    def decoding(self) -> dict[str, Any]:
        """The arguments of `ImageLoader` that are decided here."""
        return {name: getattr(self, name) for name in DECODING}

    def same_dataset(self, other: ImageSource) -> bool:
        """Whether both are of one configuration of one dataset, be it of different splits."""
        return self.name == other.name and _real(self.dataset_path) == _real(other.dataset_path)

    def same_images(self, other: ImageSource) -> bool:
        """Whether both are the same split of one dataset, or the same part of it."""
        return self.same_dataset(other) and (self.split, self.part) == (other.split, other.part)


def _real(path: Any) -> str:
    local = Path(packaged(str(path))).expanduser()
    return os.path.realpath(local) if local.exists() else str(path)
