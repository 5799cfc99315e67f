"""Opening of images from a hub name, files, folders or saved datasets as one `datasets` object."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from PIL import Image
from pyarrow.lib import ArrowException

from ...registry.errors import ConfigError, DataError
from ...registry.files import check_regular, walk_once

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
)
BUILDERS = {  # the `datasets` builder that reads each kind of file
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tar": "webdataset",
    ".zip": "imagefolder",
}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# The names of folders and files that say which split they hold, as `datasets` reads them.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}


def open_dataset(
    path: str | Path,
    *,
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Dataset | IterableDataset, Path | None]:
    """The split `split` of whatever `path` names, and the folder its image paths lie under, if any.

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
        files = sorted(glob.glob(text, recursive=True))
        if not files:
            problem, allowed = "no file matches the pattern", "a pattern that matches files"
            raise ConfigError("dataset_path", problem, given=text, allowed=allowed)
        return _open_files(files, split, streaming, where=text), None
    if local.is_file():
        return _open_files([text], split, streaming, where=text), None
    if local.exists() and not local.is_dir():
        problem, allowed = "neither a regular file nor a folder", "a file, a folder, a hub name"
        raise ConfigError("dataset_path", problem, given=text, allowed=allowed)
    if not local.exists():
        if text.startswith((".", "/", "~")) or text.count("/") > 1:
            problem, allowed = "there is no such file or folder", "an existing one, or a hub name"
            raise ConfigError("dataset_path", problem, given=text, allowed=allowed)
        return _load(text, split, name=name, streaming=streaming, trust=trust_remote_code), None
    if saved:
        return _open_saved(local, split, streaming), None
    if _has_card(local) or name is not None:
        return _load(text, split, name=name, streaming=streaming, trust=trust_remote_code), None
    files = _data_files(local)
    if files is not None:
        return _open_files(files, split, streaming, where=text, root=local), None
    data, root = _open_class_folders(local, split)
    return (data.to_iterable_dataset() if streaming else data), root


def _load(
    path: str,
    split: str,
    *,
    streaming: bool,
    name: str | None = None,
    data_files: Mapping[str, Sequence[str]] | None = None,
    trust: bool = False,
    where: str | None = None,
) -> Dataset | IterableDataset:
    """`datasets.load_dataset`, with its errors sorted into ours."""
    options: dict[str, Any] = {"trust_remote_code": True} if trust else {}
    try:
        return datasets.load_dataset(
            path, name, split=split, streaming=streaming, data_files=data_files, **options
        )
    except FileNotFoundError as error:  # includes DatasetNotFoundError and EmptyDatasetError
        raise DataError("dataset_path", f"no images found: {error}", given=where or path) from error
    except ConnectionError as error:
        problem = f"it is no local path, and the hub cannot be reached: {error}"
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
    files: list[str], split: str, streaming: bool, *, where: str, root: Path | None = None
) -> Dataset | IterableDataset:
    """Data files, each assigned to the split that its name contains.

    `datasets` would find splits too, but in the names of all folders above the
    files too ("/data/test-run-3/...").
    """
    for file in files:
        if not os.path.isfile(file):
            raise DataError("dataset_path", "not a regular file", given=file)
    kinds = {_builder(file) for file in files}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        suffixes = ", ".join(sorted({Path(file).suffix.lower() for file in files}))
        problem = f"cannot read files of kind {suffixes}{' together' if len(files) > 1 else ''}"
        allowed = f"files of one kind among {', '.join(BUILDERS)}"
        raise ConfigError("dataset_path", problem, given=where, allowed=allowed)
    by_split: dict[str, list[str]] = {}
    for file in files:
        name = os.path.relpath(file, root) if root is not None else os.path.basename(file)
        by_split.setdefault(split_of_file(name), []).append(file)
    return _load(kind, split, streaming=streaming, data_files=by_split, where=where)


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


