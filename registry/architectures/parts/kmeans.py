"""Mini-batch k-means over a stream of activations, with its state in plain tensors."""

import torch
from torch import Tensor

from .precision import at_least_float32


@torch.no_grad()
def seed_centroids(batch: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` rows of `batch` drawn without replacement, (n, d); with repeats if there are fewer."""
    order = torch.cat(
        [
            torch.randperm(batch.shape[0], generator=generator, device=batch.device)
            for _ in range(-(-n // batch.shape[0]))
        ]
    )
    return batch[order[:n]].clone()


@torch.no_grad()
def update_centroids(centroids: Tensor, counts: Tensor, batch: Tensor) -> None:
    """One step of web-scale k-means (Sculley 2010), in place.

    Each centroid becomes the running mean of the points assigned to it so far. Ties go to the
    lowest index. Computed at least in float32.

    Args:
        centroids: (c, d).
        counts: points assigned to each centroid so far, (c,), at least in float32: beyond 256 not every
            number is one of bfloat16.
        batch: new points, (n, d).
    """
    places = centroids.to(at_least_float32(centroids.dtype))
    points = batch.to(centroids.dtype).to(places.dtype)
    distance = places.square().sum(dim=1) - 2 * points @ places.T
    nearest = distance.argmin(dim=1)
    new = torch.bincount(nearest, minlength=places.shape[0]).to(counts.dtype)
    sums = torch.zeros_like(places).index_add_(0, nearest, points)
    total = (counts + new).clamp_min(1)
    means = (places * counts[:, None] + sums) / total[:, None]
    centroids.copy_(torch.where((new > 0)[:, None], means, places))
    counts.add_(new)
