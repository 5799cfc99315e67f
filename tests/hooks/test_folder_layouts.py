import json
import logging
import os
import shutil
import stat
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pandas._libs.parsers as pandas_parsers
import pytest
from folder_layouts import LAYOUTS, annotated, draw, draw_splits, pack, write
from PIL import Image
from scipy.io import savemat
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.images.folders import (
    IMAGE_EXTENSIONS,
    class_names,
    contents_of,
    image_splits,
)
from taxolens.hooks.images.loader import ImageLoader
from taxolens.hooks.images.raw import decode_raw
from taxolens.hooks.images.retyped import MISSING, as_written, retyped_columns
from taxolens.hooks.images.same_files import same_files
from taxolens.hooks.images.sources import _check_pattern, open_dataset
from taxolens.registry.errors import ConfigError, CorruptImageError, DataError
from taxolens.registry.taxonomies.folders import from_folders
from tiny_images import class_folders


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf_cache"))


def counted(images):
    names = [*images.class_names, None]
    return dict(Counter(names[label] for label in images.labels))


@pytest.mark.parametrize("name", LAYOUTS)
def test_classes_splits_and_counts(name, tmp_path):
    make, expected = LAYOUTS[name]
    path = make(tmp_path) or tmp_path
    assert {split: counted(load_images(path, split=split)) for split in expected} == expected
    with pytest.raises(ConfigError, match="split") as error:
        load_images(path, split="no_split")
    assert set(str(error.value).rpartition("allowed: ")[2].rstrip(".").split(", ")) == set(expected)


def test_images_beside_the_splits_are_named(tmp_path, caplog):
    draw_splits(tmp_path)
    draw(tmp_path, "more/1.png", "unlabelled/1.png")
    with caplog.at_level(logging.WARNING):
        load_images(tmp_path)
    assert "more, unlabelled beside the splits are left out" in caplog.text


def test_one_split_beside_other_images_is_undecided(tmp_path):
    draw(tmp_path, "train/cat/1.png", "extra/cat/1.png")
    with pytest.raises(
        ConfigError, match=r"holds train and extra, which may be.*allowed: .*/train"
    ):
        load_images(tmp_path)


def test_splits_deeper_in_several_folders_are_not_mixed(tmp_path):
    class_folders(
        tmp_path, {f"{d}/{s}/cat": [1] for d in ("day", "night") for s in ("train", "val")}
    )
    with pytest.raises(
        ConfigError, match=r"the splits in day, night would be mixed.*allowed: .*day"
    ):
        load_images(tmp_path)
    assert len(load_images(tmp_path / "night", split="val")) == 1


def test_several_categories_of_one_image_are_refused(tmp_path):
    draw(tmp_path, "1.jpg", "2.jpg")
    annotated(tmp_path, "instances.json", {"1.jpg": ["cat", "dog"], "2.jpg": ["dog"]})
    with pytest.raises(DataError, match="1 of 2 images have several categories"):
        load_images(tmp_path)


