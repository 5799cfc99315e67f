"""What can go wrong in a training run, found out before the long work starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens.util import str_to_dtype

from ...hooks.images.dataset import ImageDataset
from ...hooks.models.load import hook_d_in, resolve_hook_name
from ...hooks.models.tokens import check_tokens, tokens_per_image
from ...registry.errors import ConfigError
from ...registry.table import EVALUATORS
from ...registry.taxonomies.load import load_taxonomy

# Adam keeps two numbers per weight.
CHECKPOINT_FACTOR = 3
MIB = 1 << 20


def check_settings(cfg: Any, *, has_dataset: bool) -> None:
    """What needs neither model nor data: names of evaluators, devices, a dataset at all.

    Raises:
        ConfigError: naming the field, what was given and what is allowed.
    """
    if not cfg.dataset_path and not has_dataset:
        raise ConfigError(
            "dataset_path",
            "missing",
            given=None,
            allowed="a hub name, a folder of class folders, parquet or arrow files, or a saved dataset",
        )
    for name in cfg.evaluators:
        EVALUATORS[name]
    if cfg.evaluators and cfg.taxonomy is None:
        raise ConfigError(
            "taxonomy", "the evaluators need one", given=None, allowed="a name, a folder or a file"
        )
    for field in ("device", "llm_device", "act_store_device"):
        _check_device(field, getattr(cfg, field))


def check_model(cfg: Any, model: Any) -> None:
    """Whether the model has the hook points and tokens, and the SAEs the width found there.

    Raises:
        UnknownNameError: a hook point that is not there; the nearest ones are listed.
        ConfigError: a d_in that is not the width, or tokens that the model does not have.
    """
    check_tokens(model, cfg.tokens)
    for name, hook_name in cfg.sae_hook_names.items():
        resolve_hook_name(model, hook_name)
        given, found = cfg.sae_configs[name].d_in, hook_d_in(model, hook_name, cfg.image_size)
        if given != found:
            raise ConfigError(
                f"{name}.d_in", f"not the width at {hook_name}", given=given, allowed=found
            )
    count_tokens(cfg, model, cfg.tokens)


def check_taxonomy(cfg: Any, images: ImageDataset) -> None:
    """Whether the class tree can be read, and has the classes that evaluation will meet.

    Raises:
        ConfigError: it cannot, or classes of the images are not in it.
    """
    if cfg.taxonomy is not None and cfg.evaluators:
        has_same_classes = cfg.held_out_source.same_dataset(cfg.image_source)
        load_taxonomy(cfg.taxonomy, classes=(has_same_classes and images.class_names) or None)


def count_tokens(cfg: Any, model: Any, tokens: str) -> int:
    """Tokens of one image, the same at every hook point of the run.

    Raises:
        ConfigError: they differ between hook points, as on the way through a CNN.
    """
    counts = token_counts(cfg, model, tokens)
    if len(set(counts.values())) > 1:
        raise ConfigError(
            "hook_names",
            f"different numbers of {tokens} tokens",
            given=counts,
            allowed="hook points with the same number, or the tokens mean_patch",
        )
    return next(iter(counts.values()))


def token_counts(cfg: Any, model: Any, tokens: str) -> dict[str, int]:
    """Hook point -> tokens of one image there."""
    return {
        hook_name: tokens_per_image(model, tokens, cfg.image_size, hook_name)
        for hook_name in cfg.unique_hook_names
    }


def check_places(cfg: Any, saes: Iterable[TrainingSAE[Any]], *, cache_bytes: int = 0) -> None:
    """Whether everything that the run is to write can be written, and has room.

    Raises:
        ConfigError: naming the field, the place, and the bytes needed and free.
    """
    needed = bytes_needed(cfg, saes, cache_bytes=cache_bytes)
    places = {field: Path(getattr(cfg, field)) for field in needed if getattr(cfg, field, None)}
    if not cfg.use_cached_activations:
        places.pop("cached_activations_path", None)
    _check_room({field: _check_writable(field, place) for field, place in places.items()}, needed)


def bytes_needed(
    cfg: Any, saes: Iterable[TrainingSAE[Any]], *, cache_bytes: int = 0
) -> dict[str, int]:
    """Bytes that the run writes, at most, by the field that says where."""
    weights = sum(_n_bytes(sae) for sae in saes)
    n_checkpoints = cfg.n_checkpoints + 1  # one more for an interrupt
    if cfg.keep_checkpoints is not None:
        n_checkpoints = min(n_checkpoints, cfg.keep_checkpoints + 1)
    n_checkpoints += cfg.save_final_checkpoint
    return {
        "output_path": weights,
        "checkpoint_path": CHECKPOINT_FACTOR * weights * n_checkpoints if cfg.n_checkpoints else 0,
        "cached_activations_path": cache_bytes,
    }


def cache_size(cfg: Any, model: Any, images: ImageDataset) -> int:
    """Bytes of the activations of all images, which `use_cached_activations` writes; 0 without."""
    if not cfg.use_cached_activations or images.is_streaming:
        return 0
    width = sum(hook_d_in(model, name, cfg.image_size) for name in cfg.unique_hook_names)
    per_image = count_tokens(cfg, model, cfg.tokens)
    return len(images) * per_image * width * str_to_dtype(cfg.dtype).itemsize


def _check_device(field: str, value: str | None) -> None:
    try:
        torch.empty(1, device=value)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            field,
            f"torch cannot use it here: {reason}",
            given=value,
            allowed="a device of this machine",
        ) from error


def _check_writable(field: str, place: Path) -> Path:
    """The folder, or the one that it will be made in: a check leaves nothing behind."""
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError as error:
        raise ConfigError(field, f"cannot write into {str(place)!r}: {error.strerror}") from error


def _check_room(places: Mapping[str, Path], needed: Mapping[str, int]) -> None:
    """Fields whose places lie on one disk share its room."""
    disks: dict[int, list[str]] = {}
    for field, place in places.items():
        disks.setdefault(os.stat(place).st_dev, []).append(field)
    for fields in disks.values():
        total = sum(needed[field] for field in fields)
        free = shutil.disk_usage(places[fields[0]]).free
        if total > free:
            raise ConfigError(
                ", ".join(fields),
                f"{_in_mib(total)} needed in {str(places[fields[0]])!r}, {_in_mib(free)} free",
                allowed="more room; fewer n_checkpoints, or keep_checkpoints, need less",
            )


def _n_bytes(sae: TrainingSAE[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in sae.state_dict().values())


def _in_mib(n_bytes: int) -> str:
    return f"{n_bytes / MIB:,.1f} MiB"
