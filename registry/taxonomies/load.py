"""Loads a taxonomy by registered name, from a folder of class folders, or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UnknownNameError
from ..packaged import packaged
from ..table import TAXONOMIES
from .edges import from_file
from .folders import from_folders
from .taxonomy import Taxonomy

TREE_FILES = "a folder of nested class folders, or a .csv or .json of parent,child"
TREES = f"a name of `taxolens list taxonomies`, {TREE_FILES}"


def load_taxonomy(name_or_path: str | Path, *, classes: Sequence[str] | None = None) -> Taxonomy:
    """Load a taxonomy; with `classes`, restricted to them in their order.

    Args:
        name_or_path: a registered name ("imagenet", "cifar100", …), a folder of nested class
            folders, or a `.csv` / `.json` of parent–child pairs; "demo:tree", the packaged one.
        classes: the labels of the data set in order: class i of the result is label i.

    Raises:
        UnknownNameError: neither a registered name nor a path.
        ConfigError: cycles, several roots, unknown or repeated labels; listed in the message.
    """
    name_or_path = packaged(name_or_path)
    if str(name_or_path) in TAXONOMIES:
        return TAXONOMIES[str(name_or_path)].load(classes)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return from_folders(path, classes)
    if path.is_file() or path.suffix.lower() in (".csv", ".json"):
        return from_file(path, classes)
    try:
        return TAXONOMIES[str(name_or_path)].load(classes)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error} Also allowed: {TREE_FILES}.") from None