def test_annotations_of_any_length_and_order_are_read_in_parts(tmp_path, monkeypatch):
    """The order of instances_train2017.json, and annotations with outlines, in blocks of 64 characters."""
    monkeypatch.setattr("taxolens.registry.files.BLOCK_BYTES", 64)
    monkeypatch.setattr("taxolens.registry.files.MAX_CONTAINERS", 10)
    names = [f"{i:012}.jpg" for i in range(40)]
    draw(tmp_path, *(f"train2017/{name}" for name in names))
    annotations = [
        {"segmentation": [[1.5, 2.0, 3.25]], "iscrowd": 0, "image_id": i, "category_id": i % 2 + 1}
        for i in (*range(40), *range(40))
    ]
    content = {
        "info": {"year": 2017},
        "licenses": [{"id": 1, "name": "\u00c5 \\"}],
        "annotations": annotations,
        "images": [{"file_name": name, "id": i} for i, name in enumerate(names)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    write(tmp_path, "annotations/instances_train2017.json", json.dumps(content, ensure_ascii=False))
    images = load_images(tmp_path, split="train2017")
    assert [images.class_names[label] for label in images.labels] == ["cat", "dog"] * 20

    for bound, most, message in (
        ("MAX_CHARACTERS", 100, "names and ids of more than 100 characters"),
        ("MAX_IMAGES", 39, "annotations of more than 39 images"),
    ):
        with monkeypatch.context() as patch, pytest.raises(DataError, match=message):
            patch.setattr(f"taxolens.hooks.images.label_files.{bound}", most)
            load_images(tmp_path, split="train2017")


@pytest.mark.parametrize("wrong", [{"image_id": 1, "category_id": []}, {"image_id": {}}, 7, {}])
def test_annotations_of_another_form_are_refused(wrong, tmp_path):
    draw(tmp_path, "1.jpg")
    content = {"annotations": [wrong], "categories": [{"id": 1, "name": "cat"}]}
    content["images"] = [{"file_name": "1.jpg", "id": 1}]
    write(tmp_path, "a.json", json.dumps(content))
    with pytest.raises(DataError, match="not annotations of images"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "bounds", "problem"),
    [
        ("labels.csv", "a,b\n1,cat\n", {"MAX_CELLS": 3}, "more than 3 cells"),
        ("labels.txt", "a/1 cat\nb/1 dog\n", {"MAX_IMAGES": 1}, "classes of more than 1 images"),
        ("labels.txt", "a/1 x\na/2 x\n" * 2, {"MAX_IMAGES": 2}, "more than 2 rows of the names"),
    ],
)
def test_work_on_a_file_of_labels_is_bounded(
    name, content, bounds, problem, tmp_path, caplog, monkeypatch
):
    """Two images each of the names 1 and 2, so that each row is compared with two images."""
    draw(tmp_path, "1.jpg", "1.png", "2.jpg", "2.png")
    (tmp_path / name).write_text(content)
    for bound, value in bounds.items():
        monkeypatch.setattr(f"taxolens.hooks.images.label_files.{bound}", value)
    with pytest.raises(ConfigError, match="no file names their classes"):
        load_images(tmp_path).require_labels()
    assert f"{name} is not taken as a file of labels: {problem}" in caplog.text


def test_a_development_kit_that_cannot_be_read_is_named(tmp_path):
    draw(tmp_path, "1.jpg")
    write(tmp_path, "ILSVRC2012_validation_ground_truth.txt", "3\n")
    (tmp_path / "meta.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(300))
    with pytest.raises(DataError, match=r"meta\.mat: no synsets can be read from it: "):
        load_images(tmp_path)
    columns = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
    savemat(tmp_path / "meta.mat", {"synsets": np.array([(1, "a"), (2, "b")], columns)})
    with pytest.raises(DataError, match=r"meta\.mat has no synset of this number; given '3'"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("labels.json", '{"1": "cat"', "not JSON"),
        ("labels.json", "[1, 2]", "not a JSON object"),
        ("labels.csv", f"1,{'x' * 200_000}", "field larger than field limit"),
        ("labels.csv", "1" + "," * 1000, "more than 1,000 columns"),
        ("labels.txt", b"1 \xff", "not UTF-8"),
        (
            "labels.txt",
            "1 golden eagle 2",
            "'golden eagle 2' is a class of several words, or several",
        ),
    ],
)
def test_a_file_beside_images_that_cannot_be_read_is_named(
    name, content, problem, tmp_path, caplog
):
    draw(tmp_path, "1.jpg", "2.jpg")
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(data)
    load_images(tmp_path)
    (message,) = [r.getMessage() for r in caplog.records if "not taken" in r.getMessage()]
    assert name in message and problem in message


def test_two_files_of_labels_that_differ_are_refused(tmp_path):
    draw(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path, "a.csv", "id,label", "1,cat", "2,dog")
    write(tmp_path, "b.csv", "id,label", "1,cat", "2,cat")
    with pytest.raises(
        ConfigError, match=r"a.csv and b.csv give the images of \. different classes"
    ):
        load_images(tmp_path)


def test_ground_truth_without_its_synsets_is_refused(tmp_path):
    draw(tmp_path, "val/ILSVRC2012_val_00000001.JPEG", "train/n01440764/1.JPEG")
    write(tmp_path, "ILSVRC2012_validation_ground_truth.txt", "490")
    with pytest.raises(DataError, match=r"meta\.mat, which is not beside it"):
        load_images(tmp_path, split="val")


def test_images_of_a_flat_folder_without_labels_say_what_is_missing(tmp_path):
    draw(tmp_path, "train/cat/1.png", "val/1.png")
    with pytest.raises(
        ConfigError,
        match=r"in no class folder, and no file names their.*class folders, or a file of labels",
    ):
        load_images(tmp_path, split="val").require_labels()


def test_a_tar_of_tars_says_how_to_unpack_it(tmp_path):
    draw(tmp_path, "1.JPEG")
    with tarfile.open(tmp_path / "n01440764.tar", "w") as inner:
        inner.add(tmp_path / "1.JPEG", "n01440764_1.JPEG")
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        outer.add(tmp_path / "n01440764.tar", "n01440764.tar")
    with pytest.raises(ConfigError, match=r"archive of archives \(n01440764.tar.*unpacked"):
        load_images(tmp_path / "ILSVRC2012_img_train.tar")


def test_pictures_of_telephones_are_named_in_a_warning(tmp_path, caplog):
    if ".heic" in IMAGE_EXTENSIONS:
        pytest.skip("the extra `heic` reads them: test_images.py")
    draw(tmp_path, "cat/1.jpg")
    write(tmp_path, "cat/IMG_1.HEIC", "none")
    with caplog.at_level(logging.WARNING):
        assert len(load_images(tmp_path)) == 1
    assert "1 .heic files are left out" in caplog.text and "JPEG" in caplog.text
    assert "pip install 'taxolens[heic]'" in caplog.text


@pytest.mark.parametrize("pattern", ["", "*/*.jpg", "**/*.jpg"])
@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "input/output error")])
def test_a_class_folder_that_cannot_be_listed_is_named(pattern, error, tmp_path, monkeypatch):
    draw(tmp_path, "cat/1.jpg", "dog/2.jpg")
    listed = os.scandir

    def scandir(folder="."):
        if os.path.basename(os.fspath(folder)) == "dog":
            error.filename = folder
            raise error
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        DataError, match=f"folder {tmp_path}/dog: it cannot be listed: {error.strerror}"
    ):
        load_images(tmp_path / pattern)
    if not pattern:
        with pytest.raises(DataError, match="/dog: it cannot be listed"):
            from_folders(tmp_path)


