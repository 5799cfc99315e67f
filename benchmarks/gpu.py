"""The table of `gpu.sh`: SAE steps, evaluators, pursuit, forward, extraction and evaluation on one GPU.

    python benchmarks/gpu.py [--small] [--store] [--parts NAME ...]
    python benchmarks/gpu.py --write

Parts run one after the other, the most important first; each row is stored as it comes. With `--parts` the rows
of the others stay, where they are of the same machine. Of a part that fails the error is printed, the others go
on, and the exit status is 1. The share of the peak counts 10 d m FLOPs a token (encoding and decoding, and three
products backwards) over the card's dense bf16 peak (`PEAKS`, from NVIDIA's data sheets). Without a GPU, or with `--small`, sizes are small and the numbers are
no result.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import forward as forward_script
import matching_pursuit
import numpy as np
import sparse_step
import timing
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from taxolens import evaluate_run, load_taxonomy
from taxolens.hooks.activations.cache import ActivationCache
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.evaluation.bench import Bench, HeldOutActivations, SAELatents
from taxolens.plugin.evaluation.evaluate import choose_evaluators
from taxolens.plugin.evaluation.measure_sae import share_card_facts
from taxolens.plugin.evaluation.settings import EvaluationSettings
from taxolens.plugin.evaluation.split import Split
from taxolens.plugin.study.job import Job
from taxolens.plugin.study.settings import gather
from taxolens.registry.architectures.parts.sparse_step import with_sparse_step

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, SXM
STEPS = (  # architecture, d, m
    ("topk", 1536, 12_288),
    ("topk", 1536, 24_576),
    ("topk", 768, 12_288),
    ("batchtopk", 1536, 24_576),
    ("matryoshka_batchtopk", 1536, 24_576),
)
# name, sparse step, autocast
STEP_WAYS = (
    ("SAELens's step", False, True),
    ("ours", True, True),
    ("ours in float32", True, False),
)
Row = tuple[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--store", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    args = parser.parse_args()
    if args.write:
        timing.show("gpu", shown(timing.stored("gpu")))
        return
    logging.disable(logging.WARNING)
    small = args.small or not torch.cuda.is_available()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"machine": timing.machine(), "small": small, "rows": []}
    if args.store and set(args.parts) != set(PARTS):
        before = timing.stored("gpu")
        found["rows"] = before["rows"] if before["machine"] == found["machine"] else []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [name for name in PARTS if name in args.parts]:
            start = time.perf_counter()
            try:
                for row in PARTS[name](device, small, Path(folder)):
                    found["rows"] = with_row(found["rows"], row)
                    print(f"{row[0]:<78} {row[1]}", flush=True)
                    if args.store:
                        timing.store("gpu", found)
                        timing.show("gpu", shown(found))
            except Exception:
                failed.append(name)
                traceback.print_exc()
            print(f"    {name}: {time.perf_counter() - start:.0f} s", flush=True)
            if device == "cuda":
                torch.cuda.empty_cache()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def with_row(rows: list[Row], row: Row) -> list[Row]:
    """The rows with one in place of that of the same name, or at the end."""
    return list({**dict(rows), row[0]: row[1]}.items())


def sae_steps(device: str, small: bool, folder: Path) -> Iterator[Row]:
    """Tokens a second of SAELens's trainer with its step and Adam, and with ours, in bf16 autocast and in float32."""
    peak = next((p for card, p in PEAKS.items() if card in str(timing.machine()["gpu"])), None)
    for architecture, d_in, d_sae in STEPS:
        d_in, d_sae, batch = (d_in // 24, d_sae // 24, 128) if small else (d_in, d_sae, 4096)
        settings = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "k": 32}
        if architecture.startswith("matryoshka"):
            settings["matryoshka_widths"] = [d_sae // 32, d_sae // 8, d_sae // 2, d_sae]
        tokens = torch.randn(batch, d_in, device=device)
        for name, is_sparse, autocast in STEP_WAYS:
            cfg = TrainingSAEConfig.from_dict({**settings, "device": device})
            sae = with_sparse_step(TrainingSAE.from_dict(cfg.to_dict()), is_sparse).to(device)
            trainer = sparse_step.trainer_of(sae, batch, device, window=1000, autocast=autocast)
            rate = batch / per_call(lambda t=trainer, x=tokens: t.step(x), device, small)
            of_peak = f", {10 * d_in * d_sae * rate / peak:.1%} of the bf16 peak" if peak else ""
            yield f"{architecture}, d {d_in:,}, m {d_sae:,}, batch {batch:,}: {name}", f"{rate:,.0f} tokens/s{of_peak}"  # fmt: skip
            del trainer, sae


def evaluators(device: str, small: bool, folder: Path) -> Iterator[Row]:
    """Seconds of the default evaluators, on few images with every null and interval too."""
    bench, latents = bench_of(device, small)
    few, many = (64, 128) if small else (3200, 50_000)
    bench.run(latents, held_out(bench, latents, few))  # the first use of the GPU is not counted
    for n_images in (few, many):
        yield from evaluator_rows(bench, latents, n_images, nulls=n_images == few)
        held = held_out(bench, latents, n_images)
        batches = torch.from_numpy(held.tokens[:, 0]).to(device).split(bench.batch_size)
        with torch.no_grad():
            encoding = per_call(
                lambda of=batches: [latents.encode(batch) for batch in of], device, small
            )
        yield f"encoding of the same {n_images:,} images", f"{encoding:.3g} s"


def evaluators_and_nulls(device: str, small: bool, folder: Path) -> Iterator[Row]:
    """The default evaluators with every null and interval, on many images."""
    *_, row = evaluator_rows(*bench_of(device, small), 128 if small else 50_000, nulls=True)
    yield row


def bench_of(device: str, small: bool) -> tuple[Bench, SAELatents]:
    """The default evaluators on ImageNet's tree, and the latents of an SAE with random weights."""
    d_in, d_sae = (32, 512) if small else (768, 12_288)
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=32)).eval()
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.normal_()
    settings = EvaluationSettings(device=device)
    bench = Bench(load_taxonomy("imagenet"), choose_evaluators(None, None), settings)
    return bench, SAELatents(sae.to(device))


