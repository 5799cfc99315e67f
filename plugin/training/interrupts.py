"""Interruption of a training run between two steps, not inside one."""

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
    """A signal stopped the run. The message names the checkpoint to resume from."""


class Interrupts:
    """Context in which SIGINT, SIGTERM and SIGHUP are recorded, and stop the run between two steps.

    SAELens raises in the handler itself, which can leave weights and optimizer half updated.
    A second Ctrl-C raises KeyboardInterrupt at once. The earlier handlers are restored at the end.
    A signal that the process ignores stays ignored. Outside the main thread, where Python allows no
    handlers, signals are not recorded.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    )

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
            # None is a handler that was not set from Python, and cannot be restored.
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
        """Stop the run if a signal was recorded.

        Raises:
            InterruptedException: SAELens's, with the name of the signal.
        """
        if self.received is not None:
            raise InterruptedException(self.received.name)


class StepGate(Iterator[T], Generic[T]):
    """The trainer's data provider; each step begins here, in the trainer's own thread.

    It counts the batches that the trainer has received. Interrupts and errors of the data are
    raised here, between two steps, when weights and optimizer are consistent.

    Args:
        source: gives the batches.
        store: its `n_consumed` is counted.
        interrupts: checked before each step.
        watch: called every `WATCH_EVERY` steps; raises when training should not go on.
        before_step: called with each batch before the trainer gets it.
    """

    def __init__(
        self,
        source: Iterator[T],
        store: VisionActivationsStore,
        interrupts: Interrupts,
        watch: Callable[[], None],
        before_step: Callable[[T], object] = lambda batch: None,
    ) -> None:
        self._before_step = before_step
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
            # A signal ends worker processes too, which is then not a separate error.
            if self._interrupts.received is not None:
                raise InterruptedException(self._interrupts.received.name) from error
            raise
        self._interrupts.check()
        self._store.n_consumed += 1
        self.is_between_steps = False
        self._before_step(batch)
        return batch

    def paused(self) -> AbstractContextManager[None]:
        """Pause the prefetching thread, which uses the same model."""
        return self._store.stream.paused()

    def close(self) -> None:
        """End the iteration, and with it a prefetching thread and worker processes."""
        self._store.end()
        if isinstance(self._source, PrefetchingIterator):
            with suppress(Exception):
                for _ in self._source:
                    pass
        self._store.stream.close()
