"""Folders of images: which images they hold, and of which split and class each image is."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
from datasets import Dataset
from PIL import Image

from ...registry.errors import ConfigError, DataError
from ...registry.files import walk_links
from .decode import HEIC_EXTRA  # where that extra is installed, it registers HEIC with Pillow
from .label_files import Labels, read_labels

logger = logging.getLogger(__name__)

# Pillow names extensions of files that it cannot decode, or only with a program of the system.
NO_PICTURES = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")
IMAGE_EXTENSIONS = frozenset(
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in NO_PICTURES
)
UNREADABLE = (".heic", ".heif", ".hif")  # images that Pillow alone does not read
SYSTEM_FOLDERS = frozenset({"$RECYCLE.BIN", "@eaDir", "System Volume Information"})

# The names of folders and files that say which split they hold, as `datasets` reads them.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_OF_WORD = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_AROUND = r"(?:images?|imgs?|img|data|set|split)"
_SPLIT_FOLDER = re.compile(
    rf"(?:{_AROUND}[-_ ]?)?({'|'.join(sorted(SPLIT_OF_WORD, key=len, reverse=True))})"
    rf"(?:[-_ ]?(?:{_AROUND}|\d{{4}}))?"
)
INNER = re.compile(r"images?|imgs?|jpegimages", re.IGNORECASE)  # of a folder that is no class
SYNSET = re.compile(r"n\d{8}")


class Contents(NamedTuple):
    """The files below a folder, by their folder relative to it ("." is the folder itself)."""

    root: Path
    images: dict[str, list[str]]  # folder -> names of its images, sorted
    files: dict[str, list[str]]  # folder -> names of its other files, sorted

    def below(self, folder: str) -> Contents:
        """The contents of one folder in it."""
        if folder == ".":
            return self
        inside = [
            {
                PurePosixPath(path).relative_to(folder).as_posix(): names
                for path, names in part.items()
                if path == folder or path.startswith(f"{folder}/")
            }
            for part in (self.images, self.files)
        ]
        return Contents(self.root / folder, *inside)


class SplitFolder(NamedTuple):
    """One split: the folder that paths are named relative to, and what opens its images."""

    root: Path
    open: Callable[[], Dataset]


def contents_of(root: Path) -> Contents:
    """Everything below `root`, without hidden entries and system folders; links are followed, but none back up."""
    images: dict[str, list[str]] = {}
    files: dict[str, list[str]] = {}
    unread: Counter[str] = Counter()
    for folder, folders, names in walk_links(root):
        folders[:] = [name for name in folders if name not in SYSTEM_FOLDERS]
        relative = Path(folder).relative_to(root).as_posix()
        shown = sorted(names)
        kinds = [os.path.splitext(name)[1].lower() for name in shown]
        found = [name for name, kind in zip(shown, kinds) if kind in IMAGE_EXTENSIONS]
        if found:
            images[relative] = found
        files[relative] = [n for n, kind in zip(shown, kinds) if kind not in IMAGE_EXTENSIONS]
        unread.update(kind for kind in kinds if kind in UNREADABLE and kind not in IMAGE_EXTENSIONS)
    for kind, count in unread.items():
        logger.warning(
            "%s: %d %s files are left out: Pillow alone cannot read them. %s, or convert them to JPEG.",
            *(root, count, kind, HEIC_EXTRA),
        )
    return Contents(root, images, files)


def image_splits(contents: Contents) -> dict[str, SplitFolder]:
    """Split -> its images, by the usual name of the split and by the name of its folder.

    Raises:
        ConfigError: folders for splits lie where the images of all of them would be mixed.
    """
    return {
        name: SplitFolder(contents.root / folder, lambda f=folder: _dataset(contents, f))
        for name, folder in split_folders(contents).items()
    }


def split_of_folder(name: str) -> str | None:
    """The split that a folder's name means ("val", "train2017", "test_images"), if any."""
    match = _SPLIT_FOLDER.fullmatch(name.lower())
    return SPLIT_OF_WORD[match[1]] if match else None


def split_folders(contents: Contents) -> dict[str, str]:
    """Split -> the folder that holds its images; `train` is all of them where none is named.

    Two folders with names of different splits are splits, whatever lies beside them, and one is
    where nothing beside it holds images. Folders without images count for nothing.

    Raises:
        ConfigError: see `image_splits`.
    """
    top = "."
    while True:
        children = _children(contents.images, top)
        named = {child: split for child in children if (split := split_of_folder(child))}
        others = [child for child in children if child not in named]
        if len(set(named.values())) > 1 or (named and not others):
            break
        if named and all(_place(top, child) not in contents.images for child in named):
            (child, *_), where = named, contents.root / top
            raise ConfigError(
                "dataset_path",
                f"{where} holds {child} and {', '.join(others[:3])}, which may be a split beside "
                "other images or classes of one tree",
                given=str(contents.root),
                allowed=f"{where / child}, or a folder with train and validation in it",
            )
        if named or len(children) != 1 or top in contents.images:
            _refuse_mixed(contents)
            return {"train": "."}
        top = _place(top, children[0])
    if left_out := [*others, *(["images in no folder"] if top in contents.images else [])]:
        logger.warning(
            "%s: %s beside the splits %s left out.",
            *(contents.root / top, ", ".join(left_out), "are" if len(left_out) > 1 else "is"),
        )
    found: dict[str, str] = {}
    for child in sorted(named, key=lambda c: (c != named[c], c)):  # "test" before "evaluation"
        found.setdefault(named[child], _place(top, child))
        found[child] = _place(top, child)
    return found