def held_out(bench: Bench, latents: SAELatents, n_images: int) -> HeldOutActivations:
    """Activations that are a mean of each class and noise."""
    generator = np.random.default_rng(0)
    n_classes, width = len(bench.taxonomy.classes), latents.sae.cfg.d_in
    labels = np.arange(n_images) % n_classes
    of_class = generator.standard_normal((n_classes, 1, width), dtype=np.float32)
    noise = generator.standard_normal((n_images, 1, width), dtype=np.float32)
    return HeldOutActivations(of_class[labels] + noise, Split.halves(labels, n_classes, 1))


def evaluator_rows(
    bench: Bench, latents: SAELatents, n_images: int, *, nulls: bool
) -> Iterator[Row]:
    """Seconds of one pass and its values, and, with `nulls`, of all that is measured of an SAE."""
    held = held_out(bench, latents, n_images)
    what = f"default evaluators of an SAE, m {latents.d_sae:,}, {n_images:,} images"
    for which in ("", ", of the next SAE"):
        start = time.perf_counter()
        done = bench.run(latents, held, prepare=share_card_facts)
        for name in bench.chosen:
            done.compute(name)
        yield f"{what}: one pass and values{which}", f"{time.perf_counter() - start:.2f} s"
        if done.errors:
            raise RuntimeError(f"evaluators that failed: {done.errors}")
        done.release()
    if not nulls:
        return
    start = time.perf_counter()
    draws = {
        null: sources
        if isinstance(sources, str)
        else [bench.numbers(source, held, bench.chosen_for(null)) for source in sources]
        for null, sources in bench.null_sources(latents, held).items()
    }
    latents = bench.encode_once(latents, held)
    left_out = [bench.left_out(latents, held, i) for i in range(bench.settings.n_groups)]
    done = bench.run(latents, held, prepare=share_card_facts)
    bench.metrics(done, draws, {}, left_out)
    yield f"{what}: with all nulls and intervals", f"{time.perf_counter() - start:.2f} s"


def pursuit(device: str, small: bool, folder: Path) -> Iterator[Row]:
    """Speed of `mp` over SAELens's matching pursuit (`matching_pursuit.py`)."""
    args = argparse.Namespace(
        device=device, scale=0.02 if small else 1.0, rounds=1 if small else 3, compiled=False,
        cpu_time=False,
    )  # fmt: skip
    for name, row in chain(matching_pursuit.encoding(args), matching_pursuit.training(args)):
        yield f"mp over SAELens's matching_pursuit: {name}", f"{row['median']:.1f}×"


