"""Columns of CSV files whose text pandas, by which `datasets` reads them, changes: "007" to 7, "None" to nothing."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pandas as pd

CHUNK = 10_000  # rows whose type `datasets` finds together
MISSING = (  # what `pandas.read_csv` takes for a missing value, beside an empty cell
    *("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
)


def as_written(files: Iterable[str]) -> dict[str, Any]:
    """The options of `datasets`' reader of CSV files by which `retyped_columns` keep their text; else none.

    Empty cells stay missing, and the other columns are read as ever.
    """
    files = [*files]
    retyped = retyped_columns(files)
    if not retyped:
        return {}
    columns = {str(name) for file in files for name in pd.read_csv(file, nrows=0).columns}
    missing = {name: [""] if name in retyped else ["", *MISSING] for name in columns}
    converters = dict.fromkeys(retyped, str)
    return {"converters": converters, "keep_default_na": False, "na_values": missing}


def retyped_columns(files: Iterable[str]) -> dict[str, str]:
    """Column -> a text of it that is lost or changed: another number of digits, or a word for "missing".

    Spaces around a text, empty cells and columns of fractions do not count. What is wrong with a file is for
    `datasets` to say.
    """
    found: dict[str, str] = {}
    read: Any = partial(pd.read_csv, chunksize=CHUNK)
    for file in files:
        try:
            with (
                read(file, dtype=str, keep_default_na=False, na_filter=False) as written,
                read(file) as typed,
            ):
                for texts, values in zip(written, typed, strict=True):
                    for name in texts.columns:
                        changed = _changed(texts[name].str.strip(), values[name])
                        found |= {str(name): text for text in changed[:1]}
        except Exception:
            continue
    return found


def _changed(texts: pd.Series, values: pd.Series) -> list[str]:
    """The texts of a column that are no longer what they were."""
    if pd.api.types.is_bool_dtype(values):  # of "TRUE" and "True" both
        changed = texts if texts.nunique() > 2 else texts[:0]
    elif pd.api.types.is_integer_dtype(values):
        changed = texts[texts != values.astype(str)]
    elif pd.api.types.is_float_dtype(values) and values.notna().any():  # fractions are no labels
        changed = texts[:0]
    else:
        changed = texts[values.isna() & (texts != "")]
    return changed.tolist()
