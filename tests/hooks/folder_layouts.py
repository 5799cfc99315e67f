"""Folders as people have them on disk, each with the classes, splits and counts that must come out."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.io import savemat
from tiny_images import plain

# split -> class -> number of images; None is no class.
Expected = dict[str, dict[str | None, int]]
LAYOUTS: dict[str, tuple[Callable[[Path], object], Expected]] = {}


def layout(**expected: dict[str | None, int]) -> Callable[[Callable[[Path], object]], object]:
    def add(make: Callable[[Path], object]) -> object:
        LAYOUTS[make.__name__] = make, expected
        return make

    return add


def draw(root: Path, *files: str) -> None:
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        plain(i % 256).save(root / file)


def write(root: Path, file: str, *lines: str) -> None:
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text("\n".join(lines) + "\n")


def draw_splits(root: Path) -> None:
    draw(root, *(f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)))
    draw(root, "val/cat/7.png", "val/dog/8.png")


SPLITS: Expected = {
    "train": {"cat": 3, "dog": 3},
    "validation": {"cat": 1, "dog": 1},
    "val": {"cat": 1, "dog": 1},
}


@layout(**SPLITS)
def a_mac_folder_beside_the_splits(root: Path) -> None:
    draw_splits(root)
    draw(root, "__MACOSX/train/cat/._0.png", "@eaDir/cat/0.png", ".thumbs/cat/0.png")


@layout(**SPLITS)
def annotations_beside_the_splits(root: Path) -> None:
    draw_splits(root)
    write(root, "annotations/cat/0.xml", "<annotation/>")
    (root / "empty").mkdir()


@layout(**SPLITS)
def other_images_beside_the_splits(root: Path) -> None:
    draw_splits(root)
    draw(root, "unlabelled/1.png", "cover.png")


@layout(**SPLITS)
def splits_in_a_folder_in_a_folder(root: Path) -> None:
    draw_splits(root / "photos" / "photos")


@layout(train={"cat": 2}, training={"cat": 2})
def one_split_beside_a_folder_without_images(root: Path) -> None:
    draw(root, "Training/cat/1.png", "Training/cat/2.png")
    (root / "Training").rename(root / "training")
    write(root, "notes/readme.txt", "none")


@layout(train={"cat": 1}, validation={"cat": 1}, train2017={"cat": 1}, val2017={"cat": 1})
def splits_with_a_year(root: Path) -> None:
    draw(root, "train2017/cat/1.png", "val2017/cat/2.png")


@layout(train={None: 2}, validation={None: 1}, val={None: 1})
def splits_without_classes(root: Path) -> None:
    draw(root, "train/1.png", "train/2.png", "val/3.png")


@layout(test={"cat": 1}, evaluation={"cat": 2}, train={"cat": 1})
def two_folders_for_one_split(root: Path) -> None:
    draw(root, "test/cat/1.png", "evaluation/cat/1.png", "evaluation/cat/2.png", "train/cat/1.png")


@layout(train={"bus": 1, "train": 2})
def a_class_called_train(root: Path) -> None:
    draw(root, "train/1.png", "train/2.png", "bus/1.png")


@layout(train={"train_station": 1, "test_tube": 1})
def classes_that_begin_like_splits(root: Path) -> None:
    draw(root, "train_station/1.png", "test_tube/1.png")


@layout(train={"n01440764": 2, "n02102040": 1}, validation={"n01440764": 1}, val={"n01440764": 1})
def imagenette(root: Path) -> None:
    draw(root, "train/n01440764/ILSVRC2012_val_1.JPEG", "train/n01440764/n01440764_2.JPEG")
    draw(root, "train/n02102040/n02102040_3.JPEG", "val/n01440764/n01440764_4.JPEG")
    write(root, "noisy_imagenette.csv", "path,noisy_labels_0", "train/n01440764/1.JPEG,n01440764")


@layout(
    train={"n01443537": 2, "n01629819": 1},
    validation={"n01443537": 1, "n01629819": 2},
    val={"n01443537": 1, "n01629819": 2},
    test={None: 2},
)
def tiny_imagenet_200(root: Path) -> None:
    write(root, "wnids.txt", "n01443537", "n01629819")
    write(root, "words.txt", "n01443537\tgoldfish, Carassius auratus")
    draw(root, *(f"train/n01443537/images/n01443537_{i}.JPEG" for i in range(2)))
    draw(root, "train/n01629819/images/n01629819_0.JPEG")
    write(root, "train/n01443537/n01443537_boxes.txt", "n01443537_0.JPEG\t0\t10\t63\t58")
    draw(root, *(f"val/images/val_{i}.JPEG" for i in range(3)))
    boxes = "\t0\t32\t44\t62"
    lines = [f"val_{i}.JPEG\t{c}{boxes}" for i, c in enumerate(("n01443537", *2 * ["n01629819"]))]
    write(root, "val/val_annotations.txt", *lines)
    draw(root, "test/images/test_0.JPEG", "test/images/test_1.JPEG")


VAL = [f"ILSVRC2012_val_{i:08}" for i in range(1, 4)]
IMAGENET_VAL = {"n01440764": 2, "n15075141": 1}
IMAGENET: Expected = {
    "train": {"n01440764": 1, "n15075141": 2},
    "validation": IMAGENET_VAL,
    "val": IMAGENET_VAL,
}


def draw_imagenet(root: Path) -> None:
    draw(root, "train/n01440764/n01440764_1.JPEG")
    draw(root, *(f"train/n15075141/n15075141_{i}.JPEG" for i in range(2)))
    draw(root, *(f"val/{name}.JPEG" for name in VAL))


@layout(**IMAGENET, test={None: 1})
def imagenet_of_kaggle(root: Path) -> None:
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    draw_imagenet(images)
    draw(images, "test/ILSVRC2012_test_00000001.JPEG")
    write(root, "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml", "<annotation/>")
    write(root, "ILSVRC/ImageSets/CLS-LOC/val.txt", "ILSVRC2012_val_00000001 1")
    write(root, "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca", "n15075141 toilet tissue")
    boxes = ("n01440764 1 2 3 4", "n15075141 1 2 3 4 n15075141 5 6 7 8", "n01440764 1 2 3 4")
    rows = [f"{name},{box}" for name, box in zip(VAL, boxes, strict=True)]
    write(root, "LOC_val_solution.csv", "ImageId,PredictionString", *rows)


@layout(**IMAGENET)
def imagenet_with_its_development_kit(root: Path) -> None:
    draw_imagenet(root)
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    write(kit, "ILSVRC2012_validation_ground_truth.txt", "7", "3", "7")
    kinds = np.dtype([("ILSVRC2012_ID", object), ("WNID", object)])
    synsets = np.array([(3, "n15075141"), (7, "n01440764")], dtype=kinds)
    savemat(kit / "meta.mat", {"synsets": synsets.reshape(-1, 1)})


@layout(train={"0": 1, "999": 1}, validation={"0": 2, "999": 1}, val={"0": 2, "999": 1})
def imagenet_with_bare_numbers(root: Path) -> None:
    draw(root, "train/0/1.JPEG", "train/999/2.JPEG", *(f"val/{name}.JPEG" for name in VAL))
    write(root, "val.txt", *(f"{name}.JPEG {n}" for name, n in zip(VAL, (0, 999, 0))))


@layout(
    train={"00000_Animalia_Annelida_Lumbricus": 2, "00001_Plantae_Ginkgo_biloba": 1},
    validation={"00000_Animalia_Annelida_Lumbricus": 1},
    val={"00000_Animalia_Annelida_Lumbricus": 1},
)
def inaturalist_2021(root: Path) -> None:
    worm, ginkgo = "00000_Animalia_Annelida_Lumbricus", "00001_Plantae_Ginkgo_biloba"
    draw(root, f"train/{worm}/a.jpg", f"train/{worm}/b.jpg", f"train/{ginkgo}/c.jpg")
    draw(root, f"val/{worm}/d.jpg")
    categories = [{"id": 0, "name": "Lumbricus terrestris", "image_dir_name": worm}]
    (root / "train.json").write_text(json.dumps({"images": [], "categories": categories}))


@layout(
    train={"001.Black_footed_Albatross": 2, "002.Laysan_Albatross": 1},
    test={"002.Laysan_Albatross": 1},
)
def cub_200_2011(root: Path) -> None:
    root = root / "CUB_200_2011"
    black, laysan = "001.Black_footed_Albatross", "002.Laysan_Albatross"
    paths = [f"{black}/A_1.jpg", f"{black}/A_2.jpg", f"{laysan}/B_1.jpg", f"{laysan}/B_2.jpg"]
    draw(root, *(f"images/{path}" for path in paths))
    write(root, "images.txt", *(f"{i} {path}" for i, path in enumerate(paths, 1)))
    write(root, "image_class_labels.txt", "1 1", "2 1", "3 2", "4 2")
    write(root, "train_test_split.txt", "1 1", "2 1", "3 0", "4 1")
    write(root, "classes.txt", f"1 {black}", f"2 {laysan}")
    write(root, "attributes/certainties.txt", "1 not visible")


@layout(train={"Abyssinian": 1, "american_bulldog": 1}, test={"american_bulldog": 1})
def oxford_pets(root: Path) -> None:
    names = ["Abyssinian_1", "american_bulldog_2", "american_bulldog_10"]
    draw(root, *(f"images/{name}.jpg" for name in names), "annotations/trimaps/Abyssinian_1.png")
    rows = ["Abyssinian_1 1 1 1", "american_bulldog_2 2 2 1", "american_bulldog_10 2 2 1"]
    write(root, "annotations/list.txt", "#Image CLASS-ID SPECIES BREED ID", *rows)
    write(root, "annotations/trainval.txt", *rows[:2])
    write(root, "annotations/test.txt", rows[2])


@layout(train={"n02084071": 2, "n02958343": 1})
def imagenet_21k(root: Path) -> None:
    draw(root, "n02084071/n02084071_1.JPEG", "n02084071/n02084071_2.JPEG", "n02958343/x.JPEG")


@layout(train={"n01440764": 4, "n15075141": 2})
def imagenet_c(root: Path) -> None:
    for severity in ("noise/gaussian_noise/1", "noise/gaussian_noise/2"):
        draw(root, *(f"{severity}/n01440764/{i}.JPEG" for i in range(2)))
        draw(root, f"{severity}/n15075141/1.JPEG")


@layout(train={"n01443537": 1, "n01484850": 2})
def imagenet_r_sketch_and_a(root: Path) -> None:
    root = root / "imagenet-r"
    draw(root, "n01443537/art_0.jpg", "n01484850/cartoon_1.jpg", "n01484850/tattoo_2.jpg")
    write(root, "README.txt", "n01443537 goldfish", "n01484850 great_white_shark")


@layout(train={"0": 2, "10": 1, "2": 1})
def imagenet_v2(root: Path) -> None:
    draw(root, "0/a.jpeg", "0/b.jpeg", "10/c.jpeg", "2/d.jpeg")


def annotated(root: Path, file: str, images: dict[str, list[str]]) -> None:
    """COCO's annotations: image -> the categories of its objects."""
    names = sorted({c for found in images.values() for c in found})
    content = {
        "images": [{"id": 100 + i, "file_name": name} for i, name in enumerate(images)],
        "annotations": [
            {"image_id": 100 + i, "category_id": 7 * names.index(c)}
            for i, found in enumerate(images.values())
            for c in found
        ],
        "categories": [{"id": 7 * i, "name": name} for i, name in enumerate(names)],
    }
    write(root, file, json.dumps(content))