def forward(device: str, small: bool, folder: Path) -> Iterator[Row]:
    """Time of hook points over a plain forward (`forward.py`)."""
    for dtype in ("float32", "bfloat16"):
        rows, _ = forward_script.measured(device, dtype, 2 if small else 64, 1 if small else 9)
        for name, row in rows.items():
            yield f"forward of ViT-S, {dtype}: {name}, over Hugging Face's", f"{row['median']:.3f}×"


def extraction(device: str, small: bool, folder: Path) -> Iterator[Row]:
    """Images a second from JPEGs to a cache of all blocks' class tokens, in bf16 autocast."""
    images = load_images(pictures(small, folder))
    for size, n_first in (("tiny", 24),) if small else (("B", 1024), ("g", 64)):
        first = load_images(pictures(small, folder), max_images=n_first)
        path = str(timing.save_vit(size, folder / f"model-{size}"))
        model = load_vision_model(path, device=device)
        hooks = [f"blocks.{i}.hook_resid_post" for i in range(timing.MODELS[size][1])]
        for counted in (first, images):  # the first starts the workers' server and the GPU
            start = time.perf_counter()
            ActivationCache.build(
                model, counted, hooks, batch_size=64, autocast=True, progress=False
            )
            took = time.perf_counter() - start
        yield f"{len(images):,} JPEGs to the class tokens of all blocks, ViT-{size}", f"{len(images) / took:,.0f} images/s"  # fmt: skip


def evaluation(device: str, small: bool, folder: Path) -> Iterator[Row]:
    """Default evaluators, by SAE, beside the encoding of the same images."""
    size = "tiny" if small else "S"
    width, blocks, *_ = timing.MODELS[size]
    tree = folder / "tree.csv"
    edges = [f"half_{i % 2},class_{i}" for i in range(timing.CLASSES)]
    tree.write_text("\n".join(["parent,child", "root,half_0", "root,half_1", *edges]))
    flags = {
        "model_name": str(timing.save_vit(size, folder / "model")),
        "dataset_path": str(pictures(small, folder)), "holdout": 0.5, "taxonomy": str(tree),
        "hook_names": [f"blocks.{i}.hook_resid_post" for i in range(blocks)[-2:]],
        "architecture": "topk", "k": 32, "d_sae": 128 if small else 12_288, "epochs": 1.0,
        "train_batch_size_tokens": 8, "output_path": f"{folder}/run", "log_to_wandb": False,
        "n_checkpoints": 0, "device": device,
    }  # fmt: skip
    job = Job(gather(flags=flags), evaluate=False)
    job.train()
    start = time.perf_counter()
    evaluate_run(f"{folder}/run", device=device, progress=False)
    took = (time.perf_counter() - start) / 2
    n_images = len(load_images(pictures(small, folder))) // 2
    sae = next(iter(job.runner.session.saes.values()))
    tokens = torch.randn(n_images, width, device=device)
    with torch.no_grad():
        encoding = per_call(lambda: sae.encode(tokens), device, small)
    yield f"evaluation of {n_images:,} images, m {flags['d_sae']:,}, all of it, an SAE", f"{took:.2f} s"  # fmt: skip
    yield "encoding of the same images, an SAE", f"{encoding * 1000:.1f} ms"


PARTS: dict[str, Callable[[str, bool, Path], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        *(sae_steps, evaluators, pursuit, forward, extraction, evaluation),
        evaluators_and_nulls,  # long
    )
}


def pictures(small: bool, folder: Path) -> Path:
    """The pictures of all parts, drawn by the first that reads them."""
    place = folder / "pictures"
    return place if place.exists() else timing.draw(32 if small else 3200, place)


def per_call(run: Callable[[], object], device: str, small: bool) -> float:
    """Median seconds of a call, after two that are not counted."""
    seconds = []
    for number in range(4 if small else 22):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def shown(found: dict[str, Any]) -> str:
    """The table of stored results."""
    note = " Small sizes, no result." if found["small"] else ""
    return f"{timing.table(('what', 'measured'), found['rows'])}\n\n{timing.on_what(found)}.{note}"


if __name__ == "__main__":
    main()
