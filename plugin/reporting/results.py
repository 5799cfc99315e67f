"""Results of an evaluation, and their file `results.json`, schema ``taxolens.results/1``.

docs/formats/results.md defines the file; `results.schema.json` is its JSON schema, generated from
the types and docstrings below. In memory an undefined number is NaN; in the file it is null, so
that the file is strict JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ...registry.coerce import MisfitError, coerce
from ...registry.errors import DataError
from ...registry.files import (
    MAX_DATA_BYTES,
    UnreadableError,
    inside,
    read_json,
    reason,
    write_atomically,
)
from ...registry.heads import head_name
from ...registry.nulls import DECISIVE, LABEL_NULLS, LEAST_DRAWS, significant
from ...registry.presentation import Headline, NodeTable, Support

SCHEMA = "taxolens.results/1"
RESULTS_FILENAME = "results.json"
NO_NULL = "no null"
NULL_COLUMNS = {"": "mean", "_best": "best", "_n": "n", "_p": "p", "_q": "q"}  # of `frame`
JSON_SCHEMA = Path(__file__).with_name("results.schema.json")


@dataclass(frozen=True)
class NullResult:
    """One metric under one null control.

    Args:
        mean: the metric under the null, in its own unit; the mean where there are several draws.
        best: the best of the draws, in the metric's direction.
        n: number of draws of the null with a number; 0 where there is a `reason`.
        left_behind: whether `p` is at most .05, where there are 19 draws or more; with fewer,
            whether the value is strictly better than every draw; null where the metric has no
            direction or a number is undefined.
        reason: why this null has no number here; null where it has one.
        p: (1 + number of draws at least as good as the value) / (1 + n); null where `left_behind` is.
        q: `p` of the permuted classes after Benjamini–Hochberg over the headline metrics of all SAEs
            in the file; null elsewhere.
        missing: whether the value could be judged against this null, but there is no draw of it, for
            the `reason`; false for a null that has no meaning for the evaluator or the metric.
    """

    mean: float = math.nan
    best: float = math.nan
    n: int = 0
    left_behind: bool | None = None
    reason: str | None = None
    p: float = math.nan
    q: float = math.nan
    missing: bool = False

    @property
    def past(self) -> bool | None:
        """Whether the value is past this null: q ≤ .05 where there is a `q`, else `left_behind`."""
        return self.left_behind if math.isnan(self.q) else significant(self.q)


@dataclass(frozen=True)
class MetricResult:
    """A number, with its nulls and other controls.

    Args:
        value: the metric; its unit and meaning are documented by the evaluator.
        nulls: null control (see `registry/nulls.py`) -> the metric under it.
        controls: further control, such as `planted` (detectors built from the tree) -> the metric
            under it.
        low: lower end of the value's 95 % interval; null where none was computed.
        high: upper end of the same interval.
        support: number of nodes, latents, edges, ... that the value is computed from (their name is
            in `evaluators`); null where the evaluator does not declare it.
        least: smallest `support` with which the value is judged against its nulls.
    """

    value: float
    nulls: dict[str, NullResult] = field(default_factory=dict)
    controls: dict[str, float] = field(default_factory=dict)
    low: float = math.nan
    high: float = math.nan
    support: int | None = None
    least: int = 0

    @property
    def undecided(self) -> str | None:
        """Why the value is not judged against its nulls; None where it is."""
        if self.support is not None and self.support < self.least:
            return f"computed from {self.support}, fewer than {self.least}"
        permuted = self.nulls.get(DECISIVE, NullResult())
        if permuted.missing:
            return f"no draw of permuted classes: {permuted.reason}"
        if 0 < permuted.n < LEAST_DRAWS:
            return f"{permuted.n} draws of permuted classes, fewer than {LEAST_DRAWS}"
        if all(null.past is None for null in self.nulls.values()):
            return NO_NULL
        return None

    @property
    def not_judged(self) -> str | None:
        """Why there is no verdict on a value that has nulls; None where there is one, or no null.

        A verdict on what depends on labels needs both nulls of labels: either catches what the other
        does not.
        """
        if self.undecided:
            return None if self.undecided == NO_NULL else self.undecided
        labels = [null for null in LABEL_NULLS if null in self.nulls]
        left_out = [null for null in LABEL_NULLS if null not in labels]
        if left_out and any(self.nulls[null].past is not None for null in labels):
            return f"the null {left_out[0]} was not computed"
        return None

    @property
    def missed(self) -> list[str]:
        """The nulls that the value is not past; none where it is not judged."""
        judged = {} if self.undecided or self.not_judged else self.nulls
        return [name for name, null in judged.items() if null.past is False]

    @property
    def past_all(self) -> bool | None:
        """Whether the value is past every null that it has; None where it is not judged."""
        return None if self.undecided or self.not_judged else not self.missed


@dataclass(frozen=True)
class EvaluatorResult:
    """The numbers, files and notes of one evaluator for one SAE.

    Args:
        metrics: metric -> number beside its nulls.
        tables: table -> CSV file, relative to the results folder.
        figures: figure -> Plotly JSON file, relative to the results folder.
        seconds: the evaluator's own time in seconds, without what evaluators share.
        error: type and text of the evaluator's error; null where there was none. Numbers computed
            before the error stay.
        notes: explanations of the numbers: why some are undefined, with which SAEs this one was
            compared.
        fingerprint: digest of everything on which these numbers depend: the SAE's `fingerprint`, the
            evaluator's options, its peers. A further evaluation with an equal one keeps them.
    """

    metrics: dict[str, MetricResult] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    fingerprint: str = ""


@dataclass(frozen=True)
class TopImage:
    """One of the images on which a latent is most active.

    Args:
        index: row of the image in the dataset, counted from 0.
        label: human name of the image's class.
        activation: the latent's activation on the image, in the SAE's own unit.
        thumbnail: JPEG file, relative to the results folder; null where there is none.
    """

    index: int
    label: str
    activation: float
    thumbnail: str | None = None


@dataclass(frozen=True)
class LatentCard:
    """A latent, its position in the tree, and its most activating images.

    Args:
        latent: column of the latent in the SAE, counted from 0.
        node: id of the taxonomy node assigned to it.
        path: human names from the root to `node`.
        height: longest path from `node` to a leaf, in edges.
        generality: log2 of the number of classes at or below `node`.
        f1: F1 of the latent as a detector of `node` on held-out images, from 0 to 1; null where
            coverage was not measured.
        fires_on: share of the images on which it is above 0, from 0 to 1.
        images: its most activating images, the most active first.
        above_threshold_on: share of the held-out images on which it reaches the threshold at which
            `f1` is measured; null where `f1` is null or its threshold is 0.
    """

    latent: int
    node: str
    path: list[str]
    height: float
    generality: float
    f1: float
    fires_on: float
    images: list[TopImage]
    above_threshold_on: float = math.nan


@dataclass(frozen=True)
class SAEResult:
    """The results of one SAE.

    Args:
        id: unique in the file: the SAE's name, with its run's before it when several runs are
            compared.
        run: label of the run.
        name: name of the SAE in its run.
        hook_name: hook point that its activations come from.
        layer: the first whole number in `hook_name`; null where there is none.
        model_name: the model, as the run's config names it.
        architecture: the SAE's architecture, as saved.
        tokens: which tokens of an image it reads: class, patch, register, all or mean_patch.
        d_in: width of the activations.
        d_sae: number of latents.
        l0: mean number of latents that are not 0 on an image, on the largest or mean activation over
            its tokens; null where counting them failed.
        fingerprint: digest of the SAE, the images, the tree and the settings but for evaluators; a
            further evaluation with an equal one adds its numbers to these.
        evaluators: evaluator -> its numbers.
        most_specific: cards of the latents whose nodes have the fewest classes below them.
        least_specific: cards of the latents whose nodes have the most classes below them.
        node_f1: taxonomy node -> F1 of its best latent, from 0 to 1, scored on other images than
            those on which it was chosen.
        seconds: time taken in seconds.
        trained_as: the architecture that was trained, by the name that the user chose (`nested_topk` is
            saved as `topk`); `architecture` where the SAE does not record it.
        constraint: what was held at its random start in training, `frozen_decoder`, `soft_frozen_decoder`
            or `frozen_encoder`; null for an ordinary SAE.
        l0_token: mean number of latents that are not 0 on a token, over a sample of the fit half;
            `l0` where it reads one token of an image, null where counting them failed.
        weights: digest of the weights, by which an SAE is recognised; empty in older files.
        hook_head_index: the head of `hook_name` that it reads, counted from 0; null for all heads, and
            where there are none.
    """

    id: str
    run: str
    name: str
    hook_name: str
    layer: int | None
    model_name: str
    architecture: str
    tokens: str
    d_in: int
    d_sae: int
    l0: float
    fingerprint: str
    evaluators: dict[str, EvaluatorResult]
    most_specific: list[LatentCard] = field(default_factory=list)
    least_specific: list[LatentCard] = field(default_factory=list)
    node_f1: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    trained_as: str = ""
    constraint: str | None = None
    l0_token: float = math.nan
    weights: str = ""
    hook_head_index: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained_as", self.trained_as or self.architecture)

    def __repr__(self) -> str:
        return f"SAEResult({self.id!r}, {self.trained_as}, d_sae={self.d_sae}, l0={self.l0:.3g})"

    @property
    def place(self) -> str:
        """The hook point, or the head there, for readers."""
        return head_name(self.hook_name, self.hook_head_index)

    @property
    def errors(self) -> dict[str, str]:
        """Evaluator -> its error, of those that failed."""
        return {name: e.error for name, e in self.evaluators.items() if e.error}


@dataclass(frozen=True)
class EvaluatorInfo:
    """What an evaluator declares.

    Args:
        description: one line.
        directions: metric -> whether higher is better; null where the metric is descriptive.
        nulls: null control -> why it is not computed for this evaluator; null where it is computed.
        headlines: the metrics that summaries show; empty: its first metric with a direction.
        labels: metric -> its name in reports and charts; by default the metric's key with spaces.
        node_table: the table that places latents at nodes; null where there is none.
        support: metric -> what it is computed from.
    """

    description: str
    directions: dict[str, bool | None]
    nulls: dict[str, str | None]
    headlines: list[Headline] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    node_table: NodeTable | None = None
    support: dict[str, Support] = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be read.

    Args:
        index: row of the image in the dataset, counted from 0.
        reason: its source, and why it could not be read.
    """

    index: int
    reason: str


