"""Opening of images from a hub name, files, folders or saved datasets as one `datasets` object."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import datasets
from datasets import Dataset, IterableDataset
from pyarrow.lib import ArrowException

from ...registry.errors import ConfigError, DataError
from ...registry.files import NO_CONTENTS, check_listable, check_regular, reason
from ...registry.names import near_paths
from .archives import refuse_tar_of_tars, unpacked, with_zips
from .downloaded import downloaded_splits
from .folders import (
    IMAGE_EXTENSIONS,
    SPLIT_OF_WORD,
    Contents,
    contents_of,
    image_splits,
    split_of_folder,
)
from .retyped import as_written, retyped_columns

logger = logging.getLogger(__name__)

BUILDERS = {  # the `datasets` builder that reads each kind of file
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tar": "webdataset",
}
TEXT_KINDS = ("json", "csv")  # of files without images; they may hold paths
TABLES = (*TEXT_KINDS, "parquet", "arrow")  # whose rows may hold paths
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class Opened(NamedTuple):
    """One split, opened.

    Attributes:
        data: its rows.
        root: the folder that its images lie under; None where they are rows.
        folder: the folder that relative paths of the rows are relative to, "" where its tables lie in
            several; None: the current one.
        retyped: column -> a text of it that was changed in reading.
    """

    data: Dataset | IterableDataset
    root: Path | None = None
    folder: str | None = None
    retyped: Mapping[str, str] = MappingProxyType({})


def open_dataset(
    path: str | Path,
    *,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    trust_remote_code: bool = False,
    image_column: str | None = None,
) -> Opened:
    """The split `split` of whatever `path` names, and the folders that its image paths lie under.

    A table of paths beside images is read where `image_column` names its column of paths.

    Raises:
        ConfigError: nothing is there, or it has no such split or configuration.
        DataError: it holds no images, is damaged, or cannot be reached.
    """
    text = os.path.expanduser(str(path))
    local = Path(text)
    saved = (local / "dataset_dict.json").is_file() or (local / "state.json").is_file()
    if name is not None and (glob.has_magic(text) or local.is_file() or saved):
        problem = f"{text} has no configurations"
        raise ConfigError("dataset_name", problem, given=name, allowed="None")
    if glob.has_magic(text):
        _check_pattern(text)
        files = sorted(glob.glob(text, recursive=True))
        if not files:
            problem, allowed = "no file matches the pattern", "a pattern that matches files"
            raise ConfigError("dataset_path", problem, given=text, allowed=allowed)
        if all(file.lower().endswith(".zip") for file in files):
            return _open_images(_zips(files), split, streaming, where=text)
        return _open_files(files, split, streaming, where=text)
    if local.is_file():
        if local.suffix.lower() == ".zip":
            return _open_images(contents_of(unpacked(local)), split, streaming, where=text)
        return _open_files([text], split, streaming, where=text)
    if local.exists() and not local.is_dir():
        problem, allowed = "neither a regular file nor a folder", "a file, a folder, a hub name"
        raise ConfigError("dataset_path", problem, given=text, allowed=allowed)
    if not local.exists():
        if text.startswith((".", "/", "~")) or text.count("/") > 1:
            problem = f"there is no such file or folder{near_paths(text)}"
            allowed = "an existing one, or a hub name"
            raise ConfigError("dataset_path", problem, given=text, allowed=allowed)
        return Opened(_load(text, split, name=name, streaming=streaming, trust=trust_remote_code))
    if saved:
        return Opened(_open_saved(local, split, streaming))
    if _has_card(local) or name is not None:
        data = _load(text, split, name=name, streaming=streaming, trust=trust_remote_code)
        return Opened(data, folder=os.path.abspath(local))
    contents = contents_of(local)
    files = _data_files(contents, named_column=image_column is not None)
    if files is not None:
        described = _described_splits(contents)
        return _open_files(files, split, streaming, where=text, root=local, splits=described)
    return _open_images(contents, split, streaming, where=text)


def _zips(files: Sequence[str]) -> Contents:
    """Zip files as they lie in one folder; those of equal names in the folders that they are in."""
    if len({Path(file).stem for file in files}) == len(files):
        return Contents(Path(), {}, {".": [*files]})
    top = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    zips: dict[str, list[str]] = {}
    for file in files:
        folder, name = os.path.split(os.path.relpath(file, top))
        zips.setdefault(Path(folder).as_posix(), []).append(name)
    return Contents(Path(top), {}, zips)


def _check_pattern(pattern: str) -> None:
    """Check that what a pattern can match is seen: `glob` leaves out folders that it cannot list.

    Raises:
        DataError: one of them cannot be listed, or entered.
    """
    while glob.has_magic(pattern):
        above, name = os.path.split(pattern)
        folders = glob.glob(above, recursive=True) if above else ["."]
        for folder in filter(os.path.isdir, folders):
            if os.path.basename(folder) in NO_CONTENTS:
                continue
            if glob.has_magic(name):
                check_listable(folder)
                continue
            try:
                os.lstat(os.path.join(folder, name))
            except FileNotFoundError:
                pass
            except OSError as error:
                problem = f"cannot be read: {reason(error)}"
                raise DataError("dataset_path", problem, given=error.filename) from error
        pattern = above


def _load(
    path: str,
    split: str,
    *,
    streaming: bool,
    name: str | None = None,
    data_files: Mapping[str, Sequence[str]] | None = None,
    trust: bool = False,
    where: str | None = None,
    **options: Any,
) -> Dataset | IterableDataset:
    """`datasets.load_dataset`, with its errors sorted into ours; `options` are those of its builder."""
    if trust:
        options["trust_remote_code"] = True
    try:
        return datasets.load_dataset(
            path, name, split=split, streaming=streaming, data_files=data_files, **options
        )
    except FileNotFoundError as error:  # includes DatasetNotFoundError and EmptyDatasetError
        problem = f"no images found{'' if data_files else near_paths(path)}: {error}"
        raise DataError("dataset_path", problem, given=where or path) from error
    except ConnectionError as error:
        problem = f"it is no local path{near_paths(path)}, and the hub cannot be reached: {error}"
        raise DataError("dataset_path", problem, given=where or path) from error
    except ArrowException as error:  # some of them are ValueErrors too
        raise DataError("dataset_path", f"cannot be read: {error}", given=where or path) from error
    except (ValueError, AssertionError) as error:
        problem = f"with split={split!r} and dataset_name={name!r}, {error}"
        raise ConfigError("dataset_path", problem, given=where or path) from error
    except Exception as error:  # of damaged files: BadZipFile, TypeError, KeyError, ...
        problem = f"cannot be read: {error.__cause__ or error or type(error).__name__}"
        raise DataError("dataset_path", problem, given=where or path) from error


def _open_files(
    files: list[str],
    split: str,
    streaming: bool,
    *,
    where: str,
    root: Path | None = None,
    splits: Mapping[str, str] | None = None,
) -> Opened:
    """Data files, each assigned to its split in `splits`, else to that which its name contains.

    `datasets` would find splits too, but in the names of all folders above the
    files too ("/data/test-run-3/...").
    """
    for file in files:
        if not os.path.isfile(file):
            raise DataError("dataset_path", "not a regular file", given=file)
    kinds = {_builder(file) for file in files}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind == "webdataset":
        refuse_tar_of_tars(Path(files[0]))
    if kind is None:
        suffixes = ", ".join(sorted({Path(file).suffix.lower() for file in files}))
        problem = f"cannot read files of kind {suffixes}{' together' if len(files) > 1 else ''}"
        allowed = f"files of one kind among {', '.join([*BUILDERS, '.zip'])}"
        raise ConfigError("dataset_path", problem, given=where, allowed=allowed)
    by_split: dict[str, list[str]] = {}
    for file in files:
        name = os.path.relpath(file, root) if root is not None else os.path.basename(file)
        by_split.setdefault((splits or {}).get(file) or split_of_file(name), []).append(file)
    names = {part.partition("[")[0] for part in split.split("+")}
    chosen = files if "all" in names else [f for name in names for f in by_split.get(name, [])]
    options = as_written(chosen) if kind == "csv" else {}
    data = _load(kind, split, streaming=streaming, data_files=by_split, where=where, **options)
    if kind not in TABLES:
        described = [file for file in chosen if file.endswith("metadata.csv")]
        return Opened(data, retyped=retyped_columns(described))
    folders = {os.path.dirname(os.path.abspath(file)) for file in chosen}
    return Opened(data, folder=folders.pop() if len(folders) == 1 else "")


def _builder(file: str) -> str | None:
    suffix = Path(file).suffix.lower()
    if os.path.basename(file) in METADATA_FILES or suffix in IMAGE_EXTENSIONS:
        return "imagefolder"
    return BUILDERS.get(suffix)


def split_of_file(path: str) -> str:
    """The split that a path contains ("val-00000.parquet", "dev/0.parquet"), else "train"."""
    for part in reversed(Path(path).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_OF_WORD:
                return SPLIT_OF_WORD[word]
    return "train"


def _open_saved(folder: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        for part in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
            check_regular(part)
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow's and json's errors, all of which mean a damaged folder
        problem = f"cannot be read: {error}"
        raise DataError("dataset_path", problem, given=str(folder)) from error
    data = pick_split(saved, split, where=str(folder))
    return data.to_iterable_dataset() if streaming else data


def pick_split(data: Mapping[Any, Any] | Dataset, split: str, *, where: str = "dataset") -> Any:
    """One split, or a slice such as ``train[:10%]``, of datasets already in memory.

    A single dataset without the name of its split counts as "train". Streams have no slices.
    """
    splits: Mapping[Any, Any] = (
        {str(data.split or "train"): data} if isinstance(data, Dataset) else data
    )
    if split in splits:
        return splits[split]
    if any(isinstance(part, IterableDataset) for part in splits.values()):
        raise _no_split(where, split, splits)
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(
            {key: len(part) for key, part in splits.items()}
        )
    except (ValueError, AssertionError, AttributeError) as error:
        raise _no_split(where, split, splits) from error
    return datasets.concatenate_datasets(
        [splits[p.splitname].select(range(p.from_, p.to)) for p in parts]
    )


def _no_split(where: str, split: str, splits: Iterable[Any]) -> ConfigError:
    allowed = ", ".join(map(str, splits))
    return ConfigError("split", f"{where} has no such split", given=split, allowed=allowed)


def _has_card(folder: Path) -> bool:
    """Whether a folder is a repository whose README says what its configurations are."""
    card = folder / "README.md"
    return card.is_file() and card.open("rb").read(3) == b"---"


def _data_files(contents: Contents, *, named_column: bool) -> list[str] | None:
    """The files that `datasets` reads; None where there are plain images in folders.

    Images count as data files where a metadata file beside them holds their labels. Tables that can
    hold images hide the images beside them; tables of text do where a column of paths is named.
    """
    others = [f"{folder}/{name}" for folder, names in contents.files.items() for name in names]
    described = [file for file in others if os.path.basename(file) in METADATA_FILES]
    if described:
        images = [f"{folder}/{name}" for folder, names in contents.images.items() for name in names]
        return [str(contents.root / file) for file in sorted([*images, *described])]
    kinds = {_builder(file) for file in others}
    hiding = [
        k for k in BUILDERS.values() if named_column or not contents.images or k not in TEXT_KINDS
    ]
    kind = next((kind for kind in hiding if kind in kinds), None)
    if kind is None:
        return None
    return [str(contents.root / file) for file in others if _builder(file) == kind]


def _described_splits(contents: Contents) -> dict[str, str]:
    """The split of each metadata file, and of the images that it describes, by their full paths.

    Those in its folder and below, up to the next such file. The split is that which their folders
    below it are named for, else the one that its own path contains: file names of images say nothing.

    Raises:
        ConfigError: the folders are named for several splits, which would be mixed.
    """
    tables = {f: [n for n in names if n in METADATA_FILES] for f, names in contents.files.items()}
    folders: dict[str, list[str]] = {folder: [] for folder, names in tables.items() if names}
    for folder in contents.images:
        above = (folder, *(parent.as_posix() for parent in PurePosixPath(folder).parents))
        if (table := next((each for each in above if each in folders), None)) is not None:
            folders[table].append(folder)
    found: dict[str, str] = {}
    for table, below in folders.items():
        named = {_split_below(table, folder): folder for folder in below}
        splits = named.keys() - {None}
        if len(splits) > 1 or (None in named and splits - {"train"}):
            raise ConfigError(
                "dataset_path",
                f"{tables[table][0]} describes images in {', '.join(sorted(named.values())[:3])}: the "
                "splits would be mixed",
                given=str(contents.root / table),
                allowed=f"a {tables[table][0]} in the folder of each split",
            )
        split = splits.pop() if None not in named and splits else None
        split = split or split_of_file((PurePosixPath(table) / tables[table][0]).as_posix())
        files = [(table, name) for name in tables[table]]
        files += [(folder, name) for folder in below for name in contents.images[folder]]
        found |= {str(contents.root / f"{folder}/{name}"): split for folder, name in files}
    return found


def _split_below(top: str, folder: str) -> str | None:
    """The split that a folder below `top` is named for, by the innermost part that is one's name."""
    parts = reversed(PurePosixPath(folder).relative_to(top).parts)
    return next((split for part in parts if (split := split_of_folder(part))), None)


def _open_images(contents: Contents, split: str, streaming: bool, *, where: str) -> Opened:
    contents = with_zips(contents)
    splits = downloaded_splits(contents) or image_splits(contents)
    base = re.split(r"[\[+]", split)[0]
    if base not in splits:
        raise _no_split(where, split, splits)
    root, opened = splits[base].root, splits[base].open()
    if split != base:
        opened = pick_split(datasets.DatasetDict({base: opened}), split, where=where)
    return Opened(opened.to_iterable_dataset() if streaming else opened, root)