@pytest.mark.parametrize("pattern", ["*/*.jpg", "*/1.jpg", "**/*.jpg"])
def test_a_pattern_passes_over_what_holds_no_images(pattern, tmp_path, monkeypatch):
    """The folder lost+found of a disk, which root alone may list."""
    draw(tmp_path, "cat/1.jpg", "lost+found/1.jpg")
    listed, found = os.scandir, os.lstat

    def denied(of, path, **options):
        if "lost+found/" in f"{os.fspath(path)}/" and not str(path).endswith("found"):
            raise PermissionError(13, "denied", path)
        return of(path, **options)

    def scandir(folder="."):
        return denied(listed, os.path.join(folder, ""))

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "lstat", lambda path, **options: denied(found, path, **options))
    _check_pattern(str(tmp_path / pattern))


def test_a_class_folder_that_cannot_be_entered_is_named(tmp_path, monkeypatch):
    draw(tmp_path, "cat/1.jpg", "dog/1.jpg")
    found = os.lstat

    def lstat(path, **options):
        if str(path).endswith("dog/1.jpg"):
            raise PermissionError(13, "denied", path)
        return found(path, **options)

    monkeypatch.setattr(os, "lstat", lstat)
    with pytest.raises(DataError, match=f"cannot be read: denied; given '{tmp_path}/dog/1.jpg'"):
        load_images(tmp_path / "*" / "1.jpg")


def test_an_unpacked_zip_can_be_read_as_the_umask_says(tmp_path):
    path = LAYOUTS["one_zip_of_class_folders"][0](tmp_path)
    before = os.umask(0o027)
    try:
        load_images(path)
    finally:
        os.umask(before)
    (top,) = (Path(datasets.config.HF_DATASETS_CACHE) / "downloads" / "extracted").iterdir()
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (top, top / "cat", top / "cat" / "1.jpg")]
    assert modes == [0o750, 0o750, 0o640]


