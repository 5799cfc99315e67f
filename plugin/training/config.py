"""The configs of the two training runners: SAELens's own, with fields for images.

SAELens's fields keep their names and meanings. `VisionFields` has the fields that both runners add.
"""

from __future__ import annotations

import copy
import dataclasses
import glob
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import wandb
import yaml
from sae_lens.config import (
    T_TRAINING_SAE_CONFIG,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    dict_field,
)
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import SAEMetadata, TrainingSAEConfig

from ...hooks.activations.extract import Extraction
from ...hooks.images.decode import MAX_IMAGE_PIXELS
from ...hooks.images.source import ImageSource
from ...hooks.models.load import expand_hook_names, hook_d_in
from ...registry.errors import ConfigError
from ...registry.files import UnreadableError, read_json, read_yaml, reason, write_atomically
from ...registry.hashing import fingerprint
from ...registry.heads import head_key
from ...registry.names import did_you_mean, nearest
from ...registry.packaged import packaged
from ...registry.presets import refuse_remote_code
from ...registry.ranks import Ranks
from ...registry.table import TAXONOMIES, evaluators_named
from .config_checks import check_fields, training_config_class

logger = logging.getLogger(__name__)

AUTO = "auto"
# Settings that may name a file or folder of this machine; the first of them are saved absolute.
SAVED_ABSOLUTE = ("model_name", "dataset_path", "eval_dataset_path", "taxonomy")
PATHS = (*SAVED_ABSOLUTE, "output_path", "checkpoint_path", "cached_activations_path")
PATHS += ("resume_from_checkpoint", "from_pretrained_path")

BATCH = 4096  # SAELens's default
SMALLEST_BATCH = 8
STEPS = 500  # the default batch makes as many, where it can
FEW_STEPS = 200  # with fewer an SAE can hardly have learned
DEAD_SHARE = 0.1
DEAD_STEPS = 1000  # SAELens's default
NORM_BATCHES = 1000  # SAELens's default

T_SAE_CONFIG = TypeVar("T_SAE_CONFIG", bound=TrainingSAEConfig)


