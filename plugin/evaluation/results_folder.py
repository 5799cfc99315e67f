"""The results folder of an evaluation: results.json, written after each SAE and taken up again."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...hooks.activations.cache import ActivationCache
from ...registry.errors import TaxolensError
from ...registry.evaluators.base import ALL_NULLS
from ...registry.files import UnreadableError, inside
from ...registry.hashing import fingerprint
from ...registry.nulls import DECISIVE
from ...registry.taxonomies.permuted_classes import permuted_classes
from ..reporting.compare import write_comparison
from ..reporting.headlines import with_q
from ..reporting.results import (
    DatasetInfo,
    EvaluatorInfo,
    PermutedClassesInfo,
    Results,
    SAEResult,
    SkippedImage,
    TaxonomyInfo,
)
from .bench import Bench
from .forward import ModelSetting
from .held_out import HeldOut
from .peers import find_peers
from .sae_folders import SAEFolder
from .split import Split

logger = logging.getLogger(__name__)

PACKAGES = (
    "taxolens",
    "sae-lens",
    "transformer-lens",
    "torch",
    "transformers",
    "datasets",
    "numpy",
)


class ResultsFolder:
    """The results so far, saved after each SAE.

    Args:
        folder: the folder of results.json.
        saes: all SAEs to measure.
        bench: what is measured and how.
        held_out: the images and their tree.
        seen_in_training: whether SAEs were trained on these images.
    """

    def __init__(
        self,
        folder: Path,
        saes: Sequence[SAEFolder],
        bench: Bench,
        held_out: HeldOut,
        *,
        seen_in_training: bool,
    ) -> None:
        self.folder, self.saes = folder, saes
        self._bench, self._tree = bench, held_out.tree
        self._started = time.perf_counter()
        images = held_out.images
        self._dataset = DatasetInfo(
            path=str(held_out.source.dataset_path),
            name=held_out.source.name,
            split=str(held_out.source.split),
            fingerprint=images.fingerprint,
            n_images=len(images),
            n_fit=0,
            n_score=0,
            classes=list(images.class_names),
            seen_in_training=seen_in_training,
            holdout=held_out.source.holdout,
            holdout_seed=None if held_out.source.part is None else held_out.source.holdout_seed,
            n_present=held_out.n_present,
        )
        facts = [
            images.fingerprint,
            bench.describe(),
            bench.taxonomy.to_json(),
            versions()["taxolens"],
        ]
        own = {sae.id: _facts(sae) for sae in saes}
        self.fingerprints = {
            sae.id: _digest([*facts, *own[sae.id], *self._facts_of_peers(sae, own)]) for sae in saes
        }
        self._found: dict[str, SAEResult] = {}
        self._permuted: PermutedClassesInfo | None = None

    def _facts_of_peers(self, sae: SAEFolder, facts: Mapping[str, list[Any]]) -> list[Any]:
        """The facts of the peers; none where no evaluator compares with peers."""
        peers = find_peers(sae, self.saes) if self._bench.wants("peers") else []
        return [[peer.id, relation, *facts[peer.id]] for peer, relation in peers]

    def missing(self, saes: Sequence[SAEFolder]) -> list[SAEFolder]:
        """The SAEs among `saes` that have no numbers yet."""
        return [sae for sae in saes if sae.id not in self._found]

    def dataset_is(self, cache: ActivationCache, split: Split) -> None:
        """Record the numbers of images of a forward pass, and the images that were skipped."""
        skipped = [SkippedImage(int(i), str(why)) for i, why in sorted(cache.failures.items())]
        self._dataset = replace(
            self._dataset,
            n_images=len(split),
            n_fit=split.n_fit,
            n_score=split.n_score,
            skipped=skipped,
        )
        permuted = permuted_classes(
            self._bench.taxonomy,
            np.bincount(split.labels, minlength=len(self._bench.taxonomy.classes)),
            n=self._bench.settings.n_permutations,
            seed=self._bench.settings.seed,
        )
        facts = {**vars(permuted), "draws": len(permuted.draws)}
        if DECISIVE in self._bench.settings.nulls:
            self._permuted = PermutedClassesInfo(**facts)

    def add(self, sae: SAEResult) -> None:
        """Add the numbers of one SAE and save."""
        self._found[sae.id] = sae
        self._results(complete=False).save(self.folder)

    def finish(self) -> Results:
        """Write everything, and return the results as read back from the file."""
        self._results(complete=True).save(self.folder)
        results = Results.load(self.folder)
        write_comparison(results)
        return results

    def take_over(self) -> None:
        """Keep the SAEs that an earlier call with the same settings has finished."""
        try:
            earlier = Results.load(self.folder)
        except TaxolensError:
            return
        finished = {sae.fingerprint: sae for sae in earlier.saes if not sae.errors}
        for sae in self.saes:
            same = finished.get(self.fingerprints[sae.id])
            if same is not None and _files_exist(self.folder, same):
                self._found[sae.id] = replace(
                    same, id=sae.id, run=sae.run, name=sae.name, trained_as=sae.trained_as
                )
        if self._found:
            self._permuted = earlier.permuted_classes
            self._dataset = replace(
                earlier.dataset, seen_in_training=self._dataset.seen_in_training
            )
            logger.info("%d SAEs are measured already.", len(self._found))

    def _results(self, *, complete: bool) -> Results:
        bench, taxonomy = self._bench, self._bench.taxonomy
        results = Results(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            settings={**bench.describe(), "runs": {s.run: str(s.path) for s in self.saes}},
            provenance=provenance(bench.device, time.perf_counter() - self._started),
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
                    headlines=list(cls.headlines),
                    labels=dict(cls.labels),
                    node_table=cls.node_table,
                    support=dict(cls.support),
                )
                for name, (cls, _) in bench.chosen.items()
            },
            saes=[self._found[sae.id] for sae in self.saes if sae.id in self._found],
            complete=complete,
            permuted_classes=self._permuted,
        )
        return with_q(results)


@cache
def versions() -> dict[str, str]:
    """Package -> its version, for the packages on which the numbers depend."""
    return {package.replace("-", "_"): version(package) for package in PACKAGES}


def provenance(device: str, seconds: float) -> dict[str, Any]:
    """Versions, device and duration, as in results.json."""
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        **versions(),
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device} ({machine})",
        "seconds": round(seconds, 1),
    }


def _facts(sae: SAEFolder) -> list[Any]:
    """The facts of an SAE on which its numbers depend."""
    return [sae.weights_digest(), dict(sae.cfg), asdict(ModelSetting.of(sae))]


def _digest(facts: Any) -> str:
    return fingerprint([json.dumps(facts, sort_keys=True, default=str)])


def _files_exist(folder: Path, sae: SAEResult) -> bool:
    files = [f for e in sae.evaluators.values() for f in (*e.tables.values(), *e.figures.values())]
    try:
        return all(inside(folder, file).is_file() for file in files)
    except UnreadableError:  # not written by us: all is measured again
        return False