def test_a_pattern_of_zips_is_read_as_their_folder(tmp_path):
    """Of two files `train.zip` the images of both, whose classes are named by their paths."""
    for part in ("a", "b"):
        draw(tmp_path / "source" / part, f"cat/{part}1.jpg", f"dog/{part}2.jpg")
        (tmp_path / "zips" / part).mkdir(parents=True)
        pack(tmp_path / "source" / part, tmp_path / "zips" / part / "parts.zip")
    folder = counted(load_images(tmp_path / "zips"))
    assert sum(folder.values()) == 4
    assert counted(load_images(tmp_path / "zips" / "*" / "parts.zip")) == folder


def test_zips_of_different_names_are_side_by_side_wherever_they_lie(tmp_path):
    for folder, name in (("a", "train"), ("b", "val")):
        draw(tmp_path / "source" / folder, "cat/1.jpg")
        (tmp_path / "zips" / folder).mkdir(parents=True)
        pack(tmp_path / "source" / folder, tmp_path / "zips" / folder / f"{name}.zip")
    for split in ("train", "validation"):
        assert counted(load_images(tmp_path / "zips" / "*" / "*.zip", split=split)) == {"cat": 1}


def test_two_zips_that_are_one_folder_are_refused(tmp_path):
    draw(tmp_path / "source", "1.jpg")
    pack(tmp_path / "source", tmp_path / "cat.zip")
    pack(tmp_path / "source", tmp_path / "cat.ZIP")
    (tmp_path / "source" / "1.jpg").unlink()
    with pytest.raises(ConfigError, match="is in cat, as what another zip file holds"):
        load_images(tmp_path)


def test_a_damaged_zip_leaves_nothing_in_the_cache(tmp_path):
    path = LAYOUTS["one_zip_of_class_folders"][0](tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("dog/last.jpg", b"x" * 1000)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"x" * 1000, b"y" * 1000))
    with pytest.raises(DataError, match="cannot be unpacked: Bad CRC-32"):
        load_images(path)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "downloads" / "extracted"
    assert list(cache.iterdir()) == []


def describe(root, *files):
    """A metadata.csv: the class of an image is the first letter of its name."""
    draw(root, *files)
    write(root, "metadata.csv", "file_name,label", *(f"{f},{Path(f).name[0]}" for f in files))


@pytest.mark.parametrize("others", [["test/c2.jpg"], ["more/test2017/c2.jpg"]])
def test_one_table_above_several_splits_is_refused(others, tmp_path):
    """`datasets` takes the rows of all splits for those of the first."""
    describe(tmp_path, "train/a1.jpg", "train/b1.jpg", *others)
    for streaming in (False, True):
        with pytest.raises(ConfigError, match="the splits would be mixed"):
            load_images(tmp_path, split="train", streaming=streaming)


def test_a_folder_of_the_test_split_beside_others_is_refused(tmp_path):
    describe(tmp_path, "a1.jpg", "cat/b1.jpg", "test/c1.jpg")
    with pytest.raises(ConfigError, match="the splits would be mixed"):
        load_images(tmp_path)


def test_tables_of_each_split_and_one_above_a_single_split(tmp_path):
    describe(tmp_path / "each" / "train", "a1.jpg", "inner/b1.jpg")
    describe(tmp_path / "each" / "test", "c1.jpg")
    for split, classes in (("train", {"a": 1, "b": 1}), ("test", {"c": 1})):
        assert counted(load_images(tmp_path / "each", split=split)) == classes
    describe(tmp_path / "one", "images/val/a1.jpg", "images/val/b1.jpg")
    assert counted(load_images(tmp_path / "one", split="validation")) == {"a": 1, "b": 1}


