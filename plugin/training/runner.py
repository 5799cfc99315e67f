"""The two training runners: SAELens's, with a vision model and images.

The trainers, their loop, the schedules and `run()` are SAELens's. This module loads and checks the
inputs of a run; `resumable_session.py` stops and resumes it, and writes its files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import HfDataset, SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

from ...hooks.activations.cache import ActivationCache
from ...hooks.activations.stream import ActivationStream
from ...hooks.images.dataset import ImageDataset
from ...hooks.images.source import RECORDED_SETTINGS
from ...hooks.models.load import load_vision_model
from ...registry.errors import CheckpointError, ConfigError, TaxolensError
from ...registry.files import why
from ...registry.loaders.parts.old_folder import read_folder
from ...registry.loaders.parts.read import Source, load_source
from ...registry.loaders.parts.training_checkpoint import is_training_checkpoint
from ...registry.ranks import Ranks
from ...registry.table import ARCHITECTURES
from ..evaluation.held_out import HeldOut
from ..evaluation.sae_folders import SAE_SCHEMA, check_usable
from . import preflight
from .activations_store import VisionActivationsStore
from .checkpoints import (
    TRAINING_SETTINGS,
    RunIdentity,
    check_same_run,
    find_checkpoint,
    resolve_checkpoint,
)
from .config import AUTO, VisionMultiSAERunnerConfig, VisionSAERunnerConfig, absolute
from .constraint import Constraint
from .data_parallel import check_divisible
from .dealing import owners
from .dry_run import of_each_kind, rehearse
from .evaluation_slot import EvaluationSlot
from .interrupts import TrainingInterrupted
from .lockstep import END, follow
from .resumable_session import TrainedSAE, TrainingSession
from .rng import seeded
from .step_choice import with_step_of

logger = logging.getLogger(__name__)

SEVERAL_EPOCHS = 2  # from which on a run without a cache says that there is one


class _VisionRun:
    """The shared part of the two runners; it comes before SAELens's runner in the method order."""

    cfg: Any
    model: Any
    images: ImageDataset
    session: TrainingSession
    slot: EvaluationSlot
    activations_store: Any
    ranks: Ranks
    all_saes: dict[str, TrainingSAE[Any]]

    def _load_inputs(self, override_dataset: Any, override_model: Any, held_out: Any) -> None:
        """Load the model and the images, each checked against the config once it is loaded."""
        cfg = self.cfg
        self.held_out: HeldOut | None = held_out
        for what, override, configured in (
            ("dataset", override_dataset, cfg.image_source.title),
            ("model", override_model, cfg.model_name),
        ):
            if override is not None and _name_of(override) != configured:
                logger.warning(
                    f"override_{what} replaces the config's {what}: this run cannot be repeated "
                    "from its config alone."
                )
        preflight.check_settings(cfg, has_dataset=override_dataset is not None)
        preflight.warn_of_slow_bfloat16(cfg)
        self.model = override_model if override_model is not None else load_model(cfg)
        preflight.check_model(cfg, self.model)
        of_each_kind(
            cfg.sae_configs,
            lambda name, sae: rehearse(name, sae, cfg.device, lambda sae: with_step_of(cfg, sae)),
        )
        if cfg.compile_llm:
            compile_model(self.model, cfg.llm_compilation_mode)
        cfg.context_size = max(preflight.token_counts(cfg, self.model, "all").values())
        source = cfg.image_source
        if isinstance(override_dataset, ImageDataset):
            self.images = override_dataset
            if source.part is not None and override_dataset.part is None:
                self.images = override_dataset.parted(source.part, source.max_images)
        else:
            if override_dataset is not None:
                source = replace(source, dataset_path=override_dataset)
            self.images = ImageDataset.of(source)
        if held_out is None:
            preflight.check_taxonomy(cfg, self.images)
        else:
            preflight.check_held_out(cfg, self.images, held_out)

    def _connect(
        self,
        saes: dict[str, TrainingSAE[Any]],
        key: str | None,
        all_saes: dict[str, TrainingSAE[Any]],
    ) -> None:
        """Connect activations, SAEs and output folders; find the checkpoint to resume from.

        Args:
            saes: the SAEs that this process trains.
            key: the name of the activations of the single runner's SAE in a batch.
            all_saes: those of all processes; of the others the weights are not needed.
        """
        cfg = self.cfg
        self.all_saes = all_saes
        for sae in saes.values():
            sae.to(cfg.device)
        constraints = {
            name: Constraint(saes[name], kind)
            for name, kind in cfg.sae_constraints.items()
            if name in saes
        }
        store = VisionActivationsStore(self._stream(), key)
        identity = _identity(cfg, all_saes, store.stream)
        self.activations_store = store
        self.session = TrainingSession(cfg, saes, store, identity, constraints, self.ranks)
        self.slot = EvaluationSlot(lambda: self._stream(seed=cfg.seed + 1), self.ranks)
        cache_bytes = preflight.cache_size(cfg, self.model, self.images)
        preflight.check_places(cfg, all_saes.values(), cache_bytes=cache_bytes)
        find_resume_point(cfg, identity)
        preflight.check_output(cfg)
        if cfg.verbose and self.ranks.is_first:
            logger.info(self._account())

    def _stream(self, hook_names: Sequence[str] | None = None, **changes: Any) -> ActivationStream:
        cfg = self.cfg
        wanted = cfg.extraction
        if hook_names is not None:
            wanted = replace(wanted, hook_names=hook_names)
        order = {"seed": cfg.seed, "n_batches_in_buffer": cfg.n_batches_in_buffer, **changes}
        return ActivationStream(
            self.model,
            self.images,
            wanted,
            source=cfg.image_source,
            train_batch_size_tokens=cfg.train_batch_size_tokens,
            device=cfg.act_store_device,
            progress=cfg.verbose and self.ranks.is_first,
            **order,
        )

    def _own_stream(self) -> ActivationStream:
        """The training activations for the SAEs of this process."""
        cfg = self.cfg
        owner: dict[str, set[int]] = {key: set() for key in cfg.sae_keys.values()}
        for name, rank in owners(self.ranks, cfg.sae_configs).items():
            owner[cfg.sae_keys[name]].add(rank)
        if isinstance(cfg, VisionSAERunnerConfig):  # which all ranks train
            owner = {cfg.sae_keys["sae"]: set(range(self.ranks.size))}
        if not cfg.use_cached_activations:
            return self._stream(ranks=self.ranks, takers=owner)
        cache = self._cache()
        own = [name for name, ranks in owner.items() if self.ranks.rank in ranks]
        return self._stream(cache=cache, hook_names=own or list(owner))

    def _evaluators(self) -> list[Any]:
        """The evaluators during training, which SAELens calls only when it logs to W&B."""
        cfg = self.cfg
        if not cfg.logger.log_to_wandb:
            return []
        found = []
        if cfg.evaluators:
            from ..evaluation.training_evaluator import make_training_evaluator

            held_out = self.held_out
            if held_out is None:  # else it is checked before the model is loaded
                held_out = HeldOut.load(cfg.held_out_source, cfg.taxonomy)
                preflight.check_held_out(cfg, self.images, held_out)
            found.append(make_training_evaluator(cfg, self.model, held_out))
        if getattr(cfg, "evaluator", None) is not None:
            found.append(cfg.evaluator)
        return found

    def _account(self) -> str:
        """How many images, tokens and steps the run has."""
        cfg = self.cfg
        images = "streamed images"
        if not self.images.is_streaming:
            per_image = preflight.count_tokens(cfg, self.model, cfg.tokens)
            per_epoch = len(self.images) * per_image
            epochs = cfg.training_tokens / per_epoch
            images = (
                f"{len(self.images):,} images x {per_image} ({cfg.tokens}) = {per_epoch:,} tokens "
                f"an epoch, {epochs:,.2f} epochs"
            )
            if epochs >= SEVERAL_EPOCHS and not cfg.use_cached_activations:
                images += ", each through the model again (not with use_cached_activations)"
        return (
            f"{len(self.all_saes)} SAE(s) at {', '.join(cfg.unique_hook_names)} of "
            f"{cfg.model_name}; {images}; {cfg.training_tokens:,} tokens = "
            f"{cfg.total_training_steps:,} steps x {cfg.train_batch_size_tokens:,}."
        )

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()  # type: ignore[misc]  # SAELens's
        cfg = self.cfg
        facts = {
            "taxolens_schema": SAE_SCHEMA,
            "taxolens_version": version("taxolens"),
            "model_family": getattr(self.model, "family", None),
            "model_revision": cfg.revision,
            "model_fingerprint": self.session.identity.fixed["activations"]["model"],
            "tokens": cfg.tokens,
            "tokens_per_image": preflight.count_tokens(cfg, self.model, cfg.tokens),
            "image_size": cfg.image_size,
            **{name: getattr(cfg, name) for name in RECORDED_SETTINGS},
            "n_images": None if self.images.is_streaming else len(self.images),
            "dataset_fingerprint": self.images.fingerprint,
            "seed": cfg.seed,
            **cfg.saved_paths,
        }
        for sae_name, sae in self.session.saes.items():
            for name, value in facts.items():
                sae.cfg.metadata[name] = value
            if (constraint := cfg.sae_constraints.get(sae_name)) is not None:
                sae.cfg.metadata["constraint"] = constraint
            plugin = required_plugin(sae.cfg)
            if plugin is not None:
                sae.cfg.metadata["requires_plugin"] = plugin

    def run(self) -> Any:
        """Train and write the result, as SAELens's runner does.

        In a job of several processes every one calls this, and trains its share of the SAEs.

        Returns:
            the trained SAE, or SAE name -> trained SAE, of this process.

        Raises:
            TrainingInterrupted: a signal stopped it; the message names the checkpoint to resume from.
            DataError: the images or their activations cannot be used.
            DivergedError: weights are not finite.
            CheckpointError: a checkpoint or the result could not be written.
            ConfigError: another process writes into the same folders, or the processes of the job have not
                the same model, images and settings.
            LostRankError: another process of the job has failed.
        """
        cfg, ranks = self.cfg, self.ranks
        with ranks.joined():
            self._check_alike()
            # Folders of random names, and the checkpoint that "auto" has found, are those of the first.
            places = (cfg.checkpoint_path, cfg.resume_from_checkpoint)
            cfg.checkpoint_path, cfg.resume_from_checkpoint = ranks.from_first(places)
            if ranks.size > 1 or cfg.use_cached_activations:
                self.activations_store.stream = self._own_stream()
            if not self.session.saes:
                return self._follow()
            try:
                trained = self._train()
            except TrainingInterrupted as stop:
                self.session.meet(END, str(stop))
                raise
            self.session.meet(END)
        self.session.interrupts.deliver()
        return trained

    def _check_alike(self) -> None:
        """Check that every process of the job has the same run. Raises ConfigError on each."""
        identity = self.session.identity
        # Those by which they come to the same points of the run; paths may be of each machine.
        meeting = {
            name: getattr(self.cfg, name) for name in ("n_checkpoints", "save_final_checkpoint")
        }
        facts = {**identity.fixed, **identity.training, **meeting}
        self.ranks.check_alike({k: v for k, v in facts.items() if k != "from_pretrained_path"})

    def _follow(self) -> dict[str, TrainingSAE[Any]]:
        """Take part in a run whose SAEs other processes train."""
        cfg, store = self.cfg, self.activations_store
        if store.stream.shared is not None and cfg.resume_from_checkpoint is not None:
            store.load_from_checkpoint(cfg.resume_from_checkpoint)
        follow(self.ranks, store.stream)
        return {}

    def _train(self) -> Any:
        """Run SAELens's runner."""
        cfg = self.cfg
        self.slot.evaluators = self._evaluators()
        try:
            with self._wandb_run():
                return self._train_logged()
        finally:
            self.cfg = cfg

    def _train_logged(self) -> Any:
        cfg = self.cfg
        if self.ranks.size > 1:
            self.cfg = _ConfigOfRank(
                cfg, self.session.saes, self.activations_store.stream, self.ranks
            )
        try:
            with self.session.only_writer(), self.session.interrupts:
                return super().run()  # type: ignore[misc]  # SAELens's
        except TaxolensError:
            raise
        except Exception as error:
            if cfg.resume_from_checkpoint is None or self.session.has_begun:
                raise
            where = f"checkpoint {cfg.resume_from_checkpoint}"
            raise CheckpointError(where, f"its content is damaged: {why(error)}") from error

    @contextmanager
    def _wandb_run(self) -> Iterator[None]:
        cfg = self.cfg
        if not cfg.logger.log_to_wandb:
            yield
            return
        from ..reporting.wandb_log import no_second_run, of_one_training

        resumes = cfg.resume_from_checkpoint is not None
        place = None if cfg.checkpoint_path is None else os.path.realpath(cfg.checkpoint_path)
        with of_one_training(place, resumes=resumes, interrupted=TrainingInterrupted):
            self._start_wandb()
            with no_second_run():
                yield

    def _start_wandb(self) -> None:
        from ..reporting.wandb_log import ensure_wandb

        cfg = self.cfg
        if not self.ranks.is_first:  # which sends what it logs to the first
            ensure_wandb("disabled")
            return
        ensure_wandb(
            project=cfg.logger.wandb_project,
            entity=cfg.logger.wandb_entity,
            config=cfg.to_dict(),
            name=cfg.logger.run_name,
            id=cfg.logger.wandb_id,
            resume="allow" if cfg.resume_from_checkpoint is not None else None,
        )

    def _cache(self) -> ActivationCache:
        cfg = self.cfg
        return ActivationCache.build(
            self.model,
            self.images,
            cfg.extraction,
            source=cfg.image_source,
            path=cfg.cached_activations_path,
            ranks=self.ranks,
        )


