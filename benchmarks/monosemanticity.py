"""What MonoScore costs streamed in linear time, against summing over the pairs of images.

    python benchmarks/monosemanticity.py [--images 10000] [--latents 12288] [--embedding 768] [--l0 32]

The peer is the fastest pairwise form we know: all cosines, then for a block of latents
Σ_ab ã_a ã_b cos(E_a, E_b) as two products of dense matrices; the published loop over pairs does the
same arithmetic one image at a time. Timed is everything from z and E to the scores, the search for
the nonzeros of z included. Scores must agree. Bar: 100 times as fast or more.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from taxolens.registry.evaluators.base import EvaluationBatch, EvaluationContext, stream
from taxolens.registry.evaluators.monosemanticity import Monosemanticity
from taxolens.registry.taxonomies import Taxonomy

BAR = 100.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--latents", type=int, default=12_288)
    parser.add_argument("--embedding", type=int, default=768)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(args.images, args.embedding, generator=generator) + 0.5
    z = torch.zeros(args.images, args.latents)
    fires = torch.randint(args.latents, (args.images, args.l0), generator=generator)
    z.scatter_(1, fires, torch.rand(fires.shape, generator=generator) + 0.1)

    started = time.perf_counter()
    streamed = linear(z, embedding, args.batch)
    seconds = {"streamed": time.perf_counter() - started}
    started = time.perf_counter()
    summed = pairwise(z, embedding)
    seconds["pairwise"] = time.perf_counter() - started

    assert np.array_equal(np.isnan(streamed), np.isnan(summed))
    result = {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "times as fast": round(seconds["pairwise"] / seconds["streamed"], 1),
        "largest difference": float(np.nanmax(np.abs(streamed - summed))),
        "scored": int(np.isfinite(summed).sum()),
        "threads": torch.get_num_threads(),
    }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result["seconds"].items():
        print(f"{name:24s}{value:10.3f} s")
    print(f"{'times as fast':24s}{result['times as fast']:10.1f}   bar {BAR:.0f}")
    print(f"{'largest difference':24s}{result['largest difference']:10.1e}")


def linear(z: torch.Tensor, embedding: torch.Tensor, size: int) -> np.ndarray:
    """(m,) the scores of the evaluator, over batches."""
    n = len(z)
    nothing = torch.zeros(n, dtype=torch.int64)
    index = torch.arange(n)
    context = EvaluationContext(Taxonomy.from_edges([("root", "class")]), n, 1, z.shape[1])
    evaluator = Monosemanticity(context)
    x = torch.zeros(n, 1)
    columns = (x, z, nothing, nothing, index, nothing.bool())
    batches = (
        EvaluationBatch(*(c[i : i + size] for c in columns), embedding=embedding[i : i + size])
        for i in range(0, n, size)
    )
    stream(context, [evaluator], batches)
    return evaluator.scores()


def pairwise(z: torch.Tensor, embedding: torch.Tensor, block: int = 2048) -> np.ndarray:
    """(m,) the definition: the mean over pairs of images, weighted by both activations."""
    unit = torch.nn.functional.normalize(embedding, dim=1)
    cosine = unit @ unit.T
    cosine.fill_diagonal_(0)
    scores = []
    for a in z.split(block, dim=1):
        low = a.amin(0)
        a = (a - low) / (a.amax(0) - low)
        weight = a.sum(0).double().square() - a.double().square().sum(0)
        total = (a * (cosine @ a)).sum(0, dtype=torch.float64)
        scores.append(torch.where(weight > 0, total / weight, torch.nan).numpy())
    return np.concatenate(scores)


if __name__ == "__main__":
    main()
