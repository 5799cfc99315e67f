"""The table of an atlas: which SAE carries the tree, and where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table

from ...registry.files import write_atomically
from ...registry.nulls import DECISIVE
from .compare import as_csv
from .headlines import headlines
from .results import NullResult, Results, SAEResult
from .series import natural_key

ATLAS_FILENAME = "atlas.csv"
COLUMNS = ("hook_name", "tokens", "trained_as", "d_sae", "l0", "l0_token")


def atlas_table(results: Results) -> pd.DataFrame:
    """A row per SAE: where it was trained, and each headline metric with the p of its permuted classes.

    ``past``: the number of headline metrics that are past all their nulls, of the ``judged`` ones. The
    rows with the most come first, then the deeper hook points (own definition).
    """
    rows = [_row(results, sae) for sae in results.saes]
    order = sorted(
        range(len(rows)), key=lambda i: natural_key(results.saes[i].hook_name), reverse=True
    )
    order.sort(key=lambda i: -rows[i]["past"])
    return pd.DataFrame([rows[i] for i in order])


def _row(results: Results, sae: SAEResult) -> dict[str, Any]:
    numbers = {f"{m.evaluator}.{m.metric}": m.of(sae) for m in headlines(results)}
    judged = [n.past_all for n in numbers.values() if n is not None and n.past_all is not None]
    row: dict[str, Any] = {"sae": sae.id, **{name: getattr(sae, name) for name in COLUMNS}}
    row |= {"past": sum(map(bool, judged)), "judged": len(judged)}
    for name, number in numbers.items():
        if number is not None:
            null = number.nulls.get(DECISIVE, NullResult())
            row |= {name: number.value, f"{name} p": null.p, f"{name} past all": number.past_all}
    return row


def write_atlas(results: Results, left_out: Mapping[str, str]) -> Path:
    """Write ``atlas.csv`` into the results folder; SAEs that are left out have their reason in it."""
    table = atlas_table(results).assign(left_out="")
    missing = pd.DataFrame([{"sae": name, "left_out": why} for name, why in left_out.items()])
    text = as_csv(pd.concat([table, missing]))
    return write_atomically((results.folder or Path()) / ATLAS_FILENAME, text)


def shown_atlas(results: Results) -> Table:
    """The same for a terminal: without p."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("SAE", "hook point", "tokens", "m", "L0 image", "L0 token", "past nulls"):
        table.add_column(
            name, justify="left" if name in ("SAE", "hook point", "tokens") else "right"
        )
    for row in atlas_table(results).to_dict("records"):
        l0s = (f"{v:.3g}" if math.isfinite(v) else "–" for v in (row["l0"], row["l0_token"]))
        cells = (row["sae"], row["hook_name"], row["tokens"], f"{row['d_sae']:,}", *l0s)
        table.add_row(*map(escape, cells), f"{row['past']} of {row['judged']}")
    return table
