"""How a run's dataset settings reach every place that reads images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import wandb
from taxolens.hooks.images.dataset import ImageDataset, load_images
from taxolens.hooks.images.source import ImageSource
from taxolens.plugin.commands import evaluate as evaluate_command
from taxolens.plugin.commands import train_flags
from taxolens.plugin.evaluation.evaluate import (
    TrainingEvaluator,
    evaluate_run,
    make_training_evaluator,
)
from taxolens.plugin.evaluation.held_out import HeldOut
from taxolens.plugin.study.job import Job
from taxolens.plugin.study.settings import gather
from taxolens.plugin.training.runner import VisionSAETrainingRunner
from taxolens.registry.errors import ConfigError
from taxolens.registry.taxonomies import load
from tiny_images import hf_dataset, noise
from tiny_runs import SMALL_TOPK

CLASSES = ("ant", "bee", "oak", "elm")
SIZES = {"small": 10, "large": 20}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a card: "small" and "large" pictures of four classes, both with a training and
    a held-out split."""
    folder = tmp_path_factory.mktemp("repository")
    card = "---\nconfigs:\n"
    for seed, (name, size) in enumerate(SIZES.items()):
        card += f"- config_name: {name}\n  data_files:\n"
        for split, n in {"train": 8, "validation": 16}.items():
            first = 1000 * seed + n
            data = hf_dataset(n, CLASSES, draw=lambda i: noise(first + i, (size, size)))  # noqa: B023
            data.to_parquet(folder / f"{name}-{split}.parquet")
            card += f"  - {{split: {split}, path: {name}-{split}.parquet}}\n"
    (folder / "README.md").write_text(card + "---\n")
    (folder / "tree.csv").write_text(
        "parent,child\nanimal,ant\nanimal,bee\nplant,oak\nplant,elm\nthing,animal\nthing,plant\n"
    )
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `datasets.load_dataset` was asked for, call by call."""
    calls: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def recording(path: str, name: str | None = None, **options: Any) -> Any:
        calls.append({"path": path, "name": name, **options})
        return load(path, name, **options)

    monkeypatch.setattr("datasets.load_dataset", recording)
    return calls


@pytest.fixture
def settings(training: Any, repository: Path) -> dict[str, Any]:
    """Of a run on the training split of that dataset."""
    base = training.single()
    names = ("model_name", "training_tokens", "train_batch_size_tokens", "store_batch_size_prompts")
    return {
        **{name: getattr(base, name) for name in (*names, "hook_name", "output_path")},
        "dataset_path": str(repository),
        "dataset_name": "large",
        "taxonomy": str(repository / "tree.csv"),
        "evaluators": ["ontological_coverage"],
        **SMALL_TOPK,
    }


@pytest.fixture
def train(settings: dict[str, Any]) -> Callable[..., Job]:
    """A job with more settings, trained."""

    def call(**changes: Any) -> Job:
        job = Job(gather(flags={**settings, **changes}))
        job.train()
        return job

    return call


def reads(calls: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    """The named arguments of the calls since the last look."""
    found = [tuple(call.get(name) for name in names) for call in calls]
    calls.clear()
    return found


def test_trust_and_configuration_reach_every_place(
    train: Any, asked: list[dict[str, Any]], vit: Any
) -> None:
    what = ("name", "split", "trust_remote_code")
    training, held_out = ("large", "train", True), ("large", "validation", True)
    job = train(dataset_trust_remote_code=True)
    assert reads(asked, *what) == [held_out, training]
    cfg = job.runner.cfg
    VisionSAETrainingRunner(cfg, override_model=vit)
    assert reads(asked, *what) == [training]
    make_training_evaluator(cfg, vit)
    assert reads(asked, *what) == [held_out]
    results, _ = job.evaluate(progress=False)
    assert reads(asked, *what) == []  # the job has read them
    assert results.dataset.title == f"{cfg.dataset_path} (large, validation)"
    assert not results.dataset.seen_in_training
    common = {"override_model": vit, "progress": False, "n_permutations": 1}
    evaluate_run(cfg.output_path, **common)  # what the run's files say gives no trust
    assert reads(asked, *what) == [("large", "validation", None)]
    folder = f"{cfg.output_path}_trusted"
    evaluate_run(cfg.output_path, trust_remote_code=True, output_path=folder, **common)
    assert reads(asked, *what) == [held_out]


@pytest.fixture
def wandb_disabled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B reads its environment once; later tests find it as if it had not been used."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    yield
    wandb.teardown()


@pytest.mark.usefixtures("wandb_disabled")
def test_a_job_reads_each_split_and_the_tree_once(
    train: Any, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan, the evaluator in the training and the evaluation after it share them."""
    trees: list[Path] = []
    opened: list[ImageSource] = []
    measured: list[str] = []
    from_file, of, measure = load.from_file, ImageDataset.of, TrainingEvaluator.measure

    def read_tree(path: Path, classes: Any) -> Any:
        trees.append(path)
        return from_file(path, classes)

    def open_images(source: ImageSource) -> ImageDataset:
        opened.append(source)
        return of(source)

    def measure_in_training(self: Any, sae: Any, hook_name: str, *scaler: Any) -> Any:
        measured.append(hook_name)
        return measure(self, sae, hook_name, *scaler)

    monkeypatch.setattr(load, "from_file", read_tree)
    monkeypatch.setattr(ImageDataset, "of", open_images)
    monkeypatch.setattr(TrainingEvaluator, "measure", measure_in_training)
    job = train(log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=5)
    job.plan()
    results, _ = job.evaluate(progress=False)
    assert measured and results.errors == {} and results.dataset.n_images == 16
    assert reads(asked, "split") == [("validation",), ("train",)]
    assert [source.split for source in opened] == ["validation", "train"]
    assert len(trees) == 1


