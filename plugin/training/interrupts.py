"""Stopping a training run between two steps, never inside one."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from types import FrameType
from typing import Any, Generic, TypeVar

from sae_lens.training._interruption import InterruptedException
from sae_lens.training.prefetch import PrefetchingIterator

from ...registry.errors import TaxolensError
from .activations_store import VisionActivationsStore

logger = logging.getLogger(__name__)

T = TypeVar("T")

WATCH_EVERY = 100


class TrainingInterrupted(TaxolensError, InterruptedException):
    """A signal stopped the run. The message says where it can be resumed."""


class Interrupts:
    """While active, SIGINT and SIGTERM are noted, to be acted upon between two steps.

    SAELens raises out of the handler itself, which can leave weights and optimizer half updated.
    A second Ctrl-C raises KeyboardInterrupt at once. The handlers that were there before come
    back at the end. A signal that the process ignores stays ignored, and outside the main thread,
    where Python allows no handlers, there are none.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        logger.warning(
            f"{self.received.name}: stopping after this step and saving a checkpoint"
            " (Ctrl-C again stops at once, without)."
        )

    def check(self) -> None:
        """Raise InterruptedException when a signal was noted."""
        if self.received is not None:
            raise InterruptedException(self.received.name)


class StepGate(Iterator[T], Generic[T]):
    """The trainer's data provider: each step passes through here, in the trainer's own thread.

    It counts the batches that the trainer has had, and is where an interrupt or an error of the
    data surfaces while weights and optimizer are whole.

    Args:
        source: gives the batches.
        store: is told how many batches were consumed.
        watch: called every `WATCH_EVERY` steps; raises when training should not go on.
    """

    def __init__(
        self,
        source: Iterator[T],
        store: VisionActivationsStore,
        interrupts: Interrupts,
        watch: Callable[[], None],
    ) -> None:
        self._source = source
        self._store = store
        self._interrupts = interrupts
        self._watch = watch
        self.is_between_steps = True

    def __next__(self) -> T:
        self.is_between_steps = True
        if self._store.n_consumed % WATCH_EVERY == WATCH_EVERY - 1:
            self._watch()
        self._interrupts.check()
        try:
            batch = next(self._source)
        except Exception as error:
            # A signal reaches worker processes too, whose end is then no error of its own.
            if self._interrupts.received is not None:
                raise InterruptedException(self._interrupts.received.name) from error
            raise
        self._interrupts.check()
        self._store.n_consumed += 1
        self.is_between_steps = False
        return batch

    def paused(self) -> AbstractContextManager[None]:
        """Keep a prefetching thread from using the model meanwhile."""
        return self._store.stream.paused()

    def close(self) -> None:
        """End the iteration, and with it a prefetching thread and worker processes."""
        self._store.end()
        if isinstance(self._source, PrefetchingIterator):
            with suppress(Exception):
                for _ in self._source:
                    pass
        self._store.stream.close()
