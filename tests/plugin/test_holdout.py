"""Hold-outs of one flat folder: the same in training and evaluation, and never an image in both."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sae_lens import LoggingConfig
from taxolens.hooks.images.dataset import ImageDataset, load_images
from taxolens.hooks.images.holdout import Part
from taxolens.hooks.images.source import RECORDED_SETTINGS, ImageSource
from taxolens.plugin.commands import train as train_command
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.evaluation.held_out import (
    HeldOut,
    check_held_out,
    overlap,
    seen_in_training,
)
from taxolens.plugin.evaluation.publish import publish
from taxolens.plugin.evaluation.sae_folders import SAEFolder
from taxolens.plugin.reporting.headlines import headlines
from taxolens.plugin.reporting.report import write_report
from taxolens.plugin.reporting.results import Results
from taxolens.plugin.study.job import Job
from taxolens.plugin.study.settings import gather
from taxolens.registry.errors import ConfigError, DataError
from tiny_images import class_folders
from tiny_runs import SMALL_TOPK, WORLD_CLASSES

FAST = {"progress": False, "n_permutations": 2, "n_groups": 0}


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of each of eight classes, each picture another one."""
    folder = tmp_path_factory.mktemp("flat") / "photos"
    generator = np.random.default_rng(0)
    for name in WORLD_CLASSES:
        place = folder / Path(name).name
        place.mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    rows = [f"{Path(n).parent},{Path(n).name}\n" for n in WORLD_CLASSES]
    kinds = dict.fromkeys(f"thing,{Path(n).parent}\n" for n in WORLD_CLASSES)
    (folder.parent / "tree.csv").write_text("parent,child\n" + "".join([*kinds, *rows]))
    return folder


@pytest.fixture
def settings(training: Any, flat: Path) -> dict[str, Any]:
    base = training.single()
    return {
        "model_name": base.model_name,
        "hook_name": base.hook_name,
        "output_path": base.output_path,
        "dataset_path": str(flat),
        "taxonomy": str(flat.parent / "tree.csv"),
        "evaluators": ["pair_depth", "level_information"],
        "training_tokens": 64,
        "train_batch_size_tokens": 8,
        **SMALL_TOPK,
    }


def files(images: Any) -> set[str]:
    return {images.source(i) for i in range(len(images))}


@pytest.mark.parametrize(("share", "n"), [(0.2, 2), (0.5, 5), (0.01, 1), (0.99, 9)])
def test_a_part_has_its_share_of_every_class(share: float, n: int) -> None:
    labels = np.repeat(np.arange(4), 10)[np.random.default_rng(1).permutation(40)]
    held_out, rest = Part(share, 0, True).rows(labels), Part(share, 0, False).rows(labels)
    assert np.bincount(labels[held_out]).tolist() == [n] * 4
    assert sorted([*held_out, *rest]) == list(range(40))
    assert (Part(share, 0, True).rows(labels) == held_out).all()
    assert n == 9 or (Part(share, 1, True).rows(labels) != held_out).any()


def test_the_only_image_of_a_class_is_trained_on() -> None:
    assert Part(0.5, 0, True).rows(np.array([0, 1, 1])).tolist() in ([1], [2])


def test_a_hold_out_without_an_image_is_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    source = ImageSource(str(tmp_path), holdout=0.2, is_held_out=True)
    with pytest.raises(
        DataError, match=r"holdout: no class has images enough for both parts; given 0\.2"
    ):
        ImageDataset.of(source)


def test_max_images_counts_within_the_part(flat: Path) -> None:
    source = ImageSource(str(flat), holdout=0.2)
    images = load_images(flat).parted(source.part, 30)
    assert len(images) == 30 and len(images.labels) == 30
    held_out = load_images(flat).parted(source.part.other)
    assert len(held_out) == 16 and not files(images) & files(held_out)
    assert files(held_out.limited(7)) < files(held_out)


