"""An evaluator that raises costs its own numbers only, whoever wrote it and wherever it raises."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import taxolens
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from taxolens.hooks.images.dataset import ImageDataset
from taxolens.plugin import cli, manager
from taxolens.plugin.evaluation.evaluate import evaluate_run, make_training_evaluator
from taxolens.plugin.evaluation.held_out import HeldOut
from taxolens.plugin.reporting.report import write_report
from taxolens.plugin.reporting.results import Results, SAEResult
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.base import Accumulator
from taxolens.registry.evaluators.parts.accumulators import FiringRate, TopImages
from tiny_images import hf_dataset

HOOK = "blocks.0.hook_resid_post"
CLASSES = ("ant", "bee", "oak", "elm")
HEALTHY = ["ontological_coverage", "pair_depth", "reconstruction"]
STEPS = ("constructor", "prepare", "calibrate", "update", "compute", "tables", "figures", "notes")
SHARED_STEPS = ("constructor", "calibrate", "update")
UNUSABLE = ("numbers", "table", "figure")
AFTER_COMPUTE = ("tables", "figures", "notes", "unusable_table", "unusable_figure")
AFTER_COMPUTE += ("unusable_table_name",)


class Trouble(Exception):
    """What the evaluators here raise; in `calibrate` they raise a ConfigError."""


def fail_in(step: str, here: str) -> None:
    if step == here:
        raise (ConfigError if step == "calibrate" else Trouble)(f"told to fail in {here}")


def faulty_evaluator(step: str) -> type[taxolens.Evaluator]:
    class Faulty(taxolens.Evaluator):
        """Raises in one step, or gives what cannot be used."""

        name = f"faulty_{step}"
        description = "for tests"
        higher_is_better = {"one": True}
        support = {"one": taxolens.Support("two", "things")} if step == "lacking_count" else {}

        def __init__(self, context: Any, options: Any = None) -> None:
            super().__init__(context, options)
            fail_in(step, "constructor")

        def prepare(self) -> None:
            self.rate = self.context.share(FiringRate)  # healthy evaluators share it too
            fail_in(step, "prepare")

        def calibrate(self, batch: Any) -> None:
            fail_in(step, "calibrate")

        def update(self, batch: Any) -> None:
            fail_in(step, "update")

        def compute(self, *, permutation: Any = None, shuffled: bool = False) -> Any:
            fail_in(step, "compute")
            more = {"top/1": 0.5} if step == "unusable_name" else {}
            return {"one": "word" if step == "unusable_numbers" else 1.0, **more}

        def tables(self) -> Any:
            fail_in(step, "tables")
            if step == "unusable_table_name":
                return {"../latents": pd.DataFrame()}
            return {"latents": 7} if step == "unusable_table" else {}

        def figures(self) -> Any:
            fail_in(step, "figures")
            return {"drawing": 7} if step == "unusable_figure" else {}

        def notes(self) -> list[str]:
            fail_in(step, "notes")
            return []

    return Faulty


def sharing_evaluators(step: str) -> list[type[taxolens.Evaluator]]:
    """Two that share an accumulator which fails, the second through another accumulator."""

    class Failing(Accumulator):
        def __init__(self, context: Any) -> None:
            super().__init__(context)
            fail_in(step, "constructor")

        def calibrate(self, batch: Any) -> None:
            fail_in(step, "calibrate")

        def update(self, batch: Any) -> None:
            fail_in(step, "update")

    class Reading(Accumulator):
        def __init__(self, context: Any) -> None:
            super().__init__(context)
            context.share(Failing)

        def update(self, batch: Any) -> None: ...

    class Sharing(taxolens.Evaluator):
        """Shares an accumulator that fails."""

        description = "for tests"
        higher_is_better = {"one": True}
        kind: type[Accumulator]

        def __init__(self, context: Any, options: Any = None) -> None:
            super().__init__(context, options)
            context.share(self.kind)

        def compute(self, *, permutation: Any = None, shuffled: bool = False) -> Any:
            return {"one": 1.0}

    return [
        type(f"Sharing{i}", (Sharing,), {"name": f"sharing_{step}_{i}", "kind": kind})
        for i, kind in enumerate((Failing, Reading))
    ]


@pytest.fixture(scope="module")
def faulty() -> Any:
    """evaluator -> how its error begins; registered as those of another package's plugin are."""
    expected = {step: f"Trouble: told to fail in {step}" for step in STEPS}
    expected["calibrate"] = "ConfigError: told to fail in calibrate"
    expected["unusable_numbers"] = "ValueError: could not convert string to float: 'word'"
    expected["unusable_name"] = "ConfigError: faulty_unusable_name.compute: no name of a file"
    expected["lacking_count"] = "ConfigError: faulty_lacking_count.compute: no 'two', the support"
    expected["unusable_table_name"] = "ConfigError: table or figure: it names a file; given '../"
    expected["unusable_table"] = "AttributeError: 'int' object has no attribute 'copy'"
    expected["unusable_figure"] = "AttributeError: 'int' object has no attribute 'to_json'"
    evaluators = [faulty_evaluator(step) for step in expected]
    messages = list(expected.values())
    for step in SHARED_STEPS:
        evaluators += sharing_evaluators(step)
        messages += 2 * [f"shared Failing: {expected[step]}"]

    class Plugin:
        @taxolens.hookimpl
        def register_evaluators(self, register: Any) -> None:
            for evaluator in evaluators:
                register(evaluator)

    plugin = Plugin()
    manager.pm.register(plugin, name="faulty_evaluators")
    manager.load_plugins()
    names = [evaluator.name for evaluator in evaluators]
    yield dict(zip(names, messages, strict=True))
    manager.pm.unregister(plugin)
    for name in names:
        del taxolens.EVALUATORS._entries[name], taxolens.EVALUATORS._plugins[name]


