"""What an evaluation found, and its file: `results.json`, schema ``taxolens.results/1``.

The schema is documented in docs/results.md. In memory an undefined number is NaN; in the file
it is null, so that the file is strict JSON.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pandas as pd

from ...registry.errors import DataError
from ...registry.files import write_atomically
from ...registry.presentation import Headline, NodeTable

SCHEMA = "taxolens.results/1"
RESULTS_FILENAME = "results.json"


@dataclass(frozen=True)
class NullResult:
    """One metric under one null control.

    Args:
        mean: the metric under the null; over `n` permutations, their mean.
        best: the best of the `n`, in the metric's own direction.
        n: how many draws of the null gave a number.
        left_behind: whether the value beats `best`; None where the metric has no direction or
            one of the two numbers is undefined.
        reason: why this null has no number here.
    """

    mean: float = math.nan
    best: float = math.nan
    n: int = 0
    left_behind: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class MetricResult:
    """A number beside its nulls (by name, see `registry/nulls.py`) and other controls."""

    value: float
    nulls: dict[str, NullResult] = field(default_factory=dict)
    controls: dict[str, float] = field(default_factory=dict)

    @property
    def missed(self) -> list[str]:
        """The nulls that the value does not leave behind."""
        return [name for name, null in self.nulls.items() if null.left_behind is False]


@dataclass(frozen=True)
class EvaluatorResult:
    """What one evaluator said of one SAE. `tables` (CSV) and `figures` (Plotly JSON) map names to
    files, relative to the results folder; `error` says why an evaluator has no numbers, `notes` what
    a reader of them needs to know."""

    metrics: dict[str, MetricResult] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TopImage:
    """One of the images on which a latent is most active. `index` is its row in the dataset,
    `thumbnail` a file relative to the results folder."""

    index: int
    label: str
    activation: float
    thumbnail: str | None = None


@dataclass(frozen=True)
class LatentCard:
    """A latent, its place in the tree, and what it fires on.

    Args:
        latent: its column in the SAE.
        node: the taxonomy node assigned to it.
        path: names from the root to `node`.
        height: longest path from `node` to a leaf.
        generality: log2 of the number of leaves below `node`.
        f1: F1 of the latent as a detector of `node`, on held-out images.
        fires_on: share of the images on which it is above 0.
    """

    latent: int
    node: str
    path: list[str]
    height: float
    generality: float
    f1: float
    fires_on: float
    images: list[TopImage]


@dataclass(frozen=True)
class SAEResult:
    """Everything about one SAE. `fingerprint` changes with whatever its numbers depend on.

    `architecture` is what its files say; `trained_as` is the architecture that was trained, by the
    name that the user chose: where it is not recorded, the same.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained_as", self.trained_as or self.architecture)

    @property
    def errors(self) -> dict[str, str]:
        return {name: e.error for name, e in self.evaluators.items() if e.error}


@dataclass(frozen=True)
class EvaluatorInfo:
    """What an evaluator promises: `directions` says per metric whether higher is better (None: the
    number only describes), `nulls` why a null has no meaning for it (None: it is computed).
    `headlines`, `labels` and `node_table` are those of the evaluator's class."""

    description: str
    directions: dict[str, bool | None]
    nulls: dict[str, str | None]
    headlines: list[Headline] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    node_table: NodeTable | None = None


@dataclass(frozen=True)
class SkippedImage:
    index: int
    reason: str


@dataclass(frozen=True)
class DatasetInfo:
    """The evaluation images: `n_fit` chose thresholds and latents, `n_score` were scored."""

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

    @property
    def title(self) -> str:
        """The dataset and what of it, as the report names them."""
        return (
            f"{self.path} ({self.name}, {self.split})"
            if self.name
            else f"{self.path} ({self.split})"
        )


@dataclass(frozen=True)
class TaxonomyInfo:
    """The class tree. `tree` is `Taxonomy.to_json()`."""

    name: str
    n_nodes: int
    n_classes: int
    max_depth: int
    tree: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """One evaluation of one or many runs: see docs/results.md.

    `folder` is where the files named in it lie; it is set on reading and is not part of the file.
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
    folder: Path | None = field(default=None, compare=False)

    @property
    def errors(self) -> dict[str, str]:
        """``"<sae id>: <evaluator>" -> message`` of every evaluator that failed."""
        return {f"{sae.id}: {name}": text for sae in self.saes for name, text in sae.errors.items()}

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
        """Whether higher is better; None where the metric only describes, or is not known."""
        info = self.evaluators.get(evaluator)
        return info.directions.get(metric) if info else None

    def label(self, evaluator: str, metric: str) -> str:
        """What the evaluator calls its metric; the metric's key where it has no label."""
        info = self.evaluators.get(evaluator)
        return info.labels.get(metric, metric) if info else metric

    def frame(self) -> pd.DataFrame:
        """One row per SAE and metric: the value, and per null its mean, best and whether it is
        left behind."""
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
                    for suffix, attribute in (("", "mean"), ("_best", "best"))
                    if suffix == "" or null.n > 1
                },
                **number.controls,
                "not_left_behind": ", ".join(number.missed),
            }
            for sae, evaluator, metric, number in self.rows()
        )

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        del data["folder"]
        return {"schema": data.pop("schema"), **_nan_to_null(data)}

    @classmethod
    def from_dict(cls, data: Any, *, source: str = RESULTS_FILENAME) -> Results:
        """Raises DataError, naming the place, where `data` is not of this schema."""
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise DataError(
                f"{source}: schema is {found!r}, but this version of taxolens reads {SCHEMA!r}"
            )
        return _decode(cls, data, source)

    def save(self, folder: str | Path) -> Path:
        """Write `results.json` into `folder`, atomically."""
        text = json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False, indent=1)
        return write_atomically(Path(folder) / RESULTS_FILENAME, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read a `results.json`, or the one in the folder `path`."""
        path = Path(path)
        file = path / RESULTS_FILENAME if path.is_dir() else path
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{file} does not exist; write it with `taxolens evaluate RUN`"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is not JSON: {error}") from None
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


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a dataclass, list[...], dict[str, ...], a union with None, or a scalar.

    Fields that are not known are ignored: a later minor version may have added them.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        options = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _decode(options[0], value, where)
    if origin is list:
        _expect(isinstance(value, list), "a list", value, where)
        return [_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _expect(isinstance(value, dict), "an object", value, where)
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _expect(value is None or number, "a number or null", value, where)
        return math.nan if value is None else float(value)
    if kind is int:
        _expect(isinstance(value, int) and not isinstance(value, bool), "an integer", value, where)
        return value
    _expect(isinstance(value, kind), f"a {kind.__name__}", value, where)
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where)
    hints = get_type_hints(kind)
    found = {}
    for item in fields(kind):
        if item.name in value and item.name != "folder":
            found[item.name] = _decode(hints[item.name], value[item.name], f"{where}.{item.name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise DataError(f"{where}: {item.name!r} is missing")
    return kind(**found)


def _expect(fits: bool, expected: str, value: Any, where: str) -> None:
    if not fits:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise DataError(f"{where}: expected {expected}, got {shown}")
