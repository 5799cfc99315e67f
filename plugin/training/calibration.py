"""Cost of a training run: FLOPs, bytes, and the time that a calibration on this machine predicts.

The calibration decodes and forwards a few batches of the run's images, trains each kind of SAE for some
steps on random activations, and writes and reads a file; it changes nothing of the run.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.saes.sae import SAEMetadata, TrainingSAE, TrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ...hooks.activations.extract import TokenExtractor
from ...hooks.activations.token_sources import passes_of_window
from ...hooks.images.dataset import ImageDataset
from ...hooks.images.loader import ImageBatch, ImageLoader
from ...hooks.images.preprocess import preprocess_for
from ...hooks.images.workers import workers_for
from ...hooks.models.dtypes import ACTIVATION_DTYPES, torch_dtype
from ...hooks.models.tapped import TappedModel
from ...registry.machine import usable_cores
from ...registry.ranks import Ranks
from .data_parallel import check_divisible
from .dry_run import of_each_kind
from .rng import set_apart
from .step_choice import fuse_optimizer, tell_when_none_is_dead, with_step_of

BUDGET = 2.0  # seconds for each part, beyond the first call, which is not counted
FEWEST, MOST = 2, 8  # repetitions
STEPS_ON_GPU = 4  # are issued before the GPU is waited for, as a run never waits
FIRST_IMAGES = 2
FEW_TOKENS = 4
FILE_BYTES = 1 << 26
TRAINED = 4  # weights, gradients and Adam's two moments
# torch counts the attention of GPUs only.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    )
}
STAGES = ("decode", "forward", "sae", "disk")


@dataclass(frozen=True)
class Costs:
    """What the parts of a run cost on this machine.

    Attributes:
        decode: seconds of one core for one image: reading, decoding, preprocessing.
        forward: seconds for one image on the model's device.
        steps: SAE name -> seconds of one training step; of the one SAE of several processes, on one's share.
        write, read: bytes a second, to and from the disk of the activations.
        forward_flops: of one image.
        sae_flops: SAE name -> of one token in a training step; a sparse step needs fewer.
        exchanged: bytes of gradients that each process sends in a step, where several train one SAE.
    """

    decode: float
    forward: float
    steps: dict[str, float]
    write: float
    read: float
    forward_flops: float
    sae_flops: dict[str, float]
    exchanged: int = 0


@dataclass(frozen=True)
class Size:
    """What a run has to do.

    Attributes:
        images: forward passes of one image.
        steps: training steps.
        batch: tokens of a step.
        written, read: bytes on the disk.
    """

    images: int
    steps: int
    batch: int
    written: int
    read: int


def calibrate(cfg: Any, model: TappedModel, images: ImageDataset, n_ranks: int = 1) -> Costs:
    """Measure the parts of the run that `cfg` describes, in some seconds.

    Raises:
        ConfigError: `n_ranks` processes cannot train its one SAE.
        DataError: none of the images can be read.
    """
    divided = hasattr(cfg, "sae") and n_ranks > 1
    if divided:
        check_divisible(cfg, Ranks(size=n_ranks))
    decode, forward, forward_flops = _time_images(cfg, model, images)
    sharing = n_ranks if divided else 1
    found = of_each_kind(cfg.sae_configs, lambda _, sae: _time_steps(cfg, sae, sharing))
    write, read = time_disk(Path(cfg.cached_activations_path or cfg.output_path or "."))
    return Costs(
        decode,
        forward,
        {name: seconds for name, (seconds, *_) in found.items()},
        write,
        read,
        forward_flops,
        {name: flops for name, (_, flops, _) in found.items()},
        sum(n_bytes for *_, n_bytes in found.values()) if divided else 0,
    )


def size_of(cfg: Any, images: ImageDataset, per_image: int, n_bytes: dict[str, int]) -> Size:
    """The work of the run.

    Args:
        cfg: config of a runner.
        images: the training images.
        per_image: tokens of an image.
        n_bytes: those of `preflight.bytes_needed`.
    """
    cached = n_bytes["cached_activations_path"]
    n_images = len(images) if cached else images_forwarded(cfg, images, per_image)
    read = round(cached * cfg.training_tokens / (n_images * per_image)) if cached else 0
    batch = cfg.train_batch_size_tokens
    return Size(n_images, cfg.total_training_steps, batch, sum(n_bytes.values()), read)


def images_forwarded(cfg: Any, images: ImageDataset, per_image: int) -> int:
    """Forward passes of one image in a run without a cache, which ends after the window that it is in."""
    passes = passes_of_window(per_image, cfg.n_batches_in_buffer)
    window = cfg.store_batch_size_prompts * passes
    needed = math.ceil(cfg.training_tokens / per_image)
    if images.is_streaming:
        return math.ceil(needed / window) * window
    epochs, rest = divmod(needed, len(images))
    return epochs * len(images) + min(math.ceil(rest / window) * window, len(images))


def predict(
    costs: Costs, size: Size, *, n_ranks: int, cores: int, num_workers: int, on_cpu: bool
) -> dict[str, Any]:
    """FLOPs and seconds of the stages of a run, of all and of the slowest rank.

    Images are dealt evenly to the ranks, SAEs by the time of their steps (`Ranks.deal`), and each takes a share
    of the batch of a single SAE; all ranks use one disk. Exchange takes no time here. Each rank has `cores`
    cores and a device as here. Decoding and forward share the cores of a CPU, so that their times add up, and
    overlap on another device; the other stages follow each other.
    """
    images = math.ceil(size.images / n_ranks)
    dealt = Ranks(size=n_ranks).deal(costs.steps)
    slowest = max(sum(costs.steps[name] for name in names) for names in dealt)
    decoding = max(1, min(num_workers, cores))
    seconds = {
        "decode": images * costs.decode / decoding,
        "forward": images * costs.forward,
        "sae": size.steps * slowest,
        "disk": size.written / costs.write + size.read / costs.read,
    }
    both = (seconds["decode"], seconds["forward"])
    extraction = sum(both) if on_cpu or not num_workers else max(both)
    tokens = size.steps * size.batch
    return {
        "ranks": n_ranks,
        "cores": cores,
        "num_workers": num_workers,
        "flops": {
            "forward": size.images * costs.forward_flops,
            "sae": tokens * sum(costs.sae_flops.values()),
        },
        "bytes_written": size.written,
        "bytes_read": size.read,
        "bytes_exchanged": size.steps * costs.exchanged,
        "rates": {
            "decode": 1 / costs.decode,
            "forward": 1 / costs.forward,
            "sae": size.batch / sum(costs.steps.values()),
            "write": costs.write,
            "read": costs.read,
        },
        "seconds": {**seconds, "training": extraction + seconds["sae"] + seconds["disk"]},
        "bottleneck": max(STAGES, key=seconds.__getitem__),
    }


def cost_of(
    cfg: Any, model: TappedModel, images: ImageDataset, per_image: int, *, n_ranks: int,
    n_bytes: dict[str, int],
) -> dict[str, Any]:  # fmt: skip
    """The calibrated plan of a run: see `predict`, and `memory`: bytes on a device.

    Args:
        cfg: config of a runner.
        model: its vision model.
        images: its images.
        per_image: tokens of an image.
        n_ranks: processes that share the run.
        n_bytes: those of `preflight.bytes_needed`.

    Raises:
        ConfigError: `n_ranks` processes cannot train the one SAE of the run.
        DataError: none of the images can be read.
    """
    started = time.perf_counter()
    costs = calibrate(cfg, model, images, n_ranks)
    device = torch.device(str(model.cfg.device))
    plan = predict(
        costs,
        size_of(cfg, images, per_image, n_bytes),
        n_ranks=n_ranks,
        cores=usable_cores(),
        num_workers=workers_for(cfg.num_workers, None if images.is_streaming else len(images)),
        on_cpu=device.type == "cpu",
    )
    weights = sum(t.numel() * t.element_size() for t in model.original_model.state_dict().values())
    share = n_bytes["output_path"] / min(n_ranks, len(costs.steps))
    return {
        **plan,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "memory": {"model": weights, "saes": round(TRAINED * share)},
        "calibration_seconds": time.perf_counter() - started,
    }


def _time_images(cfg: Any, model: TappedModel, images: ImageDataset) -> tuple[float, float, float]:
    """Seconds of decoding and of the forward pass, and FLOPs of the latter, for one image."""
    largest = cfg.store_batch_size_prompts
    preprocess = preprocess_for(model, cfg.image_size)
    dtype = torch_dtype(cfg.dtype, ACTIVATION_DTYPES)
    extractor = TokenExtractor(
        model, cfg.unique_hook_names, [cfg.tokens], dtype=dtype, autocast=cfg.autocast_lm
    )
    # From all over the dataset: neighbours are often of one class and one size.
    places = np.linspace(0, 1, FIRST_IMAGES + MOST * largest)
    jobs: Iterator[Any] = (
        images.stream()
        if images.is_streaming
        else iter(dict.fromkeys((places * (len(images) - 1)).astype(int).tolist()))
    )

    def loader(size: int) -> ImageLoader:
        return ImageLoader(
            images, preprocess, batch_size=size, num_workers=0, max_corrupt_share=1.0
        )

    def run(batch: ImageBatch) -> None:
        extractor(batch)
        _wait(extractor.device)

    first = loader(min(FIRST_IMAGES, largest))
    before = time.perf_counter()
    batch = next(first.batches(jobs), None)
    if batch is None:
        raise first.nothing_readable()
    decode = [(time.perf_counter() - before) / len(batch)]
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run(batch)
    forward = [_seconds(lambda: run(batch)) / len(batch)]
    size = max(1, min(largest, int(BUDGET / FEWEST / forward[0])))
    batches = loader(size).batches(jobs)
    while len(decode) <= MOST and (len(decode) <= FEWEST or sum(forward) * size < BUDGET):
        before = time.perf_counter()
        following = next(batches, None)
        if following is None:
            break
        decode.append((time.perf_counter() - before) / len(following))
        forward.append(_seconds(lambda of=following: run(of)) / len(following))
    flops = counter.get_total_flops() / len(batch)
    counted = slice(len(decode) > 1, None)  # the first batch is a warm-up, where there are others
    return statistics.median(decode[counted]), statistics.median(forward[counted]), flops


def _time_steps(cfg: Any, sae_cfg: TrainingSAEConfig, sharing: int) -> tuple[float, float, int]:
    """A step by SAELens's trainer, of one of the processes that share the batch.

    Returns its seconds, the FLOPs of one token in the dense step, and the bytes of the gradients.
    """
    settings = cfg.to_sae_trainer_config()
    settings = replace(
        settings, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        logger=replace(settings.logger, log_to_wandb=False),
    )  # fmt: skip
    size = cfg.train_batch_size_tokens // sharing
    with set_apart():
        own = replace(copy.deepcopy(sae_cfg), device=cfg.device, metadata=SAEMetadata())
        sae = TrainingSAE.from_dict(own.to_dict()).to(cfg.device)
        few = torch.randn(FEW_TOKENS, own.d_in, dtype=sae.dtype, device=cfg.device)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            SAETrainer(settings, sae, iter(())).step(few)
        sae = with_step_of(cfg, sae, sharing)
        trainer = SAETrainer(settings, sae, iter(()))
        fuse_optimizer(trainer.optimizer)
        tell_when_none_is_dead(trainer)
        at_once = STEPS_ON_GPU if sae.device.type == "cuda" else 1
        tokens = torch.randn(size, own.d_in, dtype=sae.dtype, device=cfg.act_store_device)

        def steps() -> None:
            for _ in range(at_once):
                trainer.step(tokens)
                trainer.n_training_steps += 1
            _wait(sae.device)

        steps()
        seconds: list[float] = []
        while len(seconds) < MOST and (len(seconds) < FEWEST or sum(seconds) < BUDGET):
            seconds.append(_seconds(steps))
            if seconds[0] > BUDGET:
                break
    n_bytes = sum(p.numel() * p.element_size() for p in sae.parameters() if p.requires_grad)
    per_step = statistics.median(seconds) / at_once
    return per_step, counter.get_total_flops() / FEW_TOKENS, n_bytes


def time_disk(place: Path) -> tuple[float, float]:
    """Bytes a second of writing a file until it is on the disk, and of reading it from there.

    Args:
        place: a file or folder, which need not exist; the file is written beside it and deleted.
    """
    folder = next(path for path in (place, *place.absolute().parents) if path.is_dir())
    block = np.random.default_rng(0).bytes(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:

        def write() -> None:
            for _ in range(FILE_BYTES // len(block)):
                file.write(block)
            os.fsync(file.fileno())

        def read() -> None:
            while file.read(len(block)):
                pass

        writing = _seconds(write)
        if hasattr(os, "posix_fadvise"):  # else it is read from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        return FILE_BYTES / writing, FILE_BYTES / _seconds(read)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