def pick_split(
    data: datasets.DatasetDict | Dataset, split: str, *, where: str = "dataset"
) -> Dataset:
    """One split, or a slice such as ``train[:10%]``, of datasets already in memory.

    A single dataset without the name of its split counts as "train".
    """
    splits = data if isinstance(data, dict) else {str(data.split or "train"): data}
    if split in splits:
        return splits[split]
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


def _data_files(folder: Path) -> list[str] | None:
    """The files in `folder` that `datasets` reads; None where there are plain images in folders.

    Images count as data files where a metadata file beside them holds their labels, and do not
    count beside tables. Of several kinds of tables the first in `BUILDERS` is taken.
    """
    tables: list[str] = []
    images: list[str] = []
    described = False
    for parent, _, names in walk_once(folder):
        described = described or any(name in METADATA_FILES for name in names)
        for name in sorted(names):
            kind = _builder(name)
            if kind == "imagefolder":
                images.append(os.path.join(parent, name))
            elif kind is not None:
                tables.append(os.path.join(parent, name))
        if len(images) > 1000 and not (described or tables):  # do not walk through a million
            return None
    if described:
        return images
    kinds = {_builder(table) for table in tables}
    kind = next((kind for kind in BUILDERS.values() if kind in kinds), None)
    return [table for table in tables if _builder(table) == kind] or None


def _open_class_folders(folder: Path, split: str) -> tuple[Dataset, Path]:
    splits: dict[str, Path] = {}
    children = [
        entry for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name[0] != "."
    ]
    if children and all(child.name.lower() in SPLIT_OF_WORD for child in children):
        for child in children:
            splits.setdefault(SPLIT_OF_WORD[child.name.lower()], child)
            splits[child.name] = child
    else:
        splits["train"] = folder
    base = re.split(r"[\[+]", split)[0]
    if base not in splits:
        raise _no_split(str(folder), split, splits)
    data = class_folders_dataset(splits[base])
    if split != base:
        data = pick_split(datasets.DatasetDict({base: data}), split, where=str(folder))
    return data, splits[base]


def class_folders_dataset(root: Path) -> Dataset:
    """The images under `root` with their class: the name of the folder they lie in.

    Where several folders in the tree share a name, the class is the path from `root`
    ("animal/other"), as in taxonomies read from folders. Classes are sorted, files too within a
    class. Images directly in `root` have no class: they make a dataset without labels when there
    are no folders of images, and are left out else.

    Raises:
        DataError: there is no image.
    """
    found: dict[str, list[str]] = {}
    times: Counter[str] = Counter()
    for folder, _, names in walk_once(root):
        times[os.path.basename(folder)] += 1
        images = [n for n in names if os.path.splitext(n)[1].lower() in IMAGE_EXTENSIONS]
        if images:
            relative = Path(folder).relative_to(root).as_posix()
            found[relative] = [os.path.join(folder, name) for name in sorted(images)]
    times[os.path.basename(root)] -= 1  # the top folder is no class
    for file in (file for files in found.values() for file in files):
        if not _is_utf8(file):
            raise DataError("dataset_path", "a name is not UTF-8", given=file)
    loose = found.pop(".", [])
    if not found:
        if not loose:
            raise DataError("dataset_path", "no images found", given=str(root))
        features = datasets.Features({"image": datasets.Image(decode=False)})
        return Dataset.from_dict({"image": _as_paths(loose)}, features=features)
    if loose:
        logger.warning("%s: %d images lie in no class folder and are left out.", root, len(loose))
    by_class = {
        name if times[name := os.path.basename(folder)] == 1 else folder: files
        for folder, files in found.items()
    }
    classes = sorted(by_class)
    paths = [path for name in classes for path in by_class[name]]
    labels = [label for label, name in enumerate(classes) for _ in by_class[name]]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=classes)}
    )
    return Dataset.from_dict({"image": _as_paths(paths), "label": labels}, features=features)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # the system's bytes, as lone surrogates
        return False
    return True


def _as_paths(paths: list[str]) -> list[dict[str, Any]]:
    return [{"bytes": None, "path": os.path.abspath(path)} for path in paths]
