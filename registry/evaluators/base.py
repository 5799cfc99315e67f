"""Base class of evaluators, with the batches, shared statistics and passes that they are run on.

One pass over the evaluation set updates every evaluator of one source of latents:

    context = EvaluationContext(taxonomy=..., n_images=..., d_in=..., d_sae=...)
    done = stream(context, {"lch_height": (LCHHeight, None)}, batches)
    done.compute("lch_height")                   # the value; None where it failed, see done.errors
    done.compute("lch_height", permutation=p)    # the permuted-classes null, from the same state
    done.compute("lch_height", shuffled=True)    # the shuffled-labels null

The nulls `random` and `neurons` are the same evaluators over other latents (`parts/null_latents.py`).
"""

from __future__ import annotations

import inspect
import logging
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial, wraps
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    NamedTuple,
    Protocol,
    TypeVar,
    get_type_hints,
)

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from .. import hashing
from ..coerce import MisfitError, coerce
from ..errors import ConfigError, TaxolensError
from ..names import unknown_name_message
from ..nulls import NULLS
from ..presentation import Headline, NodeTable, Support
from ..taxonomies.permuted_classes import PermutedClasses, permuted_classes

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from scipy import sparse

    from ..taxonomies.taxonomy import Taxonomy

logger = logging.getLogger(__name__)

ALL_NULLS: dict[str, str | None] = dict.fromkeys(NULLS)
"""`nulls` of an evaluator to which every null applies."""


LARGEST = 1e12
"""Largest absolute value of x and z: sums of squares of larger ones overflow single precision."""
SMALLEST = 1e-9
"""Least size of the largest value of x, and of z unless all are 0: squares of smaller ones underflow."""


class Firings(NamedTuple):
    """The entries of z above 0, or all that are not 0, by image and then latent; where z lies."""

    rows: Tensor  # (nnz,) int64, position in the batch
    latents: Tensor  # (nnz,) int64
    values: Tensor  # (nnz,) float32


@dataclass(frozen=True)
class EvaluationBatch:
    """One batch of the evaluation set. All fit-half images precede all score-half images.

    A latent *fires* on an image where z > 0: what is said of classes and nodes rests on that. It is
    *active* where z is not 0: norms, sums, samples and L0 rest on that. NaN is neither.
    """

    x: Tensor  # (n, d) activations at the hook point
    z: Tensor  # (n, m) latents, dense
    labels: Tensor  # (n,) int64, position in `taxonomy.classes`
    shuffled_labels: Tensor  # (n,) int64, the labels permuted over the whole evaluation set
    index: Tensor  # (n,) int64, position in the evaluation set
    is_fit: Tensor  # (n,) bool: used to choose thresholds, latents and probes; the rest to score
    mean_patch: Tensor | None = None  # (n, d)
    embedding: Tensor | None = None  # (n, e) of an independent image encoder
    tokens: Tensor | None = None  # (n, k, d) the tokens that x is the mean of; None: x alone

    def __post_init__(self) -> None:
        lengths = {f.name: len(v) for f in fields(self) if (v := getattr(self, f.name)) is not None}
        if len(set(lengths.values())) > 1:
            problem = f"fields differ in length: {lengths}"
            raise ConfigError("EvaluationBatch", problem, allowed="one length")

    def __len__(self) -> int:
        return len(self.labels)

    def labels_of(self, shuffled: bool, device: torch.device | str = "cpu") -> Tensor:
        """(n,) int64 the true or the shuffled labels, on `device`."""
        return (self.shuffled_labels if shuffled else self.labels).to(device)

    @cached_property
    def active(self) -> Firings:
        """The entries of z that are not 0, computed once for all accumulators of the pass."""
        z = self.z.cpu() if self.z.device.type == "mps" else self.z  # which lacks float64
        flat = nonzero(z)
        values = z.flatten()[flat].float()
        rows = flat // max(z.shape[1], 1)
        return _where(Firings(rows, flat - rows * z.shape[1], values), ~values.isnan())

    @cached_property
    def firings(self) -> Firings:
        """The entries of z above 0."""
        return _where(self.active, self.active.values > 0)

    def require_finite(self) -> None:
        """Check that no number is NaN, infinite or too large for sums of squares.

        Raises:
            ConfigError: one is; the field is named.
        """
        if self._not_finite is not None:
            raise self._not_finite

    def require_scale(self) -> None:
        """Check that x, and z unless all of it is 0, are not too small for lengths and squares.

        Raises:
            ConfigError: they are; the field is named.
        """
        if self._too_small is not None:
            raise self._too_small

    @cached_property
    def _too_small(self) -> ConfigError | None:
        for name, values in (("x", self.x), ("z", self.z)):
            largest = float(values.abs().max()) if values.numel() else 0.0
            if 0 < largest < SMALLEST:
                return ConfigError(
                    name,
                    "too small to compute with; check the weights of the SAE and the scale of its input",
                    given=f"{largest:g} at most, on {len(self)} images",
                    allowed=f"numbers of which the largest is at least {SMALLEST:g} in absolute value",
                )
        return None

    @cached_property
    def _not_finite(self) -> ConfigError | None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        found = (not_finite(name, values) for name, values in given.items() if values is not None)
        return next((error for error in found if error is not None), None)

    @cached_property
    def priority(self) -> np.ndarray:
        """(n,) float64 in random but reproducible order: breaks ties between equal activations."""
        return hashing.uniform(self.index.cpu().numpy())


