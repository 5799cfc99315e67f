"""A taxonomy from a file of parent–child pairs, CSV or JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import MAX_DATA_BYTES, UnreadableError, parse_json, read_rows, read_text, reason
from ..names import near_paths
from .graph import listed
from .taxonomy import Taxonomy, document

logger = logging.getLogger(__name__)

Edge = tuple[str, str]
COLUMNS = ("parent", "child", "name")
MAX_EDGES = 2_000_000  # of which each takes some 600 bytes while the tree is built


def from_file(path: str | Path, classes: Sequence[str] | None = None) -> Taxonomy:
    """Read a `.csv` or a `.json`.

    CSV: columns `parent,child` and optionally `name` (the child's human name), separated by commas,
    semicolons or tabs; a header line may name them in another order; a row without a parent is the
    root. JSON: `[["animal", "dog"], …]`, `{"animal": ["dog", "cat"]}`, nested `{"animal": {"dog": ["poodle", "pug"]}}`, or the
    output of `Taxonomy.to_json`.

    Args:
        path: the file.
        classes: labels in order; None takes the list in the file, or every node without children.

    Raises:
        ConfigError: the file has another form, or as `Taxonomy.from_edges`.
    """
    path = Path(path)
    read = {".csv": _read_csv, ".json": _read_json}.get(path.suffix.lower())
    if read is None:
        raise ConfigError(
            "taxonomy",
            "not a taxonomy file",
            given=path.name,
            allowed="a file that ends in .csv or .json; docs/taxonomies.md converts Newick",
        )
    if not path.exists():
        problem = f"no such file{near_paths(path)}"
        raise ConfigError("taxonomy", problem, given=str(path), allowed="an existing one")
    try:
        edges, own_classes, names = read(path)
    except (OSError, UnreadableError) as error:
        raise ConfigError("taxonomy", f"cannot read {path}: {reason(error)}") from error
    if len(edges) > MAX_EDGES:
        raise _too_many(path)
    if not edges and classes is None and own_classes is None:
        raise ConfigError("taxonomy", f"no parent-child pair in {path}", allowed="at least one")
    taxonomy = Taxonomy.from_edges(edges, own_classes if classes is None else classes, names)
    shared = [v for v, above in zip(taxonomy.nodes, taxonomy.parents) if len(above) > 1]
    if shared:
        some = listed(shared, 3)
        logger.info("%s: %d nodes have several parents: %s", path.name, len(shared), some)
    return taxonomy


Read = tuple[list[Edge], "list[str] | None", dict[str, str]]


def _too_many(path: Path) -> ConfigError:
    problem = f"more than {MAX_EDGES:,} parent-child pairs in {path}"
    return ConfigError("taxonomy", problem, allowed="the pairs above the classes of the data")


def _no_edge(path: Path, number: int, row: list[str]) -> ConfigError:
    where, allowed = f"{path.name}, line {number}", "parent,child[,name]"
    return ConfigError(where, "not an edge", given=row, allowed=allowed)


def _read_csv(path: Path) -> Read:
    edges: list[Edge] = []
    names: dict[str, str] = {}
    columns = list(COLUMNS)
    is_first = True
    for number, row in enumerate(read_rows(path, MAX_DATA_BYTES), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        may_be_header, is_first = is_first, False
        if may_be_header and {"parent", "child"} <= {cell.lower() for cell in cells}:
            columns = [c if c in COLUMNS else "name" for c in map(str.lower, cells)]
            columns += COLUMNS[len(columns) :]
            if sorted(columns) != sorted(COLUMNS):
                raise _no_edge(path, number, row)
            continue
        line = dict(zip(columns, cells))
        if not 2 <= len(cells) <= 3 or not line.get("child"):
            raise _no_edge(path, number, row)
        parent, child, name = line.get("parent"), line["child"], line.get("name")
        if parent:
            edges.append((parent, child))
        if name:
            names[child] = name
        if max(len(edges), len(names)) > MAX_EDGES:
            raise _too_many(path)
    return edges, None, names


def _read_json(path: Path) -> Read:
    text = read_text(path, MAX_DATA_BYTES)
    try:
        data = parse_json(text, unique=True)
    except UnreadableError as error:
        raise ConfigError("taxonomy", f"{path.name} is {error}", allowed="JSON") from None
    if isinstance(data, dict) and isinstance(data.get("format"), str):
        return document(data, path.name)
    if isinstance(data, list):
        for pair in data:
            if not (
                isinstance(pair, list) and len(pair) == 2 and all(isinstance(v, str) for v in pair)
            ):
                raise ConfigError(path.name, "not a pair", given=pair, allowed="[parent, child]")
        return [(p, c) for p, c in data], None, {}
    if isinstance(data, dict):
        return list(_nested(data, path.name)), None, {}
    raise ConfigError(
        path.name, "not a tree", given=type(data).__name__, allowed="pairs or an object"
    )


def _nested(data: dict[str, Any], where: str) -> Iterator[Edge]:
    for parent, below in data.items():
        if not (
            isinstance(below, dict)
            or (isinstance(below, list) and all(isinstance(c, str) for c in below))
        ):
            raise ConfigError(
                where,
                f"children of {parent!r} cannot be read",
                given=below,
                allowed="names or an object",
            )
        yield from ((parent, child) for child in below)
        if isinstance(below, dict):
            yield from _nested(below, where)
