"""How long a command goes on after SIGTERM: in training steps and forward passes of several seconds.

    python benchmarks/signals.py [--kills 6] [--store]
    python benchmarks/signals.py --write

"training step": an SAE of 16,384 latents on activations of width 768, 1,024 of them a step. "batch of
images": 8 images of 224 pixels through a ViT of the size of `--model` (B), while the activations of the
training are gathered, or a cache of them is written. Each job runs on one thread; it is
started `--kills` times and ended at moments spread evenly over its second half. `seconds` is what one
step or forward pass takes: it is measured in this process, once the others have ended.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kills
import timing
import torch

PAGE = timing.ROOT / "docs" / "training.md"
BATCH = 1024  # tokens of a training step
D_SAE = 16_384
IMAGES = 8  # of a forward pass


def jobs(folder: Path) -> dict[str, list[str]]:
    """What takes long -> the arguments of a command that does it for minutes."""
    common = {
        "model_name": folder / "model", "dataset_path": folder / "images", "log_to_wandb": "false",
        "architecture": "standard", "lr_warm_up_steps": 0, "normalize_activations": "none",
        "store_batch_size_prompts": IMAGES, "checkpoint_path": "checkpoints", "checkpoint_id": "run",
        "resume_from_checkpoint": "auto", "output_path": "output",
    }  # fmt: skip
    step = {
        "hook_names": "blocks.0.hook_resid_post", "tokens": "patch", "d_sae": D_SAE,
        "train_batch_size_tokens": BATCH, "training_tokens": BATCH * 1000, "n_batches_in_buffer": 1,
    }  # fmt: skip
    gather = {
        "hook_names": "blocks.11.hook_resid_post", "tokens": "class", "d_sae": 64,
        "train_batch_size_tokens": 64, "training_tokens": 64 * 1000, "n_batches_in_buffer": 16,
    }  # fmt: skip
    cache = {"use_cached_activations": "true", "cached_activations_path": "cache"}
    made = {
        "training step": step,
        "batch of images, gathered in training": gather,
        "batch of images, into a cache": {**gather, **cache},
    }
    return {
        name: ["train", *timing.flags({**common, **own}), "--no_evaluate"]
        for name, own in made.items()
    }


def seconds_of_a_step() -> float:
    """Median CPU seconds of a training step of the SAE, on one thread."""
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=768, d_sae=D_SAE))
    optimizer = torch.optim.Adam(sae.parameters())
    inputs = TrainStepInput(torch.randn(BATCH, 768), {"l1": 1.0}, None, 0, False)

    def step() -> None:
        optimizer.zero_grad()
        sae.training_forward_pass(inputs).loss.backward()
        optimizer.step()

    return median_seconds(step)


def seconds_of_a_pass(model: Path) -> float:
    """The same of a forward pass of the model."""
    from transformers import Dinov2Model

    vit, images = Dinov2Model.from_pretrained(model).eval(), torch.randn(IMAGES, 3, 224, 224)
    with torch.inference_mode():
        return median_seconds(lambda: vit(images))


def median_seconds(work: Any) -> float:
    """CPU seconds of `work`, the median of three after a first one."""
    found = timing.alternate({"work": work}, 4, time.process_time)["work"]
    return statistics.median(found[1:])


def ended_in(args: list[str], place: Path, after: float) -> float:
    """Seconds from SIGTERM, sent `after` seconds, until the end of a command.

    Raises:
        SystemExit: it had ended before, or ends otherwise than by the signal.
    """
    log = place / "log.txt"
    pid = kills.start(args, place, log, place)
    code = kills.wait(pid, after)
    began = time.monotonic()
    if code is None:
        os.kill(pid, signal.SIGTERM)
        code = kills.wait(pid, kills.HANG)
    seconds = time.monotonic() - began
    said = kills.last_line(log.read_text(errors="replace"))
    if code != 1 or "SIGTERM" not in said:
        raise SystemExit(f"exit code {code}: {said}")
    return seconds


def measure(n: int, after: float, model: str) -> dict[str, Any]:
    """What `--store` stores."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    kills.warm_up()
    found: dict[str, list[float]] = {}
    folder = Path(tempfile.mkdtemp())  # every fork that ends would remove a TemporaryDirectory
    try:
        if os.fork() == 0:  # apart, since it starts threads, which later forks would lose
            timing.save_vit(model, folder / "model")
            timing.draw(64, folder / "images")
            os._exit(0)
        os.wait()
        for name, args in jobs(folder).items():
            found[name] = []
            for i in range(n):
                place = folder / f"{len(found)}-{i}"
                place.mkdir()
                seconds = ended_in(args, place, after * (1 + i / n))
                found[name].append(timing.rounded(seconds))
                print(f"{name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        one = dict.fromkeys(found, timing.rounded(seconds_of_a_pass(folder / "model")))
        one["training step"] = timing.rounded(seconds_of_a_step())
    finally:
        shutil.rmtree(folder)
    return {"machine": timing.machine(), "seconds": one, "ended_in": found}


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    rows = [
        (
            name,
            f"{found['seconds'][name]:.1f}",
            f"{statistics.median(ended):.1f}",
            f"{max(ended):.1f}",
        )
        for name, ended in found["ended_in"].items()
    ]
    head = ("SIGTERM in a", "seconds of one", "ended in, median", "longest")
    n = len(next(iter(found["ended_in"].values())))
    return f"{timing.table(head, rows)}\n\n{n} kills each; {timing.on_what(found)}."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--after", type=float, default=20.0, help="seconds before the first moment")
    parser.add_argument("--model", default="B", choices=timing.MODELS)
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(argv)
    found = timing.stored("signals") if args.write else measure(args.kills, args.after, args.model)
    print(shown(found))
    if args.store:
        timing.store("signals", found)
    if args.store or args.write:
        timing.show("signals", shown(found), PAGE)


if __name__ == "__main__":
    main()