class VisionSAETrainingRunner(_VisionRun, LanguageModelSAETrainingRunner):
    """Trains one SAE on the activations of a vision model.

    The constructor checks everything that can be checked before the training.

    Args:
        cfg: what to train; a resumed run gets its checkpoint folder from the checkpoint.
        override_dataset: images in place of cfg.dataset_path.
        override_model: a model in place of cfg.model_name.
        override_sae: an SAE in place of a new one.
        held_out: images and tree of the evaluators, where they are loaded already.

    Raises:
        ConfigError: a setting that cannot work; the message names it and what is allowed.
        DataError: images that cannot be used.
        CheckpointError: no checkpoint to resume from, or one of another run.
    """

    def __init__(
        self,
        cfg: VisionSAERunnerConfig[Any],
        override_dataset: ImageDataset | HfDataset | None = None,
        override_model: Any = None,
        override_sae: TrainingSAE[Any] | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.cfg = cfg
        self.ranks = Ranks.here()
        check_divisible(cfg, self.ranks)
        self._load_inputs(override_dataset, override_model, held_out)
        if override_sae is not None:
            self.sae = override_sae
        elif cfg.from_pretrained_path is not None:
            self.sae = load_training_sae(cfg.from_pretrained_path, cfg.device)
            if self.sae.cfg.d_in != cfg.sae.d_in:
                raise ConfigError(
                    "from_pretrained_path",
                    f"its d_in is not the width at {cfg.hook_name}",
                    given=self.sae.cfg.d_in,
                    allowed=cfg.sae.d_in,
                )
        else:
            self.sae = new_sae(cfg.sae, cfg.seed)
        self.sae = with_step_of(cfg, self.sae)
        saes = {"sae": self.sae}
        self._connect(saes, cfg.sae_keys["sae"], saes)
        self.evaluator: Any = self.slot.one

    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        return self.session.fit(trainer)

    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        if self.ranks.is_first:
            super().save_checkpoint(checkpoint_path)
        if self.ranks.size > 1:  # SAELens writes, and names the folder, on the first alone
            checkpoint_path = self.ranks.meet("folder", checkpoint_path)[1][0]
        if checkpoint_path is not None:
            self.session.complete_checkpoint(checkpoint_path)

    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        trained = {".": TrainedSAE(sae, log_feature_sparsity)} if self.ranks.is_first else {}
        self.session.write_output(output_path, trained)


class VisionMultiSAETrainingRunner(_VisionRun, MultiSAETrainingRunner):
    """Trains many SAEs, at one or many hook points, from one forward pass over the images.

    The constructor checks everything that can be checked before the training. Each SAE starts from
    the same weights as in a run of its own.

    Args:
        cfg: what to train; a resumed run gets its checkpoint folder from the checkpoint.
        override_dataset: images in place of cfg.dataset_path.
        override_model: a model in place of cfg.model_name.
        override_saes: SAEs in place of new ones, by the same names as cfg.saes.
        held_out: images and tree of the evaluators, where they are loaded already.

    Raises:
        ConfigError: a setting that cannot work; the message names it and what is allowed.
        DataError: images that cannot be used.
        CheckpointError: no checkpoint to resume from, or one of another run.
    """

    def __init__(
        self,
        cfg: VisionMultiSAERunnerConfig,
        override_dataset: ImageDataset | HfDataset | None = None,
        override_model: Any = None,
        override_saes: dict[str, TrainingSAE[Any]] | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.cfg = cfg
        self.ranks = Ranks.here()
        self._load_inputs(override_dataset, override_model, held_out)
        if override_saes is not None and set(override_saes) != set(cfg.saes):
            raise ConfigError(
                "override_saes",
                "not possible",
                given=sorted(override_saes),
                allowed=", ".join(sorted(cfg.saes)),
            )
        dealt = owners(self.ranks, cfg.saes)
        all_saes: dict[str, TrainingSAE[Any]] = dict(override_saes or {})
        for name, sae_cfg in cfg.saes.items():
            if override_saes is None:
                sae = new_sae(sae_cfg, cfg.seed)
                all_saes[name] = sae if dealt[name] == self.ranks.rank else sae.to("meta")
            with_step_of(cfg, all_saes[name])
        self.saes = {name: sae for name, sae in all_saes.items() if dealt[name] == self.ranks.rank}
        self._connect(self.saes, None, all_saes)
        self.evaluator: Any = self.slot.many

    def _run_with_interruption_handling(
        self, trainer: MultiSAETrainer
    ) -> dict[str, TrainingSAE[Any]]:
        trainer.hook_names = self.cfg.sae_keys  # under which the trainer looks in a batch
        return self.session.fit(trainer)

    def _save_runner_checkpoint_files(self, checkpoint_path: Path | None) -> None:
        if self.ranks.is_first:
            super()._save_runner_checkpoint_files(checkpoint_path)
        if checkpoint_path is not None:
            self.session.complete_checkpoint(checkpoint_path)

    def _save_final_outputs(
        self, saes: dict[str, TrainingSAE[Any]], trainer: MultiSAETrainer
    ) -> None:
        assert self.cfg.output_path is not None  # SAELens calls this only then
        self.session.write_output(
            self.cfg.output_path,
            {
                name: TrainedSAE(sae, trainer.trainers[name].log_feature_sparsity)
                for name, sae in saes.items()
            },
        )


class _ConfigOfRank:
    """A config as one of several processes gives it to SAELens: its own SAEs alone.

    A thread that reads ahead would exchange activations at its own pace, so that there is none. One SAE
    that all ranks train is saved by the first.
    """

    def __init__(
        self, cfg: Any, own: Collection[str], stream: ActivationStream, ranks: Ranks
    ) -> None:
        self._cfg = cfg
        self._saves = ranks.is_first or not isinstance(cfg, VisionSAERunnerConfig)
        self.hook_names_per_sae = {name: cfg.sae_hook_names[name] for name in own}
        self.prefetch_llm_batches = cfg.prefetch_llm_batches if stream.shared is None else False

    def to_sae_trainer_config(self) -> SAETrainerConfig:
        found = self._cfg.to_sae_trainer_config()
        return found if self._saves else replace(found, checkpoint_path=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cfg, name)


# What `load_vision_model` takes beside the fields of the config.
MODEL_OPTIONS: dict[str, tuple[type, ...]] = {
    "dtype": (str, torch.dtype),
    "family": (str, type(None)),
    "trust_remote_code": (bool,),
    "random_weights": (bool,),
    "seed": (int,),
}


def load_model(cfg: Any) -> Any:
    """The vision model that a config names.

    Raises:
        ConfigError: no such model, or an argument that `load_vision_model` does not have.
    """
    settings = {
        "device": cfg.llm_device,
        "attn_implementation": cfg.attn_implementation,
        "revision": cfg.revision,
        "hook_names": cfg.unique_hook_names,
    }
    more = cfg.model_from_pretrained_kwargs or {}
    for name, value in more.items():
        if type(value) not in MODEL_OPTIONS.get(name, ()):
            raise ConfigError(
                "model_from_pretrained_kwargs",
                f"{name}: {value!r} is not possible" if name in MODEL_OPTIONS else "not possible",
                given=name,
                allowed=", ".join(MODEL_OPTIONS),
            )
    return load_vision_model(cfg.model_name, **settings, **more)


def _name_of(loaded: Any) -> str | None:
    """The name from which a model or images were loaded; None where there is none."""
    return getattr(getattr(loaded, "cfg", loaded), "model_name", getattr(loaded, "name", None))


def compile_model(model: Any, mode: str | None) -> None:
    """Compile the model's forward pass with torch, at its first run.

    SAELens compiles `run_with_cache`, which is not used here.
    """
    getattr(model, "original_model", model).compile(mode=mode)


def new_sae(sae_cfg: TrainingSAEConfig, seed: int) -> TrainingSAE[Any]:
    """A new SAE with initial weights from `seed`, and a copy of the config, which training changes."""
    with seeded(seed):
        return TrainingSAE.from_dict(TrainingSAEConfig.from_dict(sae_cfg.to_dict()).to_dict())


def load_training_sae(path: str, device: str) -> TrainingSAE[Any]:
    """The SAE to fine-tune: a folder of SAELens, or any source that `read_sae` takes.

    Raises:
        ConfigError: a loader has to be named, facts are missing, or the release does not exist.
        CheckpointError: `from_pretrained_path` has none that can be trained.
    """
    try:
        folder = _training_checkpoint(path) or Path(path)
        if (folder / SAE_CFG_FILENAME).exists():
            sae = TrainingSAE.load_from_disk(folder, device, converter=read_folder)
        else:
            sae = load_source(TrainingSAE, path, device=device)
    except TaxolensError:
        raise
    except Exception as error:
        raise CheckpointError(
            "from_pretrained_path", f"{path!r} cannot be loaded: {why(error)}"
        ) from error
    check_usable(path, sae)
    return sae


def _training_checkpoint(path: str) -> Path | None:
    """The folder that `sae_lens:FOLDER` names where it is a checkpoint, whose scaling is estimated anew."""
    source = Source.of(path)
    folder = Path(source.path).expanduser()
    return folder if source.loader == "sae_lens" and is_training_checkpoint(folder) else None


def required_plugin(sae_cfg: TrainingSAEConfig) -> str | None:
    """The plugin that SAELens needs to load an SAE of this config; None where it needs none."""
    architecture = sae_cfg.get_inference_config_class().architecture()
    entry = ARCHITECTURES.get(architecture)
    if entry is not None and entry.sae_class is not None:
        return ARCHITECTURES.plugin_of(architecture)
    package = get_sae_class(architecture)[0].__module__.partition(".")[0]
    return None if package == "sae_lens" else package


def find_resume_point(cfg: Any, identity: RunIdentity) -> None:
    """Set cfg.resume_from_checkpoint to one usable checkpoint of this run, or None.

    Settings that were not given and follow from the length of the run become those of the checkpoint.

    The resumed run writes its checkpoints beside that one, so that all are in one folder however
    often a run is stopped.

    Raises:
        CheckpointError: no usable checkpoint, or one of another run.
        ConfigError: a fresh start into a folder that has a run's checkpoints.
    """
    has_searched = cfg.resume_from_checkpoint == AUTO
    if has_searched:
        root = None if cfg.checkpoint_path is None else Path(cfg.checkpoint_path).parent
        found = None if root is None else find_checkpoint(root, identity)
        cfg.resume_from_checkpoint = None if found is None else str(found)
        if found is None:
            logger.info(f"no checkpoint of this run under {root}: starting from the beginning.")
    preflight.check_no_checkpoints(cfg, has_searched=has_searched)
    if cfg.resume_from_checkpoint is None:
        return
    found = resolve_checkpoint(cfg.resume_from_checkpoint)
    taken = identity.taken_from(check_same_run(found, identity).run)
    identity.training.update(taken)
    for name, value in taken.items():
        setattr(cfg, name, value)
    cfg.resume_from_checkpoint = str(found)
    if cfg.checkpoint_path is not None:
        cfg.checkpoint_path = str(found.parent)


def _identity(cfg: Any, saes: dict[str, TrainingSAE[Any]], stream: ActivationStream) -> RunIdentity:
    facts = {}
    for name, sae in saes.items():
        settings = sae.cfg.to_dict()
        facts[name] = {k: v for k, v in settings.items() if k not in ("metadata", "device")}
        facts[name]["hook_name"] = cfg.sae_hook_names[name]
        if (head := cfg.sae_heads[name]) is not None:
            facts[name]["hook_head_index"] = head
        if name in cfg.sae_constraints:
            facts[name]["constraint"] = cfg.sae_constraints[name]
    activations = {**stream.describe(), "from": "cache" if cfg.use_cached_activations else "model"}
    fixed = {"saes": facts, "activations": activations}
    training = {name: getattr(cfg, name) for name in TRAINING_SETTINGS}
    training["from_pretrained_path"] = absolute(getattr(cfg, "from_pretrained_path", None))
    # Through JSON, so that it equals what is read back from a checkpoint.
    plain = json.loads(json.dumps([fixed, training], default=str))
    return RunIdentity(*plain, defaults=cfg.defaults_of_length)
