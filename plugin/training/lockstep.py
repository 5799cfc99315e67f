"""Signals of a run whose SAEs are trained by several processes, and the ranks without an SAE.

All ranks stop at the same step. They exchange whether one has received a signal, not at every step, which
would cost more than a small step, but about twice a second.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from sae_lens.training._interruption import InterruptedException

from ...hooks.activations.shared_source import ROUND, Follower, OwnPass, facts_of
from ...hooks.activations.stream import ActivationStream
from ...registry.errors import LostRankError
from ...registry.ranks import Ranks
from .activations_store import VisionActivationsStore
from .interrupts import SIGNAL_SECONDS, Interrupts, TrainingInterrupted

W = TypeVar("W")

SIGNALS = "signals"  # the names of the points where the ranks meet
END = "end"
SECONDS = 0.5  # between two exchanges of signals


class Pulse(NamedTuple):
    """What a rank comes with to an exchange of signals."""

    received: str | None
    seconds: float


class SharedInterrupts(Interrupts):
    """`Interrupts` of a process among others: `check` stops all of them at the same call.

    Every rank makes the same calls in the same order. A second Ctrl-C does not stop at once, since torchrun
    passes on the one that the terminal has sent to every process already.

    Args:
        ranks: the processes.
        store: errors of its stream come to every rank where the ranks share its forward passes.
    """

    AGAIN = ""

    def __init__(self, ranks: Ranks, store: VisionActivationsStore) -> None:
        super().__init__()
        self._ranks, self._store = ranks, store
        self._every = self._left = 1
        self._since = time.monotonic()

    def check(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._exchange()

    def waiting(self, wait: Callable[[], W]) -> W:
        return wait()  # every rank takes part in what gives the batches of all

    def check_after(self, error: Exception) -> None:
        if self._store.stream.shared is not None and not isinstance(error, LostRankError):
            time.sleep(SIGNAL_SECONDS)
            self._exchange()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            super()._note(number, frame)

    def _exchange(self) -> None:
        now = time.monotonic()
        name = None if self.received is None else self.received.name
        _, came = self._ranks.meet(SIGNALS, Pulse(name, now - self._since))
        slowest = max(pulse.seconds for pulse in came if isinstance(pulse, Pulse))
        fitting = self._every * SECONDS / max(slowest, 1e-9)
        self._every = self._left = max(1, round(min(fitting, 2 * self._every)))
        self._since = now
        for pulse in came:
            if pulse.received is not None:
                self.received = signal.Signals[pulse.received]
                raise InterruptedException(pulse.received)


def follow(ranks: Ranks, stream: ActivationStream) -> None:
    """What a rank without SAEs does: forward passes, where there is no cache, until the others have ended.

    Raises:
        TrainingInterrupted: a signal stopped them.
        LostRankError: another rank has failed.
    """
    passes: Iterator[OwnPass] = stream.own_passes()
    with Interrupts() as interrupts:
        own = next(passes, None)
        while True:
            received = None if interrupts.received is None else interrupts.received.name
            mine: Any = Follower(received, None if own is None else own.facts)
            point, came = ranks.meet(None, mine)
            if point == ROUND:
                assert own is not None and stream.shared is not None
                stream.shared.exchange(own, facts_of(came))
                own = next(passes, None)
            elif point == END:
                stopped = next((text for text in came if isinstance(text, str)), None)
                if stopped is not None:
                    raise TrainingInterrupted(stopped)
                return
