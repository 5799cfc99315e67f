"""Checks of a training run that are made before the training starts."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.saes.sae import TrainingSAE
from sae_lens.util import str_to_dtype

from ...hooks.images.dataset import ImageDataset
from ...hooks.images.source import RECORDED_SETTINGS
from ...hooks.models.load import check_device, hook_d_in
from ...hooks.models.tokens import check_tokens, tokens_per_image
from ...registry.errors import ConfigError
from ...registry.files import UnreadableError, read_json_object
from ...registry.names import as_setting
from ...registry.ranks import Ranks
from ...registry.table import EVALUATORS
from ...registry.taxonomies.load import load_taxonomy
from ..evaluation.copies import check_same_bytes
from ..evaluation.held_out import HeldOut, seen_in_training
from .checkpoints import RESTORED, TRAINING_SETTINGS, holds_checkpoints
from .config import AUTO, absolute

logger = logging.getLogger(__name__)

SLOW_BFLOAT16 = 1.5  # times as slow as float32, from which on a warning names it
# Adam keeps two numbers per weight.
CHECKPOINT_FACTOR = 3
# Settings by which two runs are told apart: those on which weights depend, as in the identity of a run. What the
# metadata of an SAE record of the images is among them, but for those of the evaluation.
RUN_SETTINGS = (
    *(
        "sae",
        "saes",
        "hook_name",
        "hook_names",
        "hook_head_index",
        "hook_head_indices",
        "constraint",
    ),
    *("model_name", "revision", "attn_implementation", "model_from_pretrained_kwargs"),
    *("tokens", "image_size", "dtype", "autocast_lm", "use_cached_activations"),
    *("dataset_path", "streaming", "max_images"),
    *(name for name in RECORDED_SETTINGS if not name.startswith("eval_")),
    *("seed", "train_batch_size_tokens", "store_batch_size_prompts", "n_batches_in_buffer"),
    *("from_pretrained_path", *TRAINING_SETTINGS),
)
# Those that a run which is resumed may have changed.
CHANGEABLE = frozenset(TRAINING_SETTINGS) - frozenset(RESTORED)
MIB = 1 << 20


def check_settings(cfg: Any, *, has_dataset: bool) -> None:
    """Check what needs neither model nor data: names of evaluators, devices, a dataset.

    Raises:
        ConfigError: a wrong value; the message names the field, the value and what is allowed.
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
        check_device(field, getattr(cfg, field))


def warn_of_slow_bfloat16(cfg: Any) -> None:
    """Warn where `autocast` or `autocast_lm` makes a run slower: on CPUs without instructions for bfloat16."""
    devices = {"autocast": cfg.device, "autocast_lm": cfg.llm_device}
    on_cpu = [f for f, d in devices.items() if getattr(cfg, f) and torch.device(d).type == "cpu"]
    if not on_cpu or (times := bfloat16_over_float32()) <= SLOW_BFLOAT16:
        return
    for field in on_cpu:
        logger.warning(
            f"{field}: on this CPU a product of matrices takes {times:.1f} times as long in bfloat16 as in "
            "float32; without it the run is faster, and more exact."
        )


def bfloat16_over_float32(size: int = 256, repetitions: int = 3) -> float:
    """Time of a product of matrices on the CPU in bfloat16 over that in float32."""
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        matrix, taken = torch.ones(size, size, dtype=dtype), []
        for _ in range(repetitions):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            taken.append(time.perf_counter() - start)
        seconds.append(min(taken))
    return seconds[0] / seconds[1]


def check_model(cfg: Any, model: Any) -> None:
    """Check that the model has the hook points and tokens, and each SAE the width of its hook point.

    Raises:
        UnknownNameError: a hook point does not exist; the nearest ones are listed.
        ConfigError: a d_in is not the width, or the model does not have such tokens or heads.
    """
    check_tokens(model, cfg.tokens)
    for name, hook_name in cfg.sae_hook_names.items():
        check_tokens(model, cfg.tokens, hook_name)
        head = cfg.sae_heads[name]
        given = cfg.sae_configs[name].d_in
        found = hook_d_in(model, hook_name, cfg.image_size, head=head)
        if given != found:
            at = f"at {hook_name}" if head is None else f"of a head at {hook_name}"
            raise ConfigError(f"{name}.d_in", f"not the width {at}", given=given, allowed=found)
    count_tokens(cfg, model, cfg.tokens)


