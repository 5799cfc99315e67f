"""Measuring trained SAEs: every evaluator beside every null, from one forward pass over the images.

results = evaluate_run("output/my_run")
write_report(results)
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..hooks.cache import ActivationCache
from ..hooks.images import ImageDataset
from ..registry.errors import ConfigError, TaxolensError
from ..registry.evaluators.base import ALL_NULLS, Evaluator
from ..registry.evaluators.planted import PlantedLatents
from ..registry.table import EVALUATORS, unknown_name_message
from ..registry.taxonomies.load import load_taxonomy
from ..registry.taxonomies.taxonomy import Taxonomy
from .compare import write_comparison
from .held_out import (
    Choice,
    ModelSetting,
    activations_of,
    check_held_out,
    images_at,
    tree_name,
)
from .measure import AGGREGATES, Bench, Images, Numbers
from .measured import measure_sae
from .results import (
    NULLS,
    DatasetInfo,
    EvaluatorInfo,
    Results,
    SAEResult,
    SkippedImage,
    TaxonomyInfo,
)
from .runs import SAEFolder, find_saes
from .split import Split
from .training_evaluator import TrainingEvaluator, make_training_evaluator

__all__ = ["TrainingEvaluator", "evaluate_run", "make_training_evaluator"]

logger = logging.getLogger(__name__)

MAIN_EVALUATORS = ("lch_height", "ontological_coverage", "pair_depth", "level_information")
ALL = "all"
CONTROLS = ("planted",)
ACTIVATIONS_FOLDER = "activations"
PACKAGES = (
    "taxolens",
    "sae-lens",
    "transformer-lens",
    "torch",
    "transformers",
    "datasets",
    "numpy",
)


def evaluate_run(
    runs: str | Path | Sequence[str | Path],
    *,
    evaluators: str | Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    taxonomy: str | None = None,
    dataset_path: str | None = None,
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
        dataset_path, split, image_column, label_column: the images; by default the config's
            `eval_dataset_path` (else its dataset_path) and `eval_split` (else validation, else
            test).
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
    choice = Choice.of(
        saes,
        dataset_path=dataset_path,
        split=split,
        image_column=image_column,
        label_column=label_column,
        max_images=max_images,
    )
    if override_dataset is None:
        images, split = choice.load()
    else:
        images, split = override_dataset, split or "given"
    seen = check_held_out(
        saes, choice.dataset_path, split, images.fingerprint, allow=allow_train_split
    )
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
        path=choice.dataset_path,
        split=split,
        fingerprint=images.fingerprint,
        n_images=len(images),
        n_fit=0,
        n_score=0,
        classes=list(images.class_names),
        seen_in_training=seen,
    )
    record = Record(folder, saes, evaluation, dataset, tree)
    for setting, group in by_model(record.missing()):
        hook_names = list(dict.fromkeys(sae.hook_name for sae in group))
        cache = activations_of(
            images,
            hook_names,
            setting,
            folder=folder / ACTIVATIONS_FOLDER,
            model=override_model or setting.load(hook_names, evaluation.device),
            batch_size=batch_size,
            num_workers=num_workers,
            max_corrupt_share=max_corrupt_share,
            progress=progress,
        )
        bench = evaluation.bench(cache)
        record.dataset_is(cache, bench.split)
        planted = evaluation.control_numbers(bench, images_at(cache, hook_names[0]))
        for sae in group:
            record.add(
                measure_sae(
                    bench,
                    sae,
                    images_at(cache, sae.hook_name),
                    fingerprint=record.fingerprints[sae.id],
                    controls=planted,
                    dataset=images,
                    rows=np.asarray(cache.indices),
                    output=folder,
                    progress=progress,
                )
            )
    results = record.finish()
    if not keep_activations:
        shutil.rmtree(folder / ACTIVATIONS_FOLDER, ignore_errors=True)
    return results


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and how: everything that numbers depend on beside SAE and images."""

    chosen: Mapping[str, tuple[type[Evaluator[Any]], Any]]
    taxonomy: Taxonomy
    nulls: tuple[str, ...]
    controls: tuple[str, ...]
    n_permutations: int
    seed: int
    aggregate: str
    device: str

    def bench(self, cache: ActivationCache) -> Bench:
        n_classes = len(self.taxonomy.classes)
        return Bench(
            taxonomy=self.taxonomy,
            split=Split.halves(np.asarray(cache.labels), n_classes, self.seed),
            chosen=self.chosen,
            nulls=self.nulls,
            n_permutations=self.n_permutations,
            seed=self.seed,
            aggregate=self.aggregate,
            device=self.device,
        )

    def control_numbers(self, bench: Bench, images: Images) -> dict[str, dict[str, Numbers | str]]:
        """Planted detectors know labels, not activations: once for all SAEs is enough."""
        if "planted" not in self.controls:
            return {}
        planted = PlantedLatents(self.taxonomy, seed=self.seed)
        return {"planted": bench.numbers(planted, images, list(self.chosen))}

    def settings(self) -> dict[str, Any]:
        return {
            "evaluators": list(self.chosen),
            "options": {name: asdict(given) for name, (_, given) in self.chosen.items()},
            "nulls": list(self.nulls),
            "controls": list(self.controls),
            "n_permutations": self.n_permutations,
            "seed": self.seed,
            "aggregate": self.aggregate,
        }