@dataclass(frozen=True)
class DatasetInfo:
    """The evaluation images.

    Args:
        path: dataset, as given.
        split: the held-out split.
        fingerprint: digest of the images, their labels and the class names.
        n_images: number of images measured on.
        n_fit: of them, those on which thresholds, latents and probes were chosen.
        n_score: of them, those that were scored.
        classes: class names, in the order of the labels.
        skipped: corrupt images, which are left out.
        seen_in_training: whether the SAEs were trained on this split; refused unless allowed.
        name: the dataset's configuration; null where it has none.
        holdout: share of every class of the split that was held out; null where the split is.
        holdout_seed: seed of the choice of these images; null likewise.
        n_present: number of classes that have images; null where it was not recorded.
        training_known: whether it is known of every SAE which images it was trained on; where it is not,
            `seen_in_training` is about the others alone; null where it was not recorded.
        n_compared: number of images whose bytes were compared with those of the images trained on, at most
            5,000; null where they were not.
        n_also_trained_on: of them, those that are byte for byte an image trained on; null likewise.
    """

    path: str
    split: str
    fingerprint: str
    n_images: int
    n_fit: int
    n_score: int
    classes: list[str]
    skipped: list[SkippedImage] = field(default_factory=list)
    seen_in_training: bool = False
    name: str | None = None
    holdout: float | None = None
    holdout_seed: int | None = None
    n_present: int | None = None
    training_known: bool | None = None
    n_compared: int | None = None
    n_also_trained_on: int | None = None

    @property
    def title(self) -> str:
        """The dataset with its configuration and split, as the report shows it."""
        held_out = f"{self.holdout:g} held out" if self.holdout else None
        parts = (self.name, self.split, held_out)
        return f"{self.path} ({', '.join(part for part in parts if part)})"


