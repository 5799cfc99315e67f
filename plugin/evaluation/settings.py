"""The options of an evaluation, for `evaluate_run` and for the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...registry.errors import ConfigError
from ...registry.files import MAX_IMAGE_PIXELS, is_path
from ...registry.names import unknown_name_message
from ...registry.nulls import CONTROLS, NULLS
from ...registry.packaged import packaged

AGGREGATES = ("max", "mean")
MAX_GROUPS = 1000
HOLDOUT = "a number above 0 and below 1"


@dataclass(frozen=True)
class EvaluationSettings:
    """Every option of an evaluation, by its name in `evaluate_run` and `taxolens evaluate`.

    "The run's" is the value in the settings of the runs, which must be the same in all of them.

    Args:
        evaluators: names of `taxolens list evaluators`, or all; by default the run's
        options: options of evaluators: '{"lch_height": {"rule": "topk"}}'
        taxonomy: a registered name, a folder or a file; by default the run's
        model_name: the model, where it is not the one that the SAEs record; a folder may have moved
        hook_name: the hook point that the SAE reads; by default as recorded
        hook_head_index: the head that it reads there; by default as recorded
        tokens: class, patch, register, all or mean_patch; by default as recorded
        image_size: pixels a side; by default as recorded
        aggregate: an image's latent, of many tokens: the largest in size (max), or their mean
        dataset_path: hub name, folder of class folders, parquet files; by default the run's
        dataset_name: the configuration of a dataset with several
        split: a held-out one; by default the run's, else validation, else test
        holdout: share of every class that is held out of the split; by default the run's
        holdout_seed: of the choice of these images; by default the run's
        image_column: by default the run's, else found
        label_column: by default the run's, else found
        max_images: measure on this many; by default the run's eval_max_images
        allow_train_split: measure on training images; the results record it
        nulls: null controls
        controls: further controls. planted: detectors built from the tree
        n_permutations: draws of the permuted classes; a verdict needs 19
        n_twins: untrained twins of each SAE, the draws of the null random
        n_groups: groups of images, each left out once, for the intervals; 0 for none
        seed: of halves, permutations and twins
        output_path: the folder of the results; by default the run
        replace: measure anew, and drop the numbers that the folder has
        device: by default a GPU where there is one
        batch_size: images in one forward pass
        num_workers: processes that decode images
        max_corrupt_share: share of corrupt images above which the work stops
        max_image_pixels: a larger picture counts as corrupt
        jpeg_edge: decode JPEGs at a reduced size whose edges are at least so long; by default as the run did
        remote_images: fetch images that rows of the dataset name by an address
        trust_remote_code: run code that comes with models and datasets
        keep_activations: keep the activations of the images too
        progress: show progress bars

    Raises:
        ConfigError: a null, control or aggregate that does not exist, too few groups, or a number out of range.
    """

    evaluators: str | Sequence[str] | None = None
    options: Mapping[str, Any] | None = None
    taxonomy: str | None = None
    model_name: str | None = None
    hook_name: str | None = None
    hook_head_index: int | None = None
    tokens: str | None = None
    image_size: int | None = None
    aggregate: str = "max"
    dataset_path: str | None = None
    dataset_name: str | None = None
    split: str | None = None
    holdout: float | None = None
    holdout_seed: int | None = None
    image_column: str | None = None
    label_column: str | None = None
    max_images: int | None = None
    allow_train_split: bool = False
    nulls: Sequence[str] = NULLS
    controls: Sequence[str] = ()
    n_permutations: int = 99
    n_twins: int = 3
    n_groups: int = 5
    seed: int = 0
    output_path: str | Path | None = None
    replace: bool = False
    device: str | None = None
    batch_size: int = 64
    num_workers: int | None = None
    max_corrupt_share: float = 0.01
    max_image_pixels: int = MAX_IMAGE_PIXELS
    jpeg_edge: int | None = None
    remote_images: bool = False
    trust_remote_code: bool = False
    keep_activations: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("model_name", "dataset_path", "taxonomy"):
            object.__setattr__(self, name, packaged(getattr(self, name)))
        for field, given, allowed in (
            ("nulls", self.nulls, NULLS),
            ("controls", self.controls, CONTROLS),
            ("aggregate", [self.aggregate], AGGREGATES),
        ):
            for name in given:
                if name not in allowed:
                    raise ConfigError(unknown_name_message(field, name, allowed))
        for field, least, most in (
            ("n_permutations", 1, 2**31),
            ("n_twins", 1, 2**31),
            ("seed", 0, 2**63 - 1),
            ("max_images", 1, 2**63 - 1),
            ("batch_size", 1, 2**31),
            ("num_workers", 0, 1024),
            ("max_image_pixels", 1, 2**63 - 1),
            ("jpeg_edge", 1, 2**31),
        ):
            given = getattr(self, field)
            if given is not None and not least <= given <= most:
                raise ConfigError(field, "not possible", given=given, allowed=f"{least} to {most}")
        if self.holdout is not None and not 0 < self.holdout < 1:
            raise ConfigError("holdout", "not possible", given=self.holdout, allowed=HOLDOUT)
        if self.n_groups != 0 and not 3 <= self.n_groups <= MAX_GROUPS:
            raise ConfigError(
                "n_groups",
                "not possible",
                given=self.n_groups,
                allowed=f"0, or 3 to {MAX_GROUPS:,}",
            )
        if self.output_path is not None and not is_path(str(self.output_path)):
            allowed = "a path without control characters"
            raise ConfigError("output_path", "no path", given=self.output_path, allowed=allowed)

    def override(self, **options: Any) -> EvaluationSettings:
        """The same settings with other values.

        Raises:
            ConfigError: an option that does not exist; the nearest ones are named.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise ConfigError(unknown_name_message("option of evaluate_run", name, known))
        return dataclasses.replace(self, **options)
