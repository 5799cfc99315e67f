"""Files that hold the classes of images which lie together in one folder."""

from __future__ import annotations

import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from ...registry.errors import ConfigError, DataError
from ...registry.files import (
    UnreadableError,
    read_bytes,
    read_lines,
    read_rows,
    read_text,
    reason,
    stream_json,
    why,
)
from .columns import LABEL_COLUMNS

logger = logging.getLogger(__name__)

Labels: TypeAlias = Sequence[str | None]
Row: TypeAlias = tuple[str, str]  # the name or path of an image, and its class

KINDS = (".txt", ".tsv", ".csv", ".json")
MAX_TABLE_BYTES = 1 << 28
MAX_COLUMNS = 1000
MAX_CELLS = 1 << 26  # of a CSV file; each takes about 0.4 µs
MAX_META_BYTES = 1 << 20  # compressed, perhaps 1000:1
MAX_JSON_BYTES = 1 << 32  # of which one value at a time is in memory
MAX_IMAGES = 4_000_000  # of which a file gives the classes, and rows that are compared with images
MAX_CHARACTERS = 1 << 28  # of the names and ids in annotations that are kept; 4 bytes each at most
# Folders of annotations beside folders of images, and where ImageNet's development kit has them.
BESIDE = re.compile(r"annotations?|labels|ILSVRC2012_devkit_t12(/data)?", re.IGNORECASE)
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
INDEX = ([""], ["index"], ["unnamed: 0"])  # the names of a column of numbers of rows
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
BOXES = re.compile(r"(n\d{8})( \d+){4}( n\d{8}( \d+){4})*")  # of LOC_val_solution.csv


def read_labels(
    root: Path, files: Mapping[str, Sequence[str]], folder: str, images: Sequence[str]
) -> Labels | None:
    """The class of each image by the file that names most of them; None where no file does.

    The files of `folder` are tried, of the folders above it up to `root`, and of folders of
    annotations beside these. Names count with or without their extension; of several rows for one
    name the one counts whose folders are those of the image, and no row of another image does.

    Args:
        root: the top folder.
        files: folder relative to `root` -> names of its files that are no images.
        folder: the folder of the images, relative to `root`.
        images: the paths of the images.

    Raises:
        ConfigError: two files give the same images different classes.
        DataError: images of several classes, or numbers that nothing explains.
    """
    stems = [_stem(path) for path in images]
    found: list[tuple[int, Path, _Read]] = []
    for file in _candidates(root, files, folder):
        read = _read_file(file, stems, images)
        covered = sum(label is not None for label in read.labels)
        if covered:
            found.append((covered, file, read))
    if not found:
        return None
    most = max(covered for covered, _, _ in found)
    best = [(file, read) for covered, file, read in found if covered == most]
    file, read = best[0]
    for other, differing in best[1:]:
        if differing.labels != read.labels:
            raise ConfigError(
                "dataset_path",
                f"{file.name} and {other.name} give the images of {folder} different classes",
                given=str(root),
                allowed="one file of labels",
            )
    if read.problem is not None:
        raise DataError(file, read.problem, allowed="one class of each image")
    without = len(images) - most
    lacking = f", which has none for {without} of {len(images)}" if without else ""
    logger.warning(
        "the classes of the images in %s are those in %s%s.", root / folder, file, lacking
    )
    return read.labels


def _candidates(root: Path, files: Mapping[str, Sequence[str]], folder: str) -> list[Path]:
    place = PurePosixPath(folder)
    above = {path.as_posix() for path in (place, *place.parents)}
    inner = {path for path in files if PurePosixPath(path).parent.as_posix() == folder}
    found = []
    for where in sorted(files, key=lambda path: -len(PurePosixPath(path).parts)):
        path = PurePosixPath(where)
        beside = any(
            parent.as_posix() in above and BESIDE.fullmatch(path.relative_to(parent).as_posix())
            for parent in path.parents
        )
        if where in above or where in inner or beside:
            names = (name for name in files[where] if os.path.splitext(name)[1].lower() in KINDS)
            found += [root / where / name for name in names]
    return [file for file in found if file.is_file()]


class _Read(NamedTuple):
    """The class of each image by one file, and what forbids its use."""

    labels: Labels
    problem: str | None


def _read_file(file: Path, stems: Sequence[str], images: Sequence[str]) -> _Read:
    try:
        return _of_images(file, _rows_in(file, stems), images)
    except (UnreadableError, OSError) as error:
        logger.warning("%s is not taken as a file of labels: %s.", file, reason(error))
        return _Read([None] * len(images), None)