def test_names_of_described_images_are_no_splits(tmp_path):
    """Once all were in `train` with their classes, and in `validation` without."""
    describe(tmp_path, "a_val2014_1.jpg", "b_val2014_2.jpg", "train/c1.jpg")
    assert counted(load_images(tmp_path)) == {"a": 1, "b": 1, "c": 1}
    with pytest.raises(ConfigError, match="validation"):
        load_images(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["cat/images", "cat", "dog/images"], ["cat", "cat", "dog"]),
        (["cat/images", "dog"], ["cat", "dog"]),
        (["cat/images", "dog/JPEGImages"], ["cat", "dog"]),
        (["pet/cat/images", "pet/cat", "wild/cat/images"], ["pet/cat", "pet/cat", "wild/cat"]),
        (["page/images", "page/text"], ["images", "text"]),
        (["images", "cat", "dog"], ["images", "cat", "dog"]),
        (["cat/images", "dog/left", "dog/right"], ["images", "left", "right"]),
    ],
)
def test_folders_of_images_in_class_folders(folders, classes):
    assert list(class_names(folders).values()) == classes


def test_one_picture_beside_a_folder_of_images(tmp_path):
    draw(tmp_path, "cat/images/1.jpg", "cat/images/2.jpg", "cat/cover.jpg", "dog/images/1.jpg")
    assert counted(load_images(tmp_path)) == {"cat": 3, "dog": 1}


def test_a_changed_zip_is_unpacked_again(tmp_path):
    make, _ = LAYOUTS["one_zip_of_class_folders"]
    path = make(tmp_path)
    assert len(load_images(path)) == 3
    draw(tmp_path / "source", "dog/4.jpg")
    make(tmp_path)
    assert len(load_images(path)) == 4


def test_a_table_of_paths_beside_images_when_its_column_is_named(tmp_path):
    draw(tmp_path, "images/1.jpg", "images/2.jpg")
    rows = [f"{tmp_path}/images/{i}.jpg,{kind}" for i, kind in ((1, "x"), (2, "y"))]
    write(tmp_path, "table.csv", "file,label", *rows)
    assert counted(load_images(tmp_path, image_column="file")) == {"x": 1, "y": 1}


def table_of_paths(folder, kind, paths):
    rows = [{"file": path, "label": Path(path).stem} for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(folder / "table.parquet")
    elif kind == "jsonl":
        write(folder, "table.jsonl", *map(json.dumps, rows))
    else:
        write(folder, "table.csv", "file,label", *(",".join(row.values()) for row in rows))


def painted(folder, name, red):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), (red, 0, 0)).save(folder / name)


def reds(images):
    """The colours that a loader reads."""
    loader = ImageLoader(images, channels_first, batch_size=4, num_workers=0)
    jobs = images.stream() if images.is_streaming else range(len(images))
    return [
        int(value) for batch in loader.batches(jobs) for value in batch.pixel_values[:, 0, 0, 0]
    ]


def channels_first(image):
    return np.asarray(image, "f4").transpose(2, 0, 1)


