"""Checks of the fields of a config that need neither the model nor the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from sae_lens.constants import DTYPE_MAP
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAEConfig, TrainingSAEConfig

from ...hooks.models.tokens import TOKEN_CHOICES
from ...registry.errors import ConfigError, UnknownNameError
from ...registry.files import is_file_name, is_path
from ...registry.names import unknown_name_message
from ...registry.nulls import CONSTRAINTS

logger = logging.getLogger(__name__)

LR_SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")

# (test, description) of allowed values. Only for what SAELens does not refuse itself, or refuses
# after the model and the data have been loaded.
Check = tuple[Callable[[Any], bool], str]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


POSITIVE_INT: Check = (lambda v: _is_int(v) and v > 0, "an integer above 0")
COUNT: Check = (lambda v: _is_int(v) and v >= 0, "an integer, 0 or more")
POSITIVE: Check = (lambda v: _is_number(v) and v > 0, "a number above 0")
SHARE: Check = (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
BETA: Check = (lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
FLAG: Check = (lambda v: isinstance(v, bool), "true or false")
TEXT: Check = (is_path, "a name without control characters")
PATH: Check = (is_path, "a path without control characters, whose parts have at most 255 bytes")
PROCESSES: Check = (lambda v: _is_int(v) and 0 <= v <= 1024, "an integer from 0 to 1024")
ID: Check = (lambda v: isinstance(v, str) and is_file_name(v), "a name that a folder can have")


def _one_of(choices: Iterable[str]) -> Check:
    choices = tuple(choices)
    return (lambda v: v in choices, "one of " + ", ".join(choices))


def _optional(check: Check) -> Check:
    return (lambda v: v is None or check[0](v), f"{check[1]}, or none")


CHECKS: dict[str, Check] = {
    "tokens": _one_of(TOKEN_CHOICES),
    "split": TEXT,
    "holdout": _optional((lambda v: _is_number(v) and 0 < v < 1, "a number above 0 and below 1")),
    "holdout_seed": COUNT,
    "max_images": _optional(POSITIVE_INT),
    "image_size": _optional(POSITIVE_INT),
    "num_workers": _optional(PROCESSES),
    "max_corrupt_share": SHARE,
    "max_image_pixels": POSITIVE_INT,
    "jpeg_edge": _optional(POSITIVE_INT),
    "remote_images": FLAG,
    "dataset_trust_remote_code": FLAG,
    "use_cached_activations": FLAG,
    "eval_max_images": _optional(POSITIVE_INT),
    **dict.fromkeys(
        (
            *("output_path", "checkpoint_path", "cached_activations_path", "taxonomy"),
            *("resume_from_checkpoint", "from_pretrained_path"),
        ),
        _optional(PATH),
    ),
    **dict.fromkeys(
        (
            *("eval_dataset_path", "dataset_name", "eval_dataset_name", "eval_split", "revision"),
            *("image_column", "label_column"),
        ),
        _optional(TEXT),
    ),
    "checkpoint_id": _optional(ID),
    "keep_checkpoints": _optional(POSITIVE_INT),
    "sparse_step": FLAG,
    "overwrite_output": FLAG,
    "model_name": TEXT,
    "streaming": FLAG,
    "training_tokens": POSITIVE_INT,
    "train_batch_size_tokens": POSITIVE_INT,
    "store_batch_size_prompts": POSITIVE_INT,
    "n_batches_in_buffer": POSITIVE_INT,
    "n_batches_for_norm_estimate": POSITIVE_INT,
    "dead_feature_window": POSITIVE_INT,
    "resample_every": _optional(POSITIVE_INT),
    "hook_head_index": _optional(COUNT),
    "feature_sampling_window": POSITIVE_INT,
    "n_checkpoints": COUNT,
    "n_restart_cycles": POSITIVE_INT,
    "seed": COUNT,
    "lr": POSITIVE,
    "lr_scheduler_name": _one_of(LR_SCHEDULERS),
    "lr_warm_up_steps": COUNT,
    "lr_decay_steps": COUNT,
    "adam_beta1": BETA,
    "adam_beta2": BETA,
    "dtype": _one_of(DTYPE_MAP),
    "autocast": FLAG,
    "autocast_lm": FLAG,
}

# Fields of SAELens that have no meaning for images; a changed one would have no effect.
REFUSED: dict[str, tuple[Any, str]] = {
    "seqpos_slice": ((None,), "choose positions with `tokens`"),
    "use_chat_formatting": (False, "images have no chat"),
    "exclude_special_tokens": (False, "choose positions with `tokens`"),
    "model_kwargs": ({}, "give arguments of the model in `model_from_pretrained_kwargs`"),
}
IGNORED: dict[str, Any] = {
    "prepend_bos": False,
    "is_dataset_tokenized": True,
    "sequence_separator_token": "bos",
    "disable_concat_sequences": False,
    "activations_mixing_fraction": 0.5,
}


def check_fields(cfg: Any) -> None:
    """Check what can be checked without the model and the data.

    Raises:
        ConfigError: a wrong value; the message names the field, the value and what is allowed.
    """
    for name, (fits, allowed) in CHECKS.items():
        value = getattr(cfg, name, None)  # SAELens's runner of many SAEs lacks some
        if not fits(value):
            raise ConfigError(name, "not possible", given=value, allowed=allowed)
    for name, (unchanged, instead) in REFUSED.items():
        if getattr(cfg, name, unchanged) not in (unchanged, _as_list(unchanged)):
            raise ConfigError(
                name, "no meaning for images", given=getattr(cfg, name), allowed=instead
            )
    ignored = [k for k, unchanged in IGNORED.items() if getattr(cfg, k, unchanged) != unchanged]
    if ignored:
        logger.warning(f"without meaning for images, and ignored: {', '.join(ignored)}.")
    _check_heads(cfg)
    _check_holdout(cfg)
    _check_schedule(cfg)
    _check_saes(cfg)
    _check_constraint(cfg)


def _each(cfg: Any, field: str) -> list[Any]:
    """The values of a field that may be a mapping from names of SAEs, which are checked."""
    given, several = getattr(cfg, field, None), getattr(cfg, "saes", None)
    if not isinstance(given, Mapping) or several is None:
        return [given]
    for name in given:
        if name not in several:
            raise ConfigError(unknown_name_message(f"{field} of SAE", name, list(several)))
    return list(given.values())


def _check_heads(cfg: Any) -> None:
    fits, allowed = CHECKS["hook_head_index"]
    for head in _each(cfg, "hook_head_indices"):
        if not fits(head):
            raise ConfigError("hook_head_indices", "not possible", given=head, allowed=allowed)


def _check_constraint(cfg: Any) -> None:
    values = _each(cfg, "constraint")
    if cfg.sae_constraints and (path := getattr(cfg, "from_pretrained_path", None)) is not None:
        raise ConfigError(
            "from_pretrained_path",
            "an SAE that is trained further has no random start for a constraint to hold",
            given=path,
            allowed="none, or no constraint",
        )
    for value in values:
        if value is not None and value not in CONSTRAINTS:
            raise ConfigError(
                "constraint", "not known", given=value, allowed=f"{', '.join(CONSTRAINTS)}, or none"
            )


def _check_holdout(cfg: Any) -> None:
    if cfg.holdout is None:
        return
    for name in ("eval_dataset_path", "eval_dataset_name", "eval_split", "streaming"):
        if getattr(cfg, name):
            problem = f"{name} is given too"
            raise ConfigError("holdout", problem, given=cfg.holdout, allowed="one of the two")


def _check_schedule(cfg: Any) -> None:
    steps = math.ceil(cfg.training_tokens / cfg.train_batch_size_tokens)
    ramps = cfg.lr_warm_up_steps + cfg.lr_decay_steps
    if ramps >= steps and ramps:

        def share(ramp: int) -> int:
            return ramp * steps // (2 * ramps)

        raise ConfigError(
            "lr_warm_up_steps + lr_decay_steps",
            "not possible",
            given=ramps,
            allowed=f"below the {steps} steps that training_tokens / train_batch_size_tokens makes: "
            f"more tokens, a smaller batch, or lr_warm_up_steps {share(cfg.lr_warm_up_steps)} and "
            f"lr_decay_steps {share(cfg.lr_decay_steps)}, half of the steps",
        )
    if cfg.lr_decay_steps and cfg.lr_scheduler_name != "constant" and cfg.lr_end == 0.0:
        raise ConfigError(
            "lr_decay_steps", "lr_end is 0, from which nothing decays", allowed="lr_end above 0"
        )
    cycles = cfg.n_restart_cycles
    if cfg.lr_scheduler_name == "cosineannealingwarmrestarts" and cycles > steps - ramps:
        raise ConfigError(
            "n_restart_cycles", "not possible", given=cycles, allowed=f"at most {steps - ramps}"
        )


def _check_saes(cfg: Any) -> None:
    saes = cfg.saes if hasattr(cfg, "saes") else {"sae": cfg.sae}
    if not saes:
        raise ConfigError("saes", "missing", given=None, allowed="at least one")
    for name, sae in saes.items():
        if not isinstance(name, str) or not is_file_name(name):
            raise ConfigError(
                "saes", "not a name", given=name, allowed="a name that a folder can have"
            )
        if not isinstance(sae, SAEConfig):
            raise ConfigError(
                name, "not possible", given=sae, allowed="the training config of an SAE"
            )
        trainable = training_config_class(sae.architecture())
        if not isinstance(sae, TrainingSAEConfig):
            raise ConfigError(
                name,
                "a config with which an SAE is loaded",
                given=type(sae).__name__,
                allowed=f"{trainable.__name__}, to train one",
            )
        for width in ("d_in", "d_sae"):
            if not POSITIVE_INT[0](getattr(sae, width)):
                raise ConfigError(
                    f"{name}.{width}",
                    "not possible",
                    given=getattr(sae, width),
                    allowed=POSITIVE_INT[1],
                )
        for field in fields(sae):
            value = getattr(sae, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(
                    f"{name}.{field.name}", "not possible", given=value, allowed="a finite number"
                )
        k = getattr(sae, "k", None)
        if k is not None and not (_is_number(k) and 0 < k <= sae.d_sae):
            raise ConfigError(
                f"{name}.k",
                "not possible",
                given=k,
                allowed=f"above 0, at most d_sae = {sae.d_sae}",
            )
        steps = math.ceil(cfg.training_tokens / cfg.train_batch_size_tokens)
        for field_name, value in vars(sae).items():
            if field_name.endswith("_warm_up_steps") and _is_int(value) and value > steps:
                problem = "longer than the run"
                raise ConfigError(
                    f"{name}.{field_name}", problem, given=value, allowed=f"up to {steps}"
                )


def training_config_class(architecture: str) -> type[TrainingSAEConfig]:
    """The training config of an architecture by name.

    Raises:
        UnknownNameError: SAELens cannot train it; those that it can train are listed.
    """
    if not isinstance(architecture, str):
        known = ", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY))
        raise UnknownNameError("architecture", "not a name", given=architecture, allowed=known)
    if architecture in SAE_TRAINING_CLASS_REGISTRY:
        return SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    if architecture in SAE_CLASS_REGISTRY:
        raise UnknownNameError(
            "architecture",
            "can be loaded but not trained: SAELens has no training class for it",
            given=architecture,
            allowed=", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY)),
        )
    raise UnknownNameError(
        unknown_name_message("architecture", architecture, list(SAE_TRAINING_CLASS_REGISTRY))
    )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
