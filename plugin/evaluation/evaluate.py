"""Measuring trained SAEs: every evaluator beside every null, from one forward pass over the images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...hooks.images.dataset import ImageDataset
from ...hooks.models.load import hook_d_in
from ...registry.errors import ConfigError
from ...registry.evaluators.base import Evaluator
from ...registry.table import EVALUATORS, unknown_name_message
from ...registry.taxonomies.load import load_taxonomy
from ..reporting.results import NULLS, DatasetInfo, Results
from .bench import AGGREGATES
from .forward import Forwards
from .held_out import check_held_out, held_out_source, load_held_out, tree_name
from .measure_sae import measure_sae
from .results_folder import Evaluation, Record
from .sae_folders import SAEFolder, find_saes
from .training_evaluator import TrainingEvaluator, make_training_evaluator

__all__ = ["TrainingEvaluator", "evaluate_run", "make_training_evaluator"]

MAIN_EVALUATORS = ("lch_height", "ontological_coverage", "pair_depth", "level_information")
ALL = "all"
CONTROLS = ("planted",)
ACTIVATIONS_FOLDER = "activations"


def evaluate_run(
    runs: str | Path | Sequence[str | Path],
    *,
    evaluators: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    taxonomy: str | None = None,
    dataset_path: str | None = None,
    dataset_name: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_images: int | None = None,
    nulls: Sequence[str] = NULLS,
    controls: Sequence[str] = (),
    n_permutations: int = 10,
    seed: int = 0,
    aggregate: str = "max",
    allow_train_split: bool = False,
    max_corrupt_share: float = 0.01,
    batch_size: int = 64,
    device: str | None = None,
    num_workers: int = 0,
    output_path: str | Path | None = None,
    keep_activations: bool = False,
    progress: bool = True,
    override_dataset: ImageDataset | None = None,
    override_model: Any = None,
) -> Results:
    """Measure every SAE of one or many runs on held-out images.

    Each SAE's numbers are saved as soon as they are there; run again with the same settings, what
    is finished is not done again.

    Args:
        runs: run folders, checkpoints or bare SAE folders (see `find_saes`).
        evaluators: names, or "all"; by default what the run's config says, else the main four.
        options: evaluator name -> the fields of its `Options`.
        taxonomy: a registered name, a folder or a file; by default what the run's config says.
        dataset_path, dataset_name, split, image_column, label_column: the images; by default the
            config's `eval_dataset_path` (else its dataset_path), `eval_dataset_name` (else its
            dataset_name, of the same dataset) and `eval_split` (else validation, else test).
        max_images: measure on this many images.
        nulls: which null controls to compute.
        controls: further controls: "planted", detectors that know the tree (recall .8, false
            alarms .001), which show what an evaluator can see at all.
        n_permutations: draws of the permuted-classes null.
        seed: of halves, permutations and random latents.
        aggregate: what a latent of an image is where a SAE reads many tokens: "max" or "mean".
        allow_train_split: go on even if the SAEs were trained on these images.
        max_corrupt_share: stop when more of the images are corrupt.
        batch_size: images in one forward pass.
        device: by default a GPU where there is one.
        num_workers: processes that decode images.
        output_path: where results.json, tables, figures and thumbnails go; by default the run's
            own folder.
        keep_activations: keep the activations of the images there too.
        override_dataset, override_model: in place of the ones that the names stand for.

    Raises:
        ConfigError: a setting is wrong, or the split was trained on.
        DataError: the images or labels cannot be used.
        CheckpointError: a SAE's files are torn.
    """
    saes = find_saes(runs)
    folder = _output_folder(runs, output_path)
    chosen = choose_evaluators(evaluators, options, saes)
    _check_subset("nulls", nulls, NULLS)
    _check_subset("controls", controls, CONTROLS)
    _check_subset("aggregate", [aggregate], AGGREGATES)
    if n_permutations < 1:
        raise ConfigError(f"n_permutations: given {n_permutations}; allowed: 1 or more")
    source = held_out_source(
        saes,
        dataset_path=dataset_path,
        name=dataset_name,
        split=split,
        image_column=image_column,
        label_column=label_column,
        max_images=max_images,
        batch_size=batch_size,
        num_workers=num_workers,
        max_corrupt_share=max_corrupt_share,
    )
    if override_dataset is None:
        images, source = load_held_out(source)
    else:
        images, source = override_dataset, replace(source, split=split or "given")
    seen = check_held_out(saes, source, images.fingerprint, allow=allow_train_split)
    images.require_labels()
    tree = tree_name(saes, taxonomy)
    evaluation = Evaluation(
        chosen=chosen,
        taxonomy=load_taxonomy(tree, classes=images.class_names),
        nulls=tuple(nulls),
        controls=tuple(controls),
        n_permutations=n_permutations,
        seed=seed,
        aggregate=aggregate,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    dataset = DatasetInfo(
        path=str(source.dataset_path),
        name=source.name,
        split=str(source.split),
        fingerprint=images.fingerprint,
        n_images=len(images),
        n_fit=0,
        n_score=0,
        classes=list(images.class_names),
        seen_in_training=seen,
    )
    record = Record(folder, saes, evaluation, dataset, tree)
    forwards = Forwards(
        saes,
        images,
        embeds=evaluation.wants_embedding,
        intervenes=evaluation.wants_intervention,
        taxonomy=evaluation.taxonomy,
        override_model=override_model,
        device=evaluation.device,
        folder=folder / ACTIVATIONS_FOLDER,
        progress=progress,
        **source.decoding,
    )
    for forward in forwards:
        missing = record.missing(forward.saes)
        if not missing:
            continue
        check_saes(missing, forward.model)
        bench = evaluation.bench(forward.cache)
        record.dataset_is(forward.cache, bench.split)
        planted = evaluation.control_numbers(bench, forward.images_at(forward.saes[0].hook_name))
        for sae in missing:
            record.add(
                measure_sae(
                    bench,
                    sae,
                    forward.images_at(sae.hook_name),
                    fingerprint=record.fingerprints[sae.id],
                    controls=planted,
                    peers=evaluation.peers_of(sae, saes, forwards.images_of),
                    dataset=images,
                    rows=np.asarray(forward.cache.indices),
                    output=folder,
                    progress=progress,
                )
            )
    results = record.finish()
    if not keep_activations:
        shutil.rmtree(folder / ACTIVATIONS_FOLDER, ignore_errors=True)
    return results


def choose_evaluators(
    names: str | Sequence[str] | None,
    options: Mapping[str, Any] | None,
    saes: Sequence[SAEFolder] = (),
) -> dict[str, tuple[type[Evaluator[Any]], Any]]:
    """name -> (class, its options), checked.

    Raises:
        ConfigError: an evaluator or option that does not exist.
    """
    if names is None:
        configured = [name for sae in saes for name in sae.setting("evaluators", [])]
        names = list(dict.fromkeys(configured)) or MAIN_EVALUATORS
    names = [names] if isinstance(names, str) else list(names)
    if ALL in names:
        names = list(EVALUATORS)
    options = dict(options or {})
    chosen = {n: (EVALUATORS[n], EVALUATORS[n]._options(options.pop(n, None))) for n in names}
    if options:
        raise ConfigError(unknown_name_message("evaluator in options", next(iter(options)), names))
    return chosen


def check_saes(saes: Sequence[SAEFolder], model: Any) -> None:
    """Before the forward pass: that every SAE can be loaded and fits its hook point.

    Raises:
        CheckpointError: torn files.
        ConfigError: another width, or an architecture that SAELens does not know.
        UnknownNameError: a hook point that the model does not have.
    """
    for sae in saes:
        d_in = sae.load().cfg.d_in
        width = hook_d_in(model, sae.hook_name, sae.setting("image_size"))
        if d_in != width:
            raise ConfigError(
                f"{sae.id}: its d_in is {d_in}, but activations at {sae.hook_name} of "
                f"{sae.model_name} have width {width}"
            )


def _output_folder(runs: str | Path | Sequence[str | Path], given: str | Path | None) -> Path:
    if given is not None:
        return Path(given)
    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    if len(paths) > 1:
        raise ConfigError("output_path: give one when several runs are compared")
    return Path(paths[0])


def _check_subset(field_name: str, given: Sequence[str], allowed: Sequence[str]) -> None:
    for name in given:
        if name not in allowed:
            raise ConfigError(unknown_name_message(field_name, name, allowed))