@pytest.mark.parametrize("given", ["folder", "file", "pattern"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_paths_of_a_table_are_relative_to_its_folder(given, kind, tmp_path, monkeypatch):
    """Whichever folder is the current one, and whatever lies in it under the same names."""
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for i, name in enumerate(("a.png", "more/b.png")):
        painted(photos, name, 10 + i)
        painted(elsewhere, name, 200 + i)
    absolute = elsewhere / "c.png"
    painted(elsewhere, "c.png", 99)
    table_of_paths(photos, kind, ["a.png", "more/b.png", str(absolute)])
    path = {"folder": photos, "file": photos / f"table.{kind}", "pattern": photos / f"t*.{kind}"}
    monkeypatch.chdir(elsewhere)
    images = load_images(path[given], image_column="file")
    prints = images.fingerprint
    assert reds(images) == [10, 11, 99] and images.class_names == ["a", "b", "c"]
    assert images.source(0) == "a.png" and images.decode(1).getpixel((0, 0)) == (11, 0, 0)
    assert set(reds(images.limited(2))) < {10, 11, 99}
    monkeypatch.chdir(tmp_path)
    relative = load_images(path[given].relative_to(tmp_path), image_column="file")
    assert relative.fingerprint == prints and reds(relative) == [10, 11, 99]
    streamed = load_images(path[given], image_column="file", streaming=True)
    assert reds(streamed) == [10, 11, 99]


def test_each_split_has_the_folder_of_its_table(tmp_path):
    for split, red in (("train", 10), ("val", 20)):
        painted(tmp_path / split, "a.png", red)
        table_of_paths(tmp_path / split, "csv", ["a.png"])
    assert reds(load_images(tmp_path / "train", split="all", image_column="file")) == [10]
    for split, found in (("train", [10]), ("validation", [20]), ("train[:1]", [10])):
        assert reds(load_images(tmp_path, split=split, image_column="file")) == found
    with pytest.raises(ConfigError, match=r"'a.png' is relative, and the tables lie in several"):
        load_images(tmp_path, split="train+validation", image_column="file")
    with pytest.raises(ConfigError, match="the tables lie in several"):
        load_images(tmp_path, split="all", image_column="file")


def test_paths_that_mean_a_file_in_the_current_folder_alone_are_refused(tmp_path, monkeypatch):
    painted(tmp_path, "photos/a.png", 10)
    table_of_paths(tmp_path / "photos", "csv", ["photos/a.png"])
    monkeypatch.chdir(tmp_path)
    said = (
        r"no file '.*/photos/photos/a\.png', and relative paths .* to its folder, not to the curr"
    )
    with pytest.raises(ConfigError, match=said):
        load_images("photos", image_column="file")
    streamed = load_images("photos", image_column="file", streaming=True)
    with pytest.raises(CorruptImageError, match=said):
        decode_raw(next(streamed.stream()))


def test_streaming_has_the_same_splits(tmp_path):
    draw_splits(tmp_path)
    images = load_images(tmp_path, split="val", streaming=True)
    assert [raw.label for raw in images.stream()] == [0, 1]
    assert list(image_splits(contents_of(tmp_path))) == ["train", "validation", "val"]


def classes_by_image(root, **settings):
    images = load_images(root, **settings)
    return [images.class_names[label] if label >= 0 else None for label in images.labels]


def test_images_of_equal_names_in_two_splits_keep_their_own_classes(tmp_path):
    draw(tmp_path, "train/1.jpg", "train/2.jpg", "val/1.jpg", "val/2.jpg")
    rows = ("train/1.jpg,cat", "train/2.jpg,dog", "val/1.jpg,dog", "val/2.jpg,cat")
    write(tmp_path, "labels.csv", "path,label", *rows)
    assert classes_by_image(tmp_path, split="train") == ["cat", "dog"]
    assert classes_by_image(tmp_path, split="validation") == ["dog", "cat"]


def test_the_rows_of_one_split_are_not_those_of_the_other(tmp_path):
    draw(tmp_path, "train/1.jpg", "train/2.jpg", "val/1.jpg", "val/2.jpg")
    write(tmp_path, "labels.csv", "path,label", "val/1.jpg,dog", "val/2.jpg,cat")
    assert classes_by_image(tmp_path, split="train") == [None, None]
    assert classes_by_image(tmp_path, split="validation") == ["dog", "cat"]


def test_paths_of_another_machine_name_the_images_by_their_ends(tmp_path):
    draw(tmp_path, "val/1.jpg", "val/2.jpg")
    rows = (r"C:\data\val\1.jpg;dog", r"C:\data\val\2.jpg;cat", r"C:\data\train\1.jpg;cat")
    write(tmp_path, "labels.csv", "path;label", *rows)
    assert classes_by_image(tmp_path, split="validation") == ["dog", "cat"]


def test_two_classes_of_one_image_are_refused(tmp_path):
    draw(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path, "labels.csv", "file,label", "1.jpg,cat", "2.jpg,dog", "1.jpg,dog")
    with pytest.raises(DataError, match=r"1.jpg has several classes there: cat, dog; allowed: one"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "classes"),
    [
        ("golden retriever", "golden eagle", ["golden retriever", "golden eagle"]),
        ("n01440764 12 3.5 -4", "n15075141 1 2 3", ["n01440764", "n15075141"]),
        ("\tgolden eagle 2\t7", "\tgolden eagle", ["golden eagle 2", "golden eagle"]),
    ],
)
def test_classes_of_several_words_in_lines_of_text(tmp_path, first, second, classes):
    draw(tmp_path, "1.jpg", "2.jpg")
    write(
        tmp_path,
        "labels.txt",
        f"1.jpg {first}".replace(" \t", "\t"),
        f"2.jpg {second}".replace(" \t", "\t"),
    )
    assert classes_by_image(tmp_path) == classes


@pytest.mark.parametrize("names", ["2.jpg 0.jpg 1.jpg", "2 0 1"])
def test_numbers_of_rows_are_no_names_of_images(tmp_path, names):
    """As pandas writes a table with its index."""
    draw(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    classes = ("cat", "dog", "eel")
    rows = (f"{i},{name},{c}" for i, (name, c) in enumerate(zip(names.split(), classes)))
    write(tmp_path, "labels.csv", ",file,label", *rows)
    assert classes_by_image(tmp_path) == ["dog", "eel", "cat"]


def test_names_with_another_extension_are_those_of_other_images(tmp_path):
    draw(tmp_path, "1.jpg", "1.png", "2.png")
    write(tmp_path, "labels.csv", "file,label", "1.jpg,cat", "1.png,dog", "2.jpg,eel")
    assert classes_by_image(tmp_path) == ["cat", "dog", "eel"]


def test_an_empty_cell_is_no_class(tmp_path, caplog):
    draw(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path, "labels.csv", "file,label", "1.jpg,", "2.jpg,dog")
    assert classes_by_image(tmp_path) == [None, "dog"]
    assert "labels.csv, which has none for 1 of 2." in caplog.text


@pytest.mark.parametrize(
    "rows", [("file,", "1,cat", "2,dog"), (",file,breed", "0,1,cat", "1,2,dog"), ("1,cat", "2,dog")]
)
def test_the_only_other_column_holds_the_classes(tmp_path, rows):
    draw(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path, "labels.csv", *rows)
    assert classes_by_image(tmp_path) == ["cat", "dog"]


def test_blank_lines_before_the_header_are_skipped(tmp_path):
    draw(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path, "labels.csv", "", ";;", "file;age;label", "1.jpg;3;cat", "2.jpg;4;dog")
    assert classes_by_image(tmp_path) == ["cat", "dog"]


def test_a_table_without_a_usual_column_of_labels_is_named(tmp_path, caplog):
    draw(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path, "labels.csv", "file,breed,age", "1.jpg,cat,3", "2.jpg,dog,4")
    assert classes_by_image(tmp_path) == [None, None]
    assert "none of the columns file, breed, age is named label, labels, class" in caplog.text


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("categories", {"id": 1, "name": "eel"}, "category 1 has two names"),
        ("images", {"id": 1, "file_name": "2.jpg"}, "two images have the id 1"),
    ],
)
def test_annotations_with_an_id_twice_are_refused(part, change, message, tmp_path):
    draw(tmp_path, "1.jpg", "2.jpg")
    content = annotations_of_two()
    content[part].append(change)
    write(tmp_path, "a.json", json.dumps(content))
    with pytest.raises(DataError, match=message):
        load_images(tmp_path)


