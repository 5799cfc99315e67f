"""The work of `taxolens train`: trains the SAEs of a study, evaluates them, writes the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...hooks.images.dataset import ImageDataset
from ...hooks.models.load import expand_hook_names, hook_d_in
from ...hooks.models.tokens import check_tokens, tokens_per_image
from ...registry.errors import ConfigError
from ...registry.heads import head_name
from ...registry.ranks import Ranks
from ...registry.taxonomies.load import TREES
from ..evaluation.evaluate import choose_evaluators, evaluate_run
from ..evaluation.held_out import HeldOut
from ..evaluation.results_folder import holds_others
from ..evaluation.sae_folders import find_saes
from ..evaluation.settings import EvaluationSettings
from ..reporting.report import REPORT_FILENAME, write_report
from ..reporting.results import Results
from ..training import preflight
from ..training.calibration import cost_of
from ..training.config import VisionSAERunnerConfig
from ..training.runner import VisionMultiSAETrainingRunner, VisionSAETrainingRunner, load_model
from .settings import Study

Runner = VisionSAETrainingRunner | VisionMultiSAETrainingRunner
Facts = dict[str, Any]


class Job:
    """A study with everything loaded and checked, and nothing trained yet.

    Settings are checked before the model is loaded, the model before the images, and the inputs of
    the evaluation before the training.

    Args:
        study: the settings.
        evaluate: also measure the trained SAEs and write the report.

    Raises:
        ConfigError: a setting that cannot work; the message names it and what is allowed.
        DataError: images that cannot be used.
    """

    def __init__(self, study: Study, *, evaluate: bool = True) -> None:
        draft = study.draft()
        if evaluate and draft.output_path is None:
            raise ConfigError(
                "output_path", "the evaluation needs the saved SAEs", given=None, allowed="a folder"
            )
        preflight.check_settings(draft, has_dataset=False)
        self.held_out = self._load_held_out(draft) if evaluate else None
        model = load_model(draft)
        check_tokens(model, draft.tokens)
        hook_names = expand_hook_names(model, study.hook_names)
        widths = {
            name: hook_d_in(model, name, draft.image_size, head=head)
            for name in hook_names
            for head in study.heads
        }
        images = ImageDataset.of(draft.image_source)
        self.per_image = tokens_per_image(model, draft.tokens, draft.image_size, hook_names[0])
        per_epoch = None if images.is_streaming else len(images) * self.per_image
        config = study.config(widths, tokens_per_epoch=per_epoch)
        single = isinstance(config, VisionSAERunnerConfig)
        runner_class = VisionSAETrainingRunner if single else VisionMultiSAETrainingRunner
        self.runner: Runner = runner_class(
            config,  # pyright: ignore[reportArgumentType]  # of the runner's own kind
            override_dataset=images,
            override_model=model,
            held_out=self.held_out,
        )

    def plan(self) -> Facts:
        """The numbers of images, tokens, steps and bytes of the training; `cost` adds the time."""
        cfg, images = self.runner.cfg, self.runner.images
        saes = cfg.sae_configs
        cache_bytes = preflight.cache_size(cfg, self.runner.model, images)
        plan: Facts = {
            "model": cfg.model_name,
            "hook_points": self._hook_points(),
            "architectures": sorted({sae.architecture() for sae in saes.values()}),
            "saes": len(saes),
            "images": None if images.is_streaming else len(images),
            "tokens": cfg.tokens,
            "tokens_per_image": self.per_image,
            "training_tokens": cfg.training_tokens,
            "epochs": None
            if images.is_streaming
            else cfg.training_tokens / (len(images) * self.per_image),
            "steps": cfg.total_training_steps,
            "batch": cfg.train_batch_size_tokens,
            "bytes": preflight.bytes_needed(
                cfg, self.runner.all_saes.values(), cache_bytes=cache_bytes
            ),
            "output_path": cfg.output_path,
            "resumes_from": cfg.resume_from_checkpoint,
            "evaluation": None if self.held_out is None else self._evaluation(self.held_out),
        }
        return plan

    def _hook_points(self) -> dict[str, Facts]:
        """Hook point, or head -> d_in there, and the widths of the SAEs."""
        cfg, found = self.runner.cfg, dict[str, Facts]()
        for name, hook_name in cfg.sae_hook_names.items():
            sae, place = cfg.sae_configs[name], head_name(hook_name, cfg.sae_heads[name])
            widths = found.setdefault(place, {"d_in": sae.d_in, "d_sae": []})["d_sae"]
            if sae.d_sae not in widths:
                widths.append(sae.d_sae)
        return found

    def cost(self, n_ranks: int | None = None) -> Facts:
        """FLOPs, bytes and seconds of the training on `n_ranks` processes, from a calibration of some seconds.

        Neither the start of the program nor the evaluation is part of it. See `calibration.predict`.

        Args:
            n_ranks: processes that share the training; None: those that torchrun has started.

        Raises:
            ConfigError: `n_ranks` is not positive.
            DataError: none of the images can be read.
        """
        n_ranks = Ranks.here().size if n_ranks is None else n_ranks
        if n_ranks < 1:
            raise ConfigError("ranks", "too small", given=n_ranks, allowed="1 or more")
        runner = self.runner
        return cost_of(
            runner.cfg,
            runner.model,
            runner.images,
            self.per_image,
            n_ranks=n_ranks,
            n_bytes=self.plan()["bytes"],
        )

    def train(self) -> None:
        """Train, and save the SAEs under output_path."""
        self.runner.run()

    def evaluate(self, *, progress: bool = True) -> tuple[Results, Path]:
        """Measure the SAEs that `train` has saved, write the report, log to W&B: results and report.

        Every rank of a job takes part; the first one writes the report and logs.

        The evaluation is a separate W&B run in the group of the training's run, which is closed
        when the training ends. With `overwrite_output` it drops numbers of other SAEs in the folder.
        """
        cfg = self.runner.cfg
        folder = Path(cfg.output_path).expanduser()
        saes = find_saes(folder)
        settings = EvaluationSettings(
            output_path=folder,
            replace=cfg.overwrite_output and holds_others(folder, saes),
            device=cfg.llm_device,
            progress=progress,
        )
        results = evaluate_run(
            saes, settings, override_model=self.runner.model, held_out=self.held_out
        )
        if not Ranks.here().is_first:
            return results, (results.folder or Path()) / REPORT_FILENAME
        report = write_report(results)
        if cfg.logger.log_to_wandb:
            from ..reporting.wandb_log import log_results

            log_results(
                results,
                report=report,
                project=cfg.logger.wandb_project,
                entity=cfg.logger.wandb_entity,
                name=f"{cfg.logger.run_name}-evaluation",
                group=cfg.logger.run_name,
            )
        return results, report

    @staticmethod
    def _load_held_out(cfg: Any) -> HeldOut:
        """Load the images and the tree of the evaluation, and check its evaluators."""
        if not cfg.taxonomy:
            raise ConfigError(
                "taxonomy",
                "not given, and the evaluation needs a class tree",
                allowed=f"{TREES}, or --no_evaluate, which only trains",
            )
        held_out = HeldOut.load(cfg.held_out_source, cfg.taxonomy)
        choose_evaluators(cfg.evaluators or None, None)
        return held_out

    def _evaluation(self, held_out: HeldOut) -> Facts:
        """The part of the plan that describes the evaluation."""
        return {
            "dataset_path": held_out.source.dataset_path,
            "split": held_out.source.split,
            "holdout": held_out.source.holdout,
            "images": len(held_out.images),
            "taxonomy": held_out.tree,
            "classes": len(held_out.taxonomy.classes),
            "classes_with_images": held_out.n_present,
            "nodes": len(held_out.taxonomy.nodes),
            "evaluators": list(choose_evaluators(self.runner.cfg.evaluators or None, None)),
        }
