"""Time and memory of Gromov's δ, relative to the array of all triples.

    python benchmarks/hyperbolicity.py [--points 1500] [--peer_points 200] [--store]

The peer takes the maximum over a dense (n, n, n) array: 27 GB at 1,500 points, so it is run with
fewer, where both must agree. Memory is the rise of the process's peak while δ is computed, the
matrix of distances included. Bar: 1 GiB at 1,500 points. `--store` stores the numbers in
docs/results/hyperbolicity.json and writes the table in docs/evaluators.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np
import tables
import timing
from taxolens.registry.evaluators.hyperbolicity import distances, gromov_delta, relative_delta

BAR = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=1500)
    parser.add_argument("--peer_points", type=int, default=200)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--store", action="store_true")
    args = parser.parse_args()
    points = np.random.default_rng(0).normal(size=(args.points, args.width))

    before = peak()  # the peak never falls, so ours is measured first
    started = time.perf_counter()
    distance = distances(points)
    relative_delta(distance, bases=1)
    seconds = {"ours": time.perf_counter() - started}
    memory = peak() - before

    small = distances(points[: args.peer_points])
    started = time.perf_counter()
    dense = all_triples(small, 0)
    seconds["all triples, fewer points"] = time.perf_counter() - started
    started = time.perf_counter()
    ours = gromov_delta(small, 0)
    seconds["ours, fewer points"] = time.perf_counter() - started
    assert abs(ours - dense) < 1e-4, (ours, dense)

    result = {
        "machine": timing.machine(),
        "points": args.points,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "GiB": round(memory, 3),
        "GiB of all triples": round(args.points**3 * 8 / 2**30, 1),
    }
    if args.store:
        timing.store("hyperbolicity", result)
        tables.write_pages()
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result["seconds"].items():
        print(f"{name:28s}{value:8.3f} s")
    print(f"{'GiB':28s}{result['GiB']:8.3f}   bar {BAR:.1f}")


def all_triples(distance: np.ndarray, base: int) -> float:
    """δ at one base point by its definition, in O(n³) memory."""
    product = 0.5 * (distance[base][:, None] + distance[base] - distance)
    through = np.minimum(product[:, :, None], product[None])
    return float((through.max(1) - product).max())


def peak() -> float:
    """GiB of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
