"""What is measured and how, and the results as they grow."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...hooks.activations.cache import ActivationCache
from ...registry.errors import TaxolensError
from ...registry.evaluators.base import ALL_NULLS, Evaluator
from ...registry.evaluators.parts.planted import PlantedLatents
from ...registry.taxonomies.taxonomy import Taxonomy
from ..reporting.compare import write_comparison
from ..reporting.results import (
    DatasetInfo,
    EvaluatorInfo,
    Results,
    SAEResult,
    SkippedImage,
    TaxonomyInfo,
)
from .bench import Bench, Images, Numbers
from .held_out import ModelSetting
from .peers import PeerSAE, find_peers
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

    @property
    def wants_embedding(self) -> bool:
        return any(cls.wants_embedding for cls, _ in self.chosen.values())

    @property
    def wants_intervention(self) -> bool:
        return any(cls.wants_intervention for cls, _ in self.chosen.values())

    @property
    def wants_peers(self) -> bool:
        return any(cls.wants_peers for cls, _ in self.chosen.values())

    def peers_of(
        self, sae: SAEFolder, saes: Sequence[SAEFolder], images_of: Callable[[SAEFolder], Images]
    ) -> list[PeerSAE]:
        """The other SAEs that one is compared with, where an evaluator wants that."""
        return [
            PeerSAE(
                peer,
                relation,
                partial(images_of, peer),
                aggregate=self.aggregate,
                device=self.device,
            )
            for peer, relation in (find_peers(sae, saes) if self.wants_peers else [])
        ]

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
        reason = "planted detectors have no directions in x"
        images = replace(images, intervene=None, no_intervention=reason)
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
        own = {sae.id: _facts(sae) for sae in saes}
        self.fingerprints = {
            sae.id: _digest([*facts, *own[sae.id], *self._facts_of_peers(sae, own)]) for sae in saes
        }
        self._dataset = dataset
        self._tree = tree
        self._found: dict[str, SAEResult] = {}
        self._take_over()

    def _facts_of_peers(self, sae: SAEFolder, facts: Mapping[str, list[Any]]) -> list[Any]:
        """Nothing where no evaluator looks at them: other SAEs then make no number stale."""
        peers = find_peers(sae, self.saes) if self.evaluation.wants_peers else []
        return [[peer.id, relation, *facts[peer.id]] for peer, relation in peers]

    def missing(self, saes: Sequence[SAEFolder]) -> list[SAEFolder]:
        """Those of the SAEs that have no numbers yet."""
        return [sae for sae in saes if sae.id not in self._found]

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


def _facts(sae: SAEFolder) -> list[Any]:
    """What the numbers of this SAE depend on."""
    return [sae.weights_digest(), dict(sae.cfg), asdict(ModelSetting.of(sae))]


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _files_exist(folder: Path, sae: SAEResult) -> bool:
    files = [f for e in sae.evaluators.values() for f in (*e.tables.values(), *e.figures.values())]
    return all((folder / file).is_file() for file in files)
