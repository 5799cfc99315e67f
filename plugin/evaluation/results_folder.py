"""The results folder of an evaluation: results.json, written after each SAE and taken up again."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...hooks.activations.cache import ActivationCache
from ...registry.errors import ConfigError, DataError, TaxolensError
from ...registry.evaluators.base import ALL_NULLS
from ...registry.files import MAX_IMAGE_PIXELS, UnreadableError, file_digest, inside, is_path
from ...registry.hashing import fingerprint
from ...registry.nulls import DECISIVE
from ...registry.ranks import Ranks
from ...registry.table import EVALUATORS
from ...registry.taxonomies.permuted_classes import permuted_classes
from ..reporting.compare import from_csv, write_comparison
from ..reporting.headlines import with_q
from ..reporting.results import (
    RESULTS_FILENAME,
    DatasetInfo,
    EvaluatorInfo,
    EvaluatorResult,
    PermutedClassesInfo,
    Results,
    SAEResult,
    SkippedImage,
    TaxonomyInfo,
)
from .bench import Bench
from .copies import AlsoTrainedOn
from .forward import ModelSetting, weights_of_models
from .held_out import HeldOut, knows_training
from .latent_cards import THUMBNAILS_FOLDER, NodeFrames
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
RANKS_FOLDER = "ranks"  # what further ranks have measured, until the evaluation ends
REPLACE = "replace=True (--replace)"
MAX_IDS = 5  # that a message names
OWN_FILES = {"tables": ".csv", "figures": ".json", THUMBNAILS_FOLDER: ".jpg"}  # folder -> suffix


class ResultsFolder:
    """The results so far, saved after each SAE.

    Args:
        folder: the folder of results.json.
        saes: all SAEs to measure.
        bench: what is measured and how.
        held_out: the images and their tree.
        ranks: those that measure; each further one saves what it has in a folder of its own.
        seen_in_training: whether SAEs were trained on these images.
        override_model: a tapped model in place of those that the SAEs name.
        copies: those of the images that are copies of an image trained on, where they were compared.
    """

    def __init__(
        self,
        folder: Path,
        saes: Sequence[SAEFolder],
        bench: Bench,
        held_out: HeldOut,
        ranks: Ranks,
        *,
        seen_in_training: bool,
        override_model: Any = None,
        copies: AlsoTrainedOn | None = None,
    ) -> None:
        self.folder, self.saes = folder, saes
        self._ranks = ranks
        self._place = folder if ranks.is_first else folder / RANKS_FOLDER / str(ranks.rank)
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
            training_known=all(map(knows_training, saes)),
            n_compared=None if copies is None else copies.n_compared,
            n_also_trained_on=None if copies is None else copies.n,
        )
        limit = images.limits.max_image_pixels
        self._limits = {} if limit == MAX_IMAGE_PIXELS else {"max_image_pixels": limit}
        self._conditions = _conditions(
            images.fingerprint,
            {**bench.describe(), **self._limits},
            json.loads(bench.taxonomy.to_json()),
            versions()["taxolens"],
        )
        models = weights_of_models(saes, override_model)
        self._facts = {sae.id: _facts(sae, models[sae.id]) for sae in saes}
        self.fingerprints = {
            sae.id: _digest([*self._conditions.values(), *self._facts[sae.id]]) for sae in saes
        }
        self._found: dict[str, SAEResult] = {}
        self._own: set[str] = set()  # measured by this process
        self._earlier: Results | None = None
        self._has_images = False  # whether `_dataset` has the images of a forward pass
        self._permuted: PermutedClassesInfo | None = None

    def _fingerprint_of(self, sae: SAEFolder, name: str) -> str:
        """The digest of everything on which the numbers of one evaluator depend."""
        cls, options = self._bench.chosen[name]
        peers = find_peers(sae, self.saes) if cls.wants_peers else []
        facts = [[peer.id, relation, *self._facts[peer.id]] for peer, relation in peers]
        given = asdict(options)
        return _digest([self.fingerprints[sae.id], name, given, _files_in(given), facts])

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on, the same on every rank; files count by their content.

        Models are left out: their activations are compared where they are made.
        """
        tree = _digest(self._conditions["tree"])
        evaluators = {}
        for name, (_, options) in self._bench.chosen.items():
            given = asdict(options)
            plain = {key: value for key, value in given.items() if not _is_there(value)}
            evaluators[name] = {**plain, "files": _files_in(given)}
        saes = {
            sae.id: {
                "weights": sae.weights_digest(),
                "key": sae.key,
                "tokens": sae.tokens,
                "image_size": sae.setting("image_size"),
            }
            for sae in self.saes
        }
        return {**self._conditions, "tree": tree, "evaluators": evaluators, "SAEs": saes}

    def missing(self, saes: Sequence[SAEFolder]) -> dict[str, Bench]:
        """Id of each of `saes` that lacks numbers -> the bench with the evaluators that it lacks."""
        found = {}
        for sae in saes:
            kept = self._kept(sae.id)
            chosen = {name: each for name, each in self._bench.chosen.items() if name not in kept}
            if chosen:
                found[sae.id] = replace(self._bench, chosen=chosen)
        return found

    def node_tables(self, sae: SAEFolder, names: Collection[str]) -> NodeFrames:
        """The node tables of the evaluators whose numbers are kept, but for those in `names`."""
        found: NodeFrames = {}
        for name, kept in self._kept(sae.id).items():
            table = self._infos()[name].node_table
            if name not in names and table is not None and table.name in kept.tables:
                file = inside(self.folder, kept.tables[table.name])
                found[name] = table, from_csv(file, text=(table.node,))
        return found

    def _kept(self, sae_id: str) -> Mapping[str, EvaluatorResult]:
        return self._found[sae_id].evaluators if sae_id in self._found else {}

    @property
    def keeps_numbers(self) -> bool:
        """Whether numbers of an earlier call are kept."""
        return bool(self._found)

    def measure_again_on(self, cache: ActivationCache) -> bool:
        """Drop the numbers that are kept, where they are of other images than those of a forward pass.

        An image that cannot be read is left out, and may be readable at another time.

        Returns:
            whether there were such numbers: all are missing then.

        Raises:
            ConfigError: some of them would not be measured again.
        """
        if not self._has_images or self._is_of(cache):
            return False
        assert self._earlier is not None
        then, now = self._dataset.n_images, len(cache)
        logger.warning(
            "%s: its numbers are of %d images that could be read, and now %s%d can be: they are measured again.",
            *(self.folder, then, "other " if then == now else "", now),
        )
        self._found, self._has_images = {}, False
        self._refuse_to_drop(self._earlier, of_these="{} when other images could be read")
        return True

    def _is_of(self, cache: ActivationCache) -> bool:
        """Whether the images measured on so far are those of a forward pass."""
        skipped = {image.index for image in self._dataset.skipped}
        return self._dataset.n_images == len(cache) and skipped == set(cache.failures)

    def dataset_is(self, cache: ActivationCache, split: Split) -> None:
        """Record the numbers of images of a forward pass, and the images that were skipped.

        Raises:
            DataError: other images could be read in the forward pass of another model.
        """
        if self._has_images and not self._is_of(cache):
            raise DataError(
                "images",
                f"{len(cache)} could be read for one model, and {self._dataset.n_images} or others for another",
                allowed=f"the same call with {REPLACE} once all can be read, without {cache.path.parent}",
            )
        self._has_images = True
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

    def add(self, sae: SAEFolder, measured: SAEResult) -> None:
        """Add the numbers of one SAE to those that it has, and save."""
        new = {
            name: replace(result, fingerprint=self._fingerprint_of(sae, name))
            for name, result in measured.evaluators.items()
        }
        evaluators = {**self._kept(sae.id), **new}
        self._found[sae.id] = replace(
            measured, evaluators={name: evaluators[name] for name in _in_order(evaluators)}
        )
        self._own.add(sae.id)
        self._save()

    def begin(self) -> None:
        """Save what other ranks' numbers belong to before they have any; nothing for one process."""
        if self._ranks.size == 1:
            return
        if self._ranks.is_first:
            self._save()
            self._forget_ranks()
        self._ranks.wait()

    def _forget_ranks(self) -> None:
        with suppress(OSError):  # not there, or with files of others
            for place in (self.folder / RANKS_FOLDER).iterdir():
                if place.is_dir() and all(_is_of_a_rank(file.name) for file in place.iterdir()):
                    shutil.rmtree(place, ignore_errors=True)
            (self.folder / RANKS_FOLDER).rmdir()

    def _save(self) -> None:
        self._results(complete=False).save(self._place)

    def finish(self) -> Results:
        """Write everything, and return the results as read back from the file."""
        self._results(complete=True).save(self.folder)
        results = Results.load(self.folder)
        write_comparison(results, earlier=self._earlier)
        if self._earlier is not None:
            for file in _files(self._earlier) - _files(results):
                with suppress(UnreadableError):  # not written by us
                    own = _own_file(self.folder, file)
                    own.unlink(missing_ok=True)
                    with suppress(OSError):  # other files are in it
                        own.parent.rmdir()
        self._forget_ranks()
        return results

    def take_over(self) -> None:
        """Keep the numbers that an earlier call has finished: same SAE, images, tree and settings.

        Raises:
            ConfigError: numbers would be dropped that this call does not measure again: of other
                SAEs, of evaluators that are not named, or in a file that cannot be read.
        """
        try:
            earlier = _with_ranks(self.folder)
        except TaxolensError as error:
            if self._bench.settings.replace:
                return
            problem = f"{self.folder} has results that cannot be read, and would be replaced"
            raise ConfigError(
                "output_path", f"{problem} ({error})", allowed=f"another output_path, or {REPLACE}"
            ) from None
        self._earlier = earlier
        if earlier is None:
            return
        if self._bench.settings.replace:
            if self._ranks.is_first:
                self._forget_ranks()
            return
        by_fingerprint = {sae.fingerprint: sae for sae in earlier.saes}
        for sae in self.saes:
            same = by_fingerprint.get(self.fingerprints[sae.id])
            if same is None:
                continue
            kept = {
                name: result
                for name, result in same.evaluators.items()
                if not result.error
                and _files_exist(self.folder, result)
                and (
                    name not in self._bench.chosen
                    or result.fingerprint == self._fingerprint_of(sae, name)
                )
            }
            if kept:
                names = {"id": sae.id, "run": sae.run, "name": sae.name}
                self._found[sae.id] = replace(
                    same,
                    **names,
                    trained_as=sae.trained_as,
                    weights=sae.weights_digest(),
                    evaluators=kept,
                )
        self._refuse_to_drop(earlier)
        if self._found:
            self._has_images = True
            self._permuted = earlier.permuted_classes
            here = self._dataset
            same = ("path", "name", "split", "seen_in_training", "training_known")
            same += ("n_compared", "n_also_trained_on")
            same = {name: getattr(here, name) for name in same}
            self._dataset = replace(earlier.dataset, **same)
            logger.info("%d SAEs have numbers already.", len(self._found))

    def _refuse_to_drop(
        self, earlier: Results, of_these: str = "{} whose files are missing"
    ) -> None:
        """Raise if the folder has numbers that are neither kept nor measured again.

        `of_these` says why those are not kept that are of the same SAEs, images, tree and settings.
        """
        there = _conditions(
            earlier.dataset.fingerprint,
            earlier.settings,
            earlier.taxonomy.tree,
            str(earlier.provenance.get("taxolens")),
        )
        others = [name for name in there if there[name] != self._conditions[name]]
        kept = {self.fingerprints[id]: set(found.evaluators) for id, found in self._found.items()}
        by_id = {sae.id: sae for sae in self.saes}
        dropped: dict[str, tuple[list[str], set[str]]] = {}  # why -> ids and evaluators
        for old in earlier.saes:
            finished = {name for name, result in old.evaluators.items() if not result.error}
            finished -= kept.get(old.fingerprint, set())
            again, sae = True, by_id.get(old.id)
            if old.fingerprint in self.fingerprints.values():
                why = of_these
            elif sae is None:
                again, why = False, "SAEs that this call does not evaluate ({})"
            else:
                differing = [*others, *_differing(old, sae)] or ["weights of the model or metadata"]
                again = "weights" not in differing or self._is_at_home(sae)
                why = f"{{}} with other {', '.join(differing)}"
            if again:
                finished -= set(self._bench.chosen)
            if finished:
                ids, evaluators = dropped.setdefault(why, ([], set()))
                ids.append(old.id)
                evaluators |= finished
        if dropped:
            why, (ids, evaluators) = next(iter(dropped.items()))
            more = f" and {len(ids) - MAX_IDS} more" if len(ids) > MAX_IDS else ""
            raise ConfigError(
                "output_path",
                f"{self.folder} has numbers of {why.format(', '.join(ids[:MAX_IDS]) + more)}, which "
                f"would be dropped: {', '.join(_in_order(evaluators))}",
                allowed=f"another output_path, these SAEs and evaluators too, or {REPLACE}",
            )

    def _is_at_home(self, sae: SAEFolder) -> bool:
        """Whether the results lie in the folder of the SAE's run, where the run was trained anew."""
        home = self.folder.resolve()
        return sae.path.resolve() in (home, home / sae.name)

    def _infos(self) -> dict[str, EvaluatorInfo]:
        """What the evaluators declare, those included whose numbers are kept."""
        infos = {
            name: EvaluatorInfo(
                description=cls.description,
                directions=dict(cls.higher_is_better),
                nulls={**ALL_NULLS, **cls.nulls},
                headlines=list(cls.headlines),
                labels=dict(cls.labels),
                node_table=cls.node_table,
                support=dict(cls.support),
            )
            for name, (cls, _) in self._bench.chosen.items()
        }
        kept = {name for sae in self._found.values() for name in sae.evaluators} - set(infos)
        if self._earlier is not None:
            infos |= {name: self._earlier.evaluators[name] for name in kept}
        return {name: infos[name] for name in _in_order(infos)}

    def _settings(self) -> dict[str, Any]:
        """The options, those of the evaluators included whose numbers are kept."""
        here = self._bench.describe()
        there = self._earlier.settings.get("options", {}) if self._earlier is not None else {}
        names = list(self._infos())
        options = {**there, **here["options"]}
        return {
            **here,
            **self._limits,
            "evaluators": names,
            "options": {name: options[name] for name in names if name in options},
            "runs": {
                run: str(_folder_of(run, self.saes))
                for run in dict.fromkeys(sae.run for sae in self.saes)
            },
        }

    def _results(self, *, complete: bool) -> Results:
        bench, taxonomy = self._bench, self._bench.taxonomy
        results = Results(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            settings=self._settings(),
            provenance=provenance(bench.device, time.perf_counter() - self._started),
            dataset=self._dataset,
            taxonomy=TaxonomyInfo(
                name=self._tree,
                n_nodes=len(taxonomy.nodes),
                n_classes=len(taxonomy.classes),
                max_depth=taxonomy.max_depth,
                tree=json.loads(taxonomy.to_json()),
            ),
            evaluators=self._infos(),
            saes=[
                self._found[sae.id]
                for sae in self.saes
                if sae.id in (self._found if self._ranks.is_first else self._own)
            ],
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


def holds_others(folder: Path, saes: Sequence[SAEFolder]) -> bool:
    """Whether a results folder has numbers of other weights than those of `saes`, or cannot be read."""
    try:
        results = _with_ranks(folder)
    except TaxolensError:
        return True
    weights = {sae.weights_digest() for sae in saes}
    return results is not None and any(sae.weights not in weights for sae in results.saes)


def _with_ranks(folder: Path) -> Results | None:
    """The results in a folder, those that further ranks have saved included; None without any.

    Raises:
        DataError: they cannot be read.
    """
    if not (folder / RESULTS_FILENAME).exists():
        return None
    results = Results.load(folder)
    for place in sorted(folder.glob(f"{RANKS_FOLDER}/*")):
        with suppress(TaxolensError):
            results = replace(results, saes=[*results.saes, *Results.load(place).saes])
    return results


def _is_of_a_rank(name: str) -> bool:
    """Whether it is the name of a rank's results, or of a temporary file of them."""
    return name == RESULTS_FILENAME or name.startswith(f".{RESULTS_FILENAME}.")


def _differing(old: SAEResult, sae: SAEFolder) -> list[str]:
    """The facts of an SAE in earlier results that are not those of the SAE of the same id."""
    facts = {
        "weights": sae.weights_digest(),
        "model_name": sae.model_name,
        "hook_name": sae.hook_name,
        "hook_head_index": sae.head,
        "tokens": sae.tokens,
    }
    return [name for name, value in facts.items() if getattr(old, name) != value]


def _facts(sae: SAEFolder, model: str) -> list[Any]:
    """The facts of an SAE on which its numbers depend; `model` is the digest of its model's weights."""
    return [sae.weights_digest(), dict(sae.cfg), asdict(ModelSetting.of(sae)), sae.key, model]


def _files_in(options: Mapping[str, Any]) -> list[str]:
    """The digests of the files that options of an evaluator name."""
    paths = [Path(value) for value in options.values() if is_path(value)]
    return [file_digest(path) for path in paths if path.is_file()]


def _is_there(value: Any) -> bool:
    """Whether an option names a file or folder of this machine."""
    return is_path(value) and Path(value).exists()


def _folder_of(run: str, saes: Sequence[SAEFolder]) -> Path:
    """The folder of a run, whose SAEs have folders of their own in it; of one SAE, its own."""
    paths = [sae.path for sae in saes if sae.run == run]
    return paths[0] if len(paths) == 1 else Path(os.path.commonpath(paths))


def _digest(facts: Any) -> str:
    return fingerprint([json.dumps(facts, sort_keys=True, default=str)])


def _conditions(
    images: str, settings: Mapping[str, Any], tree: Any, version: str
) -> dict[str, Any]:
    """What the numbers of every evaluator depend on beside the SAE, each by its name in messages."""
    own = ("evaluators", "options", "runs")
    return {
        "images": images,
        "tree": tree,
        **{"version of taxolens": version},
        "settings": {key: value for key, value in settings.items() if key not in own},
    }


def _in_order(names: Collection[str]) -> list[str]:
    """The evaluators in the order of the table of evaluators, unregistered ones last."""
    registered = list(EVALUATORS)
    return sorted(names, key=lambda n: registered.index(n) if n in registered else len(registered))


def _files(results: Results) -> set[str]:
    """The tables, figures and thumbnails that results name."""
    found = {
        file
        for sae in results.saes
        for result in sae.evaluators.values()
        for file in (*result.tables.values(), *result.figures.values())
    }
    cards = [card for sae in results.saes for card in (*sae.most_specific, *sae.least_specific)]
    return found | {image.thumbnail for card in cards for image in card.images if image.thumbnail}


def _own_file(folder: Path, name: str) -> Path:
    """The path of a table, figure or thumbnail that an evaluation writes, which `name` says.

    Raises:
        UnreadableError: it says another file, such as the weights that lie in the same folder.
    """
    path = inside(folder, name).resolve()
    for kind, suffix in OWN_FILES.items():
        if path.suffix == suffix and path.is_relative_to(folder.resolve() / kind):
            return path
    raise UnreadableError(f"{name!r} is no table, figure or thumbnail of an evaluation")


def _files_exist(folder: Path, result: EvaluatorResult) -> bool:
    files = (*result.tables.values(), *result.figures.values())
    try:
        return all(inside(folder, file).is_file() for file in files)
    except UnreadableError:  # not written by us: all is measured again
        return False
