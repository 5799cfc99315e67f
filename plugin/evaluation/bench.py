"""Measuring one SAE: evaluators over its latents, and the same ones over its null latents."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from ...registry.errors import ConfigError
from ...registry.evaluators.base import (
    EvaluationBatch,
    EvaluationContext,
    Evaluator,
    Intervention,
    Peer,
)
from ...registry.evaluators.parts.null_latents import LatentSource, NeuronLatents, RandomLatents
from ...registry.taxonomies.taxonomy import Taxonomy
from ..reporting.results import NULLS, MetricResult
from .beside_nulls import with_nulls
from .split import Split

logger = logging.getLogger(__name__)

T = TypeVar("T")
Progress = Callable[[int], Any]
Numbers = dict[str, float]

AGGREGATES = ("max", "mean")
SAMPLE_IMAGES = 2048  # fit images on which thresholds are calibrated
SAMPLE_TOKENS = 2048  # tokens on which the mean of x and the sparsity of the SAE are taken
LATENTS_AT_ONCE = 2**26  # numbers of z in memory while a batch with many tokens is encoded


@dataclass(frozen=True)
class Images:
    """The evaluation set at one hook point.

    Args:
        tokens: (n, k, d), memory-mapped or not.
        mean_patch: (n, d), where the model has patches.
        embedding: (n, e), the images as the model's last block sees them.
        intervene: runs the model on them with the activations here edited.
        no_intervention: why it is None, where it is.
    """

    tokens: np.ndarray
    mean_patch: np.ndarray | None = None
    embedding: np.ndarray | None = None
    intervene: Intervention | None = None
    no_intervention: str = "no evaluator asked for the model"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def d_in(self) -> int:
        return self.tokens.shape[-1]

    def read(self, positions: np.ndarray) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """tokens, mean_patch and embedding of the images at `positions`."""
        mean_patch = None if self.mean_patch is None else _rows(self.mean_patch, positions)
        embedding = None if self.embedding is None else _rows(self.embedding, positions)
        return _rows(self.tokens, positions), mean_patch, embedding

    def sample(self, positions: np.ndarray) -> Tensor:
        """(SAMPLE_TOKENS or fewer, d): tokens spread evenly over the images at `positions`."""
        tokens, *_ = self.read(positions)
        tokens = tokens.reshape(-1, self.d_in)
        return tokens[:: -(-len(tokens) // SAMPLE_TOKENS)]


class SAELatents:
    """The latents of a SAE. A training SAE needs its `activation_scaler`, SAELens's."""

    source = "sae"

    def __init__(self, sae: Any, activation_scaler: Any = None) -> None:
        self.sae = sae
        self.scaler = ActivationScaler() if activation_scaler is None else activation_scaler
        self.d_sae: int = sae.cfg.d_sae
        self.W_dec: Tensor | None = getattr(sae, "W_dec", None)
        self.b_dec: Tensor | None = getattr(sae, "b_dec", None)

    def encode(self, x: Tensor, **_: Any) -> Tensor:
        return self._encode(x)[1]

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) -> (n, m) latents and (n, d) what is decoded from them, on the scale of x.

        In one go, as a SAE that normalises at run time keeps in between what it took away.
        """
        encoded, z = self._encode(x)
        return z, self.scaler.unscale(self.sae.decode(encoded)).float()

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latents as the SAE gives them, and dense."""
        z = self.sae.encode(self.scaler.scale(x.to(self.sae.device, self.sae.dtype)))
        return z, (z.to_dense() if z.is_sparse else z).float()


