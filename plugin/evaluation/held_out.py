"""The evaluation images and their class tree, and the check that no SAE was trained on them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from ...hooks.images.dataset import ImageDataset
from ...hooks.images.folders import SPLIT_OF_WORD
from ...hooks.images.source import ImageSource
from ...hooks.images.sources import pick_split
from ...registry.errors import ConfigError, TaxolensError
from ...registry.taxonomies.load import load_taxonomy
from ...registry.taxonomies.taxonomy import Taxonomy
from .sae_folders import SAEFolder
from .sae_sources import of_own_runs

logger = logging.getLogger(__name__)

HELD_OUT_SPLITS = ("validation", "test")
CALLERS_ALONE = ("trust_remote_code", "remote_images")  # never from the files of an SAE
MAX_IDS = 5  # that a message names
HOLD_OUT = "--holdout 0.2 holds out a fifth of every class of the split that is trained on."


def held_out_source(saes: Sequence[SAEFolder], **given: Any) -> ImageSource:
    """The source of the evaluation images: as given, else from the settings of the runs.

    Args:
        saes: the SAEs that are evaluated.
        **given: fields of `ImageSource`; those that are None count as not given.

    Raises:
        ConfigError: the runs have different images, or none, and none are given.
    """
    given = {**dict.fromkeys(CALLERS_ALONE, False), **given}
    settings = [sae.setting for sae in of_own_runs(saes)] or [lambda name: None]
    sources = [ImageSource.of(setting).held_out(setting, **given) for setting in settings]
    for field in fields(ImageSource):
        name = field.metadata.get("setting", field.name)
        _only([getattr(source, field.name) for source in sources], name)
    if not sources[0].dataset_path:
        raise ConfigError(
            "dataset_path",
            "neither given nor in the run's settings",
            allowed="a dataset; see `load_images`",
        )
    return sources[0]


@dataclass(frozen=True)
class HeldOut:
    """The evaluation images and the tree of their classes, loaded once for all SAEs.

    Args:
        source: of the images, with its split.
        images: labelled images.
        tree: name or path of the taxonomy.
        taxonomy: over the classes of the images.
    """

    source: ImageSource
    images: ImageDataset
    tree: str
    taxonomy: Taxonomy

    @classmethod
    def load(cls, source: ImageSource, tree: str, images: ImageDataset | None = None) -> HeldOut:
        """Load both, or the tree alone where the images are given.

        Raises:
            ConfigError: no such images or tree, no labels, or classes that the tree does not have.
            DataError: images without a label.
        """
        if images is None:
            images, source = load_images_of(source)
        else:
            source = replace(source, split=source.split or "given")
        labels = images.require_labels()
        found = cls(source, images, tree, load_taxonomy(tree, classes=images.class_names))
        if len(images.class_names) == 1:
            logger.warning(
                "%s has one class, %s: numbers about the tree need several.",
                *(source.title, images.class_names[0]),
            )
        elif found.n_present < len(images.class_names):
            logger.warning(
                "%s: images of %d of its %d classes; the numbers are about these classes.%s",
                *(source.title, found.n_present, len(images.class_names)),
                found._beyond_max_images(1) or f" {HOLD_OUT}",
            )
        elif rare := [images.class_names[i] for i in np.flatnonzero(np.bincount(labels) < 2)]:
            logger.warning(
                "%s: one image of %s: its numbers need two.%s",
                *(source.title, ", ".join(rare[:10]), found._beyond_max_images(2)),
            )
        return found

    @property
    def n_present(self) -> int:
        """Number of classes that have images."""
        return len(np.unique(self.images.labels))

    def _beyond_max_images(self, least: int) -> str:
        """Which classes have fewer than `least` images because of `max_images`; "" where none has.

        A sentence, with a space before it.
        """
        kept, there = (
            np.bincount(labels[labels >= 0], minlength=len(self.images.class_names)) >= least
            for labels in (self.images.labels, self.images.limited(None).labels)
        )
        if not (more := int((there & ~kept).sum())):
            return ""
        return (
            f" max_images (in training eval_max_images) is {len(self.images):,}: without it "
            f"{more} more of the classes would have {least} or more."
        )

    def of_each_class(self, n: int) -> HeldOut:
        """At most `n` of the images of every class."""
        return replace(self, images=self.images.of_each_class(n))

    def limited(self, max_images: int) -> HeldOut:
        """At most `max_images` of the images, the same as those of a source with this `max_images`."""
        if len(self.images) <= max_images:
            return self
        source = replace(self.source, max_images=max_images)
        return replace(self, source=source, images=self.images.limited(max_images))


def load_images_of(source: ImageSource) -> tuple[ImageDataset, ImageSource]:
    """The images, and their source with its split: validation, or else test, where it has none."""
    failures: list[str] = []
    for split in [source.split] if source.split else HELD_OUT_SPLITS:
        chosen = replace(source, split=split)
        try:
            return ImageDataset.of(chosen), chosen
        except ConfigError as error:
            if source.split:
                raise
            failures.append(str(error))
    raise ConfigError(
        "split",
        f"{source.dataset} has no split {' or '.join(HELD_OUT_SPLITS)} ({failures[0].rstrip('.')})",
        allowed="the name of the split to evaluate on, another dataset_path, or, in training, "
        + HOLD_OUT.rstrip("."),
    )


def _only(values: Sequence[Any], name: str) -> Any:
    """The value that all runs share.

    Raises:
        ConfigError: they have different ones.
    """
    distinct = list(dict.fromkeys(map(str, values)))
    if len(distinct) > 1:
        raise ConfigError(
            name,
            "the runs have different ones",
            given=", ".join(distinct[:5]),
            allowed="one for all",
        )
    return values[0]


def check_held_out(saes: Sequence[SAEFolder], held_out: HeldOut, *, allow: bool) -> bool:
    """Whether an SAE was trained on these images, by name or by fingerprint.

    A hold-out from images of which it is not known whether an SAE was trained on them is named in a
    warning.

    Raises:
        ConfigError: it was, and `allow` is False.
    """
    checked = set()
    for sae in saes:
        trained_on = ImageSource.of(sae.setting)
        facts = trained_on, sae.setting("dataset_fingerprint"), sae.setting("n_images")
        if facts in checked:  # of another SAE of the run
            continue
        checked.add(facts)
        if message := seen_in_training(f"{sae.id} was trained on", *facts, held_out):
            if not allow:
                raise ConfigError(
                    "split",
                    message,
                    allowed="a held-out split, or allow_train_split=True (--allow_train_split)",
                )
            logger.warning("%s: no image is held out.", message)
            return True
    unknown = [sae.id for sae in saes if not knows_training(sae)]
    if unknown and held_out.source.holdout is not None:
        more = f" and {len(unknown) - MAX_IDS} more" if len(unknown) > MAX_IDS else ""
        logger.warning(
            "holdout: it is not known which images %s%s were trained on, so that nothing may be held out "
            "from them: %s.",
            *(", ".join(unknown[:MAX_IDS]), more, held_out.source.title),
        )
    return False


def knows_training(sae: SAEFolder) -> bool:
    """Whether an SAE records which images it was trained on; those of other libraries do not."""
    return bool(sae.setting("dataset_fingerprint"))


def seen_in_training(
    begun: str,
    trained_on: ImageSource,
    fingerprint: str | None,
    n_images: int | None,
    held_out: HeldOut,
) -> str | None:
    """In what way SAEs were trained on these images, by name or by content; None: they were not.

    Args:
        begun: the words of the message before the training images, such as "seed0 was trained on".
        trained_on: the training images.
        fingerprint: theirs, None where it is not known.
        n_images: their number, None where it is not known.
        held_out: the evaluation images.
    """
    images = held_out.images
    limit = n_images or trained_on.max_images
    again = of_opened_split(trained_on, fingerprint, n_images, images)
    if (
        fingerprint == images.fingerprint
        or overlap(trained_on, held_out.source)
        or (again is not None and _share_rows(again, images))
        or (again is None and _overlap_elsewhere(trained_on, fingerprint, limit, held_out))
    ):
        return (
            f"{begun} {trained_on.title}, and these are the images it would be evaluated on: "
            f"{held_out.source.title}"
        )
    if images.part and images.part.other == trained_on.part and fingerprint and again is None:
        return (
            f"{held_out.source.dataset_path} has other images than when {begun} "
            f"{trained_on.title}, so that images of the training would be among the held-out"
        )
    return None


def of_opened_split(
    trained_on: ImageSource, fingerprint: str | None, n_images: int | None, images: ImageDataset
) -> ImageDataset | None:
    """The training images, if they are of the split that was opened for `images`, wherever it lies."""
    if fingerprint is None or images.is_streaming:
        return None
    limits = images.limits._replace(jpeg_edge=trained_on.jpeg_edge)
    again = images.parted(trained_on.part, n_images or trained_on.max_images, limits=limits)
    if len(again) != (n_images or len(again)) or again.fingerprint != fingerprint:
        return None
    return again


def _share_rows(one: ImageDataset, other: ImageDataset) -> bool:
    """Whether two parts of one opened split share an image; `max_images` is left aside."""
    if one.part is None or other.part is None:
        return True
    if one.part.other == other.part:
        return False
    first, second = (images.parted(images.part).positions for images in (one, other))
    return bool(np.isin(first, second).any())


def _overlap_elsewhere(
    trained_on: ImageSource, fingerprint: str | None, limit: int | None, held_out: HeldOut
) -> bool:
    """Whether the dataset of the held-out images is that of the training, moved or copied, and both overlap.

    The training images are opened there, where they are another slice of a split, streamed, or have
    other columns. Where they are the split that was opened, it is compared already.
    """
    source = held_out.source
    if fingerprint is None or trained_on.same_dataset(source):
        return False
    as_opened = ("split", "image_column", "label_column")
    if not trained_on.streaming and all(
        getattr(trained_on, name) == getattr(source, name) for name in as_opened
    ):
        return False
    if not set(_bases(trained_on)) & set(_bases(source)):
        return False
    places = ("dataset_path", "name", *CALLERS_ALONE)
    moved = replace(trained_on, **{name: getattr(source, name) for name in places})
    try:
        there = ImageDataset.of(replace(moved, max_images=limit))
        return there.fingerprint == fingerprint and overlap(moved, source)
    except TaxolensError:  # no such split or column: they are others
        return False


def overlap(one: ImageSource, other: ImageSource) -> bool:
    """Whether two selections from one dataset share an image; those of two datasets do not count.

    `max_images` is left aside: of two selections from the same images, all count.
    """
    if not one.dataset_path or not one.same_dataset(other):
        return False
    if one.same_images(other):
        return True
    if one.split == other.split and one.part and other.part and one.part.other == other.part:
        return False
    if not set(_bases(one)) & set(_bases(other)):
        return False
    if one.streaming or other.streaming:
        return True
    return bool(_rows(one) & _rows(other))


def _bases(source: ImageSource) -> list[str]:
    """The splits that slices are taken of, by their usual names."""
    parts = (source.split or "train").split("+")
    return [SPLIT_OF_WORD.get(name, name) for part in parts if (name := part.partition("[")[0])]


def _rows(source: ImageSource) -> set[tuple[str, int]]:
    """The rows that a source selects: the split and the row in it."""
    whole = replace(source, holdout=None, max_images=None)
    names = {part.partition("[")[0] for part in (source.split or "train").split("+")}
    numbers = {n: len(ImageDataset.of(replace(whole, split=n))) for n in names}
    chosen = pick_split(
        DatasetDict(
            {
                name: Dataset.from_dict(
                    {"split": [SPLIT_OF_WORD.get(name, name)] * n, "row": range(n)}
                )
                for name, n in numbers.items()
            }
        ),
        source.split or "train",
    )
    rows = list(zip(chosen["split"], chosen["row"], strict=True))
    if source.part is None:
        return set(rows)
    return {rows[i] for i in source.part.rows(ImageDataset.of(whole).labels)}


def held_out_part(
    saes: Sequence[SAEFolder], source: ImageSource, images: ImageDataset
) -> tuple[ImageSource, ImageDataset]:
    """The held-out part of images given in place of a dataset, where runs held some of them out.

    They are others, and taken as they are, where their other part is not what an SAE was trained on.
    """
    part = source.part
    if part is None or images.part is not None or images.is_streaming:
        return source, images
    for sae in saes:
        rest = images.parted(part.other, sae.setting("n_images") or sae.setting("max_images"))
        if rest.fingerprint == sae.setting("dataset_fingerprint"):
            return source, images.parted(part, source.max_images)
    return replace(source, holdout=None, split=None), images


def tree_name(saes: Sequence[SAEFolder], given: str | None) -> str:
    """The taxonomy: as given, else from the settings of the runs, which have one (`check_complete`).

    Raises:
        ConfigError: the runs have different ones.
    """
    return str(given or _only([sae.setting("taxonomy") for sae in of_own_runs(saes)], "taxonomy"))
