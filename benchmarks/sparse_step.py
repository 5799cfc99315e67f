"""Speed of a training step with the sparse step, relative to SAELens's dense one.

    python benchmarks/sparse_step.py [--device cuda] [--rounds 5] [--cpu_time] [--write]

SAELens's `SAETrainer.step` (forward, backward, clipping, Adam) trains the same SAE on the same inputs with
both, in turns in one process; Adam of the sparse one is fused, as in a run of taxolens. The output is the
median over rounds of the time of the dense step over the sparse one in the same round, the lowest and the
highest, and the largest difference of the first step's gradients, relative to the largest gradient. `--write` stores them in docs/results/sparse_step.json
and writes the table in docs/architectures.md. Every latent counts as dead in the rows that name it: the
auxiliary loss then costs most.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import taxolens  # noqa: F401
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from taxolens.plugin.training.step_choice import fuse_optimizer
from taxolens.registry.architectures.parts.sparse_step import with_sparse_step

ROOT = Path(__file__).parent.parent
STORED = ROOT / "docs" / "results" / "sparse_step.json"
DOCS = ROOT / "docs" / "architectures.md"
MARKS = ("<!-- sparse step -->", "<!-- /sparse step -->")
SIZES = {  # d_in, d_sae, k, batch
    "laptop": (192, 1536, 16, 512),
    "ViT-B": (768, 6144, 32, 2048),
    "ViT-B, wide": (768, 24576, 32, 2048),
}
EVERY_DEAD = ", every latent dead"
ARCHITECTURES = {
    "topk": {},
    f"topk{EVERY_DEAD}": {},
    "batchtopk": {},
    "matryoshka_batchtopk": {"matryoshka_widths": "sixteenths"},
    "random_matryoshka": {},
    "nested_topk": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="CPU seconds of one thread, where others compute too",
    )
    parser.add_argument("--write", action="store_true", help="store the results, write the table")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    found = {
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine(),
        "clock": "CPU seconds of one thread"
        if args.cpu_time
        else f"wall time of {torch.get_num_threads()} threads",
        "rounds": args.rounds,
        "torch": torch.__version__,
        "rows": [],
    }
    for size in args.sizes:
        for architecture in args.architectures:
            row = measured(architecture, *SIZES[size], args)
            found["rows"].append({"architecture": architecture, "size": size, **row})
            print(json.dumps(found["rows"][-1]), flush=True)
    if args.write:
        STORED.write_text(json.dumps(found, indent=1) + "\n")
        before, rest = DOCS.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        DOCS.write_text(f"{before}{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}{after}")


def measured(
    architecture: str, d_in: int, d_sae: int, k: int, batch: int, args: argparse.Namespace
) -> dict[str, object]:
    """Seconds of a step of both, and how they differ."""
    name, _, dead = architecture.partition(EVERY_DEAD[:1])
    settings = {"architecture": name, "d_in": d_in, "d_sae": d_sae, "k": k}
    settings |= {"device": args.device, **ARCHITECTURES[architecture]}
    if "matryoshka_widths" in settings:
        settings["matryoshka_widths"] = [d_sae // 32, d_sae // 8, d_sae // 2, d_sae]
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(0)).to(args.device)
    trainers, gradients = [], []
    for sparse in (False, True):
        torch.manual_seed(0)
        sae = TrainingSAE.from_dict(TrainingSAEConfig.from_dict(settings).to_dict())
        sae = with_sparse_step(sae, sparse).to(args.device)
        gradients.append(first_gradients(sae, x))
        trainers.append(trainer_of(sae, batch, args.device, -1 if dead else 10**6))
    seconds: list[tuple[float, float]] = []
    for _ in range(args.rounds + 1):
        seconds.append((timed(trainers[0], x, args), timed(trainers[1], x, args)))
    seconds = seconds[1:]  # the first is a warm-up
    ratios = sorted(dense / sparse for dense, sparse in seconds)
    return {
        **{"d_in": d_in, "d_sae": d_sae, "k": k, "batch": batch},
        "dense": statistics.median(dense for dense, _ in seconds),
        "sparse": statistics.median(sparse for _, sparse in seconds),
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "difference": max(
            float((gradients[1][name] - wanted).abs().max() / wanted.abs().max())
            for name, wanted in gradients[0].items()
        ),
    }


def first_gradients(sae: TrainingSAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of one step."""
    step = TrainStepInput(x, {}, None, 0, False)
    sae.training_forward_pass(step).loss.backward()
    found = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    return found


def trainer_of(
    sae: TrainingSAE, batch: int, device: str, window: int, autocast: bool = False
) -> SAETrainer:
    """SAELens's trainer, with its defaults; a latent is dead after more steps than `window`.

    Adam of an SAE with the sparse step is fused, as in a run of taxolens.
    """
    cfg = SAETrainerConfig(
        10**9, batch, lr=1e-4, lr_end=1e-5, dead_feature_window=window, device=device,
        autocast=autocast,
    )  # fmt: skip
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))
    if getattr(sae, "sparse_step", False):
        fuse_optimizer(trainer.optimizer)
    return trainer


def timed(trainer: SAETrainer, x: torch.Tensor, args: argparse.Namespace) -> float:
    """Seconds of one step."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    trainer.step(x)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def table(found: dict) -> str:
    """The results in Markdown."""
    lines = [
        f"{found['device']}, {found['clock']}, float32, torch {found['torch']}, median of "
        f"{found['rounds']} rounds (lowest and highest ratio):",
        "",
        "| | d_in × d_sae, k, batch | SAELens | sparse step | ratio | gradients differ by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {quoted(row['architecture'])} | {row['d_in']:,} × {row['d_sae']:,}, {row['k']}, {row['batch']:,} | "
            f"{row['dense']:.3f} s | {row['sparse']:.3f} s | {row['ratio']:.1f}× ({row['lowest']:.1f} to "
            f"{row['highest']:.1f}) | {row['difference']:.0e} |"
        )
    return "\n".join(lines)


def quoted(architecture: str) -> str:
    name, comma, rest = architecture.partition(",")
    return f"`{name}`{comma}{rest}"


if __name__ == "__main__":
    main()
