"""Checkpoints with a manifest, by which incomplete and damaged ones are found, and atomic outputs.

docs/formats/checkpoints.md and docs/formats/saes.md define the files.

SAELens's trainer writes a checkpoint file by file into its final folder. The manifest is written
last and atomically: it lists every file with its size and hash, and identifies the run. A folder
without a manifest is incomplete; one whose files differ from it is damaged. The checkpoint before
it is then used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME

from ...registry.coerce import coerce
from ...registry.errors import CheckpointError
from ...registry.files import (
    UnreadableError,
    file_digest,
    inside,
    is_stale,
    read_json_object,
    reason,
    share,
    write_atomically,
)

logger = logging.getLogger(__name__)

MANIFEST_FILENAME = "checkpoint.json"
SCHEMA = "taxolens.checkpoint/2"
READABLE = (SCHEMA, "taxolens.checkpoint/1")
FINAL_PREFIX = "final_"
PARTIAL_FOLDER = ".partial"
# Settings that a checkpoint records beside the facts of its run: see `RunIdentity`.
TRAINING_SETTINGS = (
    *("training_tokens", "lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps"),
    *("n_restart_cycles", "adam_beta1", "adam_beta2", "autocast", "n_batches_for_norm_estimate"),
    *("dead_feature_window", "resample_every", "feature_sampling_window", "compile_llm"),
    "sparse_step",
)
# Settings in place of which a run that resumes has the state of optimizer, schedule and weights.
RESTORED = (
    *("lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps"),
    *("n_restart_cycles", "adam_beta1", "adam_beta2", "from_pretrained_path"),
)
ESTIMATED = ("expected_average_only_in", "covariance_whitening")  # normalizations


@dataclass(frozen=True)
class RunIdentity:
    """What a checkpoint must have in common with the run that resumes from it.

    Attributes:
        fixed: facts on which the weights, and the position in the data, depend.
        training: other settings of the training. Those whose state the checkpoint restores must be
            the same; others take effect from it on.
        defaults: names of those of `training` that follow from the length of the run since none were given,
            and for which a longer run takes the values of its checkpoint. They are not saved.
    """

    fixed: dict[str, Any]
    training: dict[str, Any]
    defaults: tuple[str, ...] = field(default=(), compare=False)

    def taken_from(self, earlier: RunIdentity) -> dict[str, Any]:
        """The values of `defaults` in a checkpoint, where it has them."""
        then = {name: earlier.training.get(name) for name in self.defaults}
        return {name: value for name, value in then.items() if type(value) is int and value > 0}

    def resuming(self, earlier: RunIdentity) -> RunIdentity:
        """The same run, when it goes on from a checkpoint."""
        return replace(self, training={**self.training, **self.taken_from(earlier)})


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of one file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `checkpoint.json`."""

    n_training_samples: int
    n_training_steps: int
    run: RunIdentity
    files: dict[str, FileFacts]


def synced_files(
    folder: Path, is_ours: Callable[[Path], bool] = lambda path: True
) -> dict[str, dict[str, Any]]:
    """Sync files of a checkpoint to the disk; return their entries in the manifest.

    Args:
        folder: the checkpoint.
        is_ours: chooses files by their path relative to the folder; by default all.
    """
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_digest(path, sync=True),
        }
        for path in _files(folder)
        if is_ours(path.relative_to(folder))
    }


