"""The evaluation images and their class tree, and the check that no SAE was trained on them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ...hooks.images.dataset import ImageDataset
from ...hooks.images.source import ImageSource
from ...registry.errors import ConfigError
from ...registry.taxonomies.load import TREES, load_taxonomy
from ...registry.taxonomies.taxonomy import Taxonomy
from .sae_folders import SAEFolder
from .sae_sources import of_own_runs

logger = logging.getLogger(__name__)

HELD_OUT_SPLITS = ("validation", "test")
CALLERS_ALONE = ("trust_remote_code", "remote_images")  # never from the files of an SAE


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
        images.require_labels()
        return cls(source, images, tree, load_taxonomy(tree, classes=images.class_names))

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
        allowed="the name of the split to evaluate on, or another dataset_path",
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

    Raises:
        ConfigError: it was, and `allow` is False.
    """
    for sae in saes:
        trained_on = ImageSource.of(sae.setting)
        same_name = trained_on.dataset_path and trained_on.same_images(held_out.source)
        fingerprint = sae.setting("dataset_fingerprint")
        if same_name or fingerprint == held_out.images.fingerprint:
            message = (
                f"{sae.id} was trained on {trained_on.title}, and these are the images it would be "
                "evaluated on"
            )
            if not allow:
                raise ConfigError(
                    "split", message, allowed="a held-out split, or allow_train_split=True"
                )
            logger.warning("%s: no image is held out.", message)
            return True
    return False


def tree_name(saes: Sequence[SAEFolder], given: str | None) -> str:
    """The taxonomy: as given, else from the settings of the runs.

    Raises:
        ConfigError: the runs have different ones, or none.
    """
    own = [sae.setting("taxonomy") for sae in of_own_runs(saes)]
    name = given or (_only(own, "taxonomy") if own else None)
    if not name:
        raise ConfigError("taxonomy", "neither given nor in the run's settings", allowed=TREES)
    return str(name)