def not_finite(field: str, values: Tensor) -> ConfigError | None:
    """The error that `values` hold NaN, infinity or a number above `LARGEST`; None if they do not."""
    if not values.is_floating_point() or not values.numel():
        return None
    low, high = map(float, torch.aminmax(values))
    if max(-low, high) <= LARGEST:
        return None
    return ConfigError(
        field,
        "NaN, infinite or too large to compute with; check the weights of the SAE and the scale of "
        "its input",
        given=f"{low:g} to {high:g}",
        allowed=f"finite numbers up to {LARGEST:g} in absolute value",
    )


def nonzero(values: Tensor) -> Tensor:
    """(k,) the positions of the entries of the flattened `values` that are not 0, ascending."""
    mask = values != 0
    if mask.device.type == "cpu":  # numpy is about ten times as fast where few are
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def _where(entries: Firings, kept: Tensor) -> Firings:
    return entries if kept.all() else Firings(*(column[kept] for column in entries))


class InterventionResult(NamedTuple):
    """Outputs of the model for n images."""

    logits: Tensor | None  # (n, outputs); None where the model has no classification head
    embedding: Tensor  # (n, d_model) final class token (mean patch token where there is none)


class Intervention(Protocol):
    """Runs the model with the activation at the hook point edited; implemented outside registry/.

    `logit_classes[o]` is the position in `taxonomy.classes` of output o, −1 where it has none; None
    without a classification head, and where no output has a class.
    """

    logit_classes: np.ndarray | None

    def __call__(
        self, index: Tensor, edit: Callable[[Tensor], Tensor] | None = None
    ) -> InterventionResult:
        """Run the images at positions `index` (n,) of the evaluation set.

        `edit` maps the activations of the chosen tokens (n, k, d) to their replacements, of the
        same shape; with None the model runs unmodified.
        """
        ...


class Peer(Protocol):
    """Another SAE of the same evaluation, over the same images; implemented outside registry/."""

    name: str
    relation: str
    """Its relation to the measured SAE, one word: "seed", "hook", "layer", "model"."""

    @property
    def same_space(self) -> bool:
        """Whether the decoder rows of both are in the same space."""
        ...

    @property
    def W_dec(self) -> Tensor | None:
        """(m', d) decoder; None where it has none."""
        ...

    def latents(self, index: np.ndarray) -> sparse.csr_array:
        """(n, m') its latents, on the images at positions `index` (n,)."""
        ...


