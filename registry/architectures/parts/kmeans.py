"""Mini-batch k-means over a stream of activations, with its state in plain tensors."""

import torch
from torch import Tensor


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
    lowest index.

    Args:
        centroids: (c, d).
        counts: points assigned to each centroid so far, (c,).
        batch: new points, (n, d).
    """
    points = batch.to(centroids.dtype)
    distance = centroids.square().sum(dim=1) - 2 * points @ centroids.T
    nearest = distance.argmin(dim=1)
    new = torch.bincount(nearest, minlength=centroids.shape[0]).to(counts.dtype)
    sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
    total = (counts + new).clamp_min(1)
    means = (centroids * counts[:, None] + sums) / total[:, None]
    centroids.copy_(torch.where((new > 0)[:, None], means, centroids))
    counts.add_(new)