def write_manifest(
    folder: Path,
    run: RunIdentity,
    *,
    n_training_samples: int,
    n_training_steps: int,
    files: Mapping[str, Any] | None = None,
) -> None:
    """Write the manifest, which completes the checkpoint.

    Args:
        folder: the checkpoint.
        run: identifies the run.
        n_training_samples: tokens trained on.
        n_training_steps: steps done.
        files: what `synced_files` has returned of all its files; by default it is called.
    """
    share(folder)
    files = dict(sorted((synced_files(folder) if files is None else files).items()))
    content = {
        "schema": SCHEMA,
        "sae_lens_version": sae_lens_version,
        "torch_version": torch.__version__,
        "n_training_samples": n_training_samples,
        "n_training_steps": n_training_steps,
        "run": dict(run.fixed),
        "training": dict(run.training),
        "files": files,
    }
    write_atomically(folder / MANIFEST_FILENAME, json.dumps(content, indent=2))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; its files are not checked.

    Raises:
        CheckpointError: the manifest is missing, not readable, or of another version.
    """
    path = folder / MANIFEST_FILENAME
    try:
        content = read_json_object(path)
        if content["schema"] not in READABLE:
            raise CheckpointError(
                f"checkpoint {folder}",
                "schema: not known",
                given=content["schema"],
                allowed=" or ".join(map(repr, READABLE)),
            )
        content["run"] = {"fixed": content.pop("run"), "training": content.pop("training")}
        return coerce(content, Manifest, path.name)
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {folder}",
            f"incomplete: it has no {MANIFEST_FILENAME}, which is written last",
        ) from None
    except KeyError as error:
        problem = f"damaged: {path.name}: {error} is missing"
        raise CheckpointError(f"checkpoint {folder}", problem) from None
    except (OSError, ValueError) as error:
        problem = f"damaged: {path.name}: {reason(error)}"
        raise CheckpointError(f"checkpoint {folder}", problem) from error


def verify_checkpoint(folder: Path) -> None:
    """Check that every file of the checkpoint is unchanged.

    Raises:
        CheckpointError: it is incomplete or damaged; the message names the file and the fault.
    """
    for name, expected in read_manifest(folder).files.items():
        fault = _fault(folder, name, expected)
        if fault:
            raise CheckpointError(f"checkpoint {folder}", f"damaged: {name} {fault}")


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint can be used."""
    try:
        verify_checkpoint(folder)
    except CheckpointError:
        return False
    return True


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, newest first, incomplete ones included, final ones excluded."""
    folder = Path(folder)
    found = [path for path in _subfolders(folder) if _is_name(path.name) and not _is_run(path)]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def holds_checkpoints(folder: str | Path) -> bool:
    """Whether `folder` has checkpoints of a run with a manifest."""
    return any((path / MANIFEST_FILENAME).exists() for path in checkpoints_in(folder))


def latest_checkpoint(
    folder: str | Path,
    *,
    before: int | None = None,
    wanted: Callable[[Path], bool] = lambda path: True,
) -> Path | None:
    """The newest usable checkpoint of a run; others are named in a warning and skipped.

    Args:
        folder: the folder that holds the run's checkpoints.
        before: only those after fewer training samples than this.
        wanted: chooses among them.
    """
    for path in checkpoints_in(folder):
        if (before is not None and int(path.name) >= before) or not wanted(path):
            continue
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning(f"{error} Using the one before it.")
            continue
        return path
    return None


def resolve_checkpoint(path: str | Path) -> Path:
    """The usable checkpoint at `path`: itself, or the newest in that folder.

    In place of an incomplete or damaged checkpoint it is the one before it in its folder.

    Raises:
        CheckpointError: there is none, or it is the final one, which cannot be resumed.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError("resume_from_checkpoint", f"{path} is not a folder")
    if path.name.startswith(FINAL_PREFIX):
        raise CheckpointError(
            "resume_from_checkpoint",
            f"{path} was written at the end of training, with the normalization of activations folded in; there is nothing to resume. To train on from its weights, give it as from_pretrained_path",
        )
    if not _is_checkpoint(path):
        found = latest_checkpoint(path)
        if found is None:
            raise CheckpointError("resume_from_checkpoint", f"{path} has no complete checkpoint")
        return found
    try:
        verify_checkpoint(path)
        return path
    except CheckpointError as error:
        before = (
            latest_checkpoint(path.parent, before=int(path.name)) if _is_name(path.name) else None
        )
        if before is None:
            raise CheckpointError(
                "resume_from_checkpoint", f"{error} No complete checkpoint comes before it"
            ) from error
        logger.warning(f"{error} Resuming from the one before it, {before}.")
        return before


def find_checkpoint(root: str | Path, run: RunIdentity) -> Path | None:
    """The usable checkpoint of this run with the most training samples, in any folder of `root`.

    One of a run with other settings, which would take effect from it on, is returned only where there is none
    of exactly these settings: it may be further because the run went back behind it to change them.
    """
    root = Path(root)
    found: list[tuple[bool, int, float, Path]] = []
    for folder in [root, *_subfolders(root)]:
        checkpoints = checkpoints_in(folder)
        if not any(_may_be_of(path, run) for path in checkpoints):
            continue
        path = None
        if any(_is_of(path, run) for path in checkpoints):
            path = latest_checkpoint(folder, wanted=lambda path: _is_of(path, run))
        path = path or latest_checkpoint(folder)
        if path is not None and _may_be_of(path, run):
            found.append((_is_of(path, run), int(path.name), path.stat().st_mtime, path))
    return max(found)[3] if found else None


def check_same_run(folder: Path, run: RunIdentity) -> Manifest:
    """Refuse a checkpoint of another run; warn of changed settings that take effect from it on.

    Raises:
        CheckpointError: fields differ; the message names each, the value found and the one wanted.
    """
    manifest = read_manifest(folder)
    run = run.resuming(manifest.run)
    differences = _differences(run.fixed, manifest.run.fixed)
    if differences:
        raise CheckpointError(
            f"checkpoint {folder}", f"belongs to another run: {'; '.join(differences)}"
        )
    overruled = _overruled(manifest, run)
    if overruled:
        raise CheckpointError(
            f"checkpoint {folder}",
            f"its state goes on with other settings: {'; '.join(overruled)}",
            allowed="the values found, or a new run, which may start from its weights "
            "(from_pretrained_path)",
        )
    changed = _differences(run.training, manifest.run.training)
    if changed:
        logger.warning(
            f"resuming {folder} with changed settings, so not as the same run: {'; '.join(changed)}. "
            f"They take effect from here on; {RUNNER_CFG_FILENAME} records them for all of the training."
        )
    return manifest