def _of_images(file: Path, rows: Sequence[Row], images: Sequence[str]) -> _Read:
    by_stem: dict[str, list[Row]] = {}
    for row in rows:
        by_stem.setdefault(_stem(row[0]), []).append(row)
    labels: list[str | None] = []
    problem = None
    n_compared = 0
    for image in images:
        of_name = by_stem.get(_stem(image), ())
        n_compared += len(of_name)
        if n_compared > MAX_IMAGES:
            raise UnreadableError(f"more than {MAX_IMAGES:,} rows of the names of images")
        folders = _folders(image)
        own = image.rpartition("/")[2]
        shared = [
            (_n_shared(_folders(name), folders), name.rpartition("/")[2] == own)
            for name, _ in of_name
        ]
        nearest = max(shared, default=(0, False))
        found: list[str] = []
        for likeness, (name, label) in zip(shared, of_name):
            if likeness < nearest or label in found:
                continue
            if nearest[0] == 0 and _is_another(file, name, image):
                continue
            found.append(label)
            if len(found) > 2:
                break
        if len(found) > 1:
            problem = f"{image} has several classes there: {', '.join(sorted(found))}"
        labels.append(found[0] if found else None)
    return _Read(labels, problem)


def _folders(path: str) -> list[str]:
    """The folders above a file, from the nearest on."""
    return [part for part in path.split("/")[-2::-1] if part not in ("", ".")]