class Accumulator(ABC):
    """Statistics of one pass, shared by evaluators; size independent of the number of images."""

    def __init__(self, context: EvaluationContext) -> None:
        self.context = context

    def calibrate(self, batch: EvaluationBatch) -> None:  # noqa: B027 (optional)
        """Receive a sample of fit-half images before the pass; optional."""

    @abstractmethod
    def update(self, batch: EvaluationBatch) -> None:
        """Add one batch to the statistics."""

    def merge(self, other: Self) -> None:
        """Add the images of `other`: the next part of the images, in the same context and calibration.

        `other` is not used afterwards, and may share memory with this one.

        Raises:
            ConfigError: there is no `merge` for what `update` adds to, or the calibrations differ.
        """
        require_merge(self)

    def fit_state(self) -> Any:
        """What `update` reads of the fit half when it gets the score half; None if it reads nothing."""
        return None

    def join_fit(self, states: Sequence[Any]) -> None:  # noqa: B027 (optional)
        """Replace it by that of the whole fit half, from the `fit_state` of every part in order.

        Called before the first image of the score half. The states are not changed.
        """


def require_merge(each: Accumulator | Evaluator[Any]) -> None:
    """Check that the class that defines `update`, or one derived from it, defines `merge`.

    Raises:
        ConfigError: the images would be lost that `update` has added.
    """
    place = {name: i for i, cls in reversed([*enumerate(type(each).__mro__)]) for name in vars(cls)}
    if place["merge"] > place["update"]:
        who = getattr(each, "name", type(each).__name__)
        problem = "parts of the images cannot be merged"
        allowed = "a method merge, or all images in one pass"
        raise ConfigError(who, problem, given="an update without a merge", allowed=allowed)


def _merge(one: Any, other: Any) -> None:
    if other is None:
        problem = "another part of the images was measured without it"
        raise ConfigError(type(one).__name__, problem, allowed="the same evaluators for all parts")
    require_merge(one)
    one.merge(other)


def require_same(who: str, one: Any, other: Any) -> None:
    """Check that what two parts of the images were measured with is the same.

    Args:
        who: what is merged, for the message.
        one, other: arrays, tensors, numbers or None.

    Raises:
        ConfigError: it differs.
    """
    same = (one is None) == (other is None)
    if same and one is not None:
        one, other = (v.cpu() if isinstance(v, Tensor) else v for v in (one, other))
        same = np.array_equal(np.asarray(one), np.asarray(other))
    if not same:
        problem = "parts of the images with different calibrations cannot be merged"
        raise ConfigError(who, problem, allowed="one calibration sample for all parts")


A = TypeVar("A", bound=Accumulator)
T = TypeVar("T")


