"""How a run's dataset settings reach every place that reads images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from taxolens.hooks.images.source import ImageSource
from taxolens.plugin.evaluation.evaluate import evaluate_run, make_training_evaluator
from taxolens.plugin.study.job import Job
from taxolens.plugin.study.settings import gather
from taxolens.plugin.training.runner import VisionSAETrainingRunner
from taxolens.registry.errors import ConfigError
from tiny_images import hf_dataset, noise

CLASSES = ("ant", "bee", "oak", "elm")
EVALUATORS = ["ontological_coverage"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a card, its pictures of four classes in a training and a held-out split."""
    folder = tmp_path_factory.mktemp("repository")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for seed, (split, n) in enumerate({"train": 8, "validation": 16}.items()):
        data = hf_dataset(n, names=CLASSES, draw=lambda i, seed=seed: noise(1000 * seed + i))
        data.to_parquet(folder / f"{split}.parquet")
        card += f"  - {{split: {split}, path: {split}.parquet}}\n"
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
        "taxonomy": str(repository / "tree.csv"),
        "evaluators": EVALUATORS,
        "architecture": "topk",
        "d_sae": 32,
        "k": 4,
        "checkpoint_path": None,
        "log_to_wandb": False,
        "verbose": False,
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


def test_trust_in_remote_code_reaches_every_place(
    train: Any, asked: list[dict[str, Any]], vit: Any
) -> None:
    what = ("split", "trust_remote_code")
    job = train(dataset_trust_remote_code=True)
    assert reads(asked, *what) == [("validation", True), ("train", True)]
    cfg = job.runner.cfg
    VisionSAETrainingRunner(cfg, override_model=vit)
    assert reads(asked, *what) == [("train", True)]
    make_training_evaluator(cfg, vit)
    assert reads(asked, *what) == [("validation", True)]
    job.evaluate(progress=False)
    assert reads(asked, *what) == [("validation", True)]
    evaluate_run(cfg.output_path, override_model=vit, progress=False, n_permutations=1)
    assert reads(asked, *what) == [("validation", True)]


def test_without_trust_none_is_given(train: Any, asked: list[dict[str, Any]], vit: Any) -> None:
    job = train(dataset_trust_remote_code=False)
    job.evaluate(progress=False)
    assert reads(asked, "split", "trust_remote_code") == [
        ("validation", None),
        ("train", None),
        ("validation", None),
    ]


def test_decoding_settings_reach_the_evaluation_of_the_same_job(
    train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taxolens.plugin.study import job as module

    def evaluate(*_: Any, **given: Any) -> Any:
        raise InterruptedError({k: given[k] for k in ("batch_size", "max_corrupt_share")})

    monkeypatch.setattr(module, "evaluate_run", evaluate)
    with pytest.raises(InterruptedError, match=r"'batch_size': 5, 'max_corrupt_share': 0.25"):
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


def test_runs_that_trust_differently_are_evaluated_together(train: Any, vit: Any) -> None:
    one = train(dataset_trust_remote_code=True)
    other = train(dataset_trust_remote_code=False, output_path=f"{one.runner.cfg.output_path}_2")
    folders = [job.runner.cfg.output_path for job in (one, other)]
    common = {"override_model": vit, "progress": False, "n_permutations": 1}
    results = evaluate_run(folders, output_path=f"{folders[0]}_both", **common)
    assert len(results.saes) == 2
    third = train(eval_split="train[:50%]", output_path=f"{folders[0]}_3").runner.cfg.output_path
    with pytest.raises(ConfigError, match="split: the runs have different ones"):
        evaluate_run([*folders, third], output_path=f"{folders[0]}_all", **common)