def _overruled(manifest: Manifest, run: RunIdentity) -> list[str]:
    """The differing settings that would be recorded, and that the state of a checkpoint overrules."""
    names, now = list(RESTORED), run.training
    lasts = now.get("training_tokens")
    if lasts is not None and (
        lasts < manifest.n_training_samples
        or now.get("lr_scheduler_name") != "constant"
        or now.get("lr_decay_steps")
    ):
        names.append("training_tokens")  # the schedule ends with them
    if any(sae.get("normalize_activations") in ESTIMATED for sae in run.fixed["saes"].values()):
        names.append("n_batches_for_norm_estimate")
    then = manifest.run.training
    both = [name for name in names if name in now and name in then]
    return _differences({name: now[name] for name in both}, {name: then[name] for name in both})


def prune_checkpoints(folder: str | Path, keep: int, apart: Collection[str] = ()) -> None:
    """Remove all but the `keep` newest complete checkpoints. Final ones stay.

    Args:
        folder: the folder that holds the run's checkpoints.
        keep: how many stay.
        apart: names of checkpoints that stay as well and are not counted: see `checkpoints_beyond`.
    """
    whole = [path for path in _with_manifest(folder) if path.name not in apart]
    for path in whole[keep:]:
        # Without its manifest a half removed checkpoint counts as incomplete.
        (path / MANIFEST_FILENAME).unlink()
        shutil.rmtree(path)


def checkpoints_beyond(folder: str | Path, n_samples: int) -> list[Path]:
    """Checkpoints after more than `n_samples`, newest first: of a continuation, where a run goes back to that point."""
    return [path for path in _with_manifest(folder) if int(path.name) > n_samples]


def remove_unfinished(folder: str | Path) -> None:
    """Remove the incomplete checkpoints of a run that is resumed, and is its folder's only writer."""
    for path in checkpoints_in(folder):
        if not (path / MANIFEST_FILENAME).exists() and is_stale(path.stat(), 0):
            logger.info(f"removing {path}, which a killed run has left unfinished.")
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def written_whole(folder: str | Path, rank: int = 0) -> Iterator[Path]:
    """Write outputs so that an SAE under its final name is always complete.

    Yields a folder inside `folder` to write into; at the end its files move to their places,
    replacing older ones. Each SAE's cfg.json is removed first and moved last: without it there is
    no SAE to load. After an error while files are written `folder` is unchanged.
    """
    folder = Path(folder)
    # Processes of one job, on several machines, may have the same number.
    partial = folder / f"{PARTIAL_FOLDER}-{os.getpid()}-{rank}"
    try:
        for left in folder.glob(f"{PARTIAL_FOLDER}*"):
            with suppress(FileNotFoundError):  # another rank has finished
                if left == partial or is_stale(left.stat()):
                    shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        share(partial)
        files = sorted(_files(partial), key=lambda path: path.name == SAE_CFG_FILENAME)
        for path in files:
            file_digest(path, sync=True)
        places = {path: folder / path.relative_to(partial) for path in files}
        for place in places.values():
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.name == SAE_CFG_FILENAME:
                place.unlink(missing_ok=True)
        for path, place in places.items():
            os.replace(path, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILENAME
    )


def _fault(folder: Path, name: str, expected: FileFacts) -> str | None:
    try:
        path = inside(folder, name)
    except UnreadableError:
        return "lies outside of it"
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != expected.bytes:
        return f"has {size} bytes in place of {expected.bytes}"
    return None if file_digest(path) == expected.sha256 else "is not as it was written"


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _is_name(name: str) -> bool:
    return name.isdecimal()


def _is_run(folder: Path) -> bool:
    """Whether a folder contains checkpoints: SAELens's random ids may consist of digits too."""
    return any(_is_name(path.name) for path in _subfolders(folder))


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST_FILENAME).exists() or (_is_name(folder.name) and not _is_run(folder))


def _with_manifest(folder: str | Path) -> list[Path]:
    return [path for path in checkpoints_in(folder) if (path / MANIFEST_FILENAME).exists()]


def _is_of(folder: Path, run: RunIdentity) -> bool:
    """Whether the settings of the checkpoint are exactly those of the run."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return not (
        _differences(run.fixed, manifest.run.fixed)
        or _differences(run.resuming(manifest.run).training, manifest.run.training)
    )


def _may_be_of(folder: Path, run: RunIdentity) -> bool:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    run = run.resuming(manifest.run)
    return not _differences(run.fixed, manifest.run.fixed) and not _overruled(manifest, run)


def _differences(wanted: Any, found: Any, field: str = "") -> list[str]:
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        keys = dict.fromkeys([*wanted, *found])
        prefix = f"{field}." if field else ""
        return [
            difference
            for key in keys
            for difference in _differences(wanted.get(key), found.get(key), f"{prefix}{key}")
        ]
    return [] if wanted == found else [f"{field}: found {found!r}, wanted {wanted!r}"]