def _refuse_mixed(contents: Contents) -> None:
    """Raise if folders of several splits lie deeper, where class folders would merge them."""
    siblings: dict[str, set[str]] = {}
    parents = {"."}
    for folder in contents.images:
        parents.update(parent.as_posix() for parent in PurePosixPath(folder).parents)
        parents.add(folder)
    for folder in parents - {"."}:
        if split := split_of_folder(PurePosixPath(folder).name):
            siblings.setdefault(PurePosixPath(folder).parent.as_posix(), set()).add(split)
    mixed = sorted(folder for folder, splits in siblings.items() if len(splits) > 1)
    if mixed:
        raise ConfigError(
            "dataset_path",
            f"the splits in {', '.join(mixed[:3])} would be mixed",
            given=str(contents.root),
            allowed=str(contents.root / mixed[0]),
        )


def _children(images: Mapping[str, Any], top: str) -> list[str]:
    """The folders directly in `top` that hold images, or whose folders do."""
    prefix = "" if top == "." else f"{top}/"
    inside = (folder[len(prefix) :] for folder in images if folder.startswith(prefix))
    return sorted({folder.partition("/")[0] for folder in inside if folder and folder != "."})


def _place(top: str, child: str) -> str:
    return child if top == "." else f"{top}/{child}"


def class_names(folders: Sequence[str]) -> dict[str, str]:
    """Folder of images -> class: its name, or its path where several folders have that name.

    Folders called `images` below the class folders are no classes, whatever lies beside them in a
    class folder, or beside that. Synsets in several places, as for the corruptions of ImageNet-C,
    are one class.
    """
    paths = {folder: PurePosixPath(folder) for folder in folders if folder != "."}
    inner = {path for path in paths.values() if INNER.fullmatch(path.name)}
    holding = {path.parent for path in inner}
    around = {path.parent for path in holding}
    others = [path for path in paths.values() if path not in inner]
    if not others:
        paths = {folder: path.parent for folder, path in paths.items() if path.parent.name}
    elif all(path.name for path in holding) and all(
        path in holding or path.parent in around for path in others
    ):
        paths = {folder: path.parent if path in inner else path for folder, path in paths.items()}
    names = {folder: path.name for folder, path in paths.items()}
    if all(SYNSET.fullmatch(name) for name in names.values()):
        return names
    above = {part for path in paths.values() for part in (path, *path.parents)}
    times = Counter(path.name for path in above)
    return {f: names[f] if times[names[f]] == 1 else path.as_posix() for f, path in paths.items()}


def _dataset(contents: Contents, folder: str) -> Dataset:
    """The images of one split with their classes.

    Classes are sorted, files too within a class. Images in no class folder are labelled by a file
    beside or above them, are without labels where there is none, and are left out where others lie
    in class folders.

    Raises:
        DataError: there is no image.
    """
    here = contents.below(folder)
    classes = class_names(list(here.images))
    places = {f: [str(here.root / f / name) for name in names] for f, names in here.images.items()}
    loose = [path for f, paths in places.items() if f not in classes for path in paths]
    if not classes:
        if not loose:
            raise DataError("dataset_path", "no images found", given=str(here.root))
        return image_dataset(loose, read_labels(contents.root, contents.files, folder, loose))
    if loose:
        logger.warning(
            "%s: %d images lie in no class folder and are left out.", here.root, len(loose)
        )
    by_class: dict[str, list[str]] = {}
    for f, name in classes.items():
        by_class.setdefault(name, []).extend(places[f])
    paths = [path for name in sorted(by_class) for path in by_class[name]]
    return image_dataset(paths, [name for name in sorted(by_class) for _ in by_class[name]])


def image_dataset(paths: Sequence[str], labels: Labels | None = None) -> Dataset:
    """Images by their paths, with their classes where they are known; None is no class.

    Raises:
        DataError: a name is not UTF-8.
    """
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:  # the system's bytes, as lone surrogates
            raise DataError("dataset_path", "a name is not UTF-8", given=path) from None
    columns: dict[str, Any] = {
        "image": [{"bytes": None, "path": os.path.abspath(path)} for path in paths]
    }
    features = datasets.Features({"image": datasets.Image(decode=False)})
    if labels is not None:
        names = sorted({label for label in labels if label is not None})
        number = {name: i for i, name in enumerate(names)}
        columns["label"] = [None if label is None else number[label] for label in labels]
        features["label"] = datasets.ClassLabel(names=names)
    return Dataset.from_dict(columns, features=features)
