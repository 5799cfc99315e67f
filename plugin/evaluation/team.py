"""The ranks that measure one SAE: SAEs are dealt to ranks, and of few SAEs the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ...registry.ranks import Ranks

T = TypeVar("T")
OWN_PASS = "the SAE's own pass"


@dataclass(frozen=True)
class Team:
    """The place of this process among those that measure one SAE; by default it is alone.

    Args:
        job: all ranks.
        place: the number of this process in the team, and how many they are.
        divided: whether the passes of an SAE are dealt, and not whole SAEs.
        counter: what has been measured, in images and evaluators, is counted under this name.
    """

    job: Ranks = Ranks()
    place: Ranks = Ranks()
    divided: bool = False
    counter: str = ""

    @classmethod
    def deal(cls, job: Ranks, costs: Mapping[str, float], counter: str) -> tuple[list[str], Team]:
        """The SAEs that this rank measures, in the order of `costs`, and its team.

        With as many SAEs as ranks or more, each SAE has one rank. With fewer, rank r takes part in
        SAE r modulo their number (own definition).

        Args:
            job: all ranks.
            costs: name of each SAE -> its cost.
            counter: see `Team`; a name that this job has not used yet.
        """
        names = list(costs)
        if len(names) >= job.size:
            return job.deal(costs)[job.rank], cls(job, counter=counter)
        first = job.rank % len(names)
        of_one = range(first, job.size, len(names))
        place = Ranks(of_one.index(job.rank), len(of_one))
        return [names[first]], cls(job, place, divided=True, counter=counter)

    @property
    def leads(self) -> bool:
        """Whether this process makes the SAE's own pass and its result."""
        return self.place.is_first

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """The passes that this process makes, of those with these costs.

        The own pass and what is computed from it count as two of the dearest (own definition).
        """
        own = {OWN_PASS: 2 * max(costs.values(), default=1.0)}
        dealt = self.place.deal({**own, **costs})[self.place.rank]
        return [name for name in dealt if name != OWN_PASS]

    def counting(self, progress: Callable[[int], Any]) -> Callable[..., None]:
        """`progress`, which also counts for the ranks that wait for this one: they go on waiting."""

        def moved(n: int = 1) -> None:
            progress(n)
            if self.job.size > 1:
                for counter in (self.counter, self._passes):
                    self.job.add(counter, n)

        return moved

    def gather(self, sae: str, numbers: Mapping[str, T]) -> dict[str, T]:
        """What all of the team have of an SAE; where SAEs are divided, every rank has to call it."""
        if not self.divided:
            return dict(numbers)
        for _ in self.job.waiting(self._passes):
            pass
        parts = self.job.gather((sae, dict(numbers)))
        return {name: found for of, part in parts if of == sae for name, found in part.items()}

    @property
    def _passes(self) -> str:
        return f"{self.counter}, passes"


ALONE = Team()
"""One process that measures an SAE by itself."""
