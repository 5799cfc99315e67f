"""Cost of the draws of permuted classes, relative to encoding the same images with the SAE.

    python benchmarks/draws.py [--images 50000] [--latents 12288] [--l0 32] [--draws 100] [--json] [--store [NAME]]

The taxonomy is ImageNet-1k's (a random tree for more than 1,000 classes); z is synthetic: on each image some latents
of its class fire, and some at random. For each count-based evaluator the script prints the time of its value, of a draw (the
mean), of the first ten draws and of all, and the share that all have of encoding the images with a
ReLU SAE. Times are the processor's, so that other work on the machine matters less. To compare with
another version, run the script on both. `--store` stores the numbers in docs/results/draws.json, or in NAME.json, and
writes the table in docs/evaluators.md, which has those of 21,841 classes (`draws_21841`) too.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator

import numpy as np
import tables
import taxolens
import timing
import torch
from evaluators import COUNT_BASED
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.registry.evaluators.base import EvaluationBatch, EvaluationContext, stream

FEW = 10


def synthetic_batches(
    images: int, latents: int, n_classes: int, l0: int, d_in: int, size: int = 512
) -> Iterator[EvaluationBatch]:
    """The evaluation set, the fit half first; l0 latents fire on an image, half of them random."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % n_classes
    shuffled = labels[torch.randperm(images, generator=generator)]
    known = torch.randint(latents, (n_classes, l0), generator=generator)
    for index in torch.arange(images).split(size):
        z = torch.zeros(len(index), latents)
        at_random = torch.randint(latents, (len(index), l0), generator=generator)
        of_class = torch.rand(len(index), l0, generator=generator) < 0.5
        fires = torch.where(of_class, known[labels[index]], at_random)
        z.scatter_(1, fires, torch.rand(fires.shape, generator=generator) + 0.1)
        x = torch.randn(len(index), d_in, generator=generator)
        is_fit = index < images // 2
        yield EvaluationBatch(x, z, labels[index], shuffled[index], index, is_fit)


def tree_of(n_classes: int) -> taxolens.Taxonomy:
    """ImageNet-1k's tree, or its part above every k-th class; a random tree for more classes."""
    full = taxolens.load_taxonomy("imagenet")
    if n_classes <= len(full.classes):
        every = len(full.classes) // n_classes
        return full.restrict(list(full.classes[::every])[:n_classes])
    generator = np.random.default_rng(0)
    inner = n_classes // 3  # each below a random earlier one: about log(inner) deep
    edges = [(f"n{generator.integers(v)}", f"n{v}") for v in range(1, inner)]
    edges += [(f"n{generator.integers(inner)}", f"c{c}") for c in range(n_classes)]
    return taxolens.Taxonomy.from_edges(edges, [f"c{c}" for c in range(n_classes)])


def seconds(act: Callable[[], object]) -> float:
    """Processor time of a call, in s."""
    started = time.process_time()
    act()
    return time.process_time() - started


def peak_gib() -> float:
    """Largest memory of the process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--latents", type=int, default=12_288)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--d_in", type=int, default=1536, help="of the SAE that encodes")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--evaluators", nargs="*", default=COUNT_BASED)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--store", nargs="?", const="draws", metavar="NAME")
    args = parser.parse_args()

    tree = tree_of(args.classes)
    n_classes = len(tree.classes)
    context = EvaluationContext(
        tree,
        args.images,
        1,
        args.latents,
        n_permutations=args.draws,
        class_counts=np.bincount(np.arange(args.images) % n_classes),
    )
    chosen = {name: (taxolens.EVALUATORS[name], None) for name in args.evaluators}
    sae = StandardSAE(StandardSAEConfig(d_in=args.d_in, d_sae=args.latents))
    with torch.no_grad():
        x = torch.randn(1024, args.d_in)
        sae.encode(x)
        encoding = seconds(lambda: sae.encode(x)) * args.images / len(x)
        size = args.images, args.latents, n_classes, args.l0, 1
        done = stream(context, chosen, synthetic_batches(*size))
    counting = peak_gib()
    drawing = seconds(lambda: context.permutations)

    rows: dict[str, dict[str, float]] = {}
    for name in args.evaluators:
        value = seconds(lambda name=name: done.compute(name))
        each = [
            seconds(lambda name=name, p=p: done.compute(name, permutation=p))
            for p in context.permutations
        ]
        rows[name] = {"value": value, "few": sum(each[:FEW]), "draws": sum(each)}
    rows["all"] = {column: sum(row[column] for row in rows.values()) for column in rows[name]}
    if done.errors:
        raise SystemExit(f"failed: {done.errors}")
    facts = {
        "machine": timing.machine(),
        "images": args.images,
        "latents": args.latents,
        "classes": n_classes,
        "draws": len(context.permutations),
        "encoding": encoding,
        "drawing": drawing,
        "peak GiB of the pass": counting,
        "peak GiB": peak_gib(),
        "evaluators": rows,
    }
    if args.store:
        timing.store(args.store, facts)
        tables.write_pages()
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    n = len(context.permutations)
    print(
        f"encoding {args.images} images: {encoding:.1f} s; making {n} permutations: {drawing:.2f} s"
    )
    print(
        f"{'':24s}{'value':>9s}{'a draw':>10s}{f'{FEW} draws':>10s}{f'{n} draws':>10s}  of encoding"
    )
    print(f"peak memory: {counting:.2f} GiB in the pass, {peak_gib():.2f} GiB in all")
    for name, row in rows.items():
        print(
            f"{name:24s}{row['value']:8.2f}s{row['draws'] / n * 1e3:8.1f}ms{row['few']:9.2f}s"
            f"{row['draws']:9.2f}s{row['draws'] / encoding:10.3f}"
        )


if __name__ == "__main__":
    main()
