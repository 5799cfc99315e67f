"""What an evaluator is: the batch it sees, the context it shares, and the numbers it gives.

One pass over the evaluation set feeds every evaluator of one latent source:

    context = EvaluationContext(taxonomy=..., n_images=..., d_in=..., d_sae=...)
    evaluators = [cls(context) for cls in classes]
    stream(context, evaluators, batches, calibration=sample_of_fit_images)
    evaluators[0].compute()                      # the value
    evaluators[0].compute(permutation=p)         # the permuted-classes null, from the same state
    evaluators[0].compute(shuffled=True)         # the shuffled-labels null

The nulls `random` and `neurons` are the same evaluators over other latents (`parts/null_latents.py`).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import hashing
from ..errors import ConfigError
from ..table import unknown_name_message

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure
    from scipy import sparse

    from ..taxonomies.taxonomy import Taxonomy

NULLS = ("permuted_classes", "shuffled", "random", "neurons")
ALL_NULLS: dict[str, str | None] = dict.fromkeys(NULLS)
"""`nulls` of an evaluator for which every null has a meaning."""


class Firings(NamedTuple):
    """The entries of z above 0, by image and then latent; on the CPU."""

    rows: Tensor  # (nnz,) int64, position in the batch
    latents: Tensor  # (nnz,) int64
    values: Tensor  # (nnz,) float32


@dataclass(frozen=True)
class EvaluationBatch:
    """One slice of the evaluation set. Every fit-half image comes before any score-half image.

    A latent *fires* on an image where z > 0; NaN never fires.
    """

    x: Tensor  # (n, d) activations at the hook point
    z: Tensor  # (n, m) latents, dense
    labels: Tensor  # (n,) int64, position in `taxonomy.classes`
    shuffled_labels: Tensor  # (n,) int64, the labels permuted over the whole evaluation set
    index: Tensor  # (n,) int64, position in the evaluation set
    is_fit: Tensor  # (n,) bool: thresholds, latents and probes are chosen here; the rest is scored
    mean_patch: Tensor | None = None  # (n, d)
    embedding: Tensor | None = None  # (n, e) of an independent image encoder
    tokens: Tensor | None = None  # (n, k, d) the tokens that x is the mean of; None: x alone

    def __post_init__(self) -> None:
        lengths = {f.name: len(v) for f in fields(self) if (v := getattr(self, f.name)) is not None}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"EvaluationBatch: fields differ in length: {lengths}")

    def __len__(self) -> int:
        return len(self.labels)

    def labels_of(self, shuffled: bool) -> Tensor:
        """The true or the shuffled labels, on the CPU."""
        return (self.shuffled_labels if shuffled else self.labels).cpu()

    @cached_property
    def firings(self) -> Firings:
        """The nonzeros of z, found once for all accumulators of the pass."""
        fires = self.z > 0
        if fires.device.type == "cpu":  # numpy finds few among many about ten times as fast
            flat = torch.from_numpy(np.flatnonzero(fires.numpy()))
        else:
            flat = fires.flatten().nonzero().squeeze(1)
        values = self.z.flatten()[flat].float().cpu()
        rows = flat.cpu() // max(self.z.shape[1], 1)
        return Firings(rows, flat.cpu() - rows * self.z.shape[1], values)

    @cached_property
    def priority(self) -> np.ndarray:
        """(n,) float64: breaks ties between images of equal activation at random, repeatably."""
        return hashing.uniform(self.index.cpu().numpy())


class InterventionResult(NamedTuple):
    """What the model gave for a batch of images."""

    logits: Tensor | None  # (n, outputs); None where the model has no classification head
    embedding: Tensor  # (n, d_model) final class token (mean patch token where there is none)


class Intervention(Protocol):
    """Runs the model with the activation at the hook point edited; implemented outside registry/.

    `logit_classes[o]` is the class in `taxonomy.classes` that output o stands for, −1 where none;
    None without a classification head, and where no output stands for a class.
    """

    logit_classes: np.ndarray | None

    def __call__(
        self, index: Tensor, edit: Callable[[Tensor], Tensor] | None = None
    ) -> InterventionResult:
        """Run the images at positions `index` (n,) of the evaluation set.

        `edit` maps the activations of the chosen tokens (n, k, d) to those that replace them;
        None runs the model untouched.
        """
        ...


class Peer(Protocol):
    """Another SAE of the same evaluation, over the same images; implemented outside registry/."""

    name: str
    relation: str
    """In one word what it shares with the SAE that is measured: "seed", "hook", "layer", "model"."""

    @property
    def same_space(self) -> bool:
        """Whether the decoder rows of the two are directions of one space."""
        ...

    @property
    def W_dec(self) -> Tensor | None:
        """(m', d)"""
        ...

    def latents(self, index: np.ndarray) -> sparse.csr_array:
        """(n, m') its latents above 0, of the images at positions `index` (n,) of the evaluation
        set."""
        ...


class Accumulator(ABC):
    """Statistics of one pass that several evaluators read; its size never depends on the images."""

    def __init__(self, context: EvaluationContext) -> None:
        self.context = context

    def calibrate(self, batch: EvaluationBatch) -> None:  # noqa: B027 (optional)
        """See a sample of fit-half images before the pass."""

    @abstractmethod
    def update(self, batch: EvaluationBatch) -> None: ...


A = TypeVar("A", bound=Accumulator)


@dataclass(eq=False)
class EvaluationContext:
    """The static facts of one latent source, and the accumulators its evaluators share."""

    taxonomy: Taxonomy
    n_images: int
    d_in: int
    d_sae: int
    source: str = "sae"
    """"sae", "random", "neurons" or "planted"."""
    seed: int = 0
    n_permutations: int = 5
    shuffled: bool = True
    """Also gather what `compute(shuffled=True)` needs. Off saves half of the memory."""
    class_counts: np.ndarray | None = None
    """(C,) images per class of the whole evaluation set; lets counters be narrow integers."""
    W_dec: Tensor | None = None  # (m, d)
    b_dec: Tensor | None = None  # (d,)
    sae: Any = None
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    """(n, d) activations of tokens -> (n, m) their latents and (n, d) what is decoded from them."""
    intervene: Intervention | None = None
    no_intervention: str = "no model is at hand"
    """Why `intervene` is None, where it is."""
    peers: Sequence[Peer] = ()
    """Other SAEs to compare with, for evaluators that have `wants_peers`."""
    _shared: dict[Any, Accumulator] = field(default_factory=dict, init=False, repr=False)

    def share(self, cls: type[A], **kwargs: Any) -> A:
        """The one accumulator `cls(context, **kwargs)` of this pass, made when first asked for."""
        arguments = inspect.signature(cls).bind(self, **kwargs)
        arguments.apply_defaults()  # leaving an argument out is to give its default
        key = (cls, *list(arguments.arguments.items())[1:])
        if key not in self._shared:
            # Made before it is entered: what it shares in turn must be updated before it is.
            accumulator = cls(self, **kwargs)
            self._shared[key] = accumulator
        return self._shared[key]  # pyright: ignore[reportReturnType]

    def calibrate(self, batch: EvaluationBatch) -> None:
        for accumulator in self._shared.values():
            accumulator.calibrate(batch)

    def update(self, batch: EvaluationBatch) -> None:
        for accumulator in self._shared.values():
            accumulator.update(batch)

    @cached_property
    def permutations(self) -> tuple[np.ndarray, ...]:
        """The class permutations of the `permuted_classes` null, each (C,)."""
        return tuple(self.taxonomy.permutation(self.seed + i) for i in range(self.n_permutations))

    @property
    def largest_class(self) -> int:
        """An upper bound on the images of one class."""
        return self.n_images if self.class_counts is None else int(np.max(self.class_counts))


O = TypeVar("O")  # noqa: E741


@dataclass(frozen=True)
class NoOptions:
    """For an evaluator with nothing to choose."""


def require_at_least(least: int, options: Any, *names: str) -> None:
    """Refuse options that are too small; one that is None is not set.

    Raises:
        ConfigError: naming the first.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}: must be at least {least}, got {value}")


class Evaluator(ABC, Generic[O]):
    """A measure of latents against a taxonomy: `update()` over batches, then `compute()`.

    Memory is O(m·C) whatever the number of images. A number that is undefined (no latent fires, a
    class without images) is NaN, never 0 and never an exception.

    Args:
        context: facts and shared accumulators of the pass.
        options: an instance of `Options`, a dict of its fields, or None for the defaults.

    Raises:
        ConfigError: an option that does not exist.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    higher_is_better: ClassVar[dict[str, bool | None]]
    """Every metric of `compute`, with its direction; None where it only describes."""
    nulls: ClassVar[dict[str, str | None]] = ALL_NULLS
    """For each of `NULLS`: None where it is computed, else why it has no meaning here."""
    invariant: ClassVar[frozenset[str]] = frozenset()
    """Metrics that do not depend on where a class stands in the tree: permuting changes none."""
    label_free: ClassVar[frozenset[str]] = frozenset()
    """Metrics that use no label at all: shuffling changes none."""
    wants_embedding: ClassVar[bool] = False
    """Whether `EvaluationBatch.embedding` is worth a whole forward pass through the model."""
    wants_peers: ClassVar[bool] = False
    """Whether its numbers depend on `EvaluationContext.peers`."""
    wants_intervention: ClassVar[bool] = False
    """Whether `EvaluationContext.intervene` is called: each call is a forward pass, so an option
    must bound the images. Where it is None the evaluator gives NaN for what it cannot measure."""
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(
        self, context: EvaluationContext, options: O | dict[str, Any] | None = None
    ) -> None:
        self.context = context
        self.taxonomy = context.taxonomy
        self.options: O = self._options(options)

    @classmethod
    def _options(cls, options: Any) -> Any:
        if isinstance(options, cls.Options):
            return options
        known = [f.name for f in fields(cls.Options)]
        for key in options or {}:
            if key not in known:
                raise ConfigError(unknown_name_message(f"option of {cls.name}", key, known))
        return cls.Options(**(options or {}))

    def calibrate(self, batch: EvaluationBatch) -> None:
        """See a sample of fit-half images before the pass (to set thresholds)."""

    def update(self, batch: EvaluationBatch) -> None:
        """See one batch. What several evaluators need belongs into a shared `Accumulator`."""

    @abstractmethod
    def compute(
        self, *, permutation: np.ndarray | None = None, shuffled: bool = False
    ) -> dict[str, float]:
        """The metrics, all keys of `higher_is_better`.

        Args:
            permutation: (C,), class c takes the place of class permutation[c] in the tree.
            shuffled: measure against the shuffled labels instead (needs `context.shuffled`).
        """

    def tables(self) -> dict[str, pd.DataFrame]:
        """Per latent, per node or per depth; by name."""
        return {}

    def figures(self) -> dict[str, Figure]:
        """Drawings by name."""
        return {}

    def notes(self) -> list[str]:
        """Sentences a reader of the numbers needs: why some are undefined, what was left out."""
        return []

    def _check_shuffled(self, shuffled: bool) -> None:
        if shuffled and not self.context.shuffled:
            raise ConfigError(
                f"{self.name}.compute(shuffled=True): the pass was made with shuffled=False"
            )


def stream(
    context: EvaluationContext,
    evaluators: Sequence[Evaluator[Any]],
    batches: Iterable[EvaluationBatch],
    *,
    calibration: EvaluationBatch | None = None,
) -> None:
    """Feed one pass to every evaluator: calibrate, then update with each batch in order.

    Without `calibration` the first batch serves as the sample.
    """
    calibrated = False
    for batch in batches:
        if not calibrated:
            sample = batch if calibration is None else calibration
            context.calibrate(sample)
            for evaluator in evaluators:
                evaluator.calibrate(sample)
            calibrated = True
        context.update(batch)
        for evaluator in evaluators:
            evaluator.update(batch)
