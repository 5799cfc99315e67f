"""Measurement of one SAE: evaluators over its latents, and over the latents of its nulls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...hooks.activations.joined_rows import Rows
from ...registry.errors import ConfigError
from ...registry.evaluators.base import (
    EvaluationBatch,
    EvaluationContext,
    Evaluator,
    Intervention,
    Pass,
    Peer,
    stream,
)
from ...registry.evaluators.parts.null_latents import LatentSource, NeuronLatents, TwinLatents
from ...registry.evaluators.parts.planted import PlantedLatents
from ...registry.evaluators.parts.sae_latents import SAELatents
from ...registry.evaluators.parts.twin import mean_l0
from ...registry.files import is_file_name
from ...registry.taxonomies.taxonomy import Taxonomy
from ..reporting.results import MetricResult
from .beside_nulls import with_nulls
from .kept_latents import KeptLatents
from .settings import EvaluationSettings
from .split import Split

Progress = Callable[[int], Any]
Numbers = dict[str, float]
Draws = Sequence[Mapping[str, Numbers | str]] | str  # or why there are none
Chosen = Mapping[str, tuple[type[Evaluator[Any]], Any]]

OF_SOURCE = ("W_dec", "b_dec", "as_decoded", "sae", "reconstruct")
"""What evaluators are given of a source of latents, where it has it."""
SAMPLE_IMAGES = 2048  # fit images on which thresholds are calibrated
SAMPLE_TOKENS = 2048  # tokens for the mean of x and the sparsity of the SAE
LATENTS_AT_ONCE = 2**26  # entries of z in memory while a batch with many tokens is encoded


@dataclass(frozen=True)
class HeldOutActivations:
    """The activations of the evaluation set at one hook point.

    Args:
        tokens: (n, k, d), memory-mapped or not.
        split: labels and halves of the n images.
        mean_patch: (n, d), where the model has patches.
        embedding: (n, e), the output of the model's last block.
        intervene: runs the model on the images with these activations edited.
        no_intervention: why `intervene` is None, where it is.
    """

    tokens: Rows
    split: Split
    mean_patch: Rows | None = None
    embedding: Rows | None = None
    intervene: Intervention | None = None
    no_intervention: str = "no evaluator asked for the model"

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.tokens.shape[-1]

    def read(self, positions: np.ndarray) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Tokens (b, k, d), mean_patch (b, d) and embedding (b, e) of the images at `positions`."""
        mean_patch = None if self.mean_patch is None else _rows(self.mean_patch, positions)
        embedding = None if self.embedding is None else _rows(self.embedding, positions)
        return _rows(self.tokens, positions), mean_patch, embedding

    def sample(self) -> Tensor:
        """(n, d) at most SAMPLE_TOKENS tokens at even distances in up to SAMPLE_IMAGES fit images."""
        tokens = _rows(self.tokens, self.split.sample(SAMPLE_IMAGES)).reshape(-1, self.d_in)
        return tokens[:: -(-len(tokens) // SAMPLE_TOKENS)]


def image_latents(
    source: LatentSource, x: Tensor, *, aggregate: str, labels: Tensor, index: Tensor
) -> Tensor:
    """(n, m) latents of images from their tokens x (n, k, d).

    The latent of an image is the activation that is largest in size, with its sign
    (`aggregate="max"`; of two of one size the positive one), or the mean over the image's tokens (own
    definition); with one token per image the two are the same.
    """
    if isinstance(source, KeptLatents):
        return source.of_images(index)
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
        parts.append(_largest(z) if aggregate == "max" else z.mean(1))
    return torch.cat(parts)


def _still(progress: Progress) -> Progress:
    """Called for images that `progress` has counted already."""
    return lambda _: progress(0)


def _largest(z: Tensor) -> Tensor:
    """(n, k, m) -> (n, m): of each latent, the activation of largest size."""
    most = z.amax(1)
    return torch.where(most >= -z.amin(1), most, z.amin(1)) if bool((z < 0).any()) else most


@dataclass(frozen=True)
class Bench:
    """The taxonomy, evaluators and options of a measurement: all but the SAE and the images.

    Args:
        taxonomy: the class tree.
        chosen: evaluator name -> (class, its options).
        settings: nulls, controls, permutations, seed, aggregate and device are read from it.
        images_at_once: images in one batch; by default 512, and 2,048 on CUDA, where each batch costs launches.
    """

    taxonomy: Taxonomy
    chosen: Chosen
    settings: EvaluationSettings = EvaluationSettings()
    images_at_once: int | None = None

    @property
    def device(self) -> str:
        """Device on which latents are computed."""
        return self.settings.device or "cpu"

    @property
    def batch_size(self) -> int:
        """Images in one batch."""
        return self.images_at_once or (2048 if self.device.startswith("cuda") else 512)

    def wants(self, what: str) -> bool:
        """Whether an evaluator wants an "embedding", an "intervention" or "peers"."""
        return any(getattr(cls, f"wants_{what}") for cls, _ in self.chosen.values())

    def describe(self) -> dict[str, Any]:
        """The options on which the numbers depend, as in results.json."""
        settings = self.settings
        return {
            "evaluators": list(self.chosen),
            "options": {name: asdict(given) for name, (_, given) in self.chosen.items()},
            "nulls": list(settings.nulls),
            "controls": list(settings.controls),
            "n_permutations": settings.n_permutations,
            "n_twins": settings.n_twins,
            "n_groups": settings.n_groups,
            "seed": settings.seed,
            "aggregate": settings.aggregate,
        }

    def run(
        self,
        source: LatentSource,
        held_out: HeldOutActivations,
        chosen: Chosen | None = None,
        *,
        peers: Sequence[Peer] = (),
        shuffled: bool = True,
        prepare: Callable[[EvaluationContext], Any] | None = None,
        progress: Progress | None = None,
    ) -> Pass:
        """One pass of `source` over the images: fit half first, then score half.

        Args:
            source: the latents that are measured.
            held_out: the activations of the evaluation set.
            chosen: the evaluators that take part; by default those of the bench.
            peers: other SAEs to compare with.
            shuffled: whether what the shuffled-labels null needs is collected, where it is chosen.
            prepare: called with the context before the pass, to share more accumulators.
            progress: called with the number of images after each batch.
        """
        split, settings = held_out.split, self.settings
        context = EvaluationContext(
            taxonomy=self.taxonomy,
            n_images=len(held_out),
            d_in=held_out.d_in,
            d_sae=source.d_sae,
            source=source.source,
            seed=settings.seed,
            n_permutations=settings.n_permutations,
            shuffled=shuffled and "shuffled" in settings.nulls,
            class_counts=np.bincount(
                split.labels[split.order], minlength=len(self.taxonomy.classes)
            ),
            peers=peers,
            intervene=held_out.intervene,
            no_intervention=held_out.no_intervention,
            **{name: getattr(source, name) for name in OF_SOURCE if hasattr(source, name)},
        )
        if prepare is not None:
            prepare(context)
        batch = partial(self._batch, source, held_out)

        def batches() -> Iterator[EvaluationBatch]:
            for positions, is_fit in split.batches(self.batch_size):
                yield batch(positions, is_fit)
                if progress is not None:
                    progress(len(positions))

        with torch.no_grad():
            return stream(
                context,
                self.chosen if chosen is None else chosen,
                batches(),
                calibration=lambda: batch(split.sample(SAMPLE_IMAGES), True),
            )

    @torch.no_grad()
    def encode_once(
        self,
        latents: SAELatents,
        held_out: HeldOutActivations,
        *,
        progress: Progress | None = None,
    ) -> SAELatents:
        """The SAE with the latents of all images, for several passes; where they are too many, as it is.

        They are computed in the batches of a pass over all images: that pass has the same latents to the bit.
        """
        kept = KeptLatents(latents, len(held_out))
        for positions, is_fit in held_out.split.batches(self.batch_size):
            if kept.fits:
                kept.add(positions, self._batch(latents, held_out, positions, is_fit).z)
            if progress is not None:
                progress(len(positions))
        return kept if kept.fits else latents

    def numbers(
        self,
        source: LatentSource,
        held_out: HeldOutActivations,
        chosen: Chosen,
        *,
        peers: Sequence[Peer] = (),
        progress: Progress | None = None,
    ) -> dict[str, Numbers | str]:
        """Evaluator -> its numbers over another source of latents, or why it has none."""
        done = self.run(source, held_out, chosen, peers=peers, shuffled=False, progress=progress)
        found: dict[str, Numbers | str] = {}
        for name in chosen:
            numbers = done.compute(name)
            found[name] = f"failed: {done.errors[name]}" if numbers is None else numbers
        done.release()
        return found

    def left_out(
        self,
        source: LatentSource,
        held_out: HeldOutActivations,
        group: int,
        *,
        peers: Sequence[Peer] = (),
        progress: Progress | None = None,
    ) -> dict[str, Numbers | str]:
        """The result of `numbers` without one of `n_groups` groups of images, for the intervals.

        The model is run only for evaluators that want their interventions repeated, in a pass of their own; metrics of others
        that need it are undefined.
        """
        rest = replace(held_out, split=held_out.split.without(group, self.settings.n_groups))
        without_model = replace(
            rest, intervene=None, no_intervention="not repeated for the intervals"
        )
        repeated = {name: it for name, it in self.chosen.items() if it[0].repeats_intervention}
        others = {name: it for name, it in self.chosen.items() if name not in repeated}
        found: dict[str, Numbers | str] = {}
        for images, chosen in ((without_model, others), (rest, repeated)):
            if chosen:
                found |= self.numbers(source, images, chosen, peers=peers, progress=progress)
                progress = progress and _still(progress)
        return found

    def controls(self, held_out: HeldOutActivations) -> dict[str, dict[str, Numbers | str]]:
        """Control -> evaluator -> its numbers, or why it has none.

        Planted detectors depend on labels and not on activations: one pass serves all SAEs.
        """
        if "planted" not in self.settings.controls:
            return {}
        planted = PlantedLatents(self.taxonomy, seed=self.settings.seed)
        reason = "planted detectors have no directions in x"
        held_out = replace(held_out, intervene=None, no_intervention=reason)
        return {"planted": self.numbers(planted, held_out, self.chosen)}

    def metrics(
        self,
        done: Pass,
        nulls: Mapping[str, Draws] = {},
        controls: Mapping[str, Mapping[str, Numbers | str]] = {},
        left_out: Sequence[Mapping[str, Numbers | str]] = (),
        progress: Callable[[], Any] | None = None,
    ) -> dict[str, dict[str, MetricResult]]:
        """Evaluator -> metric -> its value beside its nulls.

        Args:
            done: the pass over the SAE's latents.
            nulls: "random" and "neurons" -> the result of `numbers` over each of their draws, or why
                there are none.
            controls: the same for controls that are not nulls.
            left_out: the result of `left_out` over the SAE's latents, of every group.
            progress: called before each evaluator.
        """
        found = {}
        for name, (cls, _) in self.chosen.items():
            if progress is not None:
                progress()
            values = done.compute(name)
            if values is not None:
                values = done.attempt(name, partial(_usable, numbers=values))
            if values is None:
                continue
            draws = {
                null: cls.nulls.get(null) or self._draws(null, name, done, nulls)
                for null in self.settings.nulls
            }
            seen = {c: n for c in controls if isinstance(n := controls[c].get(name), dict)}
            found[name] = with_nulls(
                values,
                draws,
                cls.higher_is_better,
                seen,
                cls.invariant,
                cls.label_free,
                cls.support,
                [one if isinstance(one := rest[name], dict) else {} for rest in left_out],
                cls.ranges,
                cls.nulls,
            )
        return found

    def null_sources(
        self, sae: SAELatents, held_out: HeldOutActivations
    ) -> dict[str, list[LatentSource] | str]:
        """The null latents: `n_twins` untrained twins of the SAE, and the neurons.

        A null that cannot be made has the reason in place of its sources.
        """
        x = held_out.sample().to(self.device)
        sources: dict[str, list[LatentSource] | str] = {}
        if self.chosen_for("random"):
            sources["random"] = self._twins(sae, x)
        if self.chosen_for("neurons"):
            sources["neurons"] = [NeuronLatents.fit(x)]
        return sources

    def _twins(self, sae: SAELatents, x: Tensor) -> list[LatentSource] | str:
        try:
            l0 = mean_l0(sae, x)
            return [
                TwinLatents.fit(sae, x, seed=self.settings.seed, draw=draw, l0=l0)
                for draw in range(self.settings.n_twins)
            ]
        except Exception as error:  # of a third party's architecture
            architecture = sae.sae.cfg.architecture()
            reason = error if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            return f"{architecture} has no untrained twin: {reason}"

    def chosen_for(self, null: str) -> Chosen:
        """The evaluators for which this null is computed."""
        if null not in self.settings.nulls:
            return {}
        return {n: c for n, c in self.chosen.items() if c[0].nulls.get(null) is None}

    def _draws(
        self, null: str, name: str, done: Pass, nulls: Mapping[str, Draws]
    ) -> Sequence[Numbers] | str:
        if null == "permuted_classes":
            permuted = done.context.permuted_classes
            if permuted.reason:
                return permuted.reason
            draws = [done.compute(name, permutation=p) for p in permuted.draws]
        elif null == "shuffled":
            draws = [done.compute(name, shuffled=True)]
        else:
            found = nulls.get(null, "not computed")
            if isinstance(found, str):
                return found
            of_draws = [draw[name] for draw in found]
            failed = [draw for draw in of_draws if isinstance(draw, str)]
            return failed[0] if failed else [d for d in of_draws if not isinstance(d, str)]
        return [draw for draw in draws if draw is not None]

    def _batch(
        self,
        source: LatentSource,
        held_out: HeldOutActivations,
        positions: np.ndarray,
        is_fit: bool,
    ) -> EvaluationBatch:
        tokens, mean_patch, embedding = held_out.read(positions)
        tokens = tokens.to(self.device)
        labels = torch.from_numpy(held_out.split.labels[positions])
        index = torch.from_numpy(positions)
        aggregate = self.settings.aggregate
        z = image_latents(source, tokens, aggregate=aggregate, labels=labels, index=index)
        return EvaluationBatch(
            x=tokens.mean(1),
            z=z,
            labels=labels,
            shuffled_labels=torch.from_numpy(held_out.split.shuffled[positions]),
            index=index,
            is_fit=torch.full((len(positions),), is_fit),
            mean_patch=mean_patch,
            embedding=embedding,
            tokens=tokens,
        )


def _usable(evaluator: Evaluator[Any], numbers: dict[str, float]) -> dict[str, float]:
    """The numbers of an evaluator's `compute`.

    Raises:
        ConfigError: a metric has a name that a file cannot have, or lacks the count that it declares.
    """
    for metric in numbers:
        if not is_file_name(f"{evaluator.name}.{metric}"):
            allowed = "metrics without slashes and control characters: they name files"
            raise ConfigError(
                f"{evaluator.name}.compute", "no name of a file", given=metric, allowed=allowed
            )
        of = evaluator.support.get(metric)
        if of is not None and of.count not in numbers:
            problem = f"no {of.count!r}, the support of {metric!r}"
            allowed = "every key of higher_is_better"
            raise ConfigError(f"{evaluator.name}.compute", problem, allowed=allowed)
    return numbers


def _rows(array: Rows, positions: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(array[positions], dtype=np.float32))