def annotations_of_two(names=("cat", "dog")):
    return {
        "images": [{"file_name": f"{i}.jpg", "id": i} for i in (1, 2)],
        "annotations": [{"image_id": i, "category_id": i} for i in (1, 2)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
    }


def test_categories_of_one_name_are_told_apart(tmp_path):
    draw(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path, "a.json", json.dumps(annotations_of_two(("crane", "crane"))))
    assert classes_by_image(tmp_path) == ["crane (1)", "crane (2)"]


def test_images_without_a_row_are_counted(tmp_path, caplog):
    draw(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    write(tmp_path, "labels.csv", "file,label", "1.jpg,cat", "2.jpg,dog")
    assert classes_by_image(tmp_path) == ["cat", "dog", None]
    assert "labels.csv, which has none for 1 of 3." in caplog.text


@pytest.mark.parametrize("label", ["NA", "None", "null", "nan", "01"])
def test_words_that_tables_use_for_nothing_are_classes(tmp_path, label):
    draw(tmp_path, "1.jpg", "2.jpg")
    write(tmp_path, "labels.csv", "file,label", f"1.jpg,{label}", "2.jpg,dog")
    assert classes_by_image(tmp_path) == [label, "dog"]


def test_splits_of_links_are_those_of_copies(tmp_path):
    """A class that two splits link to is in both, and an image that both have is found."""
    pool = class_folders(tmp_path / "pool", {"cat": [1, 2], "dog": [3, 4], "fox": [5, 6]})
    for split, classes in (("train", ("cat", "dog")), ("val", ("dog", "fox"))):
        (tmp_path / "links" / split).mkdir(parents=True)
        for name in classes:
            (tmp_path / "links" / split / name).symlink_to(pool / name)
    shutil.copytree(tmp_path / "links", tmp_path / "copies")
    for split in ("train", "validation"):
        linked, copied = (load_images(tmp_path / kind, split=split) for kind in ("links", "copies"))
        assert linked.class_names == copied.class_names and len(linked.class_names) == 2
        assert linked.fingerprint == copied.fingerprint and len(linked) == 4
    train, val = (load_images(tmp_path / "links", split=split) for split in ("train", "validation"))
    found = same_files(train.files() or [], val.files() or [])
    assert [val.class_names[val.labels[place]] for place in found] == ["dog", "dog"]


WORDS = ["None", "scratch", "NA", "null", "scratch", ""]
CODES = ["007", "7", "010", "10", "007", "7"]


def written_labels(folder, name, labels):
    for number in range(len(labels)):
        class_folders(folder, {".": [number]})
    lines = [f"{number:03}.png,{label}" for number, label in enumerate(labels)]
    (folder / name).write_text("\n".join(["file_name,label", *lines]) + "\n")
    return folder / name


@pytest.mark.parametrize("labels", [WORDS, CODES], ids=["words", "codes"])
def test_labels_of_a_csv_are_as_written(labels, tmp_path):
    """Words for "missing" and leading zeros are what pandas changes by itself."""
    table = written_labels(tmp_path, "labels.csv", labels)
    options = {"image_column": "file_name", "label_column": "label"}
    images = load_images(table, **options)
    read = [None if label < 0 else images.class_names[label] for label in images.labels]
    assert read == [label or None for label in labels]
    streamed = open_dataset(table, streaming=True, image_column="file_name").data
    assert [row["label"] for row in streamed] == read


def test_the_words_that_pandas_leaves_out():
    assert {*MISSING, ""} == pandas_parsers.STR_NA_VALUES


def test_the_other_columns_are_read_as_ever(tmp_path):
    """The number beside a label that is kept: missing where it is NA or empty."""
    table = tmp_path / "labels.csv"
    table.write_text("file_name,label,y\n000.png,cat,1\n001.png,7,NA\n002.png,None,\n")
    options = as_written([str(table)])
    assert sorted(options["converters"]) == ["label"]
    found = pd.read_csv(table, **options)
    assert found["label"].tolist() == ["cat", "7", "None"]
    pd.testing.assert_series_equal(found["y"], pd.read_csv(table)["y"])


@pytest.mark.parametrize("labels", [WORDS, CODES], ids=["words", "codes"])
@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_a_metadata_csv_would_change_are_refused(labels, streaming, tmp_path):
    written_labels(tmp_path, "metadata.csv", labels)
    with pytest.raises(ConfigError, match=r"label_column: in metadata.csv the label '(None|007)'"):
        load_images(tmp_path, streaming=streaming)
    (tmp_path / "metadata.csv").rename(tmp_path / "labels.csv")
    assert set(load_images(tmp_path).class_names) == {label for label in labels if label}


@pytest.mark.parametrize(
    "labels", [["7", "10", "2"], ["cat", "", "dog"], ["TRUE", "FALSE", "TRUE"], [" 7", "10", "2"]]
)
def test_ordinary_columns_are_read_as_ever(labels, tmp_path):
    table = written_labels(tmp_path, "labels.csv", labels)
    assert retyped_columns([str(table)]) == {}
    metadata = written_labels(tmp_path / "other", "metadata.csv", labels)
    assert len(load_images(metadata.parent)) == 3


def test_a_later_block_of_a_csv_is_looked_at(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text("\n".join(["a,b", *(f"{i + 1},x" for i in range(10_000)), "007,NA"]))
    assert retyped_columns([str(table)]) == {"a": "007", "b": "NA"}
    table.write_text('a,b\n"1,2\n3')  # damaged: for `datasets` to say
    assert retyped_columns([str(table), str(tmp_path / "none.csv")]) == {}