def test_train_and_evaluate_hold_out_the_same_images(
    settings: dict[str, Any], vit: Any, flat: Path, tmp_path: Path, caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        job = Job(gather(flags={**settings, "holdout": 0.2, "seed": 5}))
    assert "classes" not in caplog.text
    trained_on, held_out = job.runner.images, job.held_out.images
    assert len(trained_on) == 64 and len(held_out) == 16
    assert not files(trained_on) & files(held_out)
    assert files(trained_on) | files(held_out) == files(load_images(flat))
    assert np.bincount(held_out.labels).tolist() == [2] * 8
    plan = job.plan()
    assert plan["images"] == 64 and plan["evaluation"]["images"] == 16
    assert "16 images (train, 0.2 held out), 8 classes" in "\n".join(train_command.described(plan))
    job.train()
    results, _ = job.evaluate(progress=False)
    again = evaluate_run(
        settings["output_path"], override_model=vit, **FAST, output_path=tmp_path / "o"
    )
    for found in (results, again):
        assert found.dataset.n_images == 16 and not found.dataset.seen_in_training
        assert (found.dataset.holdout, found.dataset.holdout_seed) == (0.2, 0)
        assert found.dataset.fingerprint == held_out.fingerprint
        assert found.dataset.n_present == 8
        assert found.dataset.title == f"{flat} (train, 0.2 held out)"

    run = Path(settings["output_path"])
    cfg = json.loads((run / "cfg.json").read_text())
    assert cfg["metadata"]["holdout"] == 0.2 and cfg["metadata"]["n_images"] == 64
    given = {"override_model": vit, **FAST, "output_path": tmp_path / "other"}
    for changes in ({"split": "train"}, {"holdout": 0.3}, {"holdout_seed": 1}):
        with pytest.raises(ConfigError, match=r"output was trained on .*without the 0\.2 held out"):
            evaluate_run(run, **given, **changes)
    # The folder, moved: found again by its content. With an image more, the parts are others.
    moved = shutil.copytree(flat, tmp_path / "moved")
    found = evaluate_run(run, **given, dataset_path=str(moved))
    assert found.dataset.fingerprint == held_out.fingerprint
    Image.new("RGB", (16, 16)).save(moved / "animal_0" / "new.png")
    with pytest.raises(ConfigError, match=r"has other images than when .* was trained on"):
        evaluate_run(run, **given, dataset_path=str(moved))
    # The same images, given as an object; and others.
    found = evaluate_run(run, **given, override_dataset=load_images(flat))
    assert found.dataset.n_images == 16 and found.dataset.fingerprint == held_out.fingerprint
    with pytest.raises(
        ConfigError, match=r"64 of 81 held-out images are byte for byte images that"
    ):
        evaluate_run(run, **given, override_dataset=load_images(moved))
    given |= {"allow_train_split": True}
    others = evaluate_run(run, **given, override_dataset=load_images(moved))
    assert others.dataset.n_images == 81 and others.dataset.holdout is None


def test_a_hold_out_and_another_split_exclude_each_other(settings: dict[str, Any]) -> None:
    for name, value in (("eval_split", "test"), ("eval_dataset_path", "x"), ("streaming", True)):
        with pytest.raises(ConfigError, match=f"holdout: {name} is given too"):
            gather(flags={**settings, "holdout": 0.2, name: value}).draft()
    with pytest.raises(ConfigError, match=r"holdout: not possible; given 1\.5"):
        gather(flags={**settings, "holdout": 1.5}).draft()


def test_a_folder_without_held_out_split_names_the_flag(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"has no split validation or test.*--holdout 0\.2"):
        Job(gather(flags=settings))


def test_a_single_class_says_so(
    settings: dict[str, Any], flat: Path, tmp_path: Path, caplog: Any
) -> None:
    shutil.copytree(next(flat.iterdir()), tmp_path / "photos" / "fir")
    (tmp_path / "tree.csv").write_text("plant,fir\nplant,oak\n")
    given = {"dataset_path": f"{tmp_path}/photos", "taxonomy": f"{tmp_path}/tree.csv"}
    with caplog.at_level(logging.WARNING):
        Job(gather(flags={**settings, **given, "holdout": 0.2}))
    assert "has one class, fir: numbers about the tree need several." in caplog.text


@pytest.mark.parametrize(
    ("n", "said"),
    [
        (3, r"images of (\d) of its 8 classes; .* is 3: without it (\d) more .* have 1 or more\."),
        (79, None),
    ],
)
def test_classes_that_max_images_leaves_out_are_laid_to_it(
    flat: Path, caplog: Any, n: int, said: str | None
) -> None:
    source = ImageSource(str(flat), max_images=n)
    with caplog.at_level(logging.WARNING):
        HeldOut.load(source, str(flat.parent / "tree.csv"))
    assert "--holdout" not in caplog.text
    found = re.search(said, caplog.text) if said else None
    assert bool(found) == bool(said)
    assert found is None or int(found[1]) + int(found[2]) == 8


def test_a_class_of_which_max_images_leaves_one_image_is_named(tmp_path: Path, caplog: Any) -> None:
    class_folders(tmp_path / "photos", {"cat": list(range(9)), "dog": list(range(9))})
    (tmp_path / "tree.csv").write_text("animal,cat\nanimal,dog\n")
    source = ImageSource(str(tmp_path / "photos"))
    images = load_images(tmp_path / "photos")
    n = next(n for n in range(2, 18) if min(np.bincount(images.limited(n).labels)) == 1)
    with caplog.at_level(logging.WARNING):
        HeldOut.load(replace(source, max_images=n), str(tmp_path / "tree.csv"))
    assert "its numbers need two. max_images (in training eval_max_images) is" in caplog.text


def test_a_slice_without_most_classes_says_so(
    settings: dict[str, Any], flat: Path, caplog: Any
) -> None:
    given = {**settings, "split": "train[:75%]", "eval_split": "train[75%:]"}
    with caplog.at_level(logging.WARNING):
        job = Job(
            gather(
                flags={
                    **given,
                    "evaluators": [
                        "pair_depth",
                        "lch_height",
                        "level_information",
                        "ontological_coverage",
                    ],
                }
            )
        )
    assert "images of 2 of its 8 classes" in caplog.text and "--holdout 0.2" in caplog.text
    plan = job.plan()
    assert plan["evaluation"]["classes_with_images"] == 2
    assert "2 of 8 classes" in "\n".join(train_command.described(plan))
    job.train()
    results, report = job.evaluate(progress=False)
    assert "8 classes (2 with images)" in report.read_text()
    undefined = 0
    for metric in headlines(results):
        found = results.saes[0].evaluators[metric.evaluator]
        if math.isnan(found.metrics[metric.metric].value):
            undefined += 1
            label = results.label(metric.evaluator, metric.metric)
            said = [n for n in found.notes if label in n and "only 2 of 8 classes have images" in n]
            assert len(said) == 1, metric
    assert undefined


def twice(flat: Path, folder: Path) -> str:
    """The same pictures as `train` and as `validation`."""
    for split in ("train", "validation"):
        shutil.copytree(flat, folder / split)
    return str(folder)


def test_training_images_among_the_held_out_are_refused_before_the_training(
    settings: dict[str, Any], flat: Path, tmp_path: Path
) -> None:
    slices = {"split": "train[:80%]", "eval_split": "train[70%:]"}
    said = (
        r"eval_split: the SAE would be trained on .*\(train\[:80%\]\), and these are the images it "
        r"would be evaluated on: .*\(train\[70%:\]\); allowed: a held-out split"
    )
    with pytest.raises(ConfigError, match=said):
        Job(gather(flags={**settings, **slices}))
    said = r"would be trained on .*\(train\), and these are the images .*\(validation\)"
    with pytest.raises(ConfigError, match=said):
        Job(gather(flags={**settings, "dataset_path": twice(flat, tmp_path / "photos")}))
    Job(gather(flags={**settings, "split": "train[:80%]", "eval_split": "train[80%:]"}))
    Job(gather(flags={**settings, **slices}), evaluate=False)


def test_evaluators_of_the_training_refuse_them_too(
    training: Any, flat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cfg = training.single(
        dataset_path=twice(flat, tmp_path / "photos"),
        taxonomy=str(flat.parent / "tree.csv"),
        evaluators=["pair_depth"],
        logger=LoggingConfig(log_to_wandb=True),
    )
    runner = training.runner(cfg, override_dataset=None)
    with pytest.raises(ConfigError, match=r"eval_split: the SAE would be trained on"):
        runner.run()
    assert not training.output.exists()


@pytest.mark.parametrize(
    ("one", "other", "share_images"),
    [
        ("train[:75%]", "train[75%:]", False),
        ("train[:75%]", "train[50%:]", True),
        ("train[:10]+train[20:30]", "train[10:20]", False),
        ("train[:10]+train[20:30]", "train[25:40]", True),
        ("train", "train[:1]", True),
    ],
)
def test_slices_that_share_images_overlap(
    one: str, other: str, share_images: bool, flat: Path
) -> None:
    first, second = (ImageSource(str(flat), split=split) for split in (one, other))
    assert overlap(first, second) is overlap(second, first) is share_images


def test_hold_outs_overlap_with_all_but_their_other_part(flat: Path, tmp_path: Path) -> None:
    trained_on = ImageSource(str(flat), holdout=0.2)
    held_out = ImageSource(str(flat), holdout=0.2, is_held_out=True)
    assert not overlap(trained_on, held_out)
    assert overlap(trained_on, ImageSource(str(flat)))
    assert overlap(trained_on, ImageSource(str(flat), holdout=0.3, is_held_out=True))
    assert overlap(ImageSource(str(flat)), held_out)
    class_folders(tmp_path, {"cat": [1, 2], "dog": [3, 4]})
    assert not overlap(trained_on, ImageSource(str(tmp_path)))


MOST = {"holdout": 0.2}
HALF = {"split": "train[:50%]", "max_images": 20}
PART = {"is_held_out": True}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("trained_on", "evaluated_on", "share_images"),
    [
        ({}, {"holdout": 0.2, **PART}, True),
        ({}, {"split": "train[:25%]"}, True),
        (MOST, {}, True),
        (MOST, {"holdout": 0.5, **PART}, True),
        (MOST, {"holdout": 0.2, "holdout_seed": 1, **PART}, True),
        (MOST, {"holdout": 0.2, **PART}, False),
        (MOST, {"holdout": 0.2, "jpeg_edge": 8, **PART}, False),
        ({"max_images": 20}, {"holdout": 0.2, **PART}, True),
        (HALF, {"holdout": 0.2, **PART}, True),
        (HALF, {"split": "train[45%:]"}, True),
        (HALF, {"split": "train[50%:]"}, False),
        ({"streaming": True}, {"holdout": 0.2, **PART}, True),
        ({"label_column": "label"}, {"holdout": 0.2, **PART}, True),
    ],
)
def test_training_images_are_found_again_where_the_folder_was_moved(
    trained_on: dict[str, Any],
    evaluated_on: dict[str, Any],
    share_images: bool,
    given: bool,
    moved: Path,
    flat: Path,
) -> None:
    """As SAEs record them that were handed on without the settings of their run."""
    source = ImageSource(str(flat), **trained_on)
    images = ImageDataset.of(source)
    recorded = dict.fromkeys(RECORDED_SETTINGS) | {"streaming": source.streaming, **trained_on}
    recorded |= {"dataset_path": str(flat), "dataset_fingerprint": images.fingerprint}
    recorded |= {} if images.is_streaming else {"n_images": len(images)}
    recorded |= {} if images.is_streaming else {"max_images": None}
    sae = SAEFolder("sae", "sae", "sae", moved, {"metadata": recorded}, {})
    tree = str(flat.parent / "tree.csv")
    held_out = HeldOut.load(ImageSource(str(moved), **evaluated_on), tree)
    if given:  # in place of a dataset: only the images say what they are
        if {"split", "streaming"} & {*trained_on, *evaluated_on}:
            pytest.skip("of a split that is not known")
        held_out = replace(held_out, source=ImageSource("photos", split="given"))
    if not share_images:
        assert not check_held_out([sae], held_out, allow=False)
        return
    with pytest.raises(ConfigError, match=r"sae was trained on .*, and these are the images"):
        check_held_out([sae], held_out, allow=False)


@pytest.fixture(scope="module")
def moved(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(flat, tmp_path_factory.mktemp("elsewhere") / "moved")


def test_other_images_in_a_folder_of_the_same_classes_are_held_out(
    flat: Path, tmp_path: Path
) -> None:
    for i, name in enumerate(WORLD_CLASSES):
        (place := tmp_path / "photos" / Path(name).name).mkdir(parents=True)
        for j in range(10):
            Image.new("RGB", (16, 16), (i, j, 0)).save(place / f"{j}.png")
    held_out = HeldOut.load(ImageSource(str(tmp_path / "photos")), str(flat.parent / "tree.csv"))
    for trained_on in ({}, HALF, MOST, {"streaming": True}):
        source = ImageSource(str(flat), **trained_on)
        print_of = ImageDataset.of(source).fingerprint
        assert seen_in_training("", source, print_of, None, held_out) is None


def test_it_is_said_where_the_training_images_are_unknown(
    settings: dict[str, Any], vit: Any, flat: Path, tmp_path: Path, caplog: Any
) -> None:
    """As of an SAE that SAELens has trained alone."""
    Job(gather(flags=settings), evaluate=False).train()
    run = Path(settings["output_path"])
    cfg = json.loads((run / "cfg.json").read_text())
    names = ("model_name", "hook_name", "tokens")
    cfg["metadata"] = {name: cfg["metadata"][name] for name in names}
    (run / "cfg.json").write_text(json.dumps(cfg))
    (run / "runner_cfg.json").unlink()
    given = {"dataset_path": str(flat), "taxonomy": settings["taxonomy"], "split": "train"}
    given |= {"override_model": vit, **FAST, "evaluators": ["pair_depth"]}
    results = evaluate_run(run, **given, output_path=tmp_path / "all")
    assert "holdout: " not in caplog.text
    evaluate_run(run, **given, holdout=0.3)
    assert "holdout: it is not known which images output were trained on" in caplog.text
    assert results.dataset.training_known is False
    results = Results.load(run)
    assert results.dataset.training_known is False and not results.dataset.seen_in_training
    assert "Perhaps not held out" in write_report(results, interactive=False).read_text()
    publish(run, "me/saes", dry_run=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It is not known whether the SAEs were trained on them." in card
    older = json.loads((run / "results.json").read_text())
    del older["dataset"]["training_known"]
    (run / "results.json").write_text(json.dumps(older))
    assert Results.load(run).dataset.training_known is None


def copied(flat: Path, folder: Path, n: int) -> tuple[Path, set[str]]:
    """The pictures, and copies of `n` training images of a fifth held out: they are held out by name."""
    photos = shutil.copytree(flat, folder / "photos")
    part = Part(0.2, 0, True)
    held_out, rest = (load_images(photos).parted(p) for p in (part, part.other))
    named = [(photos / held_out.source(i), photos / rest.source(i)) for i in range(n)]
    for place, of in named:
        shutil.copyfile(of, place)
    return photos, {f"{place} and {of}" for place, of in named}


def test_a_copy_of_a_training_image_among_the_held_out_is_named(
    settings: dict[str, Any], vit: Any, flat: Path, tmp_path: Path, caplog: Any
) -> None:
    photos, pairs = copied(flat, tmp_path, 1)
    given = {"dataset_path": str(photos), "holdout": 0.3}
    said = r"(\d) of (\d\d) held-out images are byte for byte images that are trained on, such as (.*)\."
    job = Job(gather(flags={**settings, **given}))
    n = {(photos / job.held_out.images.source(i)) for i in range(24)} & {
        Path(part) for pair in pairs for part in pair.split(" and ")
    }
    assert len(n) == 1  # of the larger hold-out too, which is of the same permutation
    found = re.search(said, caplog.text)
    assert found and found[1] == "1" and found[2] == "24" and found[3] in pairs
    caplog.clear()
    job.train()
    results, report = job.evaluate(progress=False)
    assert re.search(said, caplog.text)
    data = results.dataset
    assert (data.n_also_trained_on, data.n_compared, data.seen_in_training) == (1, 24, False)
    assert "Copies of training images" in report.read_text()
    caplog.clear()
    other = {**settings, "holdout": 0.3, "output_path": str(tmp_path / "other")}
    clean = Job(gather(flags=other))
    assert "byte for byte" not in caplog.text and len(clean.held_out.images) == 24


def test_many_copies_are_refused_before_the_training_and_in_the_evaluation(
    settings: dict[str, Any], vit: Any, flat: Path, tmp_path: Path
) -> None:
    photos, pairs = copied(flat, tmp_path, 2)
    given = {**settings, "dataset_path": str(photos), "holdout": 0.2}
    said = r"2 of 16 held-out .* trained on, such as (.*); allowed: at most 5% of them"
    with pytest.raises(ConfigError, match=rf"eval_split: .*{said}.*--no_evaluate") as error:
        Job(gather(flags=given))
    assert re.search(said, str(error.value))[1] in pairs  # type: ignore[index]
    Job(gather(flags=given), evaluate=False).train()
    run = settings["output_path"]
    measured = {"override_model": vit, **FAST, "evaluators": ["pair_depth"]}
    with pytest.raises(ConfigError, match=rf"split: .*{said}.*--allow_train_split"):
        evaluate_run(run, **measured)
    data = evaluate_run(run, **measured, allow_train_split=True).dataset
    assert (data.n_also_trained_on, data.n_compared, data.seen_in_training) == (2, 16, False)


def test_copies_in_another_split_are_found_where_the_training_images_are_still_there(
    settings: dict[str, Any], vit: Any, flat: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(flat, photos / "train")
    for i, name in enumerate(WORLD_CLASSES):
        (place := photos / "val" / Path(name).name).mkdir(parents=True)
        for j in range(3):
            Image.new("RGB", (16, 16), (i, j, 0)).save(place / f"{j}.png")
    shutil.copyfile(next((photos / "train").rglob("*.png")), place / "copy.png")
    job = Job(gather(flags={**settings, "dataset_path": str(photos)}))
    job.train()
    measured = {"override_model": vit, **FAST, "evaluators": ["pair_depth"]}
    data = evaluate_run(settings["output_path"], **measured).dataset
    assert (data.n_also_trained_on, data.n_compared) == (1, 25)
    (photos / "train" / Path(name).name / "0.png").write_bytes(b"others by now")
    given = {**measured, "output_path": tmp_path / "again"}
    assert evaluate_run(settings["output_path"], **given).dataset.n_compared is None