@dataclass(eq=False)
class EvaluationContext:
    """Shapes, decoder and images of one source of latents, and its evaluators' accumulators."""

    taxonomy: Taxonomy
    n_images: int
    d_in: int
    d_sae: int
    source: str = "sae"
    """"sae", "random", "neurons" or "planted"."""
    seed: int = 0
    n_permutations: int = 5
    shuffled: bool = True
    """Whether to collect what `compute(shuffled=True)` needs; doubles the memory."""
    class_counts: np.ndarray | None = None
    """(C,) images per class of the evaluation set; determines the integer type of counters."""
    W_dec: Tensor | None = None  # (m, d)
    b_dec: Tensor | None = None  # (d,)
    as_decoded: Callable[[Tensor], Tensor] = lambda x: x
    """(n, d) activations -> the same on the scale of z·W_dec + b_dec: others where the SAE normalises each input."""
    sae: Any = None
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """(n, d) activations of tokens -> (n, m) their latents and (n, d) their reconstruction."""
    intervene: Intervention | None = None
    no_intervention: str = "no model is available"
    """Why `intervene` is None."""
    peers: Sequence[Peer] = ()
    """Other SAEs to compare with, for evaluators that have `wants_peers`."""
    failures: dict[Any, str] = field(default_factory=dict, init=False, repr=False)
    """Name of an evaluator, or key of a shared accumulator, that failed -> the error."""
    batches: int = field(default=0, init=False)
    """Number of batches so far."""
    _shared: dict[Any, Accumulator] = field(default_factory=dict, init=False, repr=False)
    _reads: defaultdict[Any, dict[Any, None]] = field(
        default_factory=lambda: defaultdict(dict), init=False, repr=False
    )
    """Evaluator or accumulator -> the keys of the accumulators it shares."""
    _acting: list[Any] = field(default_factory=lambda: [None], init=False, repr=False)
    """Stack of evaluators and accumulators being run; the last one calls `share`."""

    def share(self, cls: type[A], **kwargs: Any) -> A:
        """The one accumulator `cls(context, **kwargs)` of this pass, constructed on first use.

        Raises:
            TaxolensError: its constructor fails, or it has failed before.
        """
        arguments = inspect.signature(cls).bind(self, **kwargs)
        arguments.apply_defaults()  # an omitted argument equals its default
        key = (cls, *list(arguments.arguments.items())[1:])
        self._reads[self._acting[-1]][key] = None
        if key not in self._shared and key not in self.failures:
            # Constructed before it is inserted: accumulators that it shares are updated first.
            made = self.attempt(key, partial(cls, self, **kwargs))
            if made is not None:
                self._shared[key] = made
        if key in self.failures:
            raise TaxolensError(self.failures[key])
        return self._shared[key]  # pyright: ignore[reportReturnType]

    def calibrate(self, batch: EvaluationBatch) -> None:
        """Calibrate every shared accumulator on a sample of fit-half images."""
        for key, accumulator in list(self._shared.items()):
            self.attempt(key, partial(accumulator.calibrate, batch))

    def update(self, batch: EvaluationBatch) -> None:
        """Update every shared accumulator; one that raises is not updated again."""
        self.batches += 1
        for key, accumulator in list(self._shared.items()):
            self.attempt(key, partial(accumulator.update, batch))

    def fit_states(self) -> dict[Any, Any]:
        """Key of a shared accumulator -> its `fit_state`, of those that have one."""
        states = {key: self.attempt(key, each.fit_state) for key, each in self._shared.items()}
        return {key: state for key, state in states.items() if state is not None}

    def join_fit(self, states: Sequence[Mapping[Any, Any]]) -> None:
        """Give every shared accumulator the `fit_states` of all parts of the images, in order."""
        for key in self.fit_states():
            parts = [part[key] for part in states if key in part]
            self.attempt(key, partial(self._shared[key].join_fit, parts))

    def merge(self, other: EvaluationContext) -> None:
        """Merge the shared accumulators with those of the next part of the images.

        What has failed in one part has failed.
        """
        self.batches += other.batches
        for who, why in other.failures.items():
            self.failures.setdefault(who, why)
            self._shared.pop(who, None)
        for key, accumulator in list(self._shared.items()):
            self.attempt(key, partial(_merge, accumulator, other._shared.get(key)))

    def release(self) -> None:
        """Let go of the shared accumulators."""
        self._shared.clear()

    def attempt(self, who: Any, act: Callable[[], T]) -> T | None:
        """Run `act` for an evaluator (`who` its name) or a shared accumulator (`who` its key).

        None where it raises, and where it, or an accumulator that it shares, has failed before;
        the error is in `failures`.
        """
        reason = self._lost(who)
        if reason is None:
            self._acting.append(who)
            try:
                return act()
            except Exception as error:
                # One failing evaluator must not end an evaluation of hours.
                shared = [] if isinstance(who, str) else [f"shared {who[0].__name__}"]
                logger.warning("%s failed on %s", *(shared or [who]), self.source, exc_info=True)
                reason = self._lost(who) or ": ".join([*shared, type(error).__name__, str(error)])
            finally:
                self._acting.pop()
        self.failures[who] = reason
        self._shared.pop(who, None)
        return None

    def _lost(self, who: Any) -> str | None:
        """The error of `who`, or of an accumulator that it shares."""
        asked = (who, *self._reads[who])
        return next((self.failures[key] for key in asked if key in self.failures), None)

    @cached_property
    def permuted_classes(self) -> PermutedClasses:
        """The draws of the `permuted_classes` null, at most `n_permutations` distinct trees."""
        return permuted_classes(
            self.taxonomy, self.class_counts, n=self.n_permutations, seed=self.seed
        )

    @property
    def permutations(self) -> tuple[np.ndarray, ...]:
        """The class permutations of these draws, each (C,)."""
        return self.permuted_classes.draws

    def draw_of(self, permutation: np.ndarray | None) -> int | None:
        """The position of one of `permutations` among them; None for any other array and for None.

        An evaluator computes all of them at once where that saves time, when the first is asked for.
        """
        if permutation is None:
            return None
        draws = enumerate(self.permutations)
        return next((i for i, draw in draws if draw is permutation), None)

    @property
    def present(self) -> np.ndarray:
        """(C,) bool, the classes with images; all where `class_counts` are not known."""
        every = np.ones(len(self.taxonomy.classes), dtype=bool)
        return every if self.class_counts is None else self.class_counts > 0

    def distinct_nodes(self, *, root: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """The nodes (n,) that differ in their classes with images, ascending, and how many of these each has (n,).

        Args:
            root: whether with the node that has all of them.
        """
        nodes, size = self.taxonomy.distinct_among(self.present)
        kept = size < self.present.sum()
        return (nodes, size) if root else (nodes[kept], size[kept])

    @cached_property
    def lch(self) -> int:
        """The LCH of the classes with images (scalar): all images lie at or below it. The root where all
        classes have some, and where none has."""
        present = self.present
        if present.all() or not present.any():
            return self.taxonomy.root
        return self.taxonomy.lch(np.flatnonzero(present))

    @property
    def largest_class(self) -> int:
        """An upper bound on the images of one class (scalar)."""
        return self.n_images if self.class_counts is None else int(np.max(self.class_counts))


O = TypeVar("O")  # noqa: E741


@dataclass(frozen=True)
class NoOptions:
    """For an evaluator without options."""


def require_at_least(least: int, options: Any, *names: str) -> None:
    """Check the least value of options; one that is None is not checked.

    Raises:
        ConfigError: an option is smaller; the first is named.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(name, "out of range", given=value, allowed=f"{least} or more")


M = TypeVar("M", bound=Callable[..., Any])


def remembered(method: M) -> M:
    """Decorator of an evaluator's method: caches results by arguments, until the next batch.

    Arguments are hashable or arrays.

    Raises:
        ConfigError: `shuffled` is true in a pass without shuffled labels.
    """
    signature = inspect.signature(method)

    @wraps(method)
    def kept(self: Evaluator[Any], *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self._check_shuffled(bound.arguments.get("shuffled", False))
        key = (method, *map(_hashable, list(bound.arguments.values())[1:]))
        if self._remembered_at != self.context.batches:
            self._remembered_at = self.context.batches
            self._remembered.clear()
        if key not in self._remembered:
            self._remembered[key] = method(self, *args, **kwargs)
        return self._remembered[key]

    return kept  # pyright: ignore[reportReturnType]


def _hashable(value: Any) -> Any:
    return (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


class Evaluator(ABC, Generic[O]):
    """A measure of latents against a taxonomy: `update()` over batches, then `compute()`.

    Memory is O(m·C), independent of the number of images. An undefined metric (no latent fires, a
    class has no images) is NaN, not 0 and not an exception.

    Args:
        context: facts and shared accumulators of the pass.
        options: an instance of `Options`, a dict of its fields, or None for the defaults.

    Raises:
        ConfigError: an option does not exist or is out of range.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    higher_is_better: ClassVar[dict[str, bool | None]]
    """Every metric of `compute`, with its direction; None for descriptive ones."""
    nulls: ClassVar[dict[str, str | None]] = ALL_NULLS
    """For each of `NULLS`: None where it is computed, else why it does not apply."""
    invariant: ClassVar[frozenset[str]] = frozenset()
    """Metrics that do not depend on the positions of classes in the tree (permuted classes)."""
    label_free: ClassVar[frozenset[str]] = frozenset()
    """Metrics that do not depend on labels (shuffled labels)."""
    wants_embedding: ClassVar[bool] = False
    """Whether `EvaluationBatch.embedding` is needed: a complete forward pass of the model."""
    wants_peers: ClassVar[bool] = False
    """Whether its numbers depend on `EvaluationContext.peers`."""
    wants_intervention: ClassVar[bool] = False
    """Whether `EvaluationContext.intervene` is called. Each call is a forward pass, so an option
    bounds the images. Where `intervene` is None, metrics that need it are NaN."""
    repeats_intervention: ClassVar[bool] = False
    """Whether it is called for each group of images of the intervals too: for a headline that needs the model."""
    headlines: ClassVar[tuple[Headline, ...]] = ()
    """Metrics shown in summaries; if empty, the first metric that has a direction."""
    labels: ClassVar[Mapping[str, str]] = {}
    """metric -> name in reports and charts; by default its key with spaces."""
    support: ClassVar[Mapping[str, Support]] = {}
    """metric -> the number of nodes, latents, edges, ... that it is computed from."""
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """metric -> the least and the largest value by its definition, at which intervals are cut."""
    node_table: ClassVar[NodeTable | None] = None
    """The one of `tables()` that assigns latents to nodes, for latent cards and tree chart."""
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(
        self, context: EvaluationContext, options: O | dict[str, Any] | None = None
    ) -> None:
        self.context = context
        self.taxonomy = context.taxonomy
        self.options: O = self._options(options)
        self._remembered: dict[Any, Any] = {}
        self._remembered_at = 0
        self.prepare()

    def prepare(self) -> None:
        """Initialise: get shared accumulators, set up own sums. Called once, before any batch."""

    @classmethod
    def _options(cls, options: Any) -> Any:
        if isinstance(options, cls.Options):
            return options
        options = {} if options is None else options
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"options of {cls.name}", "not options", given=options, allowed="names and values"
            )
        hints = get_type_hints(cls.Options)
        known = [f.name for f in fields(cls.Options)]
        typed = {}
        for key, value in options.items():
            if key not in known:
                raise ConfigError(unknown_name_message(f"option of {cls.name}", key, known))
            try:
                typed[key] = coerce(value, hints[key], key, lenient=True)
            except MisfitError as error:
                raise ConfigError(
                    f"options of {cls.name}", error, allowed=f"{key} of type {hints[key]}"
                ) from None
        return cls.Options(**typed)

    def calibrate(self, batch: EvaluationBatch) -> None:
        """Receive a sample of fit-half images before the pass (to set thresholds)."""

    def update(self, batch: EvaluationBatch) -> None:
        """Add one batch. Statistics of several evaluators belong in a shared `Accumulator`."""

    def merge(self, other: Self) -> None:
        """Add the images of `other`: the next part of the images, in the same context and calibration.

        Shared accumulators have been merged. An evaluator that has no `update` needs no `merge`.

        Raises:
            ConfigError: there is no `merge` for what `update` adds to, or the calibrations differ.
        """
        require_merge(self)

    @abstractmethod
    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        """The metrics, all keys of `higher_is_better`.

        Args:
            permutation: (C,), class c takes the position of class permutation[c] in the tree.
            shuffled: use the shuffled labels (requires `context.shuffled`).
        """

    def tables(self) -> dict[str, pd.DataFrame]:
        """Name -> table, with a row per latent, node or depth."""
        return {}

    def figures(self) -> dict[str, Figure]:
        """Name -> figure."""
        return {}

    def notes(self) -> list[str]:
        """Remarks on the numbers, as sentences: why some are undefined, what was left out."""
        return []

    def members(self, nodes: np.ndarray, permutation: np.ndarray | None = None) -> np.ndarray:
        """(C, N) bool, whether a class lies below each of `nodes` (N,), as in `compute`."""
        members = self.taxonomy.membership[:, nodes]
        return members if permutation is None else members[permutation]

    def sparse_members(
        self, nodes: np.ndarray, permutation: np.ndarray | None = None
    ) -> sparse.csr_array:
        """(C, N) sparse float32, as `members`."""
        members = self.taxonomy.sparse_membership[:, nodes]
        return members if permutation is None else members[permutation]

    def _check_shuffled(self, shuffled: bool) -> None:
        if shuffled and not self.context.shuffled:
            raise ConfigError(
                f"{self.name}.compute(shuffled=True)",
                "the pass was made with shuffled=False",
                allowed="a context with shuffled=True",
            )