@layout(
    train={"cat": 2, "dog": 1},
    train2017={"cat": 2, "dog": 1},
    validation={"dog": 1, None: 1},
    val2017={"dog": 1, None: 1},
)
def annotations_as_coco_writes_them(root: Path) -> None:
    draw(root, "train2017/1.jpg", "train2017/2.jpg", "train2017/3.jpg")
    draw(root, "val2017/4.jpg", "val2017/5.jpg")
    images = {"1.jpg": ["cat", "cat"], "2.jpg": ["dog"], "3.jpg": ["cat"]}
    annotated(root, "annotations/instances_train2017.json", images)
    annotated(root, "annotations/instances_val2017.json", {"4.jpg": ["dog"], "5.jpg": []})


@layout(train={"boxer": 2, "pug": 1})
def a_table_of_names_and_classes(root: Path) -> None:
    draw(root, "images/a1.jpg", "images/b2.jpg", "images/c3.jpg")
    write(root, "labels.csv", "id,breed", "a1,boxer", "b2,pug", "c3,boxer")


@layout(train={None: 2})
def one_folder_of_photos(root: Path) -> None:
    draw(root, "1.jpg", "2.jpg")
    write(root, "list.txt", "1.jpg", "2.jpg")


def pack(folder: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))


@layout(**SPLITS)
def one_zip_of_splits(root: Path) -> Path:
    draw_splits(root / "source" / "photos")
    pack(root / "source", root / "photos.zip")
    return root / "photos.zip"