@pytest.fixture(scope="module")
def world(vit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SAE in `sae`, 24 pictures of four classes in `pictures`, their tree in `tree.csv`."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "pictures").mkdir()
    hf_dataset(24, CLASSES).to_parquet(folder / "pictures" / "validation.parquet")
    (folder / "tree.csv").write_text(
        "parent,child\nthing,animal\nthing,plant\nanimal,ant\nanimal,bee\nplant,oak\nplant,elm\n"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=24, k=4))
        torch.nn.init.normal_(sae.W_enc)
    facts = {
        "hook_name": HOOK,
        "model_name": str(vit_folder),
        "tokens": "class",
        "dataset_path": str(folder / "pictures"),
        "taxonomy": str(folder / "tree.csv"),
    }
    for name, value in facts.items():
        sae.cfg.metadata[name] = value
    (folder / "sae").mkdir()
    sae.save_inference_model(folder / "sae")
    return folder


@pytest.fixture(scope="module")
def evaluate(world: Path, vit: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def call(*evaluators: str) -> Results:
        return evaluate_run(
            world / "sae",
            evaluators=evaluators,
            n_permutations=2,
            progress=False,
            output_path=tmp_path_factory.mktemp("results"),
            override_model=vit,
        )

    return call


@pytest.fixture(scope="module")
def alone(evaluate: Any) -> SAEResult:
    """What the healthy evaluators give without the others."""
    results = evaluate(*HEALTHY)
    assert results.errors == {}
    return results.saes[0]


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, NaN as NaN, but for the seconds taken."""
    texts = [json.dumps({**asdict(result), "seconds": 0}) for result in (one, other)]
    return texts[0] == texts[1]


def test_third_parties_evaluators_that_fail_cost_the_others_nothing(
    evaluate: Any, faulty: dict[str, str], alone: SAEResult
) -> None:
    results = evaluate(*faulty, *HEALTHY)
    (sae,) = results.saes
    assert results.complete
    for name in HEALTHY:
        assert same(sae.evaluators[name], alone.evaluators[name]), name
        for file in sae.evaluators[name].tables.values():
            assert (results.folder / file).is_file()
    assert sae.most_specific == alone.most_specific and sae.most_specific
    assert (sae.least_specific, sae.node_f1, sae.l0) == (
        alone.least_specific,
        alone.node_f1,
        alone.l0,
    )
    assert set(sae.errors) == set(faulty)
    for name, message in faulty.items():
        assert str(sae.errors[name]).startswith(message), name
        keeps_numbers = name.removeprefix("faulty_") in AFTER_COMPUTE
        assert list(sae.evaluators[name].metrics) == ["one"] * keeps_numbers, name
    assert write_report(results, interactive=False).exists()


def test_an_accumulator_of_ours_that_fails_costs_those_that_share_it(
    evaluate: Any, alone: SAEResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise Trouble("no memory")

    monkeypatch.setattr(TopImages, "update", fail)
    (sae,) = evaluate(*HEALTHY).saes
    assert sae.errors == {"pair_depth": "shared TopImages: Trouble: no memory"}
    for name in ("ontological_coverage", "reconstruction"):
        assert same(sae.evaluators[name], alone.evaluators[name]), name
    assert (sae.l0, sae.node_f1) == (alone.l0, alone.node_f1)
    assert sae.most_specific == sae.least_specific == []  # the cards show its images

    monkeypatch.undo()
    monkeypatch.setattr(FiringRate, "calibrate", fail)
    (sae,) = evaluate(*HEALTHY).saes
    assert sae.errors == {"reconstruction": "shared FiringRate: Trouble: no memory"}
    assert math.isnan(sae.l0)


def test_a_failure_under_a_null_or_a_control_is_its_reason(
    evaluate: Any, alone: SAEResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = FiringRate.update

    def fail_on_random(self: FiringRate, batch: Any) -> None:
        if self.context.source == "random":
            raise Trouble("no memory")
        update(self, batch)

    monkeypatch.setattr(FiringRate, "update", fail_on_random)
    (sae,) = evaluate(*HEALTHY).saes
    assert sae.errors == {}
    found, whole = (s.evaluators["reconstruction"].metrics["l0"] for s in (sae, alone))
    assert found.value == whole.value and found.nulls["neurons"] == whole.nulls["neurons"]
    assert found.nulls["random"].reason == "failed: shared FiringRate: Trouble: no memory"


def test_the_command_names_what_failed_and_exits_with_1(
    world: Path, faulty: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["evaluate", str(world / "sae"), "--output_path", str(tmp_path), "--static"]
    args += ["--n_permutations", "1", "--evaluators", "faulty_update", "pair_depth"]
    assert cli.main(args) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"evaluators: some failed; the numbers of the others are in {tmp_path}" in error
    assert error.endswith("sae: faulty_update: Trouble: told to fail in update.")


def test_wrong_options_are_refused_before_the_forward_pass(
    evaluate: Any, world: Path, vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taxolens.plugin.evaluation.forward.ActivationCache.build", None)
    for name, options in {
        "pair_depth": {"k": 1},
        "ontological_coverage": {"survival": [0.5]},
        "monosemanticity": {"encoder": "nowhere.npy"},
    }.items():
        with pytest.raises(ConfigError, match=next(iter(options))):
            evaluate_run(
                world / "sae", evaluators=name, options={name: options}, override_model=vit
            )


def test_evaluators_that_fail_during_training_cost_the_others_nothing(
    training: Any, vit: Any, world: Path, faulty: dict[str, str], caplog: Any
) -> None:
    cfg = training.single(
        dataset_path="elsewhere",
        eval_dataset_path=str(world / "pictures"),
        taxonomy=str(world / "tree.csv"),
    )
    images = HeldOut.load(cfg.held_out_source, cfg.taxonomy)
    assert isinstance(images.images, ImageDataset)
    sae = TopKTrainingSAE(training.sae())
    sae.cfg.metadata.hook_name = HOOK
    found = []
    for evaluators in (HEALTHY, [*faulty, *HEALTHY]):
        cfg.evaluators = list(evaluators)
        evaluator = make_training_evaluator(cfg, vit, images)
        with caplog.at_level(logging.WARNING):
            found.append(evaluator(sae, iter(()), ActivationScaler()))
    plain, mixed = (
        {k: v for k, v in metrics.items() if not k.startswith(("eval/faulty", "eval/sharing"))}
        for metrics in found
    )
    assert plain and json.dumps(plain) == json.dumps(mixed)
    for step in ("constructor", "prepare", "calibrate", "update", "compute"):
        assert f"faulty_{step} failed on sae" in caplog.text
        assert f"eval/faulty_{step}/one" not in found[1]
    assert found[1]["eval/faulty_tables/one"] == 1
    assert "shared Failing failed on sae" in caplog.text
