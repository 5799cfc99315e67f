"""The result of one SAE: numbers beside their nulls, tables and figures as files, latent cards."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ...registry.errors import ConfigError
from ...registry.evaluators.base import EvaluationContext, Evaluator, Peer
from ...registry.evaluators.parts.accumulators import FiringRate, TopImages
from ...registry.evaluators.parts.null_latents import LatentSource
from ...registry.files import is_path, write_atomically
from ..reporting.compare import as_csv
from ..reporting.results import EvaluatorResult, LatentCard, SAEResult
from . import latent_cards as cards
from .bench import Bench, HeldOutActivations, Numbers, SAELatents
from .sae_folders import SAEFolder
from .team import ALONE, Team
from .undefined import undefined_notes

CARDS = "latent cards"  # name of the cards in `failures`; no evaluator's name has a space


def measure_sae(
    bench: Bench,
    folder: SAEFolder,
    held_out: HeldOutActivations,
    *,
    fingerprint: str,
    controls: Mapping[str, Mapping[str, Numbers | str]],
    peers: Sequence[Peer] = (),
    kept: cards.NodeFrames,
    dataset: Any,
    rows: np.ndarray,
    output: Path,
    team: Team = ALONE,
) -> SAEResult | None:
    """Measure one SAE and write its tables, figures and thumbnails.

    On the further ranks of a team: measure this rank's share of the nulls and of the passes for the
    intervals, hand the numbers over, and return None.

    Args:
        bench: what is measured and how.
        folder: the saved SAE.
        held_out: the activations at its hook point.
        fingerprint: see `SAEResult`.
        controls: control -> evaluator -> numbers, or why there are none.
        peers: other SAEs to compare with.
        kept: node tables of evaluators whose numbers an earlier call has finished, for the cards.
        dataset: the `ImageDataset`, for thumbnails.
        rows: (n,) position in the evaluation set -> row of the dataset.
        output: the results folder.
        team: the ranks that measure this SAE.
    """
    started = time.perf_counter()
    sae = folder.load(bench.device)
    latents = SAELatents(sae)
    sources = bench.null_sources(latents, held_out)
    nulls_of: dict[str, tuple[str, LatentSource]] = {
        f"{null} {i}": (null, source)
        for null, draws in sources.items()
        if not isinstance(draws, str)
        for i, source in enumerate(draws)
    }
    groups = {f"without group {group}": group for group in range(bench.settings.n_groups)}
    costs = {name: source.d_sae for name, (_, source) in nulls_of.items()}
    mine = team.share({**costs, **dict.fromkeys(groups, latents.d_sae)})
    n_left_out = sum(name in groups for name in mine)
    n_images = len(held_out) * (len(mine) + team.leads + bool(n_left_out))
    with tqdm(
        total=n_images - len(held_out) * n_left_out // max(1, len(groups)),
        desc=folder.id,
        unit=" image passes",
        disable=not bench.settings.progress,
    ) as bar:
        progress = team.counting(bar.update)
        numbers: dict[str, dict[str, Numbers | str]] = {}
        # The nulls come first, so that only the SAE's own pass stays in memory for its tables.
        for name in (name for name in mine if name in nulls_of):
            null, source = nulls_of[name]
            numbers[name] = bench.numbers(
                source, held_out, bench.chosen_for(null), peers=peers, progress=progress
            )
        if n_left_out:
            latents = bench.encode_once(latents, held_out, progress=progress)
        for name in (name for name in mine if name in groups):
            numbers[name] = bench.left_out(
                latents, held_out, groups[name], peers=peers, progress=progress
            )
        if not team.leads:
            team.gather(folder.id, numbers)
            return None
        done = bench.run(
            latents, held_out, peers=peers, prepare=share_card_facts, progress=progress
        )
    numbers = team.gather(folder.id, numbers)
    nulls = {
        null: draws
        if isinstance(draws, str)
        else [numbers[f"{null} {i}"] for i in range(len(draws))]
        for null, draws in sources.items()
    }
    left_out = [numbers[name] for name in groups]
    draws = tqdm(
        total=len(bench.chosen),
        desc=f"{folder.id}: permuted classes",
        unit="evaluator",
        delay=2,
        disable=not bench.settings.progress,
    )
    with draws as bar:
        progress = team.counting(bar.update)
        metrics = bench.metrics(done, nulls, controls, left_out, progress=progress)
    tables = {name: done.attempt(name, _tables) or {} for name in bench.chosen}
    figures = {name: done.attempt(name, _figures) or {} for name in bench.chosen}
    notes = {name: done.attempt(name, _notes) or [] for name in bench.chosen}
    frames = {name: {t: frame for t, (frame, _) in found.items()} for name, found in tables.items()}
    frames |= {name: {table.name: frame} for name, (table, frame) in kept.items()}
    context = done.context
    declared = {name: cls.node_table for name, (cls, _) in bench.chosen.items()}
    declared |= {name: table for name, (table, _) in kept.items()}
    places = cards.NodeTables(frames, declared, bench.taxonomy, context.d_sae)
    l0 = context.attempt("L0", lambda: context.share(FiringRate).mean_l0)
    l0_token = context.attempt("L0 of a token", lambda: _token_l0(latents, held_out, bench.device))
    if held_out.tokens.shape[1] == 1:
        l0_token = l0
    node_f1 = context.attempt("node F1", places.node_f1)
    most, least = context.attempt(
        CARDS, lambda: _cards(context, places, rows, dataset.fingerprint)
    ) or ([], [])
    cards.write_thumbnails([*most, *least], dataset, output)
    place = Path(*folder.id.split("/"))
    evaluators = {
        name: EvaluatorResult(
            metrics=metrics.get(name, {}),
            tables={
                t: _write(output, Path("tables") / place / f"{name}.{t}.csv", text)
                for t, (_, text) in tables[name].items()
            },
            figures={
                f: _write(output, Path("figures") / place / f"{name}.{f}.json", text)
                for f, text in figures[name].items()
            },
            seconds=round(done.seconds[name], 3),
            error=done.errors.get(name),
            notes=[
                *notes[name],
                *undefined_notes(
                    cls,
                    metrics.get(name, {}),
                    taxonomy=bench.taxonomy,
                    split=held_out.split,
                    l0=l0,
                ),
            ],
        )
        for name, (cls, _) in bench.chosen.items()
    }
    done.release()
    return SAEResult(
        id=folder.id,
        run=folder.run,
        name=folder.name,
        hook_name=folder.hook_name,
        hook_head_index=folder.head,
        layer=folder.layer,
        model_name=folder.model_name,
        architecture=folder.architecture,
        trained_as=folder.trained_as,
        constraint=folder.constraint,
        tokens=folder.tokens,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        l0=math.nan if l0 is None else l0,
        l0_token=math.nan if l0_token is None else l0_token,
        fingerprint=fingerprint,
        weights=folder.weights_digest(),
        evaluators=evaluators,
        most_specific=most,
        least_specific=least,
        node_f1=node_f1 or {},
        seconds=round(time.perf_counter() - started, 1),
    )


@torch.no_grad()
def _token_l0(latents: SAELatents, held_out: HeldOutActivations, device: str) -> float:
    z = latents.encode(held_out.sample().to(device))
    return float((z != 0).sum(1).double().mean())


def share_card_facts(context: EvaluationContext) -> None:
    """Add the accumulators of the cards and of L0 to the pass; if that fails there are none."""

    def share() -> None:
        context.share(FiringRate)
        context.share(TopImages, k=cards.TOP_IMAGES)

    context.attempt(CARDS, share)


def _cards(
    context: EvaluationContext, places: cards.NodeTables, rows: np.ndarray, images: str
) -> tuple[list[LatentCard], list[LatentCard]]:
    """Cards of the most and of the least specific latents."""
    placed = places.placed_latents()
    facts = {
        "taxonomy": context.taxonomy,
        "top": context.share(TopImages, k=cards.TOP_IMAGES),
        "rate": context.share(FiringRate),
        "image_ids": rows,
        "images": images,
    }
    most, least = cards.pick(placed, context.taxonomy)
    return cards.make_cards(placed, most, **facts), cards.make_cards(placed, least, **facts)


def _tables(evaluator: Evaluator[Any]) -> dict[str, tuple[pd.DataFrame, str]]:
    """Table name -> the table, and its CSV text."""
    return {_named(name): (frame, as_csv(frame)) for name, frame in evaluator.tables().items()}


def _figures(evaluator: Evaluator[Any]) -> dict[str, str]:
    return {_named(name): str(figure.to_json()) for name, figure in evaluator.figures().items()}


def _named(name: str) -> str:
    """The name of a table or figure. Raises ConfigError where no file inside the results folder can have it."""
    if not is_path(name) or ".." in name.split("/"):
        raise ConfigError("table or figure", "it names a file", given=name, allowed="a file name")
    return name


def _notes(evaluator: Evaluator[Any]) -> list[str]:
    return [str(note) for note in evaluator.notes()]


def _write(output: Path, file: Path, text: str) -> str:
    write_atomically(output / file, text, sync=False)
    return file.as_posix()
