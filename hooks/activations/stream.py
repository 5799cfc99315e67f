"""An endless stream of activations for training; seeded, and seekable with equal bits."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...registry.errors import CheckpointError, ConfigError
from ...registry.heads import columns_of
from ...registry.ranks import ALONE, Ranks
from ..images.dataset import ImageDataset
from ..images.loader import ImageLoader
from ..images.preprocess import preprocess_for
from ..images.source import ImageSource
from ..models.dtypes import ACTIVATION_DTYPES, torch_dtype
from ..models.evals import ImageTokens
from ..models.tapped import TappedModel
from ..models.tokens import tokens_per_image
from .cache_reader import CacheReader
from .extract import Extraction, TokenExtractor
from .shared_source import OwnPass, SharedModelSource
from .token_sources import (
    Batch,
    CacheSource,
    Delivery,
    ModelSource,
    State,
    TokenSource,
    passes_of_window,
)

STATES_KEPT = 4096  # positions of the last batches; a prefetching thread is never so far ahead


class ActivationStream(Iterator[Batch]):
    """Batches {hook point: (train_batch_size_tokens, d)}, all of the same tokens, without end.

    Every epoch is a new permutation of the images, made by `seed` and the epoch's number. From a
    model, images are read in windows of `n_batches_in_buffer` forward passes whose tokens are
    shuffled among themselves; with one token per image a window is one forward pass, as nothing
    can be shuffled that the permutation has not shuffled already. From a cache, tokens are permuted
    over the whole epoch. Every token of every readable image comes exactly once an epoch; batches
    run over the ends of windows and epochs.

    `state_after` returns the position after a batch, and `seek` goes there: the batches from there
    on are equal to the bit (on the same hardware), since every window is a function of the seed,
    the epoch and the window's number alone. Torch's global random state is not used.

    `next`, `seek` and `paused` may be called from different threads; `state_after` never waits for
    a forward pass.

    Args:
        model: a vision model; not needed with a cache.
        images: the images; not needed with a cache.
        hook_names: hook points, or all that is wanted as an `Extraction`.
        source: how the images are decoded.
        cache: read activations from there instead.
        train_batch_size_tokens: tokens per batch given out.
        n_batches_in_buffer: forward passes per window. A window is kept on `device`.
        seed: decides the order, whole number from 0 on.
        device: of the batches given out.
        ranks: share the forward passes among these processes, which all read the same batches.
        takers: with `ranks`: hook point -> the ranks that get its tokens. A batch has only the hook
            points that its rank takes.
        progress: show a bar while a window of images is read that takes more than some seconds.
        settings: fields of `Extraction` (tokens, image_size, dtype, autocast), and of `ImageSource`
            (store_batch_size_prompts for its batch_size, num_workers, max_corrupt_share), by name.

    Raises:
        ConfigError: an argument is wrong; the message names it.
        DataError: no image can be read, too many are corrupt, or an activation is not finite.
    """

    def __init__(
        self,
        model: TappedModel | None,
        images: ImageDataset | None,
        hook_names: Sequence[str] | Extraction,
        *,
        source: ImageSource | None = None,
        cache: CacheReader | None = None,
        train_batch_size_tokens: int = 4096,
        n_batches_in_buffer: int = 20,
        seed: int = 0,
        device: str | torch.device = "cpu",
        ranks: Ranks = ALONE,
        takers: Mapping[str, Collection[int]] = {},
        progress: bool = False,
        **settings: Any,
    ) -> None:
        if "store_batch_size_prompts" in settings:
            settings["batch_size"] = settings.pop("store_batch_size_prompts")
        wanted, source = Extraction.of(hook_names, source, settings)
        for field, value, least in (
            ("train_batch_size_tokens", train_batch_size_tokens, 1),
            ("store_batch_size_prompts", source.batch_size, 1),
            ("n_batches_in_buffer", n_batches_in_buffer, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(field, "too small", given=value, allowed=f"{least} or more")
        self.hook_names = list(wanted.hook_names)
        self.train_batch_size_tokens = train_batch_size_tokens
        self._source: TokenSource
        delivery = Delivery(
            train_batch_size_tokens,
            torch.device(device),
            torch_dtype(wanted.dtype, ACTIVATION_DTYPES),
            seed,
        )
        if cache is not None:
            self._source = CacheSource(cache, self.hook_names, wanted.tokens, delivery)
        elif model is None or images is None:
            problem = "without a cache of activations both are needed"
            raise ConfigError("model, images", problem, allowed="both, or a cache")
        else:
            size, tokens = wanted.image_size, wanted.tokens
            extractor = TokenExtractor(
                model, self.hook_names, [tokens], dtype=delivery.dtype, autocast=wanted.autocast
            )
            on_gpu = extractor.device.type == "cuda"
            preprocess = preprocess_for(model, size)
            loader = ImageLoader(images, preprocess, pin_memory=on_gpu, **source.decoding)
            first = columns_of(self.hook_names[0])[0]
            per_image = tokens_per_image(model, tokens, size, first)
            batches = passes_of_window(per_image, n_batches_in_buffer)
            parts: Any = (loader, extractor, delivery, per_image, batches)
            if ranks.size == 1:
                self._source = ModelSource(*parts, progress=progress)
            else:
                self._source = SharedModelSource(
                    *parts, ranks=ranks, takers=takers, progress=progress
                )
        self._ended = False
        self._lock = threading.RLock()
        self._batches: Iterator[tuple[Batch, Any]] | None = None
        self._start = self._source.start()
        self._marks: deque[tuple[int, Any]] = deque(maxlen=STATES_KEPT)
        self._n_served = 0
        _streams.add(self)

    @property
    def tokens_per_image(self) -> int:
        """Tokens that one image gives at each hook point."""
        return self._source.tokens_per_image

    @property
    def images_per_batch(self) -> int:
        """Images of one forward pass."""
        return self._from_model().loader.batch_size

    def image_tokens(self, batch_size: int) -> Iterator[ImageTokens]:
        """The images themselves, in the order of the dataset and without end.

        Raises:
            ConfigError: the stream reads a cache.
        """
        return self._from_model().image_tokens(batch_size)

    @property
    def shared(self) -> SharedModelSource | None:
        """The source whose passes several ranks share; None where this one reads alone."""
        return self._source if isinstance(self._source, SharedModelSource) else None

    def own_passes(self) -> Iterator[OwnPass]:
        """The passes of this rank from the present position on, where others read the batches."""
        if self.shared is None:
            return iter(())
        epoch, first_window, _ = self._start["position"]
        return self.shared.own_passes(epoch, first_window)

    def _from_model(self) -> ModelSource:
        if not isinstance(self._source, ModelSource):
            problem = (
                "run_evals runs the model on images, and this one reads a cache of activations"
            )
            allowed = "a store of a model and images"
            raise ConfigError("activation_store", problem, allowed=allowed)
        return self._source

    @property
    def failures(self) -> dict[int, str]:
        """Image index -> source and reason, of the corrupt images met so far."""
        return self._source.failures()

    def __next__(self) -> Batch:
        with self._lock:
            if self._ended:
                raise StopIteration
            if self._batches is None:
                self._batches = self._source.batches(self._start)
            batch, mark = next(self._batches)
            self._n_served += 1
            self._marks.append((self._n_served, mark))
            return batch

    def state_after(self, n_batches: int) -> State:
        """The position after the `n_batches`-th batch since the last `seek`.

        JSON-able. 0 is the position of the start; the states of the last 4,096 batches are kept.

        Raises:
            ValueError: that batch was not served yet, or too long ago.
        """
        if n_batches == 0:
            return self._signed(self._start)
        for number, mark in reversed(list(self._marks)):
            if number == n_batches:
                return self._signed(self._source.state(mark))
        raise ValueError(
            f"the state after batch {n_batches} is not kept: {self._n_served} batches were served "
            f"and the last {len(self._marks)} states are kept"
        )

    def seek(self, state: State) -> None:
        """Go on from `state`; the next batch is the one that followed it then.

        Raises:
            CheckpointError: the state is not one of this stream: other images, tokens, seed, ...
        """
        here, there = self._source.describe(), state.get("stream")
        if not isinstance(there, dict) or "position" not in state:
            raise CheckpointError("position in the activations", "fields are missing")
        if here != there:
            differing = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
            listed = "; ".join(
                f"{k}: {there.get(k)!r} then, {here.get(k)!r} now" for k in differing
            )
            problem = f"it is one of another stream: {listed}"
            raise CheckpointError("position in the activations", problem)
        for key, first in self._source.start().items():
            if not _is_alike(state.get(key), first):
                raise CheckpointError(
                    "position in the activations",
                    f"{key}: not possible",
                    given=state.get(key),
                    allowed=f"of the form of {first!r}, and not negative",
                )
        with self._lock:
            self._close()
            self._start = {key: value for key, value in state.items() if key != "stream"}
            self._marks.clear()
            self._n_served = 0

    def describe(self) -> dict[str, Any]:
        """JSON-able: everything but hook points that determines the batches and their order."""
        return {**self._source.describe(), "train_batch_size_tokens": self.train_batch_size_tokens}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause reading in other threads, so that the model is free for other uses."""
        with self._lock:
            yield

    def stop(self) -> None:
        """Give up the batch that is being gathered: there, in whichever thread, the iteration ends.

        It may be called from a signal's handler. After `close` the iteration goes on.
        """
        self._source.stopped = True

    def close(self) -> None:
        """End the worker processes. The next batch starts them again, at the same place.

        A batch that another thread is waiting for is given up after the forward pass under way:
        there, the iteration ends.
        """
        self.stop()
        with self._lock:
            self._source.stopped = False
            if self._marks:
                self._start = self._source.state(self._marks[-1][1])
                self._marks.clear()
                self._n_served = 0
            self._close()

    def end(self) -> None:
        """Close for good: there are no more batches."""
        self._ended = True
        self.close()

    def _close(self) -> None:
        if isinstance(self._batches, Generator):
            self._batches.close()
        self._batches = None

    def _signed(self, state: State) -> State:
        return {**state, "stream": self._source.describe()}


def _is_alike(value: Any, first: Any) -> bool:
    """Whether a part of a state has the form of the same part of the first state."""
    if isinstance(first, dict):
        return isinstance(value, dict) and all(
            key.isdecimal() and isinstance(text, str) for key, text in value.items()
        )
    if isinstance(first, list):
        alike = isinstance(value, list) and len(value) == len(first)
        return alike and all(map(_is_alike, value, first))
    return type(value) is int and 0 <= value < 2**48


_streams: weakref.WeakSet[ActivationStream] = weakref.WeakSet()


@atexit.register
def _end_streams() -> None:
    """End all streams: a daemon thread that is stopped inside a forward pass ends the process."""
    for stream in list(_streams):
        stream.end()