@dataclass
class VisionLoggingConfig(LoggingConfig):
    """SAELens's logging to W&B; a failed upload gives a warning and does not end the run."""

    def log(
        self,
        trainer: Any,
        weights_path: Path | str,
        cfg_path: Path | str,
        sparsity_path: Path | str | None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        if getattr(wandb.run, "disabled", False):
            return
        try:
            named = _ValidlyNamed(trainer)
            super().log(named, weights_path, cfg_path, sparsity_path, wandb_aliases)
        except Exception as error:
            logger.warning(f"W&B did not take the SAE in {Path(weights_path).parent}: {error}")


class _ValidlyNamed:
    """A trainer whose SAE has a name that W&B allows; a model's path may have other characters."""

    def __init__(self, trainer: Any) -> None:
        self.sae = self
        self.cfg = trainer.cfg
        self._name = re.sub(r"[^\w.-]+", "_", trainer.sae.get_name(), flags=re.ASCII)

    def get_name(self) -> str:
        return self._name[-100:]


@dataclass
class VisionFields:
    """The fields that both vision runners add to SAELens's configs.

    Without meaning for images, and refused or named in a warning when changed: `context_size`,
    `seqpos_slice` (use `tokens`), `prepend_bos`, `is_dataset_tokenized`, `use_chat_formatting`,
    `exclude_special_tokens`, `sequence_separator_token`, `disable_concat_sequences`,
    `activations_mixing_fraction` (tokens are shuffled within windows of `n_batches_in_buffer`
    batches) and `model_kwargs`.

    Args:
        model_name (str): A model on the Hugging Face hub, or a local folder.
        model_class_name (str): Recorded in the SAE's metadata; the loader finds the model's family by itself.
        dataset_path (str): An image dataset: a hub name, a folder of class folders, parquet or arrow files, or a saved dataset.
        dataset_name (str, optional): The configuration of a dataset that has several.
        streaming (bool): Stream the dataset in place of downloading it first.
        context_size (int): Set by the runner: the number of tokens that the model gives an image.
        prepend_bos (bool): Without meaning for images.
        n_batches_in_buffer (int): Forward passes over images whose tokens are shuffled together.
        store_batch_size_prompts (int): Images in one forward pass.
        resume_from_checkpoint (str, optional): A checkpoint, the folder of a run's checkpoints (its newest usable one), or "auto": the furthest checkpoint under checkpoint_path that fits this run (those of exactly its settings first), and a fresh start when there is none.
        model_from_pretrained_kwargs (dict[str, Any], optional): More arguments for `load_vision_model`, such as dtype or family.
        tokens (str): Which tokens of an image become training activations: "class", "patch", "register", "all" or "mean_patch" (the mean over an image's patches).
        train_batch_size_tokens (int, optional): Tokens in one step. Defaults to 4096, or, where that makes fewer than 500 steps, to the largest power of 2 from 8 on that makes as many.
        dead_feature_window (int, optional): Steps without firing after which a latent counts as dead. Defaults to a tenth of the run, at most 1000.
        resample_every (int, optional): Steps after which dead latents start again at inputs that are reconstructed badly, each time. Defaults to never.
        n_batches_for_norm_estimate (int, optional): Batches from which normalize_activations estimates norms. Defaults to the steps of the run, at most 1000; to those of the checkpoint in a run that is resumed.
        split (str): The split of the dataset that is trained on.
        holdout (float, optional): Hold out this share of every class of the split for the evaluation, and train on the others.
        holdout_seed (int): Seed of the choice of these images. Runs with other seeds hold out the same ones.
        image_column (str, optional): The column that holds the images. Defaults to the only image column.
        label_column (str, optional): The column that holds the labels. Defaults to the only label column.
        max_images (int, optional): Use only this many images of the split: a fixed random choice, or the first that come when streaming.
        image_size (int, optional): Height and width in pixels of what the model sees. Defaults to the model's own.
        num_workers (int, optional): Worker processes that decode images. 0 decodes in the main process. Defaults to the cores that the process may use but one; 0 for fewer than 1,024 images.
        max_corrupt_share (float): Corrupt images are skipped and counted; a larger share than this stops the run.
        max_image_pixels (int): A picture of more pixels counts as corrupt; decoding one takes up to 24 bytes a pixel.
        jpeg_edge (int, optional): Decode JPEGs at 1/2, 1/4 or 1/8 of their size, as long as both edges keep so many pixels. Faster, and it changes pixel values. Defaults to their own size.
        remote_images (bool): Fetch images that rows of the dataset name by an address (http://, hf://, zip://).
        dataset_trust_remote_code (bool): Passed on to `datasets`. SAELens's default is True.
        attn_implementation (str): "sdpa" (fast) or "eager" (needed by attention hooks).
        revision (str, optional): The revision of the model on the Hugging Face hub.
        use_cached_activations (bool): Compute every activation once, keep it on disk and train from there.
        cached_activations_path (str, optional): The folder of the cached activations. Defaults to "activations/{dataset}/{model}/{hook points}_{tokens}".
        taxonomy (str, optional): The class tree that evaluators measure against: a registered name, a folder, or a CSV or JSON file of parent,child.
        evaluators (list[str]): Evaluators, or all, that run during training, whenever SAELens evaluates (which needs W&B logging).
        eval_dataset_path (str, optional): The dataset of the evaluation. Defaults to dataset_path.
        eval_dataset_name (str, optional): The configuration of the evaluation's dataset. Defaults to dataset_name where the dataset is the same.
        eval_split (str, optional): The held-out split of the evaluation.
        eval_max_images (int, optional): Evaluate on only this many images of the held-out split, chosen likewise. During training, defaults to 2,000, as many of each class, or 5 of each class where that is more.
        checkpoint_id (str, optional): The last part of the checkpoint folder, in place of SAELens's random one. A stable id lets the same command resume its own run.
        sparse_step (bool): Compute a training step of topk, batchtopk, matryoshka_batchtopk, nested_topk and random_matryoshka from the firing latents alone: several times faster, equal up to rounding.
        overwrite_output (bool): Write into output_path even where it holds another run.
        keep_checkpoints (int, optional): Keep only the newest checkpoints. Defaults to keeping all.
        constraint (str, optional): Train a control on random directions: frozen_decoder, soft_frozen_decoder or frozen_encoder. Of several SAEs, a mapping from names to constraints.
    """

    model_name: str = "facebook/dinov2-small"
    model_class_name: str = "SAETransformerBridge"
    dataset_path: str = ""
    dataset_name: str | None = None
    streaming: bool = False
    context_size: int = 1
    prepend_bos: bool = False
    n_batches_in_buffer: int = 20
    store_batch_size_prompts: int = 32
    resume_from_checkpoint: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = dict_field(default=None)
    train_batch_size_tokens: int | None = None
    dead_feature_window: int | None = None
    resample_every: int | None = None
    n_batches_for_norm_estimate: int | None = None
    tokens: str = "class"
    split: str = "train"
    holdout: float | None = None
    holdout_seed: int = 0
    image_column: str | None = None
    label_column: str | None = None
    max_images: int | None = None
    image_size: int | None = None
    num_workers: int | None = None
    max_corrupt_share: float = 0.01
    max_image_pixels: int = MAX_IMAGE_PIXELS
    jpeg_edge: int | None = None
    remote_images: bool = False
    dataset_trust_remote_code: bool = False
    attn_implementation: str = "sdpa"
    revision: str | None = None
    use_cached_activations: bool = False
    cached_activations_path: str | None = None
    taxonomy: str | None = None
    evaluators: list[str] = field(default_factory=list)
    eval_dataset_path: str | None = None
    eval_dataset_name: str | None = None
    eval_split: str | None = None
    eval_max_images: int | None = None
    checkpoint_id: str | None = None
    keep_checkpoints: int | None = None
    constraint: str | None = None
    sparse_step: bool = True
    overwrite_output: bool = False

    def __post_init__(self) -> None:
        cfg: Any = self
        if type(cfg.logger) is LoggingConfig:
            cfg.logger = VisionLoggingConfig(**vars(cfg.logger))
        for name in PATHS:
            if isinstance(value := getattr(cfg, name, None), str):
                setattr(cfg, name, packaged(os.path.expanduser(value)))
        self.evaluators = evaluators_named(self.evaluators or [])
        _take_own_gpu(cfg)
        _fit_to_the_run(cfg)
        check_fields(cfg)
        _round_up_training_tokens(cfg)
        cache_path, checkpoint_root = cfg.cached_activations_path, cfg.checkpoint_path
        # SAELens's summary of a run counts texts; the runner logs one for images.
        verbose, cfg.verbose = cfg.verbose, False
        # SAELens refuses several heads of one hook point, which its store cannot give.
        heads = getattr(cfg, "hook_head_indices", None)
        if heads is not None:
            cfg.hook_head_indices = None
        super().__post_init__()  # type: ignore[misc]  # SAELens's, next in line
        cfg.verbose = verbose
        if heads is not None:
            cfg.hook_head_indices = heads
        if self.checkpoint_id is not None and checkpoint_root is not None:
            cfg.checkpoint_path = f"{checkpoint_root}/{self.checkpoint_id}"
        if self.use_cached_activations and cache_path is None:
            self.cached_activations_path = _default_cache_path(cfg)

    @property
    def defaults_of_length(self) -> tuple[str, ...]:
        """Settings that were not given, and that a longer run which resumes takes from its checkpoint."""
        return getattr(self, "_defaults_of_length", ())

    @property
    def sae_configs(self) -> dict[str, TrainingSAEConfig]:
        """SAE name -> SAE config; the name in the single runner is "sae"."""
        raise NotImplementedError

    @property
    def sae_hook_names(self) -> dict[str, str]:
        """SAE name -> hook point."""
        raise NotImplementedError

    @property
    def sae_heads(self) -> dict[str, int | None]:
        """SAE name -> the head that it is trained on; None: all heads, or a hook point without heads."""
        raise NotImplementedError

    @property
    def sae_keys(self) -> dict[str, str]:
        """SAE name -> the name of its activations in a batch: its hook point, or the head there."""
        return {
            name: head_key(hook_name, self.sae_heads[name], self.sae_configs[name].d_in)
            for name, hook_name in self.sae_hook_names.items()
        }

    @property
    def sae_constraints(self) -> dict[str, str]:
        """SAE name -> its constraint, of the SAEs that have one."""
        constraint: Any = self.constraint
        if not isinstance(constraint, Mapping):
            constraint = dict.fromkeys(self.sae_hook_names, constraint)
        return {name: given for name, given in constraint.items() if given is not None}

    @property
    def unique_hook_names(self) -> list[str]:
        """The hook points, each once, in the order of the SAEs."""
        return list(dict.fromkeys(self.sae_hook_names.values()))

    @property
    def image_source(self) -> ImageSource:
        """The training images."""
        return ImageSource.of(self._setting)

    @property
    def held_out_source(self) -> ImageSource:
        """The evaluation images; the split is None where eval_split is."""
        return self.image_source.held_out(self._setting)

    @property
    def extraction(self) -> Extraction:
        """The training activations."""
        cfg: Any = self
        keys = list(dict.fromkeys(cfg.sae_keys.values()))
        size, dtype, autocast = cfg.image_size, cfg.dtype, cfg.autocast_lm
        return Extraction(keys, cfg.tokens, False, size, dtype, autocast)

    def _setting(self, name: str) -> Any:
        return getattr(self, name, None)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types, local paths made absolute; `from_dict` reads it back."""
        plain = json.loads(json.dumps(super().to_dict(), default=str))  # type: ignore[misc]
        return plain | self.saved_paths

    @property
    def saved_paths(self) -> dict[str, Any]:
        """The model, datasets and tree, as absolute paths where they are files or folders here."""
        return {name: absolute(getattr(self, name)) for name in SAVED_ABSOLUTE}

    def save(self, path: str | Path) -> Path:
        """Write the config to a .json, .yaml or .yml file."""
        path = Path(path)
        if _is_yaml(path):
            return write_atomically(path, yaml.safe_dump(self.to_dict(), sort_keys=False))
        return write_atomically(path, json.dumps(self.to_dict(), indent=2))

    @classmethod
    def load(cls, path: str | Path) -> Any:
        """Read a config from a .json, .yaml or .yml file.

        Raises:
            ConfigError: no such file, not readable as such, or a key or value that is not known.
        """
        path = Path(path)
        try:
            loaded = read_yaml(path) if _is_yaml(path) else read_json(path)
        except (OSError, UnreadableError) as error:
            allowed = "a .json, .yaml or .yml file"
            raise ConfigError(f"config file {path}", reason(error), allowed=allowed) from error
        if not isinstance(loaded, dict):
            raise ConfigError(
                f"config file {path}", "not settings", given=loaded, allowed="`name: value` lines"
            )
        refuse_remote_code(loaded, f"config file {path}")
        return cls.from_dict(loaded)

    @classmethod
    def from_dict(cls, cfg_dict: dict[str, Any]) -> Any:
        """The config that `to_dict`, or a YAML file, describes."""
        raise NotImplementedError


@dataclass
class VisionSAERunnerConfig(VisionFields, LanguageModelSAERunnerConfig[T_TRAINING_SAE_CONFIG]):
    """Config of training one SAE on the activations of a vision model at one hook point.

    Args:
        sae (T_TRAINING_SAE_CONFIG): The SAE: any training config of SAELens or a plugin. Its d_in must be the width at the hook point.
        hook_name (str): The TransformerLens hook point.
        hook_head_index (int, optional): At hook_q, hook_k, hook_v or hook_z, train on this head alone, counted from 0; d_in is then d_head. Defaults to all heads, joined.
    """

    sae: T_TRAINING_SAE_CONFIG
    hook_name: str = "blocks.11.hook_resid_post"

    @property
    def sae_configs(self) -> dict[str, TrainingSAEConfig]:
        return {"sae": self.sae}

    @property
    def sae_hook_names(self) -> dict[str, str]:
        return {"sae": self.hook_name}

    @property
    def sae_heads(self) -> dict[str, int | None]:
        return {"sae": self.hook_head_index}

    @classmethod
    def from_dict(cls, cfg_dict: dict[str, Any]) -> VisionSAERunnerConfig[Any]:
        """The config that `to_dict`, or a YAML file, describes.

        Raises:
            ConfigError: an unknown key (the nearest known ones are listed), or a wrong value.
        """
        cfg_dict = _checked_dict(cls, cfg_dict, required=("sae",))
        sae = sae_config_from_dict(cfg_dict.pop("sae"), "sae")
        return _constructed(cls, cfg_dict, sae=sae)


@dataclass
class VisionMultiSAERunnerConfig(VisionFields, MultiSAETrainingRunnerConfig):
    """Config of training many SAEs, at one or many hook points, from one pass over the images.

    Args:
        saes (Mapping[str, TrainingSAEConfig]): SAE name -> SAE config. A name is also the SAE's folder in output_path.
        hook_names (Mapping[str, str] | str): SAE name -> TransformerLens hook point, or one hook point for all.
        hook_head_indices (dict[str, int | None] | int, optional): SAE name -> the head that it is trained on, or one head for all. SAEs of several heads may share a hook point.
        verbose (bool): Log how many images, tokens and steps the run has.
        constraint (str | dict[str, str], optional): SAE name -> constraint, or one constraint for all.
    """

    verbose: bool = True
    constraint: str | dict[str, str] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def sae_configs(self) -> dict[str, TrainingSAEConfig]:
        return dict(self.saes)

    @property
    def sae_hook_names(self) -> dict[str, str]:
        return dict(self.hook_names_per_sae)

    @property
    def hook_head_indices_per_sae(self) -> dict[str, int | None]:
        given = self.hook_head_indices
        if not isinstance(given, Mapping):
            return dict.fromkeys(self.saes, given)
        return {name: given.get(name) for name in self.saes}

    @property
    def sae_heads(self) -> dict[str, int | None]:
        return self.hook_head_indices_per_sae

    @classmethod
    def from_dict(cls, cfg_dict: dict[str, Any]) -> VisionMultiSAERunnerConfig:
        """The config that `to_dict`, or a YAML file, describes.

        Raises:
            ConfigError: an unknown key (the nearest known ones are listed), or a wrong value.
        """
        cfg_dict = _checked_dict(cls, cfg_dict, required=("saes", "hook_names"))
        saes = cfg_dict.pop("saes")
        if not isinstance(saes, Mapping):
            raise ConfigError(
                "saes", "not possible", given=saes, allowed="a mapping of name to SAE config"
            )
        return _constructed(
            cls,
            cfg_dict,
            saes={name: sae_config_from_dict(sae, f"saes.{name}") for name, sae in saes.items()},
        )


def sae_config_for_hook(
    model: Any,
    hook_name: str,
    template: T_SAE_CONFIG,
    *,
    expansion_factor: float | None = None,
    image_size: int | None = None,
    hook_head_index: int | None = None,
) -> T_SAE_CONFIG:
    """A copy of `template` with the width of the hook point as its d_in.

    Args:
        model: the tapped model.
        hook_name: the hook point.
        template: the SAE config; its d_in is replaced.
        expansion_factor: d_sae as a multiple of d_in; None keeps the template's d_sae.
        image_size: height and width in pixels; None for the model's own.
        hook_head_index: the head of the SAE; None for all heads, joined.

    Raises:
        UnknownNameError: the model has no such hook point; the nearest ones are listed.
        ConfigError: there is no such head.
    """
    d_in = hook_d_in(model, hook_name, image_size, head=hook_head_index)
    changes: dict[str, Any] = {"d_in": d_in}
    if expansion_factor is not None:
        changes["d_sae"] = round(expansion_factor * changes["d_in"])
    # A deep copy: lists such as matryoshka_widths are changed in place when an SAE is built.
    return dataclasses.replace(copy.deepcopy(template), metadata=SAEMetadata(), **changes)


def sae_configs_for_hooks(
    model: Any,
    hook_names: Sequence[str],
    template: T_SAE_CONFIG,
    *,
    expansion_factor: float | None = None,
    image_size: int | None = None,
) -> tuple[dict[str, T_SAE_CONFIG], dict[str, str]]:
    """One SAE per hook point, named after it, for `VisionMultiSAERunnerConfig`.

    Args:
        model: the tapped model.
        hook_names: hook points or patterns, as `expand_hook_names` takes them.
        template: the SAE config; its d_in is replaced by the width at each hook point.
        expansion_factor: d_sae as a multiple of each d_in; None keeps the template's d_sae.
        image_size: height and width in pixels; None for the model's own.

    Returns:
        `saes` and `hook_names`, both keyed by SAE name.

    Raises:
        UnknownNameError: the model has no such hook point; the nearest ones are listed.
    """
    names = expand_hook_names(model, hook_names)
    saes = {
        name: sae_config_for_hook(
            model, name, template, expansion_factor=expansion_factor, image_size=image_size
        )
        for name in names
    }
    return saes, {name: name for name in names}


def sae_config_from_dict(sae: Any, field_name: str) -> TrainingSAEConfig:
    """The SAE config that a mapping with the key "architecture" describes.

    Raises:
        UnknownNameError: the architecture cannot be trained; those that can are listed.
        ConfigError: a key that the architecture does not have, or a value that it refuses.
    """
    if not isinstance(sae, Mapping) or "architecture" not in sae:
        raise ConfigError(
            field_name, "not possible", given=sae, allowed="a mapping with an architecture"
        )
    config_class = training_config_class(sae["architecture"])
    known = {f.name for f in dataclasses.fields(config_class)} | {"architecture"}
    _refuse_unknown_keys(sae, known, prefix=f"{field_name}.")
    try:
        return config_class.from_dict(copy.deepcopy(dict(sae)))
    except (TypeError, ValueError) as error:
        raise ConfigError(field_name, error, allowed=f"see {config_class.__name__}") from error


def absolute(name: str | None) -> str | None:
    """The absolute path of a file or folder, or of a pattern of files; other names as they are."""
    if not name or name in TAXONOMIES or not (os.path.exists(name) or glob.has_magic(name)):
        return name
    return os.path.abspath(name)


def default_batch(training_tokens: int) -> int:
    """The number of tokens in one step where none is given: see `VisionFields`."""
    batch = BATCH
    while batch > SMALLEST_BATCH and math.ceil(training_tokens / batch) < STEPS:
        batch //= 2
    return batch


def _take_own_gpu(cfg: Any) -> None:
    """Of several processes on one machine each computes on a GPU of its own where the device is "cuda"."""
    for name in ("device", "llm_device", "act_store_device"):
        if isinstance(device := getattr(cfg, name, None), str):
            setattr(cfg, name, Ranks.here().device(device))


def _fit_to_the_run(cfg: Any) -> None:
    """Fill in the settings whose defaults depend on the number of tokens and steps."""
    tokens, batch = cfg.training_tokens, cfg.train_batch_size_tokens
    if not isinstance(tokens, int):  # refused by the checks
        tokens = 1
    if batch is None:
        cfg.train_batch_size_tokens = batch = default_batch(tokens)
    steps = math.ceil(tokens / batch) if isinstance(batch, int) and batch > 0 else 1
    if cfg.dead_feature_window is None:
        cfg.dead_feature_window = min(DEAD_STEPS, max(1, round(DEAD_SHARE * steps)))
    if cfg.n_batches_for_norm_estimate is None:
        cfg.n_batches_for_norm_estimate = min(NORM_BATCHES, max(1, steps))
        cfg._defaults_of_length = ("n_batches_for_norm_estimate",)


def _round_up_training_tokens(cfg: Any) -> None:
    """Round training_tokens up to complete batches, which SAELens trains on, so that counts are exact.

    A run of few steps is named in a warning.
    """
    asked, batch = cfg.training_tokens, cfg.train_batch_size_tokens
    n_batches = math.ceil(asked / batch)
    cfg.training_tokens = n_batches * batch
    if cfg.training_tokens != asked:
        logger.info(
            f"training_tokens: {asked} rounded up to {cfg.training_tokens}, "
            f"{n_batches} batches of {batch}."
        )
    if n_batches < FEW_STEPS:
        most = asked // FEW_STEPS
        smaller = f", or a train_batch_size_tokens of at most {most}," if most >= 1 else ""
        logger.warning(
            f"training_tokens: {cfg.training_tokens:,} are {n_batches} steps of {batch:,}, in which "
            f"an SAE hardly learns. {FEW_STEPS} steps need {FEW_STEPS * batch:,} tokens (more "
            f"epochs){smaller} instead."
        )


def _default_cache_path(cfg: Any) -> str:
    """SAELens's path, with the tokens and all hook points, which share one cache."""
    hooks = cfg.unique_hook_names
    if len(hooks) == 1:
        last = hooks[0]
    else:
        last = f"{len(hooks)}_hooks_{fingerprint([' '.join(hooks)], digits=8)}"
    folders = (cfg.image_source.dataset, cfg.model_name, f"{last}_{cfg.tokens}")
    return "/".join(("activations", *(name.strip("/").replace("/", "_") for name in folders)))


def _checked_dict(
    cls: type[Any], cfg_dict: Mapping[str, Any], required: Sequence[str]
) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(cls) if not f.name.startswith("_")}
    _refuse_unknown_keys(cfg_dict, known)
    for name in required:
        if name not in cfg_dict:
            raise ConfigError(name, "not given", allowed=f"see {cls.__name__}")
    return dict(cfg_dict)