def image_latents(
    source: LatentSource, x: Tensor, *, aggregate: str, labels: Tensor, index: Tensor
) -> Tensor:
    """(n, m) latents of images from their tokens x (n, k, d).

    A latent of an image is its largest (`aggregate="max"`) or mean activation over the image's
    tokens (own definition); with one token an image there is nothing to aggregate.
    """
    k = x.shape[1]
    if k == 1:
        return source.encode(x[:, 0], labels=labels, index=index)
    parts = []
    for rows in torch.arange(len(x)).split(max(1, LATENTS_AT_ONCE // (k * source.d_sae))):
        z = source.encode(
            x[rows].flatten(0, 1),
            labels=labels[rows].repeat_interleave(k),
            index=index[rows].repeat_interleave(k),
        ).unflatten(0, (len(rows), k))
        parts.append(z.amax(1) if aggregate == "max" else z.mean(1))
    return torch.cat(parts)


@dataclass
class Pass:
    """The evaluators after they have seen one source's latents; `errors` names those that failed
    on the way and are no longer among them."""

    context: EvaluationContext
    evaluators: dict[str, Evaluator[Any]]
    errors: dict[str, str] = field(default_factory=dict)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def compute(self, name: str, **kwargs: Any) -> Numbers | None:
        """The numbers of one evaluator; None where it failed or has failed."""
        return self.attempt(name, lambda evaluator: evaluator.compute(**kwargs))

    def attempt(self, name: str, act: Callable[[Evaluator[Any]], T]) -> T | None:
        """Let one evaluator do something; None where it fails, or has failed before."""
        result = None
        if name in self.evaluators:
            with self._guard(name):
                result = act(self.evaluators[name])
        return result

    def each(self, act: Callable[[Evaluator[Any]], Any]) -> None:
        """Let every evaluator do something; one that fails is dropped, the others go on."""
        for name in list(self.evaluators):
            self.attempt(name, act)

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            # Hours of other numbers must not be lost to one evaluator.
            logger.warning("%s failed on %s", name, self.context.source, exc_info=True)
            self.errors[name] = f"{type(error).__name__}: {error}"
            self.evaluators.pop(name, None)
        finally:
            self.seconds[name] += time.perf_counter() - started


@dataclass(frozen=True)
class Bench:
    """What stays the same while one SAE after another is measured.

    Args:
        chosen: evaluator name -> (class, its options).
        nulls: which of `NULLS` to compute.
        batch_size: images that are measured at a time.
        aggregate: see `image_latents`.
        device: where latents are computed.
    """

    taxonomy: Taxonomy
    split: Split
    chosen: Mapping[str, tuple[type[Evaluator[Any]], Any]]
    nulls: Sequence[str] = NULLS
    n_permutations: int = 10
    seed: int = 0
    batch_size: int = 512
    aggregate: str = "max"
    device: str = "cpu"

    def run(
        self,
        source: LatentSource,
        images: Images,
        names: Sequence[str] | None = None,
        *,
        peers: Sequence[Peer] = (),
        prepare: Callable[[EvaluationContext], Any] | None = None,
        progress: Progress | None = None,
    ) -> Pass:
        """One pass of `source` over the images: fit half first, then score half.

        Args:
            names: the evaluators that take part; all by default.
            peers: other SAEs to compare with.
            prepare: called with the context before the pass, to share accumulators of one's own.
            progress: called with the number of images after each batch.
        """
        context = EvaluationContext(
            taxonomy=self.taxonomy,
            n_images=len(images),
            d_in=images.d_in,
            d_sae=source.d_sae,
            source=source.source,
            seed=self.seed,
            n_permutations=self.n_permutations,
            shuffled="shuffled" in self.nulls and source.source == "sae",
            class_counts=np.bincount(self.split.labels, minlength=len(self.taxonomy.classes)),
            W_dec=getattr(source, "W_dec", None),
            b_dec=getattr(source, "b_dec", None),
            sae=getattr(source, "sae", None),
            peers=peers,
            reconstruct=getattr(source, "reconstruct", None),
            intervene=images.intervene,
            no_intervention=images.no_intervention,
        )
        if prepare is not None:
            prepare(context)
        chosen = {name: self.chosen[name] for name in names or self.chosen}
        done = Pass(context, {n: cls(context, options) for n, (cls, options) in chosen.items()})
        with torch.no_grad():
            self._calibrate(
                done, self._batch(source, images, self.split.sample(SAMPLE_IMAGES), True)
            )
            for positions, is_fit in self.split.batches(self.batch_size):
                batch = self._batch(source, images, positions, is_fit)
                context.update(batch)
                done.each(lambda evaluator, batch=batch: evaluator.update(batch))
                if progress is not None:
                    progress(len(positions))
        return done

    @staticmethod
    def _calibrate(done: Pass, sample: EvaluationBatch) -> None:
        done.context.calibrate(sample)
        done.each(lambda evaluator: evaluator.calibrate(sample))

    def numbers(
        self,
        source: LatentSource,
        images: Images,
        names: Sequence[str],
        *,
        peers: Sequence[Peer] = (),
        progress: Progress | None = None,
    ) -> dict[str, Numbers | str]:
        """evaluator -> its numbers over another source of latents, or why it has none."""
        done = self.run(source, images, names, peers=peers, progress=progress)
        found: dict[str, Numbers | str] = {}
        for name in names:
            numbers = done.compute(name)
            found[name] = f"failed: {done.errors[name]}" if numbers is None else numbers
        return found

    def metrics(
        self,
        done: Pass,
        nulls: Mapping[str, Mapping[str, Numbers | str]] = {},
        controls: Mapping[str, Mapping[str, Numbers | str]] = {},
    ) -> dict[str, dict[str, MetricResult]]:
        """evaluator -> metric -> its value beside its nulls.

        Args:
            done: the pass over the SAE's latents.
            nulls: "random" and "neurons" -> what `numbers` gave over them.
            controls: the same for controls that are no nulls.
        """
        found = {}
        for name, (cls, _) in self.chosen.items():
            values = done.compute(name)
            if values is None:
                continue
            draws = {
                null: cls.nulls.get(null) or self._draws(null, name, done, nulls)
                for null in self.nulls
            }
            seen = {c: n for c in controls if isinstance(n := controls[c].get(name), dict)}
            found[name] = with_nulls(
                values, draws, cls.higher_is_better, seen, cls.invariant, cls.label_free
            )
        return found

    def null_sources(self, sae: LatentSource, images: Images) -> dict[str, LatentSource]:
        """The latents that the SAE must beat, centred on the mean of x over fit images; the random
        ones as many and as sparse as the SAE's."""
        x = images.sample(self.split.sample(SAMPLE_IMAGES)).to(self.device)
        nothing = torch.zeros(len(x), dtype=torch.int64)
        sources: dict[str, LatentSource] = {}
        if self._has_meaning("random"):
            with torch.no_grad():
                z = sae.encode(x, labels=nothing, index=nothing)
            l0 = float((z > 0).sum(1).float().mean())
            sources["random"] = RandomLatents.fit(x, sae.d_sae, l0, seed=self.seed)
        if self._has_meaning("neurons"):
            sources["neurons"] = NeuronLatents.fit(x)
        return sources

    def names_for(self, null: str) -> list[str]:
        """The evaluators for which this null has a meaning."""
        return [n for n, (cls, _) in self.chosen.items() if cls.nulls.get(null) is None]

    def _has_meaning(self, null: str) -> bool:
        return null in self.nulls and bool(self.names_for(null))

    def _draws(
        self, null: str, name: str, done: Pass, nulls: Mapping[str, Mapping[str, Numbers | str]]
    ) -> Sequence[Numbers] | str:
        if null == "permuted_classes":
            draws = [done.compute(name, permutation=p) for p in done.context.permutations]
        elif null == "shuffled":
            draws = [done.compute(name, shuffled=True)]
        else:
            found = nulls.get(null, {}).get(name, "not computed")
            return found if isinstance(found, str) else [found]
        return [draw for draw in draws if draw is not None]

    def _batch(
        self, source: LatentSource, images: Images, positions: np.ndarray, is_fit: bool
    ) -> EvaluationBatch:
        tokens, mean_patch, embedding = images.read(positions)
        tokens = tokens.to(self.device)
        labels = torch.from_numpy(self.split.labels[positions])
        index = torch.from_numpy(positions)
        z = image_latents(source, tokens, aggregate=self.aggregate, labels=labels, index=index)
        return EvaluationBatch(
            x=tokens.mean(1),
            z=z,
            labels=labels,
            shuffled_labels=torch.from_numpy(self.split.shuffled[positions]),
            index=index,
            is_fit=torch.full((len(positions),), is_fit),
            mean_patch=mean_patch,
            embedding=embedding,
            tokens=tokens,
        )


def _rows(array: np.ndarray, positions: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array[positions], dtype=np.float32))
