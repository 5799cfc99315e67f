"""Every architecture on the activations of a ViT for real photographs, without a known truth.

    python benchmarks/photographs.py --model FOLDER --dataset FOLDER [--cache FOLDER] [--results FILE]

The dataset has a training and a validation split, with WordNet synsets as class names. SAEs are
trained on training images, for the class token of the last block and for the patch tokens of one
middle block, and measured on validation images:

- R², L0 and dead latents over the tokens;
- how much of the ImageNet tree has a detector (`ontological_coverage`, internal nodes), and
  `absorption`, each with its value when the classes are permuted over the same tree;
- stability: the mean cosine of decoder rows, matched one to one, between the SAEs of two seeds,
  over latents that fire; as null two random dictionaries of as many rows.

`random` and `neurons` are the two sources of latents that a trained SAE must beat. Activations are
centred and scaled to a mean norm of √d. Each result is appended to the results file when it is
computed, and an SAE in the file is not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import taxolens
import torch
from architectures import NAMES, Budget, Schedule, train
from sae_lens import TopKSAE, TopKSAEConfig
from scipy.optimize import linear_sum_assignment
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.evaluation.bench import Bench, HeldOutActivations, SAELatents
from taxolens.plugin.evaluation.evaluate import choose_evaluators
from taxolens.plugin.evaluation.settings import EvaluationSettings
from taxolens.plugin.evaluation.split import Split
from taxolens.registry.evaluators.parts.null_latents import NeuronLatents, TwinLatents
from torch import Tensor

NULL_SOURCES = ("random", "neurons")
LR = 1e-3
METRICS = {
    "coverage": ("ontological_coverage", "internal_f1"),
    "absorption": ("absorption", "fraction_absorption"),
}
COLUMNS = ("r2", "l0", "dead", "coverage", "coverage_null", "absorption", "absorption_null",
           "absorption_nodes", "stability", "stability_null", "cpu_seconds")  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """Activations at one hook point, centred and scaled.

    Args:
        train: (n, d), in random order.
        held_out: of the validation images, (n, k, d).
    """

    train: Tensor
    held_out: HeldOutActivations

    @classmethod
    def read(
        cls, train: ActivationCache, validation: ActivationCache, hook_name: str, n_classes: int
    ) -> Tokens:
        x = train.tensor(hook_name).flatten(0, 1).float()
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        mean = x.mean(dim=0)
        scale = x.shape[1] ** 0.5 / (x - mean).norm(dim=1).mean()
        held_out = (validation.tensor(hook_name).float() - mean) * scale
        split = Split.halves(np.asarray(validation.labels), n_classes)
        return cls((x - mean) * scale, HeldOutActivations(held_out.numpy(), split))

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        """Endless passes over the training tokens, each in another order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator)
            for rows in order[: len(order) // size * size].split(size):
                yield self.train[rows]

    def sample(self, n: int) -> Tensor:
        """(n or fewer, d) validation tokens, spread evenly."""
        x = torch.from_numpy(self.held_out.tokens).flatten(0, 1)
        return x[:: -(-len(x) // n)]


def activations(args: argparse.Namespace, n_classes: int) -> dict[str, Tokens]:
    """kind of token -> activations, from the cache or from the photographs."""
    model = load_vision_model(args.model)
    wanted = {
        "class": (args.class_hook, args.class_images),
        "patch": (args.patch_hook, args.patch_images),
    }
    found = {}
    for kind in args.tokens:
        hook_name, counts = wanted[kind]
        caches = [
            ActivationCache.build(
                model,
                load_images(args.dataset, split=split, max_images=count or None),
                [hook_name],
                path=args.cache / f"{kind}-{split}",
                tokens=kind,
            )
            for split, count in zip(("train", "validation"), counts)
        ]
        found[kind] = Tokens.read(*caches, hook_name, n_classes)
    return found


def measure(source: Any, bench: Bench, tokens: Tokens) -> dict[str, float]:
    """Coverage and absorption, with their means under permuted classes."""
    numbers: dict[str, float] = {}
    metrics = bench.metrics(bench.run(source, tokens.held_out))
    for name, (evaluator, metric) in METRICS.items():
        result = metrics[evaluator][metric]
        numbers[name] = result.value
        numbers[f"{name}_null"] = result.nulls["permuted_classes"].mean
    numbers["absorption_nodes"] = metrics["absorption"]["nodes"].value
    return numbers


@torch.no_grad()
def describe(sae: Any, x: Tensor) -> tuple[dict[str, float], Tensor]:
    """R², L0 and dead latents over tokens x (n, d), and which latents fire (m,)."""
    z = sae.encode(x)
    z = z.to_dense() if z.is_sparse else z
    error = (sae.decode(z) - x).square().sum()
    fires = (z != 0).any(dim=0)
    numbers = {
        "r2": float(1 - error / (x - x.mean(dim=0)).square().sum()),
        "l0": float((z != 0).sum(dim=1).float().mean()),
        "dead": float((~fires).float().mean()),
    }
    return numbers, fires


def matched_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the rows of a and b, matched one to one so that it is largest."""
    cosine = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    return float(cosine.numpy()[linear_sum_assignment(cosine.numpy(), maximize=True)].mean())


def stability(first: Tensor, second: Tensor) -> dict[str, float]:
    """`matched_cosine` of two decoders (m, d), and of two random ones of that shape."""
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(part.shape, generator=generator) for part in (first, second)]
    return {"stability": matched_cosine(first, second), "stability_null": matched_cosine(*random)}


def run(name: str, seed: int, tokens: Tokens, bench: Bench, args: Any, decoder: Path) -> Any:
    """The numbers of one SAE; its decoder rows that fire are kept in `decoder`."""
    d = tokens.train.shape[1]
    sample = tokens.sample(20_000)
    seconds = 0.0
    if name == "neurons":
        source: Any = NeuronLatents.fit(tokens.train)
        numbers: dict[str, float] = {}
    elif name == "random":
        untrained = TopKSAE(TopKSAEConfig(d_in=d, d_sae=args.d_sae, k=round(args.l0)))
        source = TwinLatents.fit(SAELatents(untrained), tokens.train[:4096], seed=seed)
        numbers = {"l0": float((source.encode(sample) != 0).sum(dim=1).float().mean())}
    else:
        eighth = args.d_sae // 8
        levels = (eighth // 2, eighth + eighth // 2, args.d_sae - 2 * eighth)
        budget = Budget(d, args.d_sae, args.l0, d, levels)
        schedule = Schedule(args.steps, args.batch, args.lr)
        sae, seconds = train(name, budget, schedule, tokens.batches(args.batch, seed), seed)
        numbers, fires = describe(sae, sample)
        np.save(decoder, sae.W_dec.detach()[fires].numpy())
        source = SAELatents(sae)
    if seed == 0:  # another seed is there for stability
        numbers |= measure(source, bench, tokens)
    return numbers | {"cpu_seconds": seconds}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One table for each kind of token and learning rate: means over the seeds."""
    frame = pd.DataFrame(rows).reindex(columns=["tokens", "lr", "architecture", "seed", *COLUMNS])
    order = {name: at for at, name in enumerate([*NAMES, *NULL_SOURCES])}
    parts = []
    for (kind, lr), group in frame.groupby(["tokens", "lr"]):
        parts.append(f"\n{kind} tokens, lr {lr:g}")
        parts.append("| architecture | seeds | " + " | ".join(COLUMNS) + " |")
        parts.append("| --- " * (len(COLUMNS) + 2) + "|")
        for name, runs in sorted(group.groupby("architecture"), key=lambda item: order[item[0]]):
            cells = []
            for column in COLUMNS:
                digits = {"l0": 1, "cpu_seconds": 0, "absorption_nodes": 0}.get(column, 3)
                value = runs[column].mean()
                cells.append("–" if np.isnan(value) else f"{value:.{digits}f}")
            parts.append(f"| `{name}` | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--cache", type=Path, default=Path("photographs-cache"))
    parser.add_argument("--results", type=Path, default=Path("photographs.jsonl"))
    parser.add_argument("--taxonomy", default="imagenet")
    parser.add_argument("--tokens", nargs="*", default=["class", "patch"])
    parser.add_argument("--class-hook", default="blocks.11.hook_resid_post")
    parser.add_argument("--patch-hook", default="blocks.6.hook_resid_post")
    counts = {"type": int, "nargs": 2, "metavar": ("TRAIN", "VALIDATION"), "help": "0: all images"}
    parser.add_argument("--class-images", default=(0, 0), **counts)
    parser.add_argument("--patch-images", default=(1500, 2020), **counts)
    parser.add_argument("--architectures", nargs="*", default=[*NAMES, *NULL_SOURCES])
    parser.add_argument("--seeds", type=int, default=2, help="all but the first for stability")
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--l0", type=float, default=16)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--permutations", type=int, default=3)
    parser.add_argument("--probed-nodes", type=int, default=64)
    parser.add_argument("--only-cache", action="store_true", help="stop before training")
    parser.add_argument("--only-print", action="store_true", help="the tables of what is there")
    args = parser.parse_args()

    rows = []
    if args.results.exists():
        rows = [{"lr": LR} | json.loads(line) for line in args.results.read_text().splitlines()]
    if args.only_print:
        print(table(rows))
        return
    done = {(row["tokens"], row["architecture"], row["seed"], row["lr"]) for row in rows}
    classes = load_images(args.dataset, split="validation").class_names
    found = activations(args, len(classes))
    if args.only_cache:
        return
    tree = taxolens.load_taxonomy(args.taxonomy, classes=classes)
    chosen = choose_evaluators(
        [evaluator for evaluator, _ in METRICS.values()],
        {"absorption": {"max_nodes": args.probed_nodes}},
    )
    settings = EvaluationSettings(nulls=("permuted_classes",), n_permutations=args.permutations)
    bench = Bench(tree, chosen, settings, images_at_once=64)
    decoders = args.results.with_suffix(".decoders")
    decoders.mkdir(exist_ok=True)
    for kind, seed, name in itertools.product(found, range(args.seeds), args.architectures):
        if (kind, name, seed, args.lr) in done or (name in NULL_SOURCES and seed):
            continue
        stem = f"{kind}-{name}-lr{args.lr:g}"
        file, before = (decoders / f"{stem}-{n}.npy" for n in (seed, seed - 1))
        row = {"tokens": kind, "architecture": name, "seed": seed, "lr": args.lr}
        row |= run(name, seed, found[kind], bench, args, file)
        if file.exists() and before.exists():
            both = [torch.from_numpy(np.load(path)) for path in (before, file)]
            row |= stability(*both)
        rows.append(row)
        with args.results.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