@layout(train={"cat": 2, "dog": 1})
def one_zip_of_class_folders(root: Path) -> Path:
    draw(root / "source", "cat/1.jpg", "cat/2.jpg", "dog/3.jpg")
    pack(root / "source", root / "photos.zip")
    return root / "photos.zip"


@layout(train={"cat": 2}, validation={"cat": 1}, val={"cat": 1})
def a_folder_of_zips_of_splits(root: Path) -> Path:
    draw(root / "1", "cat/1.jpg", "cat/2.jpg")
    draw(root / "2", "val/cat/3.jpg")
    (root / "zips").mkdir()
    pack(root / "1", root / "zips" / "train.zip")
    pack(root / "2", root / "zips" / "val.zip")
    return root / "zips"


@layout(train={"cat": 2, "dog": 1})
def zips_of_one_name_in_class_folders(root: Path) -> Path:
    draw(root / "1", "1.jpg", "2.jpg")
    draw(root / "2", "1.jpg")
    for folder, name in (("1", "cat"), ("2", "dog")):
        (root / "zips" / name).mkdir(parents=True)
        pack(root / folder, root / "zips" / name / "images.zip")
    return root / "zips" / "*" / "images.zip"


@layout(train={"cat": 2, "dog": 1})
def a_folder_of_zips_of_classes(root: Path) -> Path:
    draw(root / "1", "1.jpg", "2.jpg")
    draw(root / "2", "3.jpg")
    (root / "zips").mkdir()
    pack(root / "1", root / "zips" / "cat.zip")
    pack(root / "2", root / "zips" / "dog.zip")
    return root / "zips"


@layout(train={"cat": 1})
def files_that_pillow_lists_and_cannot_read(root: Path) -> None:
    draw(root, "cat/1.jpg")
    for file in ("cat/features.h5", "cat/film.mpg", "clips/film.mpeg", "cat/map.grib"):
        write(root, file, "none")
