"""Time of MonoScore streamed in linear time, relative to sums over the pairs of images.

    python benchmarks/monosemanticity.py [--images 10000] [--latents 12288] [--embedding 768] [--l0 32] [--store]

Two peers. *Pairs in turn* is the form in which the score is published and computed
(arXiv 2504.02821): for each image its cosines with all later ones and the products of activations,
summed for every latent. It is slow, so that it is run for `--rows` images spread evenly and
scaled by the pairs they stand for. *Pairs as matrices* is the fastest pairwise form we know: all
cosines, then for a block of latents Σ_ab ã_a ã_b cos(E_a, E_b) as two products of dense matrices.
Timed is everything from z and E to the scores, the search for the nonzeros of z included. Scores
must agree; those of the first peer are compared on a small set. Bar: 100 times as fast as the pairs in turn.
`--store` stores the numbers in docs/results/monosemanticity.json and writes the table in docs/evaluators.md.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import tables
import timing
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
    parser.add_argument("--rows", type=int, default=20, help="images whose pairs are timed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--store", action="store_true")
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
    seconds["pairs as matrices"] = time.perf_counter() - started
    seconds["pairs in turn"] = seconds_of_all_pairs(z, embedding, args.rows)

    assert np.array_equal(np.isnan(streamed), np.isnan(summed))
    few = z[:200, :512], embedding[:200]
    np.testing.assert_allclose(in_turn(*few), linear(*few, 64), rtol=1e-4, atol=1e-5)
    result = {
        "machine": timing.machine(),
        "images": args.images,
        "latents": args.latents,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "times as fast": {
            name: round(value / seconds["streamed"], 1)
            for name, value in seconds.items()
            if name != "streamed"
        },
        "largest difference": float(np.nanmax(np.abs(streamed - summed))),
        "scored": int(np.isfinite(summed).sum()),
    }
    if args.store:
        timing.store("monosemanticity", result)
        tables.write_pages()
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result["seconds"].items():
        print(f"{name:24s}{value:10.3f} s")
    for name, value in result["times as fast"].items():
        bar = f"   bar {BAR:.0f}" if name == "pairs in turn" else ""
        print(f"{'than ' + name:24s}{value:10.1f} times as fast{bar}")
    print(f"{'largest difference':24s}{result['largest difference']:10.1e}")


def linear(z: torch.Tensor, embedding: torch.Tensor, size: int) -> np.ndarray:
    """(m,) the scores of the evaluator, over batches."""
    n = len(z)
    nothing = torch.zeros(n, dtype=torch.int64)
    index = torch.arange(n)
    context = EvaluationContext(Taxonomy.from_edges([("root", "class")]), n, 1, z.shape[1])
    x = torch.zeros(n, 1)
    columns = (x, z, nothing, nothing, index, nothing.bool())
    batches = (
        EvaluationBatch(*(c[i : i + size] for c in columns), embedding=embedding[i : i + size])
        for i in range(0, n, size)
    )
    done = stream(context, {"monosemanticity": (Monosemanticity, None)}, batches)
    return done.evaluators["monosemanticity"].scores()


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


def in_turn(z: torch.Tensor, embedding: torch.Tensor) -> np.ndarray:
    """(m,) the definition, one image after the other."""
    scaled, unit = scale_and_normalise(z, embedding)
    sums = torch.zeros(2, z.shape[1], dtype=torch.float64)
    for a in range(len(z) - 1):
        sums += sums_of(a, scaled, unit)
    return torch.where(sums[1] > 0, sums[0] / sums[1], torch.nan).numpy()


def seconds_of_all_pairs(z: torch.Tensor, embedding: torch.Tensor, n_rows: int) -> float:
    """The time of `in_turn` for all images, estimated from some of them."""
    scaled, unit = scale_and_normalise(z, embedding)
    rows = np.linspace(0, len(z) - 2, n_rows).astype(int)
    started = time.perf_counter()
    for a in rows:
        sums_of(int(a), scaled, unit)
    seconds = time.perf_counter() - started
    pairs = sum(len(z) - 1 - int(a) for a in rows)
    return seconds * (len(z) * (len(z) - 1) / 2) / pairs


def scale_and_normalise(
    z: torch.Tensor, embedding: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    low = z.amin(0)
    scaled = (z - low) / (z.amax(0) - low)
    return scaled, torch.nn.functional.normalize(embedding, dim=1)


def sums_of(a: int, scaled: torch.Tensor, unit: torch.Tensor, size: int = 1024) -> torch.Tensor:
    """(2, m) Σ_b ã_a ã_b cos(E_a, E_b) and Σ_b ã_a ã_b over the images b after a."""
    sums = torch.zeros(2, scaled.shape[1], dtype=torch.float64)
    for start in range(a + 1, len(scaled), size):
        weight = scaled[a] * scaled[start : start + size]
        cosine = unit[start : start + size] @ unit[a]
        sums[0] += (weight * cosine[:, None]).sum(0)
        sums[1] += weight.sum(0)
    return sums


if __name__ == "__main__":
    main()