def _constructed(cls: type[Any], cfg_dict: dict[str, Any], **built: Any) -> Any:
    """`cls(**cfg_dict)`; a checkpoint_path that ends in its id is kept."""
    logging = cfg_dict.pop("logger", None) or {}
    if not isinstance(logging, Mapping):
        raise ConfigError("logger", "not possible", given=logging, allowed="a mapping")
    _refuse_unknown_keys(logging, {f.name for f in dataclasses.fields(LoggingConfig)}, "logger.")
    if isinstance(cfg_dict.get("seqpos_slice"), list):
        cfg_dict["seqpos_slice"] = tuple(cfg_dict["seqpos_slice"])
    try:
        cfg = cls(**cfg_dict, **built, logger=LoggingConfig(**logging))
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError("config", error, allowed=f"see {cls.__name__}") from error
    # As in SAELens, a path that is read back has its id already.
    path = cfg_dict.get("checkpoint_path", cfg.checkpoint_path)
    if path is None or cfg.checkpoint_id in (None, Path(path).name):
        cfg.checkpoint_path = path
    return cfg


def _refuse_unknown_keys(given: Iterable[Any], known: Iterable[str], prefix: str = "") -> None:
    known = sorted(known)
    for key in given:
        if key not in known:
            near = did_you_mean(nearest(key, known))
            problem = f"not known ({near})" if near else "not known"
            raise ConfigError(prefix + str(key), problem, allowed="a field of the config")


def _is_yaml(path: Path) -> bool:
    return path.suffix.lower() in (".yaml", ".yml")
