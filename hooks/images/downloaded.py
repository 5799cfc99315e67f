"""Data sets whose splits and classes are in text files of their own: CUB-200-2011, Oxford pets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ...registry.errors import DataError
from ...registry.files import read_text
from .folders import Contents, SplitFolder, image_dataset

CUB_FILES = {"images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt"}
PETS_FILES = {"trainval.txt", "test.txt", "list.txt"}

Splits = dict[str, tuple[list[str], list[str | None]]]  # split -> paths and classes


def downloaded_splits(contents: Contents) -> dict[str, SplitFolder] | None:
    """Split -> its images, of a data set with files of this kind; None for others.

    Raises:
        DataError: the files do not fit each other or the images.
    """
    for folder, names in contents.files.items():
        where = contents.root / folder
        try:
            if set(names) >= CUB_FILES and (where / "images").is_dir():
                return _opened(where, _cub(where))
            images = PurePosixPath(folder).parent / "images"
            if set(names) >= PETS_FILES and images.as_posix() in contents.images:
                return _opened(contents.root / images, _pets(contents.root / images, where))
        except (ValueError, KeyError, IndexError) as error:
            raise DataError(
                "dataset_path", f"its lists do not fit: {error!r}", given=where
            ) from None
    return None


def _opened(root: Path, splits: Splits) -> dict[str, SplitFolder]:
    return {
        split: SplitFolder(root, lambda part=part: image_dataset(*part))
        for split, part in splits.items()
    }


def _cub(root: Path) -> Splits:
    """Lines of number and value: paths, numbers of classes, names of classes, 1 for training."""
    paths, classes, names, training = (
        dict(line.split(maxsplit=1) for line in _lines(root / file))
        for file in ("images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt")
    )
    splits: Splits = {"train": ([], []), "test": ([], [])}
    for number, path in paths.items():
        found, labels = splits["train" if training[number] == "1" else "test"]
        found.append(str(root / "images" / path))
        labels.append(names[classes[number]])
    return splits


def _pets(images: Path, lists: Path) -> Splits:
    """Lines of name, class, species and breed; the name is that of the class and a number."""
    splits: Splits = {}
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        names = [line.split()[0] for line in _lines(lists / file) if line[0] != "#"]
        labels: list[str | None] = [name.rpartition("_")[0] for name in names]
        splits[split] = [str(images / f"{name}.jpg") for name in names], labels
    return splits


def _lines(file: Path) -> Sequence[str]:
    return [line for line in read_text(file).splitlines() if line.strip()]