@dataclass(frozen=True)
class TaxonomyInfo:
    """The class tree.

    Args:
        name: taxonomy, as given: a registered name, a folder or a file.
        n_nodes: number of nodes.
        n_classes: number of classes.
        max_depth: longest path from the root, in edges.
        tree: the whole tree as a taxonomy document; `Taxonomy.from_json` reads it.
    """

    name: str
    n_nodes: int
    n_classes: int
    max_depth: int
    tree: dict[str, Any]


@dataclass(frozen=True)
class PermutedClassesInfo:
    """What the permuted-classes null could permute.

    Args:
        present: number of classes with images.
        movable: of them, those that can be exchanged with a class of like size.
        strata: number of groups of classes of like size.
        draws: number of distinct trees drawn.
        same_tree: random permutations left out because they give the tree itself.
        repeated: random permutations left out because they give the tree of an earlier draw.
    """

    present: int
    movable: int
    strata: int
    draws: int
    same_tree: int
    repeated: int


@dataclass(frozen=True)
class Results:
    """One evaluation of one or many runs.

    Args:
        created: time of writing, ISO 8601 in UTC, to the second.
        settings: the options: evaluators with their options, nulls, controls, n_permutations, seed,
            aggregate, runs, and max_image_pixels where it is not the default.
        provenance: versions of taxolens and the libraries below it, Python, system, device, seconds.
        dataset: the evaluation images.
        taxonomy: the class tree.
        evaluators: evaluator -> what it declares.
        saes: one entry for each SAE that has been measured.
        complete: false while SAEs are still to be measured.
        schema: version of the file format.
        permuted_classes: what the null of that name could permute; null where it was not computed.
        folder: folder of the files named here; set on reading, not part of the file.
    """

    created: str
    settings: dict[str, Any]
    provenance: dict[str, Any]
    dataset: DatasetInfo
    taxonomy: TaxonomyInfo
    evaluators: dict[str, EvaluatorInfo]
    saes: list[SAEResult]
    complete: bool = True
    schema: str = SCHEMA
    permuted_classes: PermutedClassesInfo | None = None
    folder: Path | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return (
            f"Results(saes={len(self.saes)}, evaluators={list(self.evaluators)}, "
            f"images={self.dataset.n_images}, folder={str(self.folder)!r})"
        )

    @property
    def errors(self) -> dict[str, str]:
        """``"<sae id>: <evaluator>" -> message`` of every evaluator that failed."""
        return {f"{sae.id}: {name}": text for sae in self.saes for name, text in sae.errors.items()}

    def file(self, name: str) -> Path | None:
        """The file that the results name; None where they were not read from a folder, or it is missing.

        Raises:
            DataError: it lies outside of the results folder, also after links are followed.
        """
        if self.folder is None:
            return None
        try:
            path = inside(self.folder, name)
        except UnreadableError as error:
            raise DataError(self.folder / RESULTS_FILENAME, error) from None
        return path if path.is_file() else None

    def rows(self) -> Iterator[tuple[SAEResult, str, str, MetricResult]]:
        """Every (SAE, evaluator, metric name, metric)."""
        for sae in self.saes:
            for evaluator, result in sae.evaluators.items():
                for metric, number in result.metrics.items():
                    yield sae, evaluator, metric, number

    def metric_names(self) -> list[tuple[str, str]]:
        """Every (evaluator, metric) that some SAE has."""
        return list(dict.fromkeys((evaluator, metric) for _, evaluator, metric, _ in self.rows()))

    def direction(self, evaluator: str, metric: str) -> bool | None:
        """Whether higher is better; None where the metric is descriptive or not known."""
        info = self.evaluators.get(evaluator)
        return info.directions.get(metric) if info else None

    def label(self, evaluator: str, metric: str) -> str:
        """The evaluator's label of its metric; the metric's key where it has none."""
        info = self.evaluators.get(evaluator)
        return info.labels.get(metric, metric) if info else metric

    def frame(self) -> pd.DataFrame:
        """One row per SAE and metric: value, interval, support, nulls, those not beaten, why it is not judged."""
        return pd.DataFrame(
            {
                "run": sae.run,
                "sae": sae.name,
                "hook_name": sae.hook_name,
                "layer": sae.layer,
                "architecture": sae.trained_as,
                "evaluator": evaluator,
                "metric": metric,
                "value": number.value,
                **{
                    f"{name}{suffix}": getattr(null, attribute)
                    for name, null in number.nulls.items()
                    for suffix, attribute in NULL_COLUMNS.items()
                    if suffix == "" or null.n > 1 or (null.n and name == DECISIVE)
                },
                "low": number.low,
                "high": number.high,
                "support": number.support,
                **number.controls,
                "not_left_behind": ", ".join(number.missed),
                "not_judged": number.not_judged or "",
            }
            for sae, evaluator, metric, number in self.rows()
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of `results.json`."""
        data = asdict(self)
        del data["folder"]
        return {"schema": data.pop("schema"), **_nan_to_null(data)}

    @classmethod
    def from_dict(cls, data: Any, *, source: str = RESULTS_FILENAME) -> Results:
        """The results in the content of a `results.json`.

        Raises:
            DataError: `data` is not of this schema; the message names the place.
        """
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise DataError(source, "schema: not known", given=found, allowed=repr(SCHEMA))
        try:
            return coerce({k: v for k, v in data.items() if k != "folder"}, cls, source)
        except MisfitError as error:
            raise DataError(str(error)) from None

    def save(self, folder: str | Path) -> Path:
        """Write `results.json` into `folder`, atomically."""
        text = json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False, indent=1)
        return write_atomically(Path(folder) / RESULTS_FILENAME, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a `results.json`, or the one in the folder `path`.

        Raises:
            DataError: the file is missing, not JSON, too long, or of another schema.
        """
        path = Path(path).expanduser()
        file = path / RESULTS_FILENAME if path.is_dir() else path
        try:
            data = read_json(file, MAX_DATA_BYTES)
        except FileNotFoundError:
            raise DataError(
                file, "not found", allowed="what `taxolens evaluate RUN` writes"
            ) from None
        except (OSError, UnreadableError) as error:
            raise DataError(file, reason(error)) from None
        results = cls.from_dict(data, source=str(file))
        object.__setattr__(results, "folder", file.parent)
        return results


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _nan_to_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nan_to_null(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