class Pass:
    """Evaluators over the latents of one source; only the numbers of one that raises are lost.

    If a shared accumulator raises, the numbers of the evaluators that share it are lost.

    Args:
        context: the context of the source.
        chosen: evaluator name -> (class, its options).

    Attributes:
        evaluators: name -> evaluator, without those that have failed.
        seconds: name -> time of the evaluator in s, without its shared accumulators.
    """

    def __init__(
        self, context: EvaluationContext, chosen: Mapping[str, tuple[type[Evaluator[Any]], Any]]
    ) -> None:
        self.context = context
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.evaluators: dict[str, Evaluator[Any]] = {}
        for name, (cls, options) in chosen.items():
            made = self._timed(name, partial(cls, context, options))
            if made is not None:
                self.evaluators[name] = made

    @property
    def errors(self) -> dict[str, str]:
        """Evaluator name -> its error."""
        return {who: why for who, why in self.context.failures.items() if isinstance(who, str)}

    def calibrate(self, sample: EvaluationBatch) -> None:
        """Calibrate shared accumulators, then evaluators, on a sample of fit-half images."""
        self._each(lambda _: sample.require_finite())
        self._each(lambda _: sample.require_scale())
        self.context.calibrate(sample)
        self._each(lambda evaluator: evaluator.calibrate(sample))

    def update(self, batch: EvaluationBatch) -> None:
        """Update shared accumulators, then evaluators, with one batch."""
        self._each(lambda _: batch.require_finite())
        self.context.update(batch)
        self._each(lambda evaluator: evaluator.update(batch))

    def merge(self, other: Pass) -> None:
        """Add another part of the images, so that the numbers are those of one pass over both.

        Each part gets its share of the fit half and then its share of the score half, and the same
        calibration sample. Between the halves, `context.join_fit` gives every part the `fit_states`
        of all. Parts are merged in the order of their images. Counts are then equal to the bit, sums
        up to the order of addition. `other` is not used afterwards.
        """
        self.context.merge(other.context)
        for name in self.errors:
            self.evaluators.pop(name, None)
        for name in list(self.evaluators):
            self.attempt(name, partial(_merge, other=other.evaluators.get(name)))
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds

    def compute(self, name: str, **kwargs: Any) -> dict[str, float] | None:
        """The numbers of one evaluator; None where it fails, or has failed before."""
        return self.attempt(
            name, lambda e: {metric: float(v) for metric, v in e.compute(**kwargs).items()}
        )

    def attempt(self, name: str, act: Callable[[Evaluator[Any]], T]) -> T | None:
        """Run `act` for one evaluator; None where it fails, or has failed before."""
        if name not in self.evaluators:
            return None
        return self._timed(name, partial(act, self.evaluators[name]))

    def release(self) -> None:
        """Let go of all that was counted; no number can be computed afterwards.

        The context and its accumulators refer to each other: without this their arrays wait for Python to
        look for cycles, which it seldom does where few objects hold much memory.
        """
        self.evaluators.clear()
        self.context.release()

    def _each(self, act: Callable[[Evaluator[Any]], Any]) -> None:
        for name in list(self.evaluators):
            self.attempt(name, act)

    def _timed(self, name: str, act: Callable[[], T]) -> T | None:
        started = time.perf_counter()
        result = self.context.attempt(name, act)
        self.seconds[name] += time.perf_counter() - started
        if name in self.context.failures:
            self.evaluators.pop(name, None)
        return result


def stream(
    context: EvaluationContext,
    chosen: Mapping[str, tuple[type[Evaluator[Any]], Any]],
    batches: Iterable[EvaluationBatch],
    *,
    calibration: Callable[[], EvaluationBatch] | None = None,
) -> Pass:
    """Run one pass: construct the evaluators, calibrate, then update with each batch in order.

    Args:
        context: the context of the source of latents.
        chosen: evaluator name -> (class, its options: an instance, a dict or None).
        batches: the evaluation set, the fit half first.
        calibration: returns the sample of fit-half images for `calibrate`; default: the first batch.
    """
    done = Pass(context, chosen)
    if calibration is not None:
        done.calibrate(calibration())
    for i, batch in enumerate(batches):
        if i == 0 and calibration is None:
            done.calibrate(batch)
        done.update(batch)
    return done
