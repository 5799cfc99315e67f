"""Held-out images that are byte for byte images trained on, under whichever names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...hooks.images.dataset import ImageDataset
from ...hooks.images.same_files import same_files
from ...hooks.images.source import ImageSource
from ...registry.errors import ConfigError, TaxolensError
from .held_out import CALLERS_ALONE, HeldOut, of_opened_split
from .sae_folders import SAEFolder

logger = logging.getLogger(__name__)

MAX_COMPARED = 5000  # held-out images whose bytes are compared with those trained on
MAX_SAME = 0.05  # share of them that may be images that were trained on
ALLOWED_AS = {  # the rest of an error, by the setting that it names
    "split": "or allow_train_split=True (--allow_train_split)",
    "eval_split": "or no evaluation (--no_evaluate, no evaluators)",
}


class AlsoTrainedOn(NamedTuple):
    """Held-out images whose bytes are those of an image that was trained on.

    Args:
        n: their number.
        n_compared: number of held-out images that were compared.
        example: one of them, and the image that was trained on; None where there is none.
    """

    n: int
    n_compared: int
    example: tuple[str, str] | None = None

    @property
    def message(self) -> str:
        """What was found, as the start of a sentence."""
        of = f"{self.n:,} of {self.n_compared:,} held-out images"
        return "{} are byte for byte images that are trained on, such as {} and {}".format(
            of, *(self.example or ("", ""))
        )


def check_same_bytes(
    field: str, trained: Sequence[ImageDataset], held_out: HeldOut, *, allow: bool, progress: bool
) -> AlsoTrainedOn | None:
    """Held-out images that are copies of an image that was trained on; None where none can be compared.

    At most `MAX_COMPARED` of the held-out images are compared, a fixed random choice, and files alone:
    not the rows of tables that hold bytes, not streams.

    Args:
        field: the setting that an error names.
        trained: the training images, of SAEs of several runs each.
        held_out: the evaluation images.
        allow: warn only, however many there are.
        progress: show a progress bar.

    Raises:
        ConfigError: they are more than `MAX_SAME` of those compared, and `allow` is False.
    """
    theirs = held_out.images.files()
    if theirs is not None and len(theirs) > MAX_COMPARED:
        order = np.random.default_rng(0).permutation(len(theirs))[:MAX_COMPARED]
        theirs = [theirs[i] for i in np.sort(order)]
    same: dict[int, str] = {}
    any_compared = False
    for each in trained:
        mine = None if theirs is None else each.files()
        if theirs is not None and mine is not None:
            any_compared = True
            same |= same_files(mine, theirs, progress=progress)
    if theirs is None or not any_compared:
        return None
    example = next(((theirs[i], path) for i, path in sorted(same.items())), None)
    found = AlsoTrainedOn(len(same), len(theirs), example)
    if found.n > MAX_SAME * found.n_compared and not allow:
        raise ConfigError(
            field,
            f"{held_out.source.title}: {found.message}",
            allowed=f"at most {MAX_SAME:.0%} of them: remove one of each two files, "
            + ALLOWED_AS.get(field, "or choose other images"),
        )
    if found.n:
        logger.warning("%s: %s.", held_out.source.title, found.message)
    return found


def check_copies(
    saes: Sequence[SAEFolder], held_out: HeldOut, *, allow: bool, progress: bool
) -> AlsoTrainedOn | None:
    """`check_same_bytes` for the training images of SAEs that can be found: by their fingerprint.

    Raises:
        ConfigError: see there.
    """
    images, found, checked = held_out.images, [], set()
    for sae in saes:
        trained_on = ImageSource.of(sae.setting)
        fingerprint, n_images = sae.setting("dataset_fingerprint"), sae.setting("n_images")
        if fingerprint is None or fingerprint in checked or images.is_streaming:
            continue
        checked.add(fingerprint)
        again = of_opened_split(trained_on, fingerprint, n_images, images)
        if again is None and images.files() is not None:
            again = _opened(trained_on, fingerprint, n_images)
        if again is not None:
            found.append(again)
    return check_same_bytes("split", found, held_out, allow=allow, progress=progress)


def _opened(trained_on: ImageSource, fingerprint: str, n_images: int | None) -> ImageDataset | None:
    """The training images, where their folder is still there with the same content."""
    if trained_on.streaming or not Path(str(trained_on.dataset_path)).expanduser().is_dir():
        return None
    limit = n_images or trained_on.max_images
    source = replace(trained_on, **dict.fromkeys(CALLERS_ALONE, False), max_images=limit)
    try:
        images = ImageDataset.of(source)
        return images if images.fingerprint == fingerprint else None
    except TaxolensError:
        return None
