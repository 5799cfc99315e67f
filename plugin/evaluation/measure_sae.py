"""One SAE, measured: its numbers beside their nulls, its tables and figures as files, its cards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ...registry.evaluators.base import EvaluationContext, Peer
from ...registry.evaluators.parts.accumulators import FiringRate, TopImages
from ...registry.files import write_atomically
from ..reporting.results import EvaluatorResult, LatentCard, SAEResult
from . import latent_cards as cards
from .bench import Bench, Images, Numbers, SAELatents
from .sae_folders import SAEFolder


def measure_sae(
    bench: Bench,
    folder: SAEFolder,
    images: Images,
    *,
    fingerprint: str,
    controls: Mapping[str, Mapping[str, Numbers | str]],
    peers: Sequence[Peer] = (),
    dataset: Any,
    rows: np.ndarray,
    output: Path,
    progress: bool = True,
) -> SAEResult:
    """Everything about one SAE.

    Args:
        images: the activations at its hook point.
        controls: control -> evaluator -> numbers, or why there are none.
        peers: other SAEs to compare with.
        dataset: the `ImageDataset`, for thumbnails.
        rows: (n,) position in the evaluation set -> row of the dataset.
        output: the results folder.
    """
    started = time.perf_counter()
    sae = folder.load(bench.device)
    latents = SAELatents(sae)
    sources = bench.null_sources(latents, images)
    with tqdm(
        total=len(images) * (1 + len(sources)), desc=folder.id, unit="img", disable=not progress
    ) as bar:
        # The nulls first: only the SAE's own pass stays in memory for its tables.
        nulls = {
            name: bench.numbers(
                source, images, bench.names_for(name), peers=peers, progress=bar.update
            )
            for name, source in sources.items()
        }
        done = bench.run(
            latents, images, peers=peers, prepare=_share_card_facts, progress=bar.update
        )
    metrics = bench.metrics(done, nulls, controls)
    tables = {name: done.attempt(name, lambda e: e.tables()) or {} for name in bench.chosen}
    figures = {name: done.attempt(name, lambda e: e.figures()) or {} for name in bench.chosen}
    notes = {name: done.attempt(name, lambda e: e.notes()) or [] for name in bench.chosen}
    most, least = _cards(bench, done.context, tables, rows)
    cards.write_thumbnails([*most, *least], dataset, output)
    place = Path(*folder.id.split("/"))
    evaluators = {
        name: EvaluatorResult(
            metrics=metrics.get(name, {}),
            tables={
                t: _write(output, Path("tables") / place / f"{name}.{t}.csv", _csv(frame))
                for t, frame in tables[name].items()
            },
            figures={
                f: _write(
                    output, Path("figures") / place / f"{name}.{f}.json", str(figure.to_json())
                )
                for f, figure in figures[name].items()
            },
            seconds=round(done.seconds[name], 3),
            error=done.errors.get(name),
            notes=notes[name],
        )
        for name in bench.chosen
    }
    return SAEResult(
        id=folder.id,
        run=folder.run,
        name=folder.name,
        hook_name=folder.hook_name,
        layer=folder.layer,
        model_name=folder.model_name,
        architecture=str(folder.cfg.get("architecture", "")),
        tokens=folder.tokens,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        l0=done.context.share(FiringRate).mean_l0,
        fingerprint=fingerprint,
        evaluators=evaluators,
        most_specific=most,
        least_specific=least,
        node_f1=cards.node_f1(tables),
        seconds=round(time.perf_counter() - started, 1),
    )


def _share_card_facts(context: EvaluationContext) -> None:
    context.share(TopImages, k=cards.TOP_IMAGES)
    context.share(FiringRate)


def _cards(
    bench: Bench, context: EvaluationContext, tables: cards.Tables, rows: np.ndarray
) -> tuple[list[LatentCard], list[LatentCard]]:
    placed = cards.placed_latents(tables)
    facts = {
        "taxonomy": bench.taxonomy,
        "top": context.share(TopImages, k=cards.TOP_IMAGES),
        "rate": context.share(FiringRate),
        "image_ids": rows,
    }
    most, least = cards.pick(placed, bench.taxonomy)
    return cards.make_cards(placed, most, **facts), cards.make_cards(placed, least, **facts)


def _csv(frame: pd.DataFrame) -> str:
    return frame.to_csv(index=False, float_format="%.6g")


def _write(output: Path, file: Path, text: str) -> str:
    write_atomically(output / file, text, sync=False)
    return file.as_posix()
