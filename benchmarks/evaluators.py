"""Cost of the count-based evaluators, relative to encoding the same activations with the SAE.

    python benchmarks/evaluators.py [--images 50000] [--latents 12288] [--d_in 1536] [--l0 32] [--store]

*Count-based* evaluators read only which latents fire on which images, and how strongly: firings per
class and threshold, the top images, joint firings. They fit nothing and use neither x nor the decoder.
The decoder is withheld here, so `parent_child` leaves out its probes of x. `--evaluators` takes any
others, which then get the decoder.

The taxonomy is ImageNet-1k's. z is synthetic: on each image some latents of its class fire, and some at
random. Timed are the encoder of a ReLU SAE on activations of that shape (its cheapest form: no top-k),
and everything the evaluators do: the search for the nonzeros of z, calibration, every update, and
computing value, shuffled null and permuted-classes null. Bars: ratio 1.0 or less, peak memory 4 GiB or
less. `--store` stores the numbers in docs/results/evaluators.json and writes the table in docs/evaluators.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import numpy as np
import tables
import taxolens
import timing
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.registry.evaluators.base import EvaluationBatch, EvaluationContext

COUNT_BASED = (
    "lch_height",
    "ontological_coverage",
    "pair_depth",
    "parent_child",
    "matryoshka_depth",
)
BARS = {"ratio": 1.0, "peak GiB": 4.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--latents", type=int, default=12_288)
    parser.add_argument("--d_in", type=int, default=1536)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--permutations", type=int, default=10, help="of the classes, as the null")
    parser.add_argument("--evaluators", nargs="*", default=COUNT_BASED)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--store", action="store_true")
    args = parser.parse_args()

    tree = taxolens.load_taxonomy("imagenet")
    n_classes = len(tree.classes)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(args.images) % n_classes
    shuffled = labels[torch.randperm(args.images, generator=generator)]
    known = torch.randint(args.latents, (n_classes, args.l0), generator=generator)
    sae = StandardSAE(StandardSAEConfig(d_in=args.d_in, d_sae=args.latents))
    context = EvaluationContext(
        tree,
        args.images,
        args.d_in,
        args.latents,
        n_permutations=args.permutations,
        class_counts=np.bincount(labels, minlength=n_classes),
        W_dec=None if set(args.evaluators) <= set(COUNT_BASED) else sae.W_dec.detach(),
        b_dec=sae.b_dec.detach(),
    )
    evaluators = {name: taxolens.EVALUATORS[name](context) for name in args.evaluators}

    seconds = dict.fromkeys(("encoding", "nonzeros", "shared counts", *evaluators), 0.0)

    def timed(what: str, started: float) -> None:
        seconds[what] += time.perf_counter() - started

    def update(batch: EvaluationBatch) -> None:
        started = time.perf_counter()
        _ = batch.firings  # found once, then kept with the batch
        timed("nonzeros", started)
        started = time.perf_counter()
        if batch.index[0] == 0:
            context.calibrate(batch)
        context.update(batch)
        timed("shared counts", started)
        for name, evaluator in evaluators.items():
            started = time.perf_counter()
            if batch.index[0] == 0:
                evaluator.calibrate(batch)
            evaluator.update(batch)
            timed(name, started)

    with torch.no_grad():
        for index in torch.arange(args.images).split(args.batch):
            x = torch.randn(len(index), args.d_in, generator=generator)
            started = time.perf_counter()
            sae.encode(x)
            timed("encoding", started)
            z = torch.zeros(len(index), args.latents)
            at_random = torch.randint(args.latents, (len(index), args.l0), generator=generator)
            of_class = torch.rand(len(index), args.l0, generator=generator) < 0.5
            fires = torch.where(of_class, known[labels[index]], at_random)
            z.scatter_(1, fires, torch.rand(fires.shape, generator=generator) + 0.1)
            is_fit = index < args.images // 2
            update(EvaluationBatch(x, z, labels[index], shuffled[index], index, is_fit))

    for name, evaluator in evaluators.items():
        started = time.perf_counter()
        evaluator.compute()
        evaluator.compute(shuffled=True)
        for permutation in context.permutations:
            evaluator.compute(permutation=permutation)
        timed(name, started)

    spent = sum(seconds.values()) - seconds["encoding"]
    result = {
        "machine": timing.machine(),
        "images": args.images,
        "classes": n_classes,
        "latents": args.latents,
        "permutations": len(context.permutations),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "spent": round(spent, 2),
        "ratio": round(spent / seconds["encoding"], 3),
        "peak GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    if args.store:
        timing.store("evaluators", result)
        tables.write_pages()
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result["seconds"].items():
        print(f"{name:24s}{value:8.2f} s")
    for name, bar in BARS.items():
        print(f"{name:24s}{result[name]:8.2f}   bar {bar:.1f}")


if __name__ == "__main__":
    main()
