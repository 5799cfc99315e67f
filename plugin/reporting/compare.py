"""The files of the folder `metrics`: one table and one figure per metric, SAEs side by side."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import pandas as pd

from ...registry.errors import DataError
from ...registry.files import is_file_name, write_atomically
from ...registry.nulls import DECISIVE
from ...registry.table import EVALUATORS
from .headlines import ShownMetric
from .report import Report
from .results import Results

METRICS_FOLDER = "metrics"
FORMULAS = ("=", "+", "-", "@", "\t", "\r")
SAES_FILENAME = "saes.csv"
SAE_COLUMNS = ("id", "hook_name", "hook_head_index", "model_name", "architecture", "trained_as")
SAE_COLUMNS += ("tokens", "d_in", "d_sae", "l0", "l0_token", "constraint")
CONTROLS_FILENAME = "controls.csv"
SUFFIXES = (".csv", ".svg")


def write_comparison(
    results: Results, folder: Path | None = None, *, earlier: Results | None = None
) -> Path:
    """Write ``metrics/<evaluator>.<metric>.csv`` and ``.svg`` for every metric.

    A table has a row per place (layer, or hook point) and for each series of SAEs the value and its
    nulls; the figure is the report's, with a title and a legend. ``saes.csv`` lists the SAEs:
    architecture, tokens, widths, L0 of an image and of a token. ``controls.csv`` has each SAE beside
    its controls trained on random, where there are any. Files of metrics that these results do not have
    are removed: of the earlier results, and of every registered evaluator. Others are left alone.

    Args:
        results: the results.
        folder: the results folder; by default where the results were read from.
        earlier: the results whose files lie in the folder.

    Returns:
        the folder of the files.

    Raises:
        DataError: an evaluator or metric has a name that a file cannot have.
    """
    target = (folder or results.folder or Path()) / METRICS_FOLDER
    report = Report(results)
    saes = as_csv(sae_table(report))
    write_atomically(target / SAES_FILENAME, saes, sync=False)
    written = {SAES_FILENAME}
    if report.with_controls:
        controls = as_csv(control_table(report))
        write_atomically(target / CONTROLS_FILENAME, controls, sync=False)
        written.add(CONTROLS_FILENAME)
    for evaluator, metric in results.metric_names():
        title = f"{evaluator} / {results.label(evaluator, metric)}"
        headline = ShownMetric(evaluator, metric, title)
        stem = f"{evaluator}.{metric}"
        if not is_file_name(stem):
            raise DataError(
                f"metric {stem!r}", "it names files", allowed="names without slashes and NUL"
            )
        table = as_csv(comparison_table(report, headline))
        write_atomically(target / f"{stem}.csv", table, sync=False)
        write_atomically(target / f"{stem}.svg", report.figure(headline), sync=False)
        written |= {f"{stem}.csv", f"{stem}.svg"}
    for name in _own_names(earlier) - written:
        if (target / name).is_file():
            (target / name).unlink()
    if CONTROLS_FILENAME not in written and _is_control_table(target / CONTROLS_FILENAME):
        (target / CONTROLS_FILENAME).unlink()
    return target


def _own_names(earlier: Results | None) -> set[str]:
    """The names of files that an earlier evaluation may have written for its metrics."""
    stems = {
        f"{name}.{metric}" for name, cls in EVALUATORS.items() for metric in cls.higher_is_better
    }
    if earlier is not None:
        stems |= {f"{evaluator}.{metric}" for evaluator, metric in earlier.metric_names()}
    return {stem + suffix for stem in stems if is_file_name(stem) for suffix in SUFFIXES}


def _is_control_table(file: Path) -> bool:
    """Whether it is a table of controls as an evaluation writes it, perhaps one that never finished."""
    with suppress(OSError), file.open("rb") as opened:
        return opened.readline(64).startswith(b"evaluator,metric,sae,trained")
    return False


def as_csv(table: pd.DataFrame) -> str:
    """A table as CSV, to six digits, in which a spreadsheet finds no formula.

    Text that begins with = + - @, a tab or a return gets an apostrophe before it: names of classes
    and SAEs come from files. So does such text that has apostrophes before it, which `from_csv` needs.
    """
    table = table.copy()
    for column in table.select_dtypes(exclude=["number", "bool"]).columns:
        table[column] = table[column].map(_marked)
    return table.rename(columns=_marked).to_csv(index=False, float_format="%.6g")


def from_csv(
    file: str | Path, *, text: Collection[str] = (), n_rows: int | None = None
) -> pd.DataFrame:
    """A table that `as_csv` has written, with its text as it was, such as None, NA or 007.

    Args:
        file: of the table.
        text: columns of text, also where all of it looks like numbers.
        n_rows: the number of rows that are read, from the first; None: all.
    """
    table = pd.read_csv(file, dtype=str, keep_default_na=False, nrows=n_rows)
    table = table.rename(columns=_without_mark)
    columns = table.items()
    return pd.DataFrame({name: _as_text(c) if name in text else _typed(c) for name, c in columns})


def _typed(cells: pd.Series) -> pd.Series:
    """A column (n,) of numbers, where every cell is one as `as_csv` writes it or empty; else of truths or text."""
    if cells.map(_is_written_number).all():
        return pd.Series(pd.to_numeric(cells.where(cells != "")))
    return cells == "True" if cells.isin(("True", "False")).all() else _as_text(cells)


def _is_written_number(cell: str) -> bool:
    try:
        number = float(cell or 0)
    except ValueError:
        return False
    return not cell or (not math.isnan(number) and cell in (f"{number:.6g}", f"{number:.0f}"))


def _as_text(cells: pd.Series) -> pd.Series:
    return cells.map(_without_mark)


def _marked(value: object) -> object:
    is_formula = isinstance(value, str) and value.lstrip("'").startswith(FORMULAS)
    return f"'{value}" if is_formula else value


def _without_mark(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and cell.lstrip("'").startswith(FORMULAS) else cell


def sae_table(report: Report) -> pd.DataFrame:
    """A row per SAE, with the series that names its column in the tables of the metrics."""
    return pd.DataFrame(
        {"series": series.label, **{name: getattr(sae, name) for name in SAE_COLUMNS}}
        for series in report.series
        for sae in series
    )


def control_table(report: Report) -> pd.DataFrame:
    """A row per metric and SAE that has controls: its value, and that of each control."""
    rows = []
    for evaluator, metric in report.results.metric_names():
        shown = ShownMetric(evaluator, metric, metric)
        for sae, controls in report.with_controls:
            row: dict[str, object] = {"evaluator": evaluator, "metric": metric, "sae": sae.id}
            for name, one in {"trained": sae, **controls}.items():
                row[name] = number.value if (number := shown.of(one)) else None
            rows.append(row)
    return pd.DataFrame(rows)


def comparison_table(report: Report, headline: ShownMetric) -> pd.DataFrame:
    """A row per place; columns ``<series>``, its interval, support, nulls, and of a null of several draws best, draws, p.

    The main null has them with one draw too, and q. ``<series> not judged``: why, where too little is known.
    """
    rows = []
    for place, numbers in report.side_by_side(headline):
        row: dict[str, object] = {"place": place}
        for series, number in zip(report.series, numbers, strict=True):
            if number is None:
                continue
            row[series.label] = number.value
            if math.isfinite(number.low):
                row |= {f"{series.label} low": number.low, f"{series.label} high": number.high}
            if number.support is not None:
                row[f"{series.label} support"] = number.support
            for name, null in number.nulls.items():
                row[f"{series.label} {name}"] = null.mean
                if null.n > 1 or (null.n and name == DECISIVE):
                    row[f"{series.label} {name} best"] = null.best
                    row[f"{series.label} {name} draws"] = null.n
                    row[f"{series.label} {name} p"] = null.p
                if math.isfinite(null.q):
                    row[f"{series.label} {name} q"] = null.q
            if number.not_judged:
                row[f"{series.label} not judged"] = number.not_judged
        rows.append(row)
    return pd.DataFrame(rows)
