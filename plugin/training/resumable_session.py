"""A training that can be stopped and resumed at any step, with atomic checkpoints and outputs."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training._interruption import InterruptedException
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...hooks.activations.shared_source import Follower
from ...registry.coerce import is_real
from ...registry.errors import CheckpointError, ConfigError, DivergedError, LostRankError
from ...registry.files import only_writer
from ...registry.names import as_setting
from ...registry.ranks import ALONE, Ranks
from . import preflight
from .activations_store import VisionActivationsStore
from .checkpoints import (
    ESTIMATED,
    FINAL_PREFIX,
    RunIdentity,
    checkpoints_beyond,
    is_whole,
    latest_checkpoint,
    prune_checkpoints,
    read_manifest,
    remove_unfinished,
    synced_files,
    write_manifest,
    written_whole,
)
from .constraint import Constraint, load_initial_rows, save_initial_rows
from .data_parallel import share_start, share_steps
from .interrupts import Interrupts, StepGate, TrainingInterrupted
from .lockstep import SharedInterrupts
from .resampling import Resampling
from .rng import draw_by_step, seeded
from .shared_logs import histograms_of_any_range, share_logs
from .step_choice import fuse_optimizer, tell_when_none_is_dead

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, SafetensorError)


class TrainedSAE(NamedTuple):
    """An SAE and its (d_sae,) log10 feature sparsity, where known."""

    sae: TrainingSAE[Any]
    sparsity: torch.Tensor | None


class TrainingSession:
    """Runs one of SAELens's trainers and writes its checkpoints and outputs.

    Args:
        cfg: the runner's config.
        saes: SAE name -> SAE, as trained; of several processes those of this one.
        store: the source of the trainer's batches.
        identity: identifies the checkpoints of this run.
        constraints: SAE name -> its constraint, of those SAEs that have one.
        ranks: the processes that train the SAEs of the run. Each writes its own SAEs, the first everything else.
    """

    def __init__(
        self,
        cfg: Any,
        saes: Mapping[str, TrainingSAE[Any]],
        store: VisionActivationsStore,
        identity: RunIdentity,
        constraints: Mapping[str, Constraint] = {},
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.cfg = cfg
        self.saes = saes
        self.store = store
        self.identity = identity
        self.constraints = constraints
        every = cfg.resample_every
        if every and cfg.sae_constraints:
            problem = "a constraint holds the weights that it changes"
            raise ConfigError("resample_every", problem, given=every, allowed="one of the two")
        self.resampled = (
            {name: Resampling(sae, every, cfg.seed) for name, sae in saes.items()} if every else {}
        )
        self.interrupts = (
            SharedInterrupts(ranks, store)
            if ranks.size > 1
            else Interrupts(lambda: store.stream.stop())  # it may be replaced
        )
        self._trainer: Any = None
        self._left: set[str] = set()  # checkpoints that a run which goes back leaves behind

    @contextmanager
    def only_writer(self) -> Iterator[None]:
        """Keep other processes from writing the same outputs or checkpoints.

        A checkpoint that a killed process of this run has left unfinished is removed.

        Raises:
            ConfigError: one of them is writing there, or another run has written there since the runner was made.
        """
        cfg = self.cfg
        with ExitStack() as locks:
            if self.ranks.is_first:
                for field in ("output_path", "checkpoint_path"):
                    if (place := getattr(cfg, field)) is not None:
                        locks.enter_context(only_writer(place, field))
                preflight.check_output(cfg)
                preflight.check_no_checkpoints(cfg)
                if cfg.resume_from_checkpoint is not None and cfg.checkpoint_path is not None:
                    remove_unfinished(cfg.checkpoint_path)
            self.meet("locked")
            yield

    @property
    def has_begun(self) -> bool:
        """Whether a trainer runs, or has run."""
        return self._trainer is not None

    def fit(self, trainer: Any) -> Any:
        """Run the trainer; stopped and resumed at any step, it ends in the same weights.

        Called in the context of `interrupts`, which is that of writing the output as well.

        Args:
            trainer: an `SAETrainer` or `MultiSAETrainer`, its state loaded when it resumes.

        Raises:
            TrainingInterrupted: a signal stopped it; the message names the checkpoint to resume from.
            DivergedError: weights are not finite.
            CheckpointError: a checkpoint could not be written.
        """
        self._trainer = trainer
        gate = StepGate(
            trainer.data_provider, self.store, self.interrupts, self._check_finite, self._resample
        )
        trainer.data_provider = gate
        checkpoint: Path | None = None
        with seeded(self.cfg.seed):
            if self.cfg.resume_from_checkpoint is not None:
                checkpoint = Path(self.cfg.resume_from_checkpoint)
                self._align(trainer, checkpoint)
                self._check_finite(thorough=True)
                self._leave_those_beyond(checkpoint)
            if trainer in self._trainers.values():  # of one SAE, which all ranks train
                share_start(trainer.sae, self.ranks)
            for name, constraint in self.constraints.items():
                first = (
                    {}
                    if checkpoint is None
                    else load_initial_rows(self._place(checkpoint, name), constraint)
                )
                constraint.start(self._trainers[name].optimizer, first)
            for own in self._trainers.values():
                if own is trainer:
                    share_steps(own, self.ranks)
                draw_by_step(own, self.cfg.seed)
                fuse_optimizer(own.optimizer)
                tell_when_none_is_dead(own)
                _leave_empty_windows(own)
            many = hasattr(trainer, "trainers")
            logs = share_logs(self.ranks, self.cfg, self._trainers) if many else None
            self.store.open()
            try:
                self._skip_estimates(gate)
                with histograms_of_any_range(self.saes.values()):
                    trained = trainer.fit()
                if logs is not None:
                    logs.finish()
                return trained
            except InterruptedException as stop:
                raise TrainingInterrupted(self._stopped(f"{stop}", self._save())) from None
            except Exception as error:
                self._keep_what_is_whole(gate, error)
                raise
            finally:
                gate.close()

    @property
    def _trainers(self) -> Mapping[str, Any]:
        """SAE name -> its trainer."""
        return getattr(self._trainer, "trainers", dict.fromkeys(self.saes, self._trainer))

    def _place(self, checkpoint: Path, name: str) -> Path:
        """The folder of an SAE in a checkpoint."""
        return checkpoint / name if hasattr(self._trainer, "trainers") else checkpoint

    def meet(self, point: str, value: Any = None) -> list[Any]:
        """The values of the ranks that train, at a point to which all come."""
        if self.ranks.size == 1:
            return [value]
        _, came = self.ranks.meet(point, value)
        return [each for each in came if not isinstance(each, Follower)]

    def _skip_estimates(self, gate: StepGate[Any]) -> None:
        """Draw the batches from which SAEs of other ranks alone estimate norms: all train on the same ones."""
        needed = any(
            trainer.sae.cfg.normalize_activations in ESTIMATED
            and trainer.activation_scaler.scaling_factor is None
            and trainer.activation_scaler.whitening is None
            for trainer in self._trainers.values()
        )
        if any(self.meet("estimates", needed)) and not needed:
            for _ in range(self.cfg.n_batches_for_norm_estimate):
                next(gate)

    def _resample(self, batch: Any) -> None:
        """Resample dead latents before the step that trains on `batch`."""
        for name, resampling in self.resampled.items():
            own = self._trainers[name]
            inputs = batch[self.cfg.sae_keys[name]] if isinstance(batch, dict) else batch
            found = resampling.before_step(own, inputs)
            if found:
                logger.info(f"{name}: {found} dead latents start again.")

    def complete_checkpoint(self, folder: Path) -> None:
        """Complete a checkpoint, whose other files SAELens has written into `folder`, on every rank its own.

        That of the end is left out where weights are not finite and an output follows, which says so.

        Raises:
            DivergedError: weights are not finite; no checkpoint is made.
        """
        is_final = folder.name.startswith(FINAL_PREFIX)
        if is_final and self.cfg.output_path is not None and self._not_finite_anywhere():
            if self.ranks.is_first:
                shutil.rmtree(folder, ignore_errors=True)
            return
        self._check_finite(thorough=True)
        for name, constraint in self.constraints.items():
            save_initial_rows(self._place(folder, name), constraint)
        n_samples = self._trainer.n_training_samples
        written = self.meet("checkpoint", synced_files(folder, self._is_ours))
        if self.ranks.is_first:
            write_manifest(
                folder,
                self.identity,
                n_training_samples=n_samples,
                n_training_steps=n_samples // self.cfg.train_batch_size_tokens,
                files={name: facts for part in written for name, facts in part.items()},
            )
            if self.cfg.keep_checkpoints is not None:
                self._left.discard(folder.name)
                prune_checkpoints(folder.parent, self.cfg.keep_checkpoints, self._left)
        self.meet("checkpoint is complete")

    def _is_ours(self, path: Path) -> bool:
        """Whether this rank writes the file at `path` of a checkpoint: those of its SAEs, the first the others."""
        name = path.parts[0]
        if self.ranks.is_first:
            return name in self.saes or name not in self.cfg.sae_configs
        return name in self.saes

    def write_output(self, output_path: str | Path, trained: Mapping[str, TrainedSAE]) -> None:
        """Write SAEs for inference, atomically; then log them to W&B.

        Args:
            output_path: the folder.
            trained: folder under `output_path` ("." for itself) -> SAE.

        Raises:
            DivergedError: weights are not finite; SAEs whose weights are finite have been written.
            CheckpointError: writing failed; the message names the folder that was used instead.
        """
        diverged = self._not_finite_anywhere()
        if len(diverged) == len(self.cfg.sae_configs):
            raise next(iter(diverged.values()))
        trained = {name: each for name, each in trained.items() if name not in diverged}
        # The first rank is the last to write: runner_cfg.json lists the SAEs of all.
        problem = None if self.ranks.is_first else self._try_to_write(output_path, trained)
        problems = [found for found in self.meet("output", problem) if found]
        if self.ranks.is_first and not problems:
            problem = self._try_to_write(output_path, trained, diverged)
        problems += [found for found in self.meet("output is complete", problem) if found]
        if problems:
            problems += map(str, diverged.values())
            raise CheckpointError("output_path", " ".join(dict.fromkeys(problems)))
        if self.cfg.logger.log_to_wandb:
            for name, (sae, sparsity) in trained.items():
                folder = Path(output_path) / name
                self.cfg.logger.log(
                    _Logged(sae, self.cfg.to_sae_trainer_config()),
                    folder / SAE_WEIGHTS_FILENAME,
                    folder / SAE_CFG_FILENAME,
                    sparsity_path=None if sparsity is None else folder / SPARSITY_FILENAME,
                    wandb_aliases=["final_model"],
                )
        if diverged:
            found = " ".join(map(str, diverged.values()))
            problem = f"{str(output_path)!r} holds the other SAEs alone. {found}"
            raise DivergedError("output_path", problem)

    def _try_to_write(
        self,
        output_path: str | Path,
        trained: Mapping[str, TrainedSAE],
        diverged: Collection[str] = (),
    ) -> str | None:
        """Why the output could not be written, and where it is instead; None where it was."""
        output = Path(output_path)
        try:
            for name in diverged:  # one of an earlier run would be taken for this run's
                (output / name / SAE_CFG_FILENAME).unlink(missing_ok=True)
            self._write(output, trained)
        except WRITE_ERRORS as error:
            return f"{str(output_path)!r} could not be written: {error}. {self._rescue(trained)}"
        return None

    def _write(self, output: Path, trained: Mapping[str, TrainedSAE]) -> None:
        with written_whole(output, self.ranks.rank) as partial:
            for name, (sae, sparsity) in trained.items():
                _, config = sae.save_inference_model(partial / name)
                # SAELens's order of the keys differs from process to process.
                config.write_text(json.dumps(json.loads(config.read_text()), sort_keys=True))
                if sparsity is not None:
                    save_file({"sparsity": sparsity}, partial / name / SPARSITY_FILENAME)
            if self.ranks.is_first:
                (partial / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict()))

    def _rescue(self, trained: Mapping[str, TrainedSAE]) -> str:
        """Write the SAEs to a temporary folder, so that the training is not lost; return a message."""
        with suppress(*WRITE_ERRORS):
            folder = Path(tempfile.mkdtemp(prefix="taxolens-"))
            self._write(folder, trained)
            return f"The trained SAE is in {folder} instead."
        n_samples, folder = self._trainer.n_training_samples, self.cfg.checkpoint_path
        last = latest_checkpoint(folder, before=n_samples + 1) if folder else None
        if last is None:
            return "No other place had room for it either."
        return f"Make room, then finish it with {as_setting('resume_from_checkpoint', last)}."

    def _align(self, trainer: Any, checkpoint: Path) -> None:
        """Correct the state that SAELens restores.

        It saves `n_training_steps` before counting the step, and would write earlier checkpoints
        again.

        Raises:
            CheckpointError: its state is of another moment than its manifest.
        """
        expected = read_manifest(checkpoint).n_training_samples
        for each in (trainer, *getattr(trainer, "trainers", {}).values()):
            if each.n_training_samples != expected:
                raise CheckpointError(
                    f"checkpoint {checkpoint}",
                    "damaged: n_training_samples in trainer_state.pt is not that of the manifest",
                    given=each.n_training_samples,
                    allowed=expected,
                )
            _check_state(checkpoint, each)
            each.n_training_steps = each.n_training_samples // self.cfg.train_batch_size_tokens
        trainer.checkpoint_thresholds = [
            threshold
            for threshold in trainer.checkpoint_thresholds
            if threshold >= trainer.n_training_samples
        ]

    def _leave_those_beyond(self, checkpoint: Path) -> None:
        """Name the checkpoints beyond the one that is resumed, which stay until this run writes them again."""
        folder, n_samples = checkpoint.parent, self._trainer.n_training_samples
        self._left = {path.name for path in checkpoints_beyond(folder, n_samples)}
        if self._left and self.ranks.is_first:
            logger.warning(
                f"resuming after {n_samples:,} tokens. Later checkpoints in {folder} stay, except where this run "
                "writes its own in their place, and keep_checkpoints does not count them: "
                f"{', '.join(sorted(self._left, key=int))}."
            )

    def _save(self) -> Path | None:
        """Save a checkpoint of the state between two steps, unless it exists."""
        folder = self._folder_now()
        if folder is None:
            return None
        if self._trainer.n_training_samples == 0 and not self._has_estimates():
            self.store.n_consumed = 0  # an unfinished estimate of norms starts again
        exists = is_whole(folder) and read_manifest(folder).run == self.identity
        if not self.meet("saving", exists)[0]:
            try:
                self._trainer.save_checkpoint(checkpoint_name=folder.name)
            except Exception as error:
                self._refuse_half_written(error)
                raise
        return folder

    def _has_estimates(self) -> bool:
        scalers = [trainer.activation_scaler for trainer in self._trainers.values()]
        own = any(s.scaling_factor is not None or s.whitening is not None for s in scalers)
        return any(self.meet("estimates", own))

    def _keep_what_is_whole(self, gate: StepGate[Any], error: Exception) -> None:
        # A checkpoint needs all ranks; an error of the images comes to all of them at the same step.
        shared = self.store.stream.shared is not None and error is gate.error_of_source
        alike = self.ranks.size == 1 or shared
        if isinstance(error, DivergedError | LostRankError):
            if self.ranks.is_first:
                self._remove_half_written()
        elif gate.is_between_steps and alike:
            logger.error(self._stopped(type(error).__name__, self._save()))
        else:
            self._refuse_half_written(error)

    def _refuse_half_written(self, error: Exception) -> None:
        """Raise CheckpointError if `error` was raised while a checkpoint was written."""
        folder = self._remove_half_written()
        if folder is None:
            return
        left = latest_checkpoint(folder.parent, before=int(folder.name))
        last = f"the last complete one is {left}" if left else "there is none before it"
        raise CheckpointError(
            f"checkpoint {folder}", f"could not be written: {error}; {last}"
        ) from error

    def _remove_half_written(self) -> Path | None:
        folder = self._folder_now()
        if folder is None or not folder.is_dir() or is_whole(folder):
            return None
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def _folder_now(self) -> Path | None:
        if self.cfg.checkpoint_path is None:
            return None
        return Path(self.cfg.checkpoint_path) / str(self._trainer.n_training_samples)

    def _stopped(self, reason: str, saved: Path | None) -> str:
        done, total = self._trainer.n_training_samples, self.cfg.training_tokens
        how = (
            f"resume with {as_setting('resume_from_checkpoint', saved)}"
            if saved is not None
            else "nothing was saved, since checkpoint_path is none"
        )
        return f"{reason}: training stopped after {done:,} of {total:,} tokens; {how}."

    def _check_finite(self, thorough: bool = False) -> None:
        """Raise DivergedError if weights are not finite.

        Clipping the gradient's norm spreads one NaN to every weight, so that during training the
        check of b_dec, which is small, is enough.
        """
        for error in self._not_finite(thorough).values():
            raise error

    def _not_finite(self, thorough: bool) -> dict[str, DivergedError]:
        """SAE name -> the error, of this process's SAEs whose weights are not finite."""
        found: dict[str, DivergedError] = {}
        for name, sae in self.saes.items():
            tensors = sae.state_dict() if thorough else {"b_dec": sae.b_dec}
            for key, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    found[name] = DivergedError(
                        f"SAE {name!r}",
                        f"{key} is not finite after {self._trainer.n_training_samples:,} tokens: training diverged",
                        allowed="a lower lr, lr_warm_up_steps, or normalize_activations",
                    )
                    break
        return found

    def _not_finite_anywhere(self) -> dict[str, DivergedError]:
        """The same of the SAEs of all ranks; each calls this."""
        parts = self.meet("finite", self._not_finite(thorough=True))
        return {name: error for part in parts for name, error in part.items()}


