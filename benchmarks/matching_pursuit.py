"""Speed of `mp` relative to SAELens's matching pursuit: encoding, and a complete training step.

    python benchmarks/matching_pursuit.py [--part encoding] [--device cuda] [--scale 1] [--rounds 3]
                                          [--compiled]

Both do the same work, 32 steps for every input, from the same dictionary on the same inputs, in
turns in one process: SAELens's runs with `stop_on_duplicate_support=False` and
`residual_threshold=0`, as by default it ends an input at the first atom it picks twice. The output
is the median over rounds of the time of SAELens's over ours in the same round, the lowest and the
highest, and the share of (input, step) pairs where both routes chose the same atom.

Bars: encoding at d=768, m=8192, n=1024, 32 steps: 4x. A training step (forward, backward, Adam) at
d=768, m=3072, n=4096, 32 steps: 2.5x. Encoding is measured as in use, with frozen weights and the
Gram matrix kept from an earlier batch, and also with the matrix rebuilt at each call.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import taxolens  # noqa: F401
import torch
from sae_lens import MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from taxolens.registry.architectures.mp import MPTrainingSAE, MPTrainingSAEConfig
from taxolens.registry.architectures.parts.pursuit import GramCache, pursuit_path
from torch import Tensor

STEPS, D_IN = 32, 768
BARS = {"encode, frozen weights": 4.0, "training step": 2.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks atoms and inputs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=["encoding", "training"], help="by default both")
    parser.add_argument("--compiled", action="store_true", help="also fused by inductor (CPU)")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="CPU seconds of one thread, where others compute too",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    if args.cpu_time:
        torch.set_num_threads(1)
    machine = {
        "clock": "CPU time" if args.cpu_time else "wall time",
        "device": torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "scale": args.scale,
    }
    if not args.json:
        print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    rows: dict[str, dict[str, float]] = {}
    for part in (encoding, training):
        if args.part in (None, part.__name__):
            for name, row in part(args):
                rows[name] = row
                if not args.json:
                    print_row(name, row)
    if args.json:
        print(json.dumps({"machine": machine, "ratios": rows}, indent=2))


def print_row(name: str, row: dict[str, float]) -> None:
    bar = f"  bar {BARS[name]:.1f}" if name in BARS else ""
    print(
        f"{name:<28} {row['median']:6.2f}x  ({row['lowest']:.2f} to {row['highest']:.2f})"
        f"  SAELens {row['theirs_s']:.3f} s, ours {row['ours_s']:.3f} s"
        f"  same atoms {row['same_atoms']:.5f}{bar}",
        flush=True,
    )


def encoding(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """SAELens's `encode` and ours on frozen weights."""
    m, n = int(8192 * args.scale), int(1024 * args.scale)
    theirs, ours = pair(m, args.device)
    theirs, ours = theirs.eval(), ours.eval()
    x = torch.randn(n, D_IN, device=args.device)
    atoms, cache = ours.dictionary().detach(), GramCache()

    def pursue(**how: object) -> Callable[[], object]:
        return lambda: pursuit_path(x, atoms, STEPS, **how).dense(m)  # type: ignore[arg-type]

    ways = {"encode, frozen weights": lambda: ours.encode(x), "encode, Gram rebuilt": pursue()}
    if args.compiled:
        ways["encode, fused"] = pursue(cache=cache, compiled=True)
    same = {"same_atoms": agreement(x, atoms)}
    for name, way in ways.items():
        with torch.no_grad():
            row = ratio(lambda: theirs.encode(x), way, args) | same
        yield name, row


def training(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """A complete step of each: forward, backward, clipping, Adam."""
    m, n = int(3072 * args.scale), int(4096 * args.scale)
    x = torch.randn(n, D_IN, device=args.device)
    theirs, ours = pair(m, args.device)
    same = {"same_atoms": agreement(x, ours.dictionary().detach())}
    yield "training step", ratio(train_step(theirs, x), train_step(ours, x), args) | same
    if args.compiled:
        ours.cfg.compile_encoder = True
        yield "training step, fused", ratio(train_step(theirs, x), train_step(ours, x), args) | same


def pair(m: int, device: str) -> tuple[MatchingPursuitTrainingSAE, MPTrainingSAE]:
    """SAELens's SAE and ours, with the same dictionary."""
    torch.manual_seed(0)
    common = {"d_in": D_IN, "d_sae": m, "device": device, "decoder_init_norm": 1.0}
    theirs = MatchingPursuitTrainingSAE(
        MatchingPursuitTrainingSAEConfig(
            **common, max_iterations=STEPS, residual_threshold=0.0, stop_on_duplicate_support=False
        )
    )
    ours = MPTrainingSAE(MPTrainingSAEConfig(**common, k=STEPS))
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return theirs, ours


def train_step(sae: TrainingSAE, x: Tensor) -> Callable[[], object]:
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-6)

    def step() -> None:
        sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False)).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


@torch.no_grad()
def agreement(x: Tensor, atoms: Tensor) -> float:
    """Share of (input, step) pairs for which both routes choose the same atom."""
    routes = (pursuit_path(x, atoms, STEPS, method=m) for m in ("textbook", "gram"))
    one, two = (route.indices for route in routes)
    return float((one == two).float().mean())


def ratio(theirs: Callable[[], object], ours: Callable[[], object], args) -> dict[str, float]:
    """Times both in turns; the first round is a warm-up."""
    times: list[tuple[float, float]] = []
    for round_number in range(-1, args.rounds):
        pair = seconds(theirs, args), seconds(ours, args)
        if round_number >= 0:
            times.append(pair)
    ratios = [slow / fast for slow, fast in times]
    return {
        "median": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "theirs_s": statistics.median(slow for slow, _ in times),
        "ours_s": statistics.median(fast for _, fast in times),
    }


def seconds(run: Callable[[], object], args: argparse.Namespace) -> float:
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