def _n_shared(some: list[str], others: list[str]) -> int:
    """How many folders are equal, from the nearest on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(some, others)))


def _is_another(file: Path, name: str, image: str) -> bool:
    """Whether a name in a file is the path of another image."""
    if "/" not in name:
        return False
    above = os.path.dirname(file)
    places = [os.path.join(folder, name) for folder in (above, os.path.dirname(above))]
    return any(os.path.isfile(place) and not os.path.samefile(place, image) for place in places)


def _rows_in(file: Path, stems: Sequence[str]) -> list[Row]:
    """(name, class) of the images that the file names."""
    wanted = set(stems)
    if file.name == GROUND_TRUTH:
        return _ground_truth(file, stems)
    if file.suffix.lower() == ".json":
        return _annotated(file, wanted)
    if file.suffix.lower() == ".csv":
        return _distinct(_table(_bounded(read_rows(file, MAX_TABLE_BYTES)), wanted))
    return _distinct(_listed(read_lines(file, MAX_TABLE_BYTES), wanted))


def _listed(lines: Iterator[str], wanted: set[str]) -> Iterator[Row]:
    """The labels in lines that begin with a name, of columns between tabs or spaces."""
    for line in lines:
        tabs = "\t" in line
        row = line.split("\t", 2) if tabs else line.split(None, 1)
        if len(row) > 1 and _stem(row[0]) in wanted:
            yield _posix(row[0]), row[1].strip() if tabs else _class_in(row[1])


def _class_in(text: str) -> str:
    """The class in what follows a name: its first word before numbers, else all of its words."""
    first, *others = text.split()
    numbers = [NUMBER.fullmatch(word) is not None for word in others]
    if any(numbers) and not all(numbers):
        raise UnreadableError(f"{text[:80]!r} is a class of several words, or several columns")
    return first if any(numbers) else " ".join([first, *others])


def _bounded(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    n_cells = 0
    for row in rows:
        if len(row) > MAX_COLUMNS:
            raise UnreadableError(f"more than {MAX_COLUMNS:,} columns")
        n_cells += len(row)
        if n_cells > MAX_CELLS:
            raise UnreadableError(f"more than {MAX_CELLS:,} cells")
        yield row


def _distinct(rows: Iterator[Row]) -> list[Row]:
    """Each row once, of a bounded number."""
    found: dict[Row, None] = {}
    for row in rows:
        if not row[1]:  # an image without a class
            continue
        found[row] = None
        if len(found) > MAX_IMAGES:
            raise UnreadableError(f"classes of more than {MAX_IMAGES:,} images")
    return list(found)


def _table(rows: Iterator[Sequence[str]], wanted: set[str]) -> Iterator[Row]:
    """The labels in a table: of two columns the other one, of more the one with a usual name."""
    first = next((row for row in rows if any(map(str.strip, row))), [])
    rows = chain([first], rows)
    named = next((row for row in rows if any(_stem(cell) in wanted for cell in row)), None)
    if named is None:
        return
    header = [cell.strip().lower() for cell in first] if first != named else []
    usual = [header.index(name) for name in LABEL_COLUMNS if name in header]
    keys = [i for i, cell in enumerate(named) if i not in usual and _stem(cell) in wanted]
    if not keys:
        return
    # Numbers of rows, as pandas writes them, may be names of images too.
    key = max(keys, key=lambda i: ("." in named[i], header[i : i + 1] not in INDEX, -i))
    numbered = header[:1] in INDEX
    others = [i for i in range(len(named)) if i != key and not (i == 0 and numbered)]
    column = usual[0] if usual else others[0] if len(others) == 1 else None
    if column is None:
        shown = ", ".join(first[:9])
        raise UnreadableError(f"none of the columns {shown} is named {', '.join(LABEL_COLUMNS)}")
    for row in chain([named], rows):
        if len(row) > max(key, column) and _stem(row[key]) in wanted:
            label = row[column].strip()
            yield _posix(row[key]), box[1] if (box := BOXES.fullmatch(label)) else label


def _annotated(file: Path, wanted: set[str]) -> list[Row]:
    """The labels in annotations as COCO writes them, or in an object of image and class."""
    keys: set[str] = set()
    texts: list[Row] = []
    names: dict[Any, str] = {}  # of the categories, by their ids
    paths: dict[Any, str] = {}  # of the wanted images, by their ids
    category_of: dict[Any, Any] = {}  # of every image, by ids: images may come after annotations
    several: set[Any] = set()  # ids of the images of more than one category
    not_coco = ""
    n_characters = 0
    for key, value in stream_json(file, MAX_JSON_BYTES):
        keys.add(key)
        kept: tuple[Any, ...] = ()
        try:
            if value is None:
                continue
            if key == "categories":
                kept = value["id"], str(value["name"])
                if names.setdefault(kept[0], kept[1]) != kept[1]:
                    not_coco = not_coco or f"category {kept[0]!r} has two names"
            elif key == "images":
                if _stem(value["file_name"]) in wanted:
                    kept = value["id"], _posix(value["file_name"])
                    if paths.setdefault(kept[0], kept[1]) != kept[1]:
                        not_coco = not_coco or f"two images have the id {kept[0]!r}"
            elif key == "annotations":
                image, category = value["image_id"], value["category_id"]
                hash(category)  # a list or an object is none
                kept = image, category
                if category_of.setdefault(image, category) != category:
                    several.add(image)
            elif isinstance(value, str | int) and _stem(key) in wanted:
                kept = _posix(key), str(value)
                texts.append(kept)
        except (KeyError, TypeError) as error:
            not_coco = not_coco or f"not annotations of images: {error!r}"
        if max(map(len, (category_of, texts, names, paths))) > MAX_IMAGES:
            raise DataError(file, f"annotations of more than {MAX_IMAGES:,} images")
        n_characters += sum(len(part) for part in kept if isinstance(part, str))
        if n_characters > MAX_CHARACTERS:
            raise DataError(file, f"names and ids of more than {MAX_CHARACTERS:,} characters")
    if not {"images", "annotations", "categories"} <= keys:
        return texts
    if not not_coco:
        unknown = {category_of[image] for image in paths if image in category_of} - names.keys()
        not_coco = (
            f"not annotations of images: category {min(map(repr, unknown))}" if unknown else ""
        )
    if not_coco:
        raise DataError(file, not_coco)
    annotated = [image for image in paths if image in category_of]
    if n_several := len(several.intersection(annotated)):
        raise DataError(
            file,
            f"{n_several} of {len(annotated)} images have several categories, and an evaluation needs "
            "one class of each image",
            allowed="class folders, or annotations of one category an image",
        )
    times = Counter(names.values())
    named = {i: name if times[name] == 1 else f"{name} ({i})" for i, name in names.items()}
    return [(paths[image], named[category_of[image]]) for image in annotated]


def _ground_truth(file: Path, stems: Sequence[str]) -> list[Row]:
    """The synsets of ImageNet's validation images, by the development kit's own numbers."""
    numbers = read_text(file).split()
    if len(numbers) != len(stems):
        return []
    meta = file.with_name("meta.mat")
    if not meta.is_file():
        raise DataError(
            file,
            "its numbers are those of meta.mat, which is not beside it",
            allowed="the folder `data` of ILSVRC2012_devkit_t12",
        )
    from scipy.io import loadmat

    try:
        data = io.BytesIO(read_bytes(meta, MAX_META_BYTES))
        synsets = loadmat(data, squeeze_me=True, variable_names=["synsets"])["synsets"]
        names = {str(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        unknown = next((number for number in numbers if number not in names), None)
    except Exception as error:  # of a damaged file scipy raises nearly anything
        raise DataError(meta, f"no synsets can be read from it: {why(error)}") from None
    if unknown is not None:
        raise DataError(file, f"{meta.name} has no synset of this number", given=unknown)
    return [(stem, names[number]) for stem, number in zip(sorted(stems), numbers, strict=True)]


def _posix(name: object) -> str:
    """A path as it is written in a file, also on Windows."""
    return str(name).strip().replace("\\", "/").removeprefix("./")


def _stem(name: object) -> str:
    """The name of a file without folders and extension; called for every cell of a table."""
    base = str(name).strip().replace("\\", "/").rpartition("/")[2]
    return base.rpartition(".")[0] or base
