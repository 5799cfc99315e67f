"""An endless stream of activations for training, seeded and seekable to the bit."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...registry.errors import CheckpointError, ConfigError, DataError
from ..images.loader import ImageBatch, ImageLoader, Job
from ..images.preprocess import preprocess_for
from ..models.tokens import tokens_per_image
from .extract import TokenExtractor, model_fingerprint, torch_dtype
from .permutation import LazyPermutation

if TYPE_CHECKING:
    from ..images.dataset import ImageDataset
    from ..models.load import VisionModel
    from .cache import ActivationCache

Batch = dict[str, Tensor]
State = dict[str, Any]

STATES_KEPT = 4096  # positions of the last batches; a prefetching thread is never so far ahead
GATHERED_BYTES = 1 << 28  # read from a cache at once, in the order of the file


class _Source(Protocol):
    """Where batches come from: a model that reads images, or a cache.

    Once `stopped` is set, batches end at the next opportunity.
    """

    tokens_per_image: int
    stopped: threading.Event

    def start(self) -> State: ...
    def batches(self, state: State) -> Iterator[tuple[Batch, Any]]: ...
    def state(self, mark: Any) -> State: ...
    def describe(self) -> dict[str, Any]: ...
    def failures(self) -> dict[int, str]: ...


class ActivationStream(Iterator[Batch]):
    """Batches {hook point: (train_batch_size_tokens, d)}, all of the same tokens, without end.

    Every epoch is a new permutation of the images, made by `seed` and the epoch's number. From a
    model, images are read in windows of `n_batches_in_buffer` forward passes whose tokens are
    shuffled among themselves; with one token per image a window is one forward pass, as nothing
    can be shuffled that the permutation has not shuffled already. From a cache, tokens are permuted
    over the whole epoch. Every token of every readable image comes exactly once an epoch; batches
    run over the ends of windows and epochs.

    Whatever batch was served last, `state_after` says where the next begins, and `seek` goes
    there: what follows is the same to the bit (on the same hardware), since every window is a
    function of the seed, the epoch and the window's number alone. Torch's global random state is
    never touched.

    `next`, `seek` and `paused` may be called from different threads; `state_after` never waits for
    a forward pass.

    Args:
        model: a vision model; not needed with a cache.
        images: the images; not needed with a cache.
        hook_names: hook points, all read from one forward pass.
        tokens: one of `TOKEN_CHOICES`.
        train_batch_size_tokens: tokens per batch given out.
        store_batch_size_prompts: images per forward pass.
        n_batches_in_buffer: forward passes per window. A window is kept on `device`.
        seed: decides the order, whole number from 0 on.
        device, dtype: of the batches given out.
        num_workers: processes that decode images ahead.
        image_size: height and width given to the model; None: its own.
        cache: read activations from there instead.
        max_corrupt_share: stop with a `DataError` when more of the images are corrupt.
        autocast: run the model in bfloat16 where that is safe.

    Raises:
        ConfigError: an argument is wrong; the message names it.
        DataError: no image can be read, too many are corrupt, or an activation is not finite.
    """

    def __init__(
        self,
        model: VisionModel | None,
        images: ImageDataset | None,
        hook_names: Sequence[str],
        *,
        tokens: str = "class",
        train_batch_size_tokens: int = 4096,
        store_batch_size_prompts: int = 32,
        n_batches_in_buffer: int = 20,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        num_workers: int = 0,
        image_size: int | None = None,
        cache: ActivationCache | None = None,
        max_corrupt_share: float = 0.01,
        autocast: bool = False,
    ) -> None:
        for field, value, least in (
            ("train_batch_size_tokens", train_batch_size_tokens, 1),
            ("store_batch_size_prompts", store_batch_size_prompts, 1),
            ("n_batches_in_buffer", n_batches_in_buffer, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{field}={value}: must be at least {least}.")
        self.hook_names = list(hook_names)
        self.train_batch_size_tokens = train_batch_size_tokens
        self._source: _Source
        delivery = _Delivery(
            train_batch_size_tokens, torch.device(device), torch_dtype(dtype), seed
        )
        if cache is not None:
            self._source = _CacheSource(cache, self.hook_names, tokens, delivery)
        elif model is None or images is None:
            raise ConfigError("model, images: both are needed without a cache of activations.")
        else:
            loader = ImageLoader(
                images,
                preprocess_for(model, image_size),
                batch_size=store_batch_size_prompts,
                num_workers=num_workers,
                max_corrupt_share=max_corrupt_share,
                pin_memory=torch.device(str(model.cfg.device)).type == "cuda",
            )
            extractor = TokenExtractor(
                model, self.hook_names, [tokens], dtype=delivery.dtype, autocast=autocast
            )
            per_image = tokens_per_image(model, tokens, image_size, self.hook_names[0])
            batches = 1 if per_image == 1 else n_batches_in_buffer
            self._source = _ModelSource(loader, extractor, delivery, per_image, batches)
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
        """Where the stream stood right after the `n_batches`-th batch since the last `seek`.

        JSON-able. 0 is where it started; the states of the last 4,096 batches are kept.

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
            raise CheckpointError("the position in the activations cannot be read: fields missing.")
        if here != there:
            differing = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
            listed = "; ".join(
                f"{k}: {there.get(k)!r} then, {here.get(k)!r} now" for k in differing
            )
            raise CheckpointError(
                f"the position belongs to another stream of activations: {listed}."
            )
        with self._lock:
            self._close()
            self._start = {key: value for key, value in state.items() if key != "stream"}
            self._marks.clear()
            self._n_served = 0

    def describe(self) -> dict[str, Any]:
        """JSON-able: everything that decides which numbers come in which order, but hook points."""
        return {**self._source.describe(), "train_batch_size_tokens": self.train_batch_size_tokens}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep other threads from reading, and the model free for other uses, for the while."""
        with self._lock:
            yield

    def close(self) -> None:
        """End the worker processes. The next batch starts them again, at the same place.

        A batch that another thread is waiting for is given up after the forward pass under way:
        there, the iteration ends.
        """
        self._source.stopped.set()
        with self._lock:
            self._source.stopped.clear()
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


_streams: weakref.WeakSet[ActivationStream] = weakref.WeakSet()


@atexit.register
def _end_streams() -> None:
    """A daemon thread that is cut off in the middle of a forward pass takes the process with it."""
    for stream in list(_streams):
        stream.end()


@dataclass(frozen=True)
class _Delivery:
    """How tokens are given out."""

    batch_size: int
    device: torch.device
    dtype: torch.dtype
    seed: int


@dataclass
class _Place:
    """A group of images for one forward pass, and where it stands."""

    epoch: int
    window: int
    ends_window: bool
    ends_epoch: bool


@dataclass
class _Window:
    """The tokens of one window, (n, d) for each hook point, and the order to give them out in."""

    place: _Place
    tokens: Batch
    order: Tensor | None
    counts: tuple[int, int]  # of images read, and of corrupt ones, before it

    def __len__(self) -> int:
        return len(next(iter(self.tokens.values()))) if self.tokens else 0

    @property
    def following(self) -> tuple[int, int]:
        place = self.place
        return (place.epoch + 1, 0) if place.ends_epoch else (place.epoch, place.window + 1)

    def copy(self, start: int, end: int, to: Batch, at: int) -> None:
        """Write tokens number `start` to `end` into `to`, from row `at` on."""
        for name, tokens in self.tokens.items():
            target = to[name][at : at + end - start]
            if self.order is None:
                target.copy_(tokens[start:end])
            else:
                torch.index_select(tokens, 0, self.order[start:end], out=target)


class _ModelSource:
    """Activations made as they are needed, from images through a model."""

    def __init__(
        self,
        loader: ImageLoader,
        extractor: TokenExtractor,
        delivery: _Delivery,
        tokens_per_image: int,
        batches_per_window: int,
    ) -> None:
        self.loader = loader
        self.extractor = extractor
        self.delivery = delivery
        self.tokens_per_image = tokens_per_image
        self.batches_per_window = batches_per_window
        self.stopped = threading.Event()
        self._description: dict[str, Any] | None = None

    def start(self) -> State:
        return {"position": [0, 0, 0], "failures": {}, "n_processed": 0, "n_failed": 0}

    def state(self, mark: Any) -> State:
        position, n_failures, n_processed, n_failed = mark
        failures = list(self.loader.failures.items())[:n_failures]
        return {
            "position": list(position),
            "failures": {str(index): text for index, text in failures},
            "n_processed": n_processed,
            "n_failed": n_failed,
        }

    def failures(self) -> dict[int, str]:
        return dict(self.loader.failures)

    def describe(self) -> dict[str, Any]:
        if self._description is None:
            self._description = {
                "from": "model",
                "model": model_fingerprint(self.extractor.model),
                "images": self.loader.images.fingerprint,
                "preprocessing": _described(self.loader.preprocess),
                "tokens": self.extractor.tokens[0],
                "seed": self.delivery.seed,
                "store_batch_size_prompts": self.loader.batch_size,
                "batches_per_window": self.batches_per_window,
                "dtype": str(self.delivery.dtype),
                "autocast": self.extractor.autocast,
            }
        return dict(self._description)

    def batches(self, state: State) -> Iterator[tuple[Batch, Any]]:
        loader, size = self.loader, self.delivery.batch_size
        loader.failures = {int(index): text for index, text in state["failures"].items()}
        loader.n_processed, loader.n_failed = state["n_processed"], state["n_failed"]
        epoch, first_window, offset = state["position"]
        batch: Batch = {}
        filled = 0
        for window in self._windows(epoch, first_window):
            while offset < len(window):
                if not batch:
                    batch = {
                        name: tokens.new_empty(size, tokens.shape[-1])
                        for name, tokens in window.tokens.items()
                    }
                end = min(len(window), offset + size - filled)
                window.copy(offset, end, batch, filled)
                filled, offset = filled + end - offset, end
                if filled == size:
                    if offset < len(window):
                        position = (window.place.epoch, window.place.window, offset)
                        counts = window.counts
                    else:
                        position = (*window.following, 0)
                        counts = (loader.n_processed, loader.n_failed)
                    yield batch, (position, len(loader.failures), *counts)
                    batch, filled = {}, 0
            offset = 0

    def _windows(self, epoch: int, first_window: int) -> Iterator[_Window]:
        """The windows from there on, without end."""
        places: deque[_Place] = deque()  # of the groups that are being decoded
        rows = self.batches_per_window * self.loader.batch_size * self.tokens_per_image
        buffers: Batch = {}
        filled = 0
        counts = (self.loader.n_processed, self.loader.n_failed)
        whole_epoch, any_tokens = first_window == 0, False
        for decoded in self.loader.grouped(self._groups(epoch, first_window, places)):
            if self.stopped.is_set():
                return
            place = places.popleft()
            if len(decoded):
                tokens = self._tokens(decoded)
                n = len(next(iter(tokens.values())))
                if self.batches_per_window == 1:
                    buffers, filled = tokens, n
                else:
                    if not buffers:
                        buffers = {k: t.new_empty(rows, t.shape[-1]) for k, t in tokens.items()}
                    for name, part in tokens.items():
                        buffers[name][filled : filled + n] = part
                    filled += n
            if place.ends_window:
                any_tokens = any_tokens or filled > 0
                tokens = {name: buffer[:filled] for name, buffer in buffers.items()}
                yield _Window(place, tokens, self._order(place, filled), counts)
                counts, filled = (self.loader.n_processed, self.loader.n_failed), 0
            if place.ends_epoch:
                if whole_epoch and not any_tokens:
                    self._nothing_readable()
                whole_epoch, any_tokens = True, False

    def _groups(self, epoch: int, first_window: int, places: deque[_Place]) -> Iterator[list[Job]]:
        """Images for one forward pass after the other; where each stands goes into `places`."""
        while True:
            size = self.loader.batch_size
            group = first_window * self.batches_per_window
            jobs = self._jobs(epoch, group * size)
            chunk = list(islice(jobs, size))
            if not chunk and group == 0:
                self._nothing_readable()
            while chunk:
                following = list(islice(jobs, size))
                group += 1
                ends_epoch = not following
                places.append(
                    _Place(
                        epoch,
                        (group - 1) // self.batches_per_window,
                        ends_epoch or group % self.batches_per_window == 0,
                        ends_epoch,
                    )
                )
                yield chunk
                chunk = following
            epoch, first_window = epoch + 1, 0

    def _jobs(self, epoch: int, skip: int) -> Iterator[Job]:
        images = self.loader.images
        if images.is_streaming:
            return images.stream(seed=self.delivery.seed, epoch=epoch, skip=skip)
        order = np.random.default_rng([self.delivery.seed, epoch]).permutation(len(images))
        return iter(order[skip:].tolist())

    def _tokens(self, decoded: ImageBatch) -> Batch:
        """(images * tokens, d) for each hook point, where they are delivered."""
        activations = self.extractor(decoded)
        found = next(iter(activations.values())).shape[1]
        if found != self.tokens_per_image:
            raise ConfigError(
                f"image_size: images of {tuple(decoded.pixel_values.shape[2:])} pixels give {found} "
                f"tokens ({self.extractor.tokens[0]}) each where {self.tokens_per_image} were "
                "expected; give the image_size that is wanted."
            )
        return {
            name: tensor.flatten(0, 1).to(self.delivery.device)
            for name, tensor in activations.items()
        }

    def _order(self, place: _Place, n_tokens: int) -> Tensor | None:
        if self.tokens_per_image == 1:
            return None
        generator = np.random.default_rng([self.delivery.seed, place.epoch, place.window, 1])
        return torch.from_numpy(generator.permutation(n_tokens)).to(self.delivery.device)

    def _nothing_readable(self) -> None:
        shown = "; ".join(f"image {i} ({why})" for i, why in list(self.failures().items())[:3])
        raise DataError(
            f"{self.loader.images.name}: not one image can be read: {shown or 'empty'}."
        )


class _CacheSource:
    """Activations read from a cache, in an order over the whole epoch."""

    def __init__(
        self, cache: ActivationCache, hook_names: list[str], tokens: str, delivery: _Delivery
    ) -> None:
        if not cache.complete:
            raise ConfigError(f"cache: {cache.path} is not complete; build it to its end first.")
        self.cache = cache
        self.delivery = delivery
        self.tokens = tokens
        self.stopped = threading.Event()
        self._columns = {name: cache.tensor(name, tokens).flatten(0, 1) for name in hook_names}
        if not self._columns:
            raise ConfigError("hook_names: none given.")
        self.n_tokens = len(next(iter(self._columns.values())))
        if self.n_tokens == 0:
            raise DataError(f"{cache.path} holds no activations: no image could be read.")
        self.tokens_per_image = self.n_tokens // len(cache)

    def start(self) -> State:
        return {"position": 0}

    def state(self, mark: Any) -> State:
        return {"position": mark}

    def failures(self) -> dict[int, str]:
        return dict(self.cache.failures)

    def describe(self) -> dict[str, Any]:
        return {
            "from": "cache",
            **{key: self.cache.facts[key] for key in ("model", "images", "preprocessing", "dtype")},
            "tokens": self.tokens,
            "seed": self.delivery.seed,
        }

    def batches(self, state: State) -> Iterator[tuple[Batch, Any]]:
        position, size = int(state["position"]), self.delivery.batch_size
        row_bytes = sum(c.shape[-1] * c.element_size() for c in self._columns.values())
        at_once = size * max(1, min(GATHERED_BYTES // row_bytes, self.n_tokens) // size)
        while not self.stopped.is_set():
            gathered = self._gather(self._rows(position, at_once))
            for start in range(0, at_once, size):
                position += size
                yield (
                    {name: rows[start : start + size] for name, rows in gathered.items()},
                    position,
                )

    def _rows(self, position: int, n: int) -> Tensor:
        """Which tokens stand at `position` and the n - 1 places after it, over the epochs."""
        places = np.arange(position, position + n)
        rows = np.empty(n, dtype=np.int64)
        epochs = places // self.n_tokens
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            order = LazyPermutation(self.n_tokens, self.delivery.seed, epoch)
            rows[here] = order[places[here] % self.n_tokens]
        return torch.from_numpy(rows)

    def _gather(self, rows: Tensor) -> Batch:
        """Read in the order of the file, give back in the order asked for."""
        in_file_order, order = rows.sort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        device, dtype = self.delivery.device, self.delivery.dtype
        back = back.to(device)
        return {
            name: column.index_select(0, in_file_order).to(device, dtype).index_select(0, back)
            for name, column in self._columns.items()
        }


def _described(preprocess: Any) -> Any:
    return preprocess.describe() if hasattr(preprocess, "describe") else repr(preprocess)