def check_taxonomy(cfg: Any, images: ImageDataset) -> None:
    """Check that the class tree can be read, and with evaluators that it has the classes of their images.

    Raises:
        ConfigError: it cannot be read, or classes of the images are not in it.
    """
    if cfg.taxonomy is not None:
        has_same_classes = cfg.evaluators and cfg.held_out_source.same_dataset(cfg.image_source)
        load_taxonomy(cfg.taxonomy, classes=(has_same_classes and images.class_names) or None)


def check_held_out(cfg: Any, images: ImageDataset, held_out: HeldOut) -> None:
    """Check that no image is trained on that the SAEs are evaluated on, as the evaluation would later.

    Raises:
        ConfigError: some are, both have the same content, or more than a few have the same bytes.
    """
    begun, source = "the SAE would be trained on", cfg.image_source
    n_images = None if images.is_streaming else len(images)
    if message := seen_in_training(begun, source, images.fingerprint, n_images, held_out):
        raise ConfigError(
            "eval_split",
            message,
            allowed="a held-out split, --holdout 0.2, or no evaluation (--no_evaluate, no evaluators)",
        )
    if Ranks.here().is_first and not images.is_streaming:
        check_same_bytes("eval_split", [images], held_out, allow=False, progress=cfg.verbose)


def count_tokens(cfg: Any, model: Any, tokens: str) -> int:
    """The number of tokens of one image, the same at every hook point of the run.

    Raises:
        ConfigError: it differs between hook points, as between the stages of a CNN.
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
    """Hook point -> number of tokens of one image."""
    return {
        hook_name: tokens_per_image(model, tokens, cfg.image_size, hook_name)
        for hook_name in cfg.unique_hook_names
    }


def check_places(cfg: Any, saes: Iterable[TrainingSAE[Any]], *, cache_bytes: int = 0) -> None:
    """Check that the output folders can be written, and that there is enough disk space.

    Raises:
        ConfigError: the message names the field, the folder, and the bytes needed and free.
    """
    needed = bytes_needed(cfg, saes, cache_bytes=cache_bytes)
    places = {field: Path(getattr(cfg, field)) for field in needed if getattr(cfg, field, None)}
    if not cfg.use_cached_activations:
        places.pop("cached_activations_path", None)
    _check_room({field: _check_writable(field, place) for field, place in places.items()}, needed)


def check_output(cfg: Any) -> None:
    """Check that the output folder does not hold another run, whose SAEs would join this one's.

    A run that is resumed may differ from the result that it writes again in what may change meanwhile, such as
    its length. A setting that the folder does not record is not compared.

    Raises:
        ConfigError: it does, and `overwrite_output` is False; the message names what differs. Or it holds the SAE
            that the run starts from, which would be lost.
    """
    _check_start(cfg)
    if cfg.output_path is None or cfg.overwrite_output:
        return
    folder = Path(cfg.output_path)
    try:
        there = read_json_object(folder / RUNNER_CFG_FILENAME)
    except FileNotFoundError:
        if not (folder / SAE_CFG_FILENAME).exists():
            return
        there = {}
    except (OSError, UnreadableError):
        there = {}
    here = cfg.to_dict()
    excused = CHANGEABLE if cfg.resume_from_checkpoint is not None else ()
    differing = [
        name
        for name in RUN_SETTINGS
        if name not in excused
        and name not in cfg.defaults_of_length  # a longer run has that of its beginning
        and name in there
        and _compared(name, here.get(name)) != _compared(name, there[name])
    ]
    if differing or not there:
        raise ConfigError(
            "output_path",
            f"holds another run (differing in {', '.join(differing) or 'all settings'})",
            given=cfg.output_path,
            allowed="another folder, or overwrite_output=True (--overwrite_output)",
        )


def check_no_checkpoints(cfg: Any, *, has_searched: bool = False) -> None:
    """Check that a run which begins anew does not write among the checkpoints of another one.

    Args:
        cfg: the runner's config.
        has_searched: whether a checkpoint of this run was searched for, and none was found.

    Raises:
        ConfigError: its checkpoint folder has checkpoints already.
    """
    place = cfg.checkpoint_path
    if cfg.resume_from_checkpoint is not None or place is None or not holds_checkpoints(place):
        return
    allowed = f"{as_setting('resume_from_checkpoint', AUTO)}, which goes on from them, or another checkpoint_id"
    if has_searched:
        allowed = (
            "another checkpoint_id, or the settings of their run: "
            f"{as_setting('resume_from_checkpoint', place)} names those that differ"
        )
    raise ConfigError("checkpoint_path", "holds checkpoints already", given=place, allowed=allowed)


def _check_start(cfg: Any) -> None:
    """Check that the SAE that the run starts from is not where the run writes. Raises ConfigError."""
    start = getattr(cfg, "from_pretrained_path", None)
    if start is None or not Path(start).is_dir():  # a single file is none that a run writes
        return
    folder = Path(start).resolve()
    written = [("output_path", folder)]
    if cfg.resume_from_checkpoint is None:  # else its own, which it has left behind
        written.append(("checkpoint_path", folder.parent))
    for field, place in written:
        given = getattr(cfg, field)
        if given is not None and Path(given).resolve() == place:
            raise ConfigError(
                field,
                "the SAE that the run starts from (from_pretrained_path) lies there, and would be lost",
                given=given,
                allowed="another folder",
            )


def _compared(name: str, value: Any) -> Any:
    """A setting without what does not tell runs apart: metadata, devices, how a path is written."""
    if name == "from_pretrained_path":
        return absolute(value)
    if not isinstance(value, dict):
        return value
    left_out = ("metadata", "device")
    return {key: _compared(key, each) for key, each in value.items() if key not in left_out}


def bytes_needed(
    cfg: Any, saes: Iterable[TrainingSAE[Any]], *, cache_bytes: int = 0
) -> dict[str, int]:
    """Field of an output folder -> the most bytes of tensors that the run writes there.

    The checkpoint of an interrupt is counted beside regular ones, and not where there are none.
    """
    weights = sum(_n_bytes(sae) for sae in saes)
    n_checkpoints = cfg.n_checkpoints + 1 if cfg.n_checkpoints else 0
    if cfg.keep_checkpoints is not None:
        n_checkpoints = min(n_checkpoints, cfg.keep_checkpoints + 1)
    n_checkpoints += cfg.save_final_checkpoint
    if cfg.checkpoint_path is None:
        n_checkpoints = 0
    factor = CHECKPOINT_FACTOR + ("soft_frozen_decoder" in cfg.sae_constraints.values())
    return {
        "output_path": weights,
        "checkpoint_path": factor * weights * n_checkpoints,
        "cached_activations_path": cache_bytes,
    }


def cache_size(cfg: Any, model: Any, images: ImageDataset) -> int:
    """Bytes of the activations that `use_cached_activations` writes; 0 where it is off."""
    if not cfg.use_cached_activations or images.is_streaming:
        return 0
    width = sum(hook_d_in(model, name, cfg.image_size) for name in cfg.unique_hook_names)
    per_image = count_tokens(cfg, model, cfg.tokens)
    dtype = str_to_dtype(cfg.dtype)
    stored = torch.float32 if dtype == torch.bfloat16 else dtype  # NumPy has no bfloat16
    return len(images) * per_image * width * stored.itemsize


def _check_writable(field: str, place: Path) -> Path:
    """The existing folder in which `place` is, or will be made; the check creates no folder."""
    there = next(path for path in (place, *place.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError as error:
        problem = f"cannot write into {str(place)!r}: {error.strerror}"
        raise ConfigError(field, problem, allowed="a folder that can be written") from error


def _check_room(places: Mapping[str, Path], needed: Mapping[str, int]) -> None:
    """Check the free space of each disk; fields with folders on one disk share it."""
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
