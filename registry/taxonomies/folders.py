"""A taxonomy from nested class folders: in `animal/dog/poodle/1.jpg`, poodle is a child of dog."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..errors import ConfigError
from ..files import walk_links
from .taxonomy import Taxonomy


def from_folders(path: str | Path, classes: Sequence[str] | None = None) -> Taxonomy:
    """Read the tree of folders under `path` (the folder of one split).

    Folders that contain files are classes; if there are none, the innermost folders are. The id of
    a node is the name of its folder, or its path from the top ("animal/other") where several
    folders share the name.

    Args:
        path: the top folder; its name becomes the root's human name.
        classes: labels in order, each the name or the path of a class folder; None takes every
            class sorted by name.

    Raises:
        ConfigError: the folder is missing or has no class folder, or a label is unknown.
    """
    top = Path(path)
    if not top.is_dir():
        raise ConfigError("taxonomy", f"no such folder: {top}", allowed="an existing one")
    folders: list[str] = []
    holding_files: list[str] = []
    for folder, _, files in walk_links(top):
        relative = PurePosixPath(Path(folder).relative_to(top)).as_posix()
        if relative != ".":
            folders.append(relative)
            if files:
                holding_files.append(relative)
    if not folders:
        raise ConfigError("taxonomy", f"no class folders in {top}", allowed="at least one")

    times = Counter(PurePosixPath(f).name for f in folders)
    ids = {f: name if times[name := PurePosixPath(f).name] == 1 else f for f in folders}
    ids["."] = "."
    edges = [(ids[PurePosixPath(f).parent.as_posix()], ids[f]) for f in folders]
    names = {ids[f]: PurePosixPath(f).name for f in folders} | {".": top.resolve().name}
    if classes is not None:
        classes = [ids.get(c, c) for c in classes]
    elif holding_files:
        classes = sorted(ids[f] for f in holding_files)
    return Taxonomy.from_edges(edges, classes, names)
