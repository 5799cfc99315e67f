"""Reallocation of the dead children of a `tree` to parents with larger capacity.

Source: Tree SAE (Cao et al. 2026, arXiv 2605.07922), algorithms 1 and 2, and the notes on its
training code: the loss of each step is shared equally by the possible parents that fired, the
root among them, and added to their capacity; a parent's quota of children is the allocation that
maximises the smallest capacity per child; only dead children move, from parents
over their quota to parents below it; capacities start from 0 after each reallocation.
"""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from .exact_buffers import ExactBuffers
from .forest import ROOT
from .levels import level_slices


class TreeGrowth(ExactBuffers):
    """Counters for the reallocation, all in the saved state.

    Buffers: `capacity` (n_levels, m + 1), the root last; `idle_steps` (m,), steps since a latent
    fired; `interval` and `waited`, in steps.
    """

    exact = ("capacity", "idle_steps", "interval", "waited")
    capacity: Tensor
    idle_steps: Tensor
    interval: Tensor
    waited: Tensor

    def __init__(self, widths: Sequence[int], interval: int, device: torch.device) -> None:
        super().__init__()
        self.slices = level_slices(widths)
        m = sum(widths)
        self.register_buffer("capacity", torch.zeros(len(widths), m + 1, device=device))
        self.register_buffer("idle_steps", torch.zeros(m, dtype=torch.int64, device=device))
        self.register_buffer("interval", torch.tensor(interval, device=device))
        self.register_buffer("waited", torch.tensor(0, device=device))

    @torch.no_grad()
    def observe(self, fired: Tensor, loss: Tensor) -> None:
        """Count one step in which `fired` (m,) bool latents fired somewhere in the batch."""
        self.idle_steps += 1
        self.idle_steps[fired] = 0
        self.waited += 1
        for level, latents in enumerate(self.slices):
            if level:
                above = fired[: latents.start].to(self.capacity.dtype)
                share = loss.to(self.capacity.dtype) / (above.sum() + 1)
                self.capacity[level, : latents.start] += share * above
                self.capacity[level, -1] += share

    def due(self) -> bool:
        """Whether the interval has passed since the last growth."""
        return bool(self.waited >= self.interval)

    def schedule(self, growth: float, longest: int) -> None:
        """Restart the counters with a longer interval."""
        self.capacity.zero_()
        self.waited.zero_()
        self.interval.copy_((self.interval * growth).to(torch.int64).clamp(max=longest))

    @torch.no_grad()
    def reallocate(self, parents: Tensor, dead: Tensor, eligible_within: int) -> Tensor:
        """The parents (m,) after moving dead children of each level towards the quotas."""
        parents = parents.clone()
        for level, latents in enumerate(self.slices):
            if level == 0:
                continue
            n_above, width = latents.start, latents.stop - latents.start
            mine = torch.where(parents[latents] == ROOT, n_above, parents[latents])
            capacity = torch.cat([self.capacity[level, :n_above], self.capacity[level, -1:]])
            capacity[:-1][self.idle_steps[:n_above] >= eligible_within] = 0
            quotas = fair_quotas(capacity.tolist(), width)
            counts = torch.bincount(mine, minlength=n_above + 1).tolist()
            places = [p for p, (q, c) in enumerate(zip(quotas, counts)) for _ in range(q - c)]
            for child in dead[latents].nonzero().flatten().tolist():
                parent = int(mine[child])
                if not places:
                    break
                if counts[parent] > quotas[parent]:
                    counts[parent] -= 1
                    mine[child] = places.pop(0)
            parents[latents] = torch.where(mine == n_above, ROOT, mine)
        return parents


def fair_quotas(capacity: Sequence[float], n_children: int) -> list[int]:
    """Algorithm 1: number of children per parent that maximises the smallest capacity per child.

    Each child in turn is assigned to the parent that will have the largest capacity per child.
    Parents without capacity get none; ties: lowest index.
    """
    quotas = [0] * len(capacity)
    heap = [(-c, parent) for parent, c in enumerate(capacity) if c > 0]
    heapq.heapify(heap)
    for _ in range(n_children if heap else 0):
        _, parent = heap[0]
        quotas[parent] += 1
        heapq.heapreplace(heap, (-capacity[parent] / (quotas[parent] + 1), parent))
    return quotas
