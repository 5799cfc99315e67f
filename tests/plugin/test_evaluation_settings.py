"""The options of an evaluation: one dataclass for Python and for the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import taxolens
from taxolens.plugin.commands import evaluate as command
from taxolens.plugin.evaluation import evaluate as module
from taxolens.registry.errors import ConfigError

FIELDS = {field.name: field for field in dataclasses.fields(taxolens.EvaluationSettings)}
# A value other than the default for every option, as words on the command line and in Python.
VALUES: dict[str, tuple[list[str], Any]] = {
    "evaluators": (["pair_depth", "lch_height"], ["pair_depth", "lch_height"]),
    "options": (['{"pair_depth": {"k": 4}}'], {"pair_depth": {"k": 4}}),
    "taxonomy": (["imagenet"], "imagenet"),
    "model_name": (["vit"], "vit"),
    "hook_name": (["blocks.3.hook_resid_post"], "blocks.3.hook_resid_post"),
    "hook_head_index": (["3"], 3),
    "tokens": (["patch"], "patch"),
    "image_size": (["32"], 32),
    "aggregate": (["mean"], "mean"),
    "dataset_path": (["photos"], "photos"),
    "dataset_name": (["large"], "large"),
    "split": (["test"], "test"),
    "holdout": (["0.25"], 0.25),
    "holdout_seed": (["3"], 3),
    "image_column": (["picture"], "picture"),
    "label_column": (["class"], "class"),
    "max_images": (["7"], 7),
    "allow_train_split": ([], True),
    "nulls": (["random"], ["random"]),
    "controls": (["planted"], ["planted"]),
    "n_permutations": (["3"], 3),
    "n_twins": (["2"], 2),
    "n_groups": (["4"], 4),
    "seed": (["5"], 5),
    "output_path": (["out"], "out"),
    "replace": ([], True),
    "device": (["cuda:1"], "cuda:1"),
    "batch_size": (["8"], 8),
    "num_workers": (["2"], 2),
    "max_corrupt_share": (["0.5"], 0.5),
    "max_image_pixels": (["1000"], 1000),
    "jpeg_edge": (["256"], 256),
    "remote_images": ([], True),
    "trust_remote_code": ([], True),
    "keep_activations": ([], True),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[taxolens.EvaluationSettings]:
    """The settings with which evaluations begin; they stop there."""
    seen: list[taxolens.EvaluationSettings] = []

    def stop(names: Any, options: Any, saes: Any = ()) -> None:
        raise InterruptedError

    override = taxolens.EvaluationSettings.override

    def recording(self: Any, **options: Any) -> Any:
        seen.append(override(self, **options))
        return seen[-1]

    monkeypatch.setattr(taxolens.EvaluationSettings, "override", recording)
    monkeypatch.setattr(module, "find_sources", lambda runs: [])
    monkeypatch.setattr(module, "choose_evaluators", stop)
    return seen


def test_every_option_has_a_flag_and_reaches_the_evaluation(asked: list[Any]) -> None:
    assert set(FIELDS) == {*VALUES, *command.WITHOUT_FLAG}, "a field without a value in this test"
    words = ["run"]
    for name, (given, value) in VALUES.items():
        assert value != FIELDS[name].default, name
        words += [f"--{name}", *given]
    with pytest.raises(InterruptedError):
        command.run(words)
    assert asked == [
        taxolens.EvaluationSettings(**{name: value for name, (_, value) in VALUES.items()})
    ]


def test_what_is_not_typed_keeps_its_default(asked: list[Any]) -> None:
    with pytest.raises(InterruptedError):
        command.run(["run"])
    assert asked == [taxolens.EvaluationSettings()]


def test_every_option_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in VALUES:
        assert f"--{name} " in text
        assert f"        {name}: " in str(taxolens.EvaluationSettings.__doc__)
    assert "--progress" not in text
    assert "draws of the permuted classes; a verdict needs 19; by default 99" in text
    assert "by default permuted_classes shuffled random neurons" in text


def test_keywords_are_laid_over_settings(asked: list[Any], tmp_path: Path) -> None:
    settings = taxolens.EvaluationSettings(seed=3, n_permutations=2)
    for given in ((), (settings,)):
        with pytest.raises(InterruptedError):
            taxolens.evaluate_run(tmp_path, *given, seed=4, evaluators="pair_depth")
    assert [(s.seed, s.n_permutations, s.evaluators) for s in asked] == [
        (4, 99, "pair_depth"),
        (4, 2, "pair_depth"),
    ]
    assert settings.seed == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 5  # type: ignore[misc]


def test_wrong_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'n_permutations'.*given 'n_permutation';"):
        taxolens.evaluate_run(tmp_path, n_permutation=3)
    for options, message in (
        ({"nulls": ["shufled"]}, "nulls: not known .did you mean 'shuffled'.*given 'shufled'"),
        ({"controls": ["palnted"]}, "controls: not known .did you mean 'planted'.*given 'palnted'"),
        ({"aggregate": "sum"}, "aggregate: not known; given 'sum'; allowed: max, mean"),
        ({"n_permutations": 0}, "n_permutations: not possible; given 0; allowed: 1 to"),
        (
            {"holdout": 1.0},
            "holdout: not possible; given 1.0; allowed: a number above 0 and below 1",
        ),
        ({"n_groups": 2}, "n_groups: not possible; given 2; allowed: 0, or 3 to 1,000"),
        ({"n_groups": 10**6}, "n_groups: not possible; given 1000000; allowed: 0, or 3 to 1,000"),
    ):
        with pytest.raises(ConfigError, match=message):
            taxolens.EvaluationSettings(**options)
