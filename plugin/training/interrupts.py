"""Interruption of a training run between two steps, while it waits for data, or in an evaluation."""

from __future__ import annotations

import logging
import signal
import threading
import time
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
W = TypeVar("W")

WATCH_EVERY = 100
SIGNAL_SECONDS = 0.5


class TrainingInterrupted(TaxolensError, InterruptedException):
    """A signal stopped the run. The message names the checkpoint to resume from."""


class Interrupts:
    """Context in which SIGINT, SIGTERM and SIGHUP are recorded, and stop the run between two steps.

    SAELens raises in the handler itself, which can leave weights and optimizer half updated.
    A second Ctrl-C raises KeyboardInterrupt at once. The earlier handlers are restored at the end.
    A signal that the process ignores stays ignored. Outside the main thread, where Python allows no
    handlers, signals are not recorded. Python runs a handler between two operations of its own, so
    that a long call of torch delays it.

    Args:
        stop: called in the handler, to end the waiting for data.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    )
    AGAIN = " (Ctrl-C again stops at once, without)"

    def __init__(self, stop: Callable[[], object] = lambda: None) -> None:
        self.received: signal.Signals | None = None
        self._stop = stop
        self._at_once = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        self.received = None
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
        self._stop()
        logger.warning(
            f"{self.received.name}: stopping after this step and saving a checkpoint{self.AGAIN}."
        )
        if self._at_once:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Stop the run if a signal was recorded.

        Raises:
            InterruptedException: SAELens's, with the name of the signal.
        """
        if self.received is not None:
            raise InterruptedException(self.received.name)

    def check_after(self, error: Exception) -> None:
        """As `check`, when the data has raised `error`.

        A signal to all processes of the job ends workers too, perhaps before it comes here.

        Raises:
            InterruptedException: `error` is no separate one.
        """
        time.sleep(SIGNAL_SECONDS)
        if self.received is not None:
            raise InterruptedException(self.received.name) from error

    def at_once(self, work: Callable[[], W]) -> W:
        """What `work` returns, which changes nothing of the training; a signal ends it at once.

        Raises:
            InterruptedException: a signal came.
        """
        try:
            self._at_once = True
            found = work()
            self._at_once = False
            return found
        except KeyboardInterrupt:
            if self.received is None:
                raise
            raise InterruptedException(self.received.name) from None
        finally:
            self._at_once = False

    def waiting(self, wait: Callable[[], W]) -> W:
        """As `at_once`, for what gives the next batch."""
        return self.at_once(wait)

    def unless_stopped(self, evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """As `at_once`, but {} once a signal comes."""
        if self.received is not None:
            return {}
        try:
            return self.at_once(evaluate)
        except InterruptedException:
            return {}

    def deliver(self) -> None:
        """Send a recorded signal again, to the handlers of outside: it came in the last step."""
        if self.received is not None:
            signal.raise_signal(self.received)


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
        self.error_of_source: Exception | None = None

    def __next__(self) -> T:
        self.is_between_steps = True
        if self._store.n_consumed % WATCH_EVERY == WATCH_EVERY - 1:
            self._watch()
        self._interrupts.check()
        try:
            batch = self._interrupts.waiting(lambda: next(self._source))
        except InterruptedException:
            raise
        except Exception as error:
            self.error_of_source = error
            self._interrupts.check_after(error)
            raise
        self._interrupts.check()
        self._store.n_consumed += 1
        self.is_between_steps = False
        self._before_step(batch)
        return batch

    def paused(self) -> AbstractContextManager[None]:
        """Pause the prefetching thread, which uses the same model."""
        return self._store.stream.paused()

    def unless_stopped(self, evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """See `Interrupts`."""
        return self._interrupts.unless_stopped(evaluate)

    def close(self) -> None:
        """End the iteration, and with it a prefetching thread and worker processes."""
        self._store.end()
        if isinstance(self._source, PrefetchingIterator):
            with suppress(Exception):
                for _ in self._source:
                    pass
        self._store.stream.close()