def _leave_empty_windows(trainer: Any) -> None:
    """Log no sparsity of a window without a step, which is not a number.

    A run that was stopped before the first step of a window has logged and reset the window before it;
    SAELens, resumed there, does so again. Wraps its public seam.
    """
    reset = trainer.maybe_reset_sparsity
    trainer.maybe_reset_sparsity = lambda: reset() if trainer.n_frac_active_samples else {}


def _check_state(checkpoint: Path, trainer: Any) -> None:
    """Check what SAELens restores as it comes, and fails on, or goes wrong with, later.

    Raises:
        CheckpointError: a part of the state is of another kind than a trainer's.
    """
    if not hasattr(trainer, "activation_scaler"):  # of many SAEs, each with a trainer of its own
        return
    n_latents = (trainer.sae.cfg.d_sae,)
    scale = trainer.activation_scaler.scaling_factor
    for name, fits in (
        ("act_freq_scores", getattr(trainer.act_freq_scores, "shape", None) == n_latents),
        (
            "n_forward_passes_since_fired",
            getattr(trainer.n_forward_passes_since_fired, "shape", None) == n_latents,
        ),
        ("n_frac_active_samples", is_real(n := trainer.n_frac_active_samples) and 0 <= n < 2**63),
        ("started_fine_tuning", isinstance(trainer.started_fine_tuning, bool)),
        ("scaling_factor", scale is None or (is_real(scale) and scale > 0)),
    ):
        if not fits:
            raise CheckpointError(f"checkpoint {checkpoint}", f"damaged: {name} is not possible")


class _Logged(NamedTuple):
    """The attributes of a trainer that SAELens's `LoggingConfig.log` reads."""

    sae: TrainingSAE[Any]
    cfg: Any
