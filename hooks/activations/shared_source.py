"""A `ModelSource` whose forward passes are dealt to the processes of a job, and exchanged.

Passes keep their places in the one order of the stream: of N that follow each other, each rank computes
one. Every batch has therefore the same tokens for any number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from ...registry.errors import TaxolensError
from ...registry.ranks import Ranks
from .token_sources import Batch, ModelSource, Place

ROUND = "forward passes"  # the name of the point where the ranks exchange them


@dataclass(frozen=True)
class PassFacts:
    """What every rank has to know of one forward pass: its images, its shapes, or why it failed."""

    n_images: int = 0
    failures: list[tuple[int, str, str]] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    error: TaxolensError | None = None


class OwnPass(NamedTuple):
    """A forward pass of this rank; the places are those of all passes of its round, by rank."""

    facts: PassFacts
    tokens: Batch
    places: list[Place]


class Follower(NamedTuple):
    """What a rank without SAEs comes with to each point: a signal that it has received, and its pass."""

    received: str | None
    facts: PassFacts | None  # None from a cache


def facts_of(came: Sequence[Any]) -> list[PassFacts]:
    """The facts of a round's passes, of ranks with and without SAEs."""
    found: list[Any] = [each.facts if isinstance(each, Follower) else each for each in came]
    return found


class SharedModelSource(ModelSource):
    """Computes every N-th forward pass and gets the others from the other ranks.

    An error of any rank is raised on every rank, at the same batch.

    Args:
        ranks: the processes of the job.
        takers: hook point -> the ranks that get its tokens; this rank's batches have the hook points that it takes.
    """

    def __init__(
        self, *args: Any, ranks: Ranks, takers: Mapping[str, Collection[int]], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.ranks = ranks
        self.takers = takers

    def own_passes(self, epoch: int, first_window: int) -> Iterator[OwnPass]:
        """The forward passes of this rank from there on; the last one may be an error."""
        n = self.ranks.size
        places: deque[Place] = deque()
        groups = self._groups(epoch, first_window, places)
        rounds = iter(lambda: list(islice(groups, n)), [])
        own = self.loader.grouped((each[self.ranks.rank] for each in rounds), counted=False)
        while True:
            tokens: Batch = {}
            try:
                decoded = next(own)
                if len(decoded):
                    tokens = {name: part.cpu() for name, part in self._tokens(decoded).items()}
                shapes = {name: (*part.shape,) for name, part in tokens.items()}
                n_images = len(decoded) + len(decoded.failures)
                facts = PassFacts(n_images, decoded.failures, shapes)
            except TaxolensError as error:
                facts = PassFacts(error=error)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                facts = PassFacts(error=TaxolensError(f"rank {self.ranks.rank}", problem))
            yield OwnPass(facts, tokens, [places.popleft() for _ in range(min(n, len(places)))])
            if facts.error is not None:
                return

    def exchange(self, own: OwnPass, facts: list[PassFacts]) -> dict[str, list[Any]]:
        """Hook point -> the tokens of the passes of one round, on the ranks that take them."""
        shapes = [each.shapes for each in facts]
        return self.ranks.deliver(own.tokens, shapes, self.takers, self.delivery.dtype)

    def _passes(self, epoch: int, first_window: int) -> Iterator[tuple[Place, Batch]]:
        for own in self.own_passes(epoch, first_window):
            came: list[Any] = self.ranks.meet(ROUND, own.facts)[1]
            facts = facts_of(came)
            received = self.exchange(own, facts)
            left = {name: iter(parts) for name, parts in received.items()}
            for rank, each in enumerate(facts):
                error = each.error
                if error is None and rank >= len(own.places):  # this rank could not list its images
                    error = own.facts.error
                if error is not None:
                    raise error
                self.loader.count(each.failures, each.n_images)
                tokens = {
                    name: next(parts).to(self.delivery.device)
                    for name, parts in left.items()
                    if each.shapes
                }
                yield own.places[rank], tokens
