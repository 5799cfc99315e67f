"""Evaluation of the SAEs of runs: every evaluator beside every null, from one pass over the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from tqdm.auto import tqdm

from ...hooks.images.dataset import ImageDataset
from ...hooks.images.source import ImageSource
from ...hooks.models.load import check_device, hook_d_in
from ...hooks.models.tokens import check_tokens
from ...registry.errors import ConfigError
from ...registry.evaluators.base import Evaluator
from ...registry.files import only_writer
from ...registry.heads import head_name
from ...registry.loaders.parts.read import Source
from ...registry.names import unknown_name_message
from ...registry.ranks import Ranks
from ...registry.table import EVALUATORS, evaluators_named
from ..reporting.results import Results, SAEResult
from .bench import Bench
from .copies import check_copies
from .forward import Forward, ModelSetting, forwards_of, remove_caches
from .held_out import HeldOut, check_held_out, held_out_part, held_out_source, tree_name
from .measure_sae import measure_sae
from .peers import find_peers, peers_of
from .results_folder import ResultsFolder
from .sae_folders import SAEFolder
from .sae_sources import Sources, check_complete, find_sources, is_other, override
from .settings import EvaluationSettings
from .team import Team
from .training_evaluator import TrainingEvaluator, make_training_evaluator

__all__ = ["EvaluationSettings", "TrainingEvaluator", "evaluate_run", "make_training_evaluator"]

MAIN_EVALUATORS = ("lch_height", "ontological_coverage", "pair_depth", "level_information")
OVERRIDES = ("model_name", "hook_name", "hook_head_index", "tokens", "image_size")
ACTIVATIONS_FOLDER = "activations"


def evaluate_run(
    runs: Sources,
    settings: EvaluationSettings | None = None,
    *,
    override_dataset: ImageDataset | None = None,
    override_model: Any = None,
    held_out: HeldOut | None = None,
    ranks: Ranks | None = None,
    **options: Any,
) -> Results:
    """Measure every SAE of one or many runs on held-out images.

    Each SAE's numbers are saved when they are complete. A second call keeps those of the same SAE,
    images, tree and settings, whichever evaluators it names; without `replace` it drops only those
    that it measures again. An evaluator that raises has no numbers, and `Results.errors` names it;
    the others are not affected.

    In a job of torchrun every rank calls this with the same arguments. SAEs are dealt to ranks, of
    fewer SAEs than ranks their passes; rank 0 writes the results, which equal those of one process.

    Args:
        runs: run folders, checkpoints, SAE folders, files of other libraries, and published SAEs
            (see `find_sources`).
        settings: what is measured, on which images, and how; by default the settings of the runs.
        override_dataset: images in place of those of dataset_path.
        override_model: a model in place of the runs' own.
        held_out: loaded images and tree; the settings of their source are then not used.
        ranks: the processes that share the work; None: those of torchrun's job; `Ranks()`: this one
            alone.
        **options: fields of `EvaluationSettings`, in place of those of `settings`.

    Raises:
        ConfigError: a setting is wrong, the split was trained on, output_path has numbers that would
            be dropped, or the ranks have not the same SAEs, models, images, tree and settings.
        DataError: the images or labels cannot be used.
        CheckpointError: an SAE's files are incomplete or damaged.
    """
    ranks = Ranks.here() if ranks is None else ranks
    with ranks.joined():
        settings = (settings or EvaluationSettings()).override(**options)
        if not ranks.is_first:
            settings = settings.override(progress=False)
        return _evaluate(runs, settings, override_dataset, override_model, held_out, ranks)


def device_of(settings: EvaluationSettings, ranks: Ranks) -> str:
    """The device on which a rank evaluates: by default a GPU where there is one."""
    return ranks.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _evaluate(
    runs: Sources,
    settings: EvaluationSettings,
    override_dataset: ImageDataset | None,
    override_model: Any,
    held_out: HeldOut | None,
    ranks: Ranks,
) -> Results:
    """The evaluation of `evaluate_run` on one of the ranks."""
    device = device_of(settings, ranks)
    saes = override(find_sources(runs), **{name: getattr(settings, name) for name in OVERRIDES})
    folder = _output_folder(runs, settings.output_path)
    chosen = choose_evaluators(settings.evaluators, settings.options, saes)
    check_device("device", device)
    if held_out is not None:
        check_complete(saes)
    else:
        images = settings.dataset_path or override_dataset
        check_complete(saes, dataset_path=images, taxonomy=settings.taxonomy)
        given = {f.name: getattr(settings, f.name, None) for f in fields(ImageSource)}
        source = held_out_source(saes, **{**given, "name": settings.dataset_name})
        if override_dataset is not None:
            source, override_dataset = held_out_part(saes, source, override_dataset)
        held_out = HeldOut.load(source, tree_name(saes, settings.taxonomy), override_dataset)
    allow = settings.allow_train_split
    seen = check_held_out(saes, held_out, allow=allow)
    copies = None
    if ranks.is_first and not seen:
        copies = check_copies(saes, held_out, allow=allow, progress=settings.progress)
    bench = Bench(held_out.taxonomy, chosen, replace(settings, device=device))
    results = ResultsFolder(
        folder,
        saes,
        bench,
        held_out,
        ranks,
        seen_in_training=seen,
        copies=copies,
        override_model=override_model,
    )
    ranks.check_alike(results.facts())
    activations = folder / ACTIVATIONS_FOLDER
    with only_writer(folder, "output_path") if ranks.is_first else nullcontext():
        ranks.wait()
        results.take_over()
        ranks.wait()
        again, checked = True, set[str]()
        while again:
            lacking = results.missing(saes)
            names = {name for each in lacking.values() for name in each.chosen}
            bench = replace(bench, chosen={name: chosen[name] for name in chosen if name in names})
            forwards = forwards_of(
                saes, held_out, bench, activations, override_model, ranks, due=lacking
            )
            again = _is_of_other_images(forwards, lacking, results, checked)
        for forward in forwards.values():
            missing = [sae for sae in forward.saes if sae.id in lacking]
            if missing:
                check_saes([sae for sae in missing if sae.id not in checked], forward.model)
                _measure(missing, forward, forwards, bench, lacking, results, ranks)
            forward.release()
        found = results.finish() if ranks.is_first else None
        if ranks.is_first and not settings.keep_activations:
            remove_caches(activations)
        ranks.wait()
    return found or Results.load(folder)


def _is_of_other_images(
    forwards: Mapping[ModelSetting, Forward],
    lacking: Mapping[str, Bench],
    results: ResultsFolder,
    checked: set[str],
) -> bool:
    """Whether the numbers that are kept were of other images than can be read now, and are dropped.

    `checked` gets the ids of the SAEs that `check_saes` has seen before the forward pass.
    """
    for forward in forwards.values():
        missing = [sae for sae in forward.saes if sae.id in lacking]
        if missing and results.keeps_numbers:
            check_saes(missing, forward.model)
            checked |= {sae.id for sae in missing}
            return results.measure_again_on(forward.cache)
    return False


def _measure(
    saes: Sequence[SAEFolder],
    forward: Forward,
    forwards: Mapping[ModelSetting, Forward],
    bench: Bench,
    lacking: Mapping[str, Bench],
    results: ResultsFolder,
    ranks: Ranks,
) -> None:
    """Measure SAEs of one model, each by the evaluators that it lacks, and add them to the results."""
    if ranks.size > 1 and bench.wants("peers"):  # all ranks make a cache together, so not at need
        for sae in saes:
            for peer, _ in find_peers(sae, results.saes):
                _ = forwards[ModelSetting.of(peer)].cache
    results.dataset_is(forward.cache, forward.split)
    results.begin()
    by_id = {sae.id: sae for sae in saes}
    costs = {sae.id: _cost(sae, forward, lacking[sae.id]) for sae in saes}
    mine, team = Team.deal(ranks, costs, ranks.from_first(f"measured {uuid4().hex}"))
    controls = bench.controls(forward.at(forward.saes[0].key)) if team.leads else {}
    done: dict[str, SAEResult] = {}
    for name in mine:
        sae, own = by_id[name], lacking[name]
        measured = measure_sae(
            own,
            sae,
            forward.at(sae.key),
            fingerprint=results.fingerprints[sae.id],
            controls=controls,
            peers=peers_of(own, sae, results.saes, forwards),
            kept=results.node_tables(sae, own.chosen),
            dataset=forward.held_out.images,
            rows=np.asarray(forward.cache.indices),
            output=results.folder,
            team=team,
        )
        if measured is not None:
            results.add(sae, measured)
            done[name] = measured
    bar = tqdm(desc="all ranks", unit=" steps", delay=2, disable=not bench.settings.progress)
    with bar:
        for count in ranks.waiting(team.counter):
            bar.update(count - bar.n)
    parts = ranks.gather(done)
    for part in parts[1:] if ranks.is_first else []:
        for name, measured in part.items():
            results.add(by_id[name], measured)


def _cost(sae: SAEFolder, forward: Forward, bench: Bench) -> float:
    """Latents × tokens of an image × evaluators (own definition)."""
    n_tokens = forward.cache.activations(sae.hook_name).shape[1]
    return float(sae.cfg.get("d_sae", 1)) * n_tokens * len(bench.chosen)


def choose_evaluators(
    names: str | Sequence[str] | None,
    options: Mapping[str, Any] | None,
    saes: Sequence[SAEFolder] = (),
) -> dict[str, tuple[type[Evaluator[Any]], Any]]:
    """Name -> (class, its options), checked.

    Raises:
        ConfigError: an evaluator or option that does not exist.
    """
    if names is None:
        configured = [name for sae in saes for name in sae.setting("evaluators", [])]
        names = list(dict.fromkeys(configured)) or MAIN_EVALUATORS
    names = evaluators_named(names)
    options = dict(options or {})
    chosen = {n: (EVALUATORS[n], EVALUATORS[n]._options(options.pop(n, None))) for n in names}
    if options:
        raise ConfigError(unknown_name_message("evaluator in options", next(iter(options)), names))
    return chosen


def check_saes(saes: Sequence[SAEFolder], model: Any) -> None:
    """Check before the forward pass that every SAE can be loaded and fits its hook point and its tokens.

    Raises:
        CheckpointError: files are incomplete or damaged.
        ConfigError: another width, no such head or tokens, a transcoder, or an architecture that
            SAELens does not have.
        UnknownNameError: a hook point that the model does not have.
    """
    for sae in saes:
        if "transcoder" in sae.architecture:
            raise ConfigError(
                f"{sae.id}: architecture",
                "it predicts another activation than the one it reads, and reconstructions are compared "
                "with what is read",
                given=sae.architecture,
                allowed="an SAE",
            )
        check_tokens(model, sae.tokens, sae.hook_name)
        d_in = sae.load().cfg.d_in
        width = hook_d_in(model, sae.hook_name, sae.setting("image_size"), head=sae.head)
        if d_in != width:
            raise ConfigError(
                f"{sae.id}: d_in",
                f"not the width of {head_name(sae.hook_name, sae.head)} of {sae.model_name}",
                given=d_in,
                allowed=width,
            )


def _output_folder(runs: Sources, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given).expanduser()
    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    if len(paths) > 1 or isinstance(paths[0], SAEFolder) or is_other(Source.of(paths[0])):
        raise ConfigError(
            "output_path",
            "not given",
            allowed="a folder, where several runs are compared, and for a file or a published SAE",
        )
    return Path(paths[0]).expanduser()