class Record:
    """The results as they grow, saved after each SAE."""

    def __init__(
        self,
        folder: Path,
        saes: Sequence[SAEFolder],
        evaluation: Evaluation,
        dataset: DatasetInfo,
        tree: str,
    ) -> None:
        self.folder, self.saes, self.evaluation = folder, saes, evaluation
        self._started = time.perf_counter()
        facts = [
            dataset.fingerprint,
            evaluation.settings(),
            evaluation.taxonomy.to_json(),
            versions()["taxolens"],
        ]
        self.fingerprints = {sae.id: _digest([*facts, *_facts(sae)]) for sae in saes}
        self._dataset = dataset
        self._tree = tree
        self._found: dict[str, SAEResult] = {}
        self._take_over()

    def missing(self) -> list[SAEFolder]:
        """The SAEs that have no numbers yet."""
        return [sae for sae in self.saes if sae.id not in self._found]

    def dataset_is(self, cache: ActivationCache, split: Split) -> None:
        skipped = [SkippedImage(int(i), str(why)) for i, why in sorted(cache.failures.items())]
        self._dataset = replace(
            self._dataset,
            n_images=len(split),
            n_fit=split.n_fit,
            n_score=split.n_score,
            skipped=skipped,
        )

    def add(self, sae: SAEResult) -> None:
        self._found[sae.id] = sae
        self._results(complete=False).save(self.folder)

    def finish(self) -> Results:
        """Write everything, and read it back as any reader would."""
        self._results(complete=True).save(self.folder)
        results = Results.load(self.folder)
        write_comparison(results)
        return results

    def _take_over(self) -> None:
        """Keep what an earlier call with the same settings has finished."""
        try:
            earlier = Results.load(self.folder)
        except TaxolensError:
            return
        finished = {sae.fingerprint: sae for sae in earlier.saes if not sae.errors}
        for sae in self.saes:
            same = finished.get(self.fingerprints[sae.id])
            if same is not None and _files_exist(self.folder, same):
                self._found[sae.id] = replace(same, id=sae.id, run=sae.run, name=sae.name)
        if self._found:
            self._dataset = replace(
                earlier.dataset, seen_in_training=self._dataset.seen_in_training
            )
            logger.info("%d SAEs are measured already.", len(self._found))

    def _results(self, *, complete: bool) -> Results:
        evaluation, taxonomy = self.evaluation, self.evaluation.taxonomy
        return Results(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            settings={**evaluation.settings(), "runs": {s.run: str(s.path) for s in self.saes}},
            provenance=provenance(evaluation.device, time.perf_counter() - self._started),
            dataset=self._dataset,
            taxonomy=TaxonomyInfo(
                name=self._tree,
                n_nodes=len(taxonomy.nodes),
                n_classes=len(taxonomy.classes),
                max_depth=taxonomy.max_depth,
                tree=json.loads(taxonomy.to_json()),
            ),
            evaluators={
                name: EvaluatorInfo(
                    description=cls.description,
                    directions=dict(cls.higher_is_better),
                    nulls={**ALL_NULLS, **cls.nulls},
                )
                for name, (cls, _) in evaluation.chosen.items()
            },
            saes=[self._found[sae.id] for sae in self.saes if sae.id in self._found],
            complete=complete,
        )


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


def by_model(saes: Sequence[SAEFolder]) -> Iterator[tuple[ModelSetting, list[SAEFolder]]]:
    """SAEs that can share one forward pass."""
    groups: dict[ModelSetting, list[SAEFolder]] = {}
    for sae in saes:
        groups.setdefault(ModelSetting.of(sae), []).append(sae)
    yield from groups.items()


@cache
def versions() -> dict[str, str]:
    return {package.replace("-", "_"): version(package) for package in PACKAGES}


def provenance(device: str, seconds: float) -> dict[str, Any]:
    """Versions and machine."""
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        **versions(),
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device} ({machine})",
        "seconds": round(seconds, 1),
    }


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


def _facts(sae: SAEFolder) -> list[Any]:
    """What the numbers of this SAE depend on."""
    return [sae.weights_digest(), dict(sae.cfg), asdict(ModelSetting.of(sae))]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _files_exist(folder: Path, sae: SAEResult) -> bool:
    files = [f for e in sae.evaluators.values() for f in (*e.tables.values(), *e.figures.values())]
    return all((folder / file).is_file() for file in files)