def test_the_training_evaluator_takes_the_images_that_it_would_load(
    training: Any, repository: Path, vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = training.single(
        dataset_path=str(repository),
        dataset_name="large",
        taxonomy=str(repository / "tree.csv"),
        evaluators=["ontological_coverage"],
    )
    whole = HeldOut.load(cfg.held_out_source, cfg.taxonomy)
    cfg.eval_max_images = 9
    shared = make_training_evaluator(cfg, vit, whole).held_out[cfg.hook_name]
    loaded = make_training_evaluator(cfg, vit).held_out[cfg.hook_name]
    assert len(shared) == 9 and np.array_equal(shared.tokens, loaded.tokens)
    assert np.array_equal(shared.split.labels, loaded.split.labels)
    limited = whole.limited(9).images
    assert limited.fingerprint == HeldOut.load(cfg.held_out_source, cfg.taxonomy).images.fingerprint
    assert whole.limited(100) is whole
    # Without a number as many of each class, and not fewer than the evaluators need.
    cfg.eval_max_images = None
    n_classes = len(whole.taxonomy.classes)
    module = "taxolens.plugin.evaluation.training_evaluator"
    for most, least, expected in ((3 * n_classes + 1, 1, 3), (n_classes, 2, 2), (10**6, 1, 10**6)):
        monkeypatch.setattr(f"{module}.MAX_TRAINING_IMAGES", most)
        monkeypatch.setattr(f"{module}.LEAST_OF_A_CLASS", least)
        labels = make_training_evaluator(cfg, vit, whole).held_out[cfg.hook_name].split.labels
        every = np.bincount(whole.images.labels)
        assert np.bincount(labels).tolist() == np.minimum(every, expected).tolist()


def test_the_configuration_is_recorded_in_the_metadata_of_the_sae(train: Any, vit: Any) -> None:
    cfg = train().runner.cfg
    (Path(cfg.output_path) / "runner_cfg.json").unlink()
    common = {"override_model": vit, "progress": False, "n_permutations": 1}
    assert evaluate_run(cfg.output_path, **common).dataset.name == "large"
    other = evaluate_run(cfg.output_path, dataset_name="small", **common)
    assert other.dataset.name == "small"


def test_without_trust_none_is_given(train: Any, asked: list[dict[str, Any]], vit: Any) -> None:
    job = train(dataset_trust_remote_code=False)
    job.evaluate(progress=False)
    assert reads(asked, "split", "trust_remote_code") == [("validation", None), ("train", None)]


def test_decoding_settings_reach_the_evaluation_of_the_same_job(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taxolens.plugin.study import job as module

    def evaluate(*_: Any, **given: Any) -> Any:
        raise InterruptedError(given["held_out"].source.decoding)

    monkeypatch.setattr(module, "evaluate_run", evaluate)
    expected = "'batch_size': 5, 'num_workers': None, 'max_corrupt_share': 0.25"
    with pytest.raises(InterruptedError, match=expected):
        train(max_corrupt_share=0.25, store_batch_size_prompts=5).evaluate()


def run_settings(**settings: Any) -> Callable[[str], Any]:
    return settings.get


def test_held_out_images_are_those_of_the_run_but_for_its_eval_settings() -> None:
    trained = run_settings(
        dataset_path="photos",
        split="train[:90%]",
        image_column="picture",
        max_images=7,
        streaming=True,
        dataset_trust_remote_code=True,
        store_batch_size_prompts=5,
        num_workers=2,
    )
    source = ImageSource.of(trained)
    assert source == ImageSource(
        "photos",
        split="train[:90%]",
        image_column="picture",
        max_images=7,
        streaming=True,
        trust_remote_code=True,
        batch_size=5,
        num_workers=2,
    )
    held_out = source.held_out(trained)
    assert (held_out.split, held_out.max_images, held_out.streaming) == (None, None, False)
    assert (held_out.dataset_path, held_out.image_column) == ("photos", "picture")
    assert held_out.trust_remote_code and held_out.num_workers == 2
    evaluated = run_settings(eval_dataset_path="other", eval_split="test", eval_max_images=3)
    other = source.held_out(evaluated)
    assert (other.title, other.max_images) == ("other (test)", 3)
    assert source.held_out(evaluated, split="val", label_column=None).title == "other (val)"


def test_same_images_are_of_the_same_split_of_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    source = ImageSource("photos")
    assert source.same_images(ImageSource(str(tmp_path / "photos"), batch_size=3))
    assert not source.same_images(ImageSource("photos", split="test"))
    assert source.same_dataset(ImageSource("photos", split="test"))
    assert not source.same_dataset(ImageSource("pictures"))
    assert not source.same_dataset(ImageSource("photos", "large"))


def test_another_configuration_of_the_split_trained_on_is_held_out(
    train: Any, asked: list[dict[str, Any]], vit: Any
) -> None:
    cfg = train(eval_dataset_name="small", eval_split="train").runner.cfg
    assert reads(asked, "name", "split") == [("small", "train"), ("large", "train")]
    make_training_evaluator(cfg, vit)
    assert reads(asked, "name", "split") == [("small", "train")]
    common = {"override_model": vit, "progress": False, "n_permutations": 1}
    assert not evaluate_run(cfg.output_path, **common).dataset.seen_in_training
    with pytest.raises(ConfigError, match=r"was trained on .* \(large, train\)"):
        evaluate_run(cfg.output_path, dataset_name="large", **common)
    cfg.eval_dataset_name = None
    with pytest.raises(ConfigError, match="eval_split: trained on; given 'train'"):
        make_training_evaluator(cfg, vit)


def test_a_configuration_counts_for_the_dataset_it_is_given_with() -> None:
    trained = run_settings(dataset_path="photos", dataset_name="large")
    source = ImageSource.of(trained)
    assert source.title == "photos (large, train)" and source.dataset == "photos/large"
    assert source.held_out(trained).name == "large"
    assert source.held_out(trained, dataset_path="other").name is None
    assert source.held_out(trained, dataset_path="other", name="few").name == "few"
    elsewhere = run_settings(eval_dataset_path="other", eval_dataset_name="few")
    assert source.held_out(elsewhere).dataset == "other/few"
    assert source.held_out(elsewhere, name="many").dataset == "other/many"
    assert source.held_out(elsewhere, dataset_path="third").dataset == "third"
    assert source.held_out(run_settings(eval_dataset_path="other")).dataset == "other"


def test_a_dataset_without_configurations_refuses_one(tmp_path: Path) -> None:
    data = hf_dataset(3)
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "data.parquet", tmp_path / "*.parquet", tmp_path / "saved"):
        with pytest.raises(ConfigError, match=r"dataset_name: .* has no configurations; given 'a'"):
            load_images(path, name="a")


def test_the_configuration_is_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--dataset_path", "photos", "--dataset_name", "large", "--hook_name", "blocks.0"]
    study = train_flags.parse([*flags, "--model_name", "vit", "--eval_dataset_name", "small"]).study
    assert (study.runner["dataset_name"], study.runner["eval_dataset_name"]) == ("large", "small")

    def evaluate(*_: Any, dataset_name: str, **__: Any) -> Any:
        raise ConfigError(f"dataset_name is {dataset_name}")

    monkeypatch.setattr("taxolens.plugin.evaluation.evaluate.evaluate_run", evaluate)
    with pytest.raises(ConfigError, match="dataset_name is large"):
        evaluate_command.run(["runs/one", "--dataset_name", "large"])


def test_two_configurations_have_two_default_caches(training: Any) -> None:
    one, other = (
        training.single(use_cached_activations=True, dataset_path="photos", dataset_name=name)
        for name in (None, "large")
    )
    assert Path(one.cached_activations_path).parts[:2] == ("activations", "photos")
    assert Path(other.cached_activations_path).parts[:2] == ("activations", "photos_large")


def test_runs_that_trust_differently_are_evaluated_together(train: Any, vit: Any) -> None:
    one = train(dataset_trust_remote_code=True)
    other = train(dataset_trust_remote_code=False, output_path=f"{one.runner.cfg.output_path}_2")
    folders = [job.runner.cfg.output_path for job in (one, other)]
    common = {"override_model": vit, "progress": False, "n_permutations": 1}
    results = evaluate_run(folders, output_path=f"{folders[0]}_both", **common)
    assert len(results.saes) == 2
    third = train(
        eval_split="validation[:50%]", output_path=f"{folders[0]}_3"
    ).runner.cfg.output_path
    with pytest.raises(ConfigError, match="split: the runs have different ones"):
        evaluate_run([*folders, third], output_path=f"{folders[0]}_all", **common)
