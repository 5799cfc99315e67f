"""What it saves that the command line keeps freed memory: forward passes and SAE steps, in turns of processes.

    python benchmarks/freed_memory.py [--small] [--rounds 3] [--store]
    python benchmarks/freed_memory.py --write

By default glibc gives blocks of more than 32 MiB back to the kernel when they are freed. Each process does the
same work with or without `keep_freed_memory`, which is what the command line calls; its largest memory
(resident set) is compared too.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import sparse_step
import timing
import torch
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from taxolens.registry.architectures.parts.sparse_step import with_sparse_step
from taxolens.registry.machine import keep_freed_memory

WAYS = {"glibc's default": False, "as the command line sets it": True}
CALLS = 5  # the median of these counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a minute")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--work", help="what this process does; by default it starts others")
    parser.add_argument("--keep", action="store_true", help="keep freed memory meanwhile")
    args = parser.parse_args()
    if args.write:
        timing.show("freed_memory", shown(timing.stored("freed_memory")))
        return
    if args.work:
        print(json.dumps(measured(args.work, keep=args.keep)))
        return
    works = list(WORKS)[:1] if args.small else list(WORKS)
    found: dict[str, Any] = {
        "machine": timing.machine(),
        "rounds": [
            {f"{work}; {way}": in_a_process(work, keep=keep) for work in works for way, keep in WAYS.items()}
            for _ in range(1 if args.small else args.rounds)
        ],
    }  # fmt: skip
    print(shown(found))
    if args.store:
        timing.store("freed_memory", found)
        timing.show("freed_memory", shown(found))


def in_a_process(work: str, *, keep: bool) -> dict[str, float]:
    """The result of `measured` in a process of its own."""
    command = [sys.executable, __file__, "--work", work, *(["--keep"] if keep else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(work: str, *, keep: bool) -> dict[str, float]:
    """Seconds of a call, and the largest memory of the process in MB."""
    if keep:
        keep_freed_memory()
    call = WORKS[work]()
    seconds = []
    for _ in range(CALLS + 2):  # the first two take the memory
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"seconds": statistics.median(seconds[2:]), "megabytes": largest}


def forward(size: str) -> Callable[[], Any]:
    """The forward pass of 32 images."""
    model, pixels = timing.vit(size), torch.randn(32, 3, 224, 224)
    return lambda: _without_gradients(model, pixels)


@torch.no_grad()
def _without_gradients(model: torch.nn.Module, pixels: torch.Tensor) -> Any:
    return model(pixels)


def step(d_in: int, d_sae: int, batch: int) -> Callable[[], Any]:
    """A training step of `topk`, as in a run of taxolens."""
    settings = {"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": 32, "device": "cpu"}
    sae = with_sparse_step(TrainingSAE.from_dict(TrainingSAEConfig.from_dict(settings).to_dict()))
    trainer = sparse_step.trainer_of(sae, batch, "cpu", window=1000)
    tokens = torch.randn(batch, d_in)
    return lambda: trainer.step(tokens)


WORKS: dict[str, Callable[[], Callable[[], Any]]] = {
    "forward of ViT-Ti, 32 images": lambda: forward("Ti"),
    "forward of ViT-S, 32 images": lambda: forward("S"),
    "step of topk, d 768, m 12,288, batch 256": lambda: step(768, 12_288, 256),
    "step of topk, d 768, m 12,288, batch 4,096": lambda: step(768, 12_288, 4096),
}


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    rows = []
    works = dict.fromkeys(name.partition(";")[0] for name in found["rounds"][0])
    for work in works:
        of = {
            (way, key): [one[f"{work}; {way}"][key] for one in found["rounds"]]
            for way in WAYS
            for key in ("seconds", "megabytes")
        }
        default, ours = WAYS
        ratios = [a / b for a, b in zip(of[default, "seconds"], of[ours, "seconds"], strict=True)]
        rows.append(
            (
                work,
                *(f"{statistics.median(of[way, 'seconds']):.3g} s" for way in WAYS),
                f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})",
                " and ".join(f"{statistics.median(of[way, 'megabytes']):,.0f}" for way in WAYS),
            )
        )
    head = ("work", *WAYS, "faster by", "largest memory in MB, of both")
    return f"{timing.table(head, rows)}\n\nMedians over {len(found['rounds'])} round(s) (lowest and highest ratio); {timing.on_what(found)}."


if __name__ == "__main__":
    main()
