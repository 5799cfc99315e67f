"""From trained SAEs on disk to results: one forward pass, held-out images, resuming, bad input."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image, ImageOps
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file
from taxolens.hooks.activations.extract import model_fingerprint
from taxolens.hooks.images import dataset
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.models.load import from_module, load_vision_model
from taxolens.plugin.evaluation import evaluate as module
from taxolens.plugin.evaluation import forward
from taxolens.plugin.evaluation.evaluate import evaluate_run, make_training_evaluator
from taxolens.plugin.evaluation.latent_cards import thumbnail
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.plugin.evaluation.sae_sources import find_sources
from taxolens.plugin.reporting.report import write_report
from taxolens.plugin.reporting.results import Results
from taxolens.plugin.training.runner import VisionMultiSAETrainingRunner
from taxolens.registry.errors import CheckpointError, ConfigError, DataError, UnknownNameError
from taxolens.registry.loaders.parts.read import read_sae
from taxolens.registry.nulls import NULLS
from taxolens.registry.taxonomies.taxonomy import Taxonomy
from tiny_models import tiny_model
from tiny_runs import WORLD_CLASSES, run_settings, save_sae

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
FAST = {
    "progress": False,
    "n_permutations": 2,
    "n_groups": 0,
    "evaluators": ["ontological_coverage", "lch_height"],
}


@pytest.fixture(scope="module")
def run(vit_folder: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two SAEs, as the runner writes it."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    settings = run_settings(vit_folder, world)
    for i, hook in enumerate(HOOKS):
        save_sae(folder / hook, hook, settings, seed=i)
    (folder / "runner_cfg.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def evaluate(run: Path, vit: Any, tmp_path: Path) -> Any:
    """`evaluate_run` over that run, into a folder of the test's own."""

    def call(runs: Any = run, **changes: Any) -> Results:
        settings = {**FAST, "override_model": vit, "output_path": tmp_path / "out", **changes}
        return evaluate_run(runs, **settings)

    return call


# The whole way ----------------------------------------------------------------------------------


def test_train_evaluate_report(training: Any, world: Path, tmp_path: Path) -> None:
    """The runner's own output, with nothing said that the run does not say itself."""
    cfg = training.multi(
        dataset_path=str(world),
        eval_split="validation",
        taxonomy=str(world / "validation"),
        saes={hook: training.sae() for hook in HOOKS},
        hook_names={hook: hook for hook in HOOKS},
    )
    VisionMultiSAETrainingRunner(cfg).run()
    results = evaluate_run(cfg.output_path, progress=False, n_permutations=2)
    assert results.errors == {} and results.complete
    assert [sae.id for sae in results.saes] == list(HOOKS)
    assert [sae.layer for sae in results.saes] == [0, 1]
    assert set(results.evaluators) == set(module.MAIN_EVALUATORS)
    assert results.folder == Path(cfg.output_path)
    assert results.dataset.n_images == 32 and not results.dataset.seen_in_training
    assert (results.dataset.n_fit, results.dataset.n_score) == (16, 16)
    assert results.taxonomy.n_classes == 8 and results.taxonomy.max_depth == 2
    for sae in results.saes:
        assert sae.architecture == "topk" and sae.d_in == 16 and sae.tokens == "class"
        for evaluator in sae.evaluators.values():
            for name, metric in evaluator.metrics.items():
                assert set(metric.nulls) == set(NULLS), name
                for null in metric.nulls.values():
                    assert null.n > 0 or null.reason
            files = [*evaluator.tables.values(), *evaluator.figures.values()]
            assert all((results.folder / file).is_file() for file in files)
        coverage = sae.evaluators["ontological_coverage"].metrics["internal_f1"]
        assert 0 <= coverage.value <= 1 and coverage.nulls["permuted_classes"].n == 2
        assert results.permuted_classes is not None and results.permuted_classes.draws == 2
        assert results.permuted_classes.present == len(WORLD_CLASSES)
        mean_patch = sae.evaluators["level_information"].metrics["mean_patch_knn_accuracy"]
        assert math.isfinite(mean_patch.value)
        assert sae.node_f1
        for card in [*sae.most_specific, *sae.least_specific]:
            assert all((results.folder / str(i.thumbnail)).is_file() for i in card.images)
    assert not (results.folder / "activations").exists()
    assert (results.folder / "metrics" / "pair_depth.pair_depth.svg").is_file()
    page = write_report(results, interactive=False).read_text()
    assert HOOKS[1] in page and "data:image/jpeg" in page


def test_files_of_others_in_the_output_folder_are_left_alone(evaluate: Any, tmp_path: Path) -> None:
    """A cache of a training, tables and figures of the user's own, also beside ours of the same kind."""
    out = tmp_path / "out"
    mine = [
        out / "activations" / "vit_train" / "cache.json",
        out / "activations" / "0123abcd" / "notes.txt",
        out / "metrics" / "my_experiment.csv",
        out / "metrics" / "pair_depth.mine.svg",
        out / "metrics" / "controls.csv",
        out / "ranks" / "by_hand" / "order.csv",
    ]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("a,b\n1,2\n")
    evaluate(evaluators="pair_depth", keep_activations=True)
    assert len(list((out / "activations").iterdir())) == 3
    killed = out / "activations" / "89abcdef"  # before its first index
    killed.mkdir()
    for name in (".lock", "blocks.0.hook_resid_post.npy"):
        (killed / name).write_bytes(b"")
    measured = {file.name for file in (out / "metrics").glob("pair_depth.*")}
    evaluate(evaluators="lch_height", replace=True)
    assert all(file.read_text() == "a,b\n1,2\n" for file in mine)
    assert {file.parent.name for file in (out / "activations").rglob("*.*")} == {
        "vit_train",
        "0123abcd",
    }
    left = {file.name for file in (out / "metrics").glob("pair_depth.*")}
    assert "pair_depth.pair_depth.csv" in measured and left == {"pair_depth.mine.svg"}


def test_the_folder_of_a_run_is_recorded_not_that_of_one_of_its_saes(
    evaluate: Any, run: Path, tmp_path: Path
) -> None:
    assert evaluate().settings["runs"] == {"study": str(run)}
    one = evaluate(run / HOOKS[1], output_path=tmp_path / "one")
    assert list(one.settings["runs"].values()) == [str(run / HOOKS[1])]


@pytest.fixture
def passes(vit: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the batches that the model is given."""
    shapes: list[tuple[int, ...]] = []
    handle = vit.original_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(
            tuple(kwargs.get("pixel_values", args[0] if args else None).shape)
        ),
        with_kwargs=True,
    )
    yield shapes
    handle.remove()


def test_one_run_of_the_images_serves_all_hook_points_and_tokens(
    evaluate: Any, vit_folder: Path, world: Path, passes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """SAEs of one image size share it, those of another have one more; nothing differs by a bit."""
    settings = run_settings(vit_folder, world)
    folders: dict[tuple[str, int], list[Path]] = {}
    for i, (hook, tokens, size) in enumerate(
        [
            (HOOKS[0], "class", 16),
            (HOOKS[0], "patch", 16),
            (HOOKS[1], "class", 16),
            (HOOKS[1], "mean_patch", 16),
            (HOOKS[0], "all", 16),
            (HOOKS[1], "patch", 32),
            (HOOKS[1], "class", 32),
        ]
    ):
        folder = tmp_path / f"sae_{i}"
        # a model that is given is one model, whatever the metadata say of its revision
        more = {"tokens": tokens, "image_size": size, "revision": "main" if i == 2 else None}
        save_sae(folder, hook, {**settings, **more}, seed=i)
        folders.setdefault((tokens, size), []).append(folder)
    options = {"keep_activations": True, "batch_size": 8}

    def run_of(saes: list[Path], name: str) -> tuple[dict[str, str], dict[str, bytes]]:
        passes.clear()
        output = tmp_path / name
        results = evaluate(saes, output_path=output, **options)
        assert results.errors == {}
        numbers = {
            s.weights: repr([e.metrics for e in s.evaluators.values()]) for s in results.saes
        }
        files = (output / "activations").rglob("*.npy")
        return numbers, {str(file.relative_to(output)): file.read_bytes() for file in files}

    everything = [folder for group in folders.values() for folder in group]
    run_of(everything, "first")  # in which hook points are probed
    together = run_of(everything, "together")
    assert passes == [(8, 3, 16, 16)] * 4 + [(8, 3, 32, 32)] * 4
    alone: tuple[dict[str, str], dict[str, bytes]] = ({}, {})
    for place, group in enumerate(folders.values()):
        for all_of, found in zip(alone, run_of(group, f"alone_{place}"), strict=True):
            all_of |= found
        assert len(passes) == 4
    assert len(together[0]) == 7 and together == alone


def test_only_what_is_missing_is_run_through_the_model_again(
    evaluate: Any, vit_folder: Path, world: Path, passes: list[tuple[int, ...]], tmp_path: Path
) -> None:
    settings = run_settings(vit_folder, world)
    for i, tokens in enumerate(("class", "patch")):
        save_sae(tmp_path / tokens, HOOKS[0], {**settings, "tokens": tokens}, seed=i)
    options = {"keep_activations": True, "batch_size": 8, "image_size": 16}
    evaluate(tmp_path / "class", **options)
    passes.clear()
    both = evaluate([tmp_path / "class", tmp_path / "patch"], **options)
    assert len(passes) == 4 and len(both.saes) == 2


def test_the_last_block_embeds_the_images_for_evaluators_that_want_it(
    evaluate: Any, run: Path, monkeypatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}
    measure_sae = module.measure_sae

    def spied(bench: Any, sae: Any, images: Any, **settings: Any) -> Any:
        seen[sae.hook_name] = images
        return measure_sae(bench, sae, images, **settings)

    monkeypatch.setattr(module, "measure_sae", spied)
    monkeypatch.setattr(module.EVALUATORS["lch_height"], "wants_embedding", True)
    evaluate(evaluators="lch_height")
    assert seen[HOOKS[1]].embedding is None
    last = seen[HOOKS[1]].tokens[:, 0]
    assert np.array_equal(seen[HOOKS[0]].embedding, last)
    seen.clear()
    evaluate(run / HOOKS[0], evaluators="lch_height", output_path=tmp_path / "alone")
    assert np.array_equal(seen[HOOKS[0]].embedding, last)


@pytest.fixture
def contexts(monkeypatch) -> list[Any]:
    """The contexts that an evaluator which asks for interventions is given."""
    cls, seen = module.EVALUATORS["lch_height"], []
    init = cls.__init__

    def spied(self: Any, context: Any, options: Any = None) -> None:
        seen.append(context)
        init(self, context, options)

    monkeypatch.setattr(cls, "__init__", spied)
    monkeypatch.setattr(cls, "wants_intervention", True)
    return seen


def test_evaluators_can_intervene_at_the_images_and_tokens_of_the_sae(
    evaluate: Any, run: Path, world: Path, tmp_path: Path, contexts: list[Any], monkeypatch
) -> None:
    """Positions are those of the batches, also where a corrupt picture has none."""
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    (broken / "validation" / WORLD_CLASSES[0] / "1.png").write_bytes(b"no picture")
    images: dict[str, Any] = {}
    measure_sae = module.measure_sae

    def spied(bench: Any, sae: Any, at: Any, **settings: Any) -> Any:
        images[sae.hook_name] = at
        return measure_sae(bench, sae, at, **settings)

    monkeypatch.setattr(module, "measure_sae", spied)
    evaluate(
        evaluators="lch_height",
        dataset_path=str(broken),
        taxonomy=str(broken / "validation"),
        max_corrupt_share=0.5,
        controls=["planted"],
    )
    sources = [context.source for context in contexts]
    assert sources == ["planted", *2 * [*3 * ["random"], "neurons", "sae"]]
    planted, *of_saes = contexts
    assert planted.intervene is None and "detectors" in planted.no_intervention
    for context, hook in zip(of_saes, np.repeat(HOOKS, 5)):
        seen: list[torch.Tensor] = []

        def edit(x: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(x)
            return x

        index = torch.tensor([30, 0, 2])
        result = context.intervene(index, edit)
        expected = torch.from_numpy(images[hook].tokens[index])
        torch.testing.assert_close(torch.cat(seen), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(result.embedding, context.intervene(index).embedding)
        assert result.logits is None and context.intervene.logit_classes is None
        z, decoded = context.reconstruct(expected[:, 0])
        assert z.shape == (3, context.d_sae) and decoded.shape == (3, 16)


@pytest.mark.parametrize("repeats", [True, False])
def test_the_model_is_run_for_intervals_only_where_a_headline_needs_it(
    evaluate: Any, contexts: list[Any], monkeypatch, repeats: bool
) -> None:
    monkeypatch.setattr(module.EVALUATORS["lch_height"], "repeats_intervention", repeats)
    evaluate(evaluators=["lch_height", "pair_depth"], n_groups=3, nulls=[])
    reasons = [c.no_intervention for c in contexts if c.intervene is None]
    assert reasons == ([] if repeats else 2 * 3 * ["not repeated for the intervals"])
    assert len(contexts) == 2 * 4


def test_what_the_model_measures_has_an_interval_where_it_is_a_headline(evaluate: Any) -> None:
    results = evaluate(evaluators="supervised_dictionary", n_groups=3, nulls=[])
    for sae in results.saes:
        metrics = sae.evaluators["supervised_dictionary"].metrics
        for metric in ("sufficiency", "interpretability"):
            number = metrics[metric]
            assert number.low <= number.value <= number.high, metric
            assert math.isfinite(number.low) and number.low < number.high


def test_a_model_with_a_head_and_a_model_without(
    evaluate: Any, run: Path, world: Path, tmp_path: Path
) -> None:
    """Splicing and steering from the command's own entry point, SAEs, null latents and all."""
    settings: dict[str, Any] = {
        "evaluators": ["reconstruction", "detection"],
        "options": {"detection": {"n_latents": 3, "n_directions": 2, "min_fired": 2, "kl": 1e-4}},
    }
    names = load_images(world, split="validation").class_names
    model = from_module(tiny_model("vit_classifier"))
    model.original_model.config.id2label = dict(enumerate(names[:5]))
    with_head = evaluate(override_model=model, **settings)
    without = evaluate(output_path=tmp_path / "without", **settings)
    assert with_head.errors == without.errors == {}
    for results, has_head in ((with_head, True), (without, False)):
        for sae in results.saes:
            costs = sae.evaluators["reconstruction"].metrics
            assert math.isfinite(costs["ce_loss_with_sae"].value) == has_head
            assert math.isfinite(costs["embedding_cossim_with_sae"].value)
            assert costs["explained_variance"].nulls["random"].n == 3
            steering = sae.evaluators["detection"].metrics
            assert math.isfinite(steering["steering"].value)
            assert steering["steering_rank"].nulls["permuted_classes"].n == 2
            assert steering["steering"].nulls["random"].n == 3
            table = pd.read_csv(results.folder / sae.evaluators["detection"].tables["steering"])
            assert table["kl"].to_numpy() == pytest.approx(1e-4, rel=0.06)


def test_without_need_no_picture_is_kept_for_interventions(evaluate: Any, monkeypatch) -> None:
    monkeypatch.setattr(forward, "Pictures", None)
    assert evaluate(evaluators="lch_height").errors == {}


def test_a_model_that_cannot_be_intervened_in_gives_a_reason(
    evaluate: Any, contexts: list[Any], monkeypatch, caplog
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigError("it has no blocks")

    monkeypatch.setattr(forward, "ModelIntervention", refuse)
    assert evaluate(evaluators="lch_height").errors == {}
    assert {(c.intervene, c.no_intervention) for c in contexts} == {(None, "it has no blocks")}
    assert f"no interventions at {HOOKS[0]}: it has no blocks" in caplog.text


def test_numbers_repeat_and_follow_the_seed(evaluate: Any, tmp_path: Path) -> None:
    def numbers(name: str, **changes: Any) -> dict[str, float]:
        results = evaluate(output_path=tmp_path / name, **changes)
        return {f"{s.id}{e}{m}": n.value for s, e, m, n in results.rows()}

    first = numbers("a")
    assert first == pytest.approx(numbers("b", batch_size=3), nan_ok=True)
    assert first != pytest.approx(numbers("c", seed=1), nan_ok=True)


def test_patch_tokens_are_aggregated_over_the_image(
    evaluate: Any, vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    settings = {"model_name": str(vit_folder), "dataset_path": str(world), "tokens": "patch"}
    save_sae(tmp_path / "sae", HOOKS[0], settings)
    common = {"runs": tmp_path / "sae", "taxonomy": str(world / "validation")}
    largest = evaluate(**common)
    mean = evaluate(**common, aggregate="mean", output_path=tmp_path / "mean")
    assert largest.errors == mean.errors == {}
    assert largest.saes[0].tokens == "patch" and largest.saes[0].id == "sae"
    assert largest.saes[0].l0 > 4  # four of each of the four patches, more of their union
    assert largest.saes[0].l0 == mean.saes[0].l0
    assert largest.saes[0].l0_token == mean.saes[0].l0_token == 4
    assert mean.settings["aggregate"] == "mean"


def test_runs_are_compared_on_the_same_images(evaluate: Any, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    results = evaluate([run, other])
    assert [sae.id for sae in results.saes] == [
        f"{label}/{hook}" for label in ("study", "other") for hook in HOOKS
    ]
    by_run = results.frame().groupby("run")["value"].apply(list)
    assert by_run["study"] == pytest.approx(by_run["other"], nan_ok=True)
    with pytest.raises(
        ConfigError, match="output_path: not given; allowed: a folder, where several runs"
    ):
        evaluate([run, other], output_path=None)


def test_max_images_and_controls(evaluate: Any) -> None:
    results = evaluate(max_images=20, controls=["planted"], nulls=["permuted_classes"])
    assert results.dataset.n_images == 20
    coverage = results.saes[0].evaluators["ontological_coverage"].metrics["internal_f1"]
    assert 0 < coverage.controls["planted"] < 1
    assert set(coverage.nulls) == {"permuted_classes"}


def test_all_evaluators_and_their_options(evaluate: Any) -> None:
    results = evaluate(evaluators="all", options={"pair_depth": {"k": 4}})
    assert set(results.evaluators) == set(module.EVALUATORS)
    assert results.settings["options"]["pair_depth"] == {"k": 4}


def test_seeds_are_compared_and_measured_anew_with_other_peers(
    evaluate: Any, run: Path, tmp_path: Path
) -> None:
    def measure(*runs: Path, **changes: Any) -> Results:
        given = {"evaluators": "stability", "output_path": tmp_path / "c", **changes}
        return evaluate(list(runs), **given)

    other = tmp_path / "other"
    shutil.copytree(run, other)
    stable = measure(run, other).saes[0].evaluators["stability"]
    # The copy is the same SAE: everything is found again, and far more than by random latents.
    for metric in ("decoder_cosine", "activation_correlation", "one_to_one_r2", "relative_cosine"):
        number = stable.metrics[metric]
        assert number.value == pytest.approx(1, abs=0.01), metric
        assert number.nulls["random"].left_behind and number.nulls["permuted_classes"].reason
    assert stable.metrics["peers"].value == 1
    apart = {"evaluators": ["stability", "pair_depth"], "output_path": tmp_path / "g"}
    with_groups = measure(run, other, n_groups=3, **apart)
    found = with_groups.saes[0].evaluators
    for number in (
        found["stability"].metrics["one_to_one_r2"],
        *found["pair_depth"].metrics.values(),
    ):
        assert number.low <= number.value <= number.high, number
    assert found["stability"].metrics["decoder_cosine"].high == pytest.approx(1, abs=0.01)
    assert stable.notes == [f"Compared with other/{HOOKS[0]} (seed)."]

    first = measure(run, other)
    shutil.rmtree(other / HOOKS[0])
    settings = json.loads((run / "runner_cfg.json").read_text())
    save_sae(other / HOOKS[0], HOOKS[0], settings, seed=9)
    second = measure(run, other, output_path=tmp_path / "d")

    def digests(results: Results) -> list[str]:
        return [sae.evaluators["stability"].fingerprint for sae in results.saes]

    changed = [a != b for a, b in zip(digests(first), digests(second), strict=True)]
    assert changed == [True, False, True, False]
    value = second.saes[0].evaluators["stability"].metrics["decoder_cosine"]
    assert value.value < 0.99
    # What does not look at peers does not care.
    apart = {"evaluators": "pair_depth", "output_path": tmp_path / "e"}
    plain = [measure(*runs, **apart) for runs in ((run,), (run, other))]
    assert plain[0].saes[0].fingerprint == plain[1].saes[0].fingerprint


def test_layers_of_one_run_are_compared_and_one_sae_alone_is_told_so(
    evaluate: Any, run: Path, tmp_path: Path
) -> None:
    results = evaluate(evaluators="stability")
    notes = [sae.evaluators["stability"].notes for sae in results.saes]
    assert notes == [[f"Compared with {HOOKS[1 - i]} (layer)."] for i in (0, 1)]
    assert math.isfinite(results.saes[0].evaluators["stability"].metrics["decoder_cosine"].value)
    alone = evaluate(run / HOOKS[0], evaluators="stability", output_path=tmp_path / "alone")
    stable = alone.saes[0].evaluators["stability"]
    assert alone.errors == {} and math.isnan(stable.metrics["decoder_cosine"].value)
    assert "no other SAE to compare with" in stable.notes[0]
    page = write_report(alone, interactive=False).read_text()
    assert "no other SAE to compare with" in page


def test_models_are_compared_by_what_needs_no_common_space(
    evaluate: Any, run: Path, vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "other_vit"
    shutil.copytree(vit_folder, copied)
    settings = {
        "model_name": str(copied),
        "dataset_path": str(world),
        "taxonomy": str(world / "validation"),
    }
    save_sae(tmp_path / "elsewhere", HOOKS[0], settings, seed=0)
    results = evaluate(
        [run / HOOKS[0], tmp_path / "elsewhere"], evaluators="stability", override_model=None
    )
    for sae in results.saes:
        numbers = sae.evaluators["stability"].metrics
        assert math.isnan(numbers["decoder_cosine"].value)
        assert numbers["relative_cosine"].value == pytest.approx(1, abs=0.01)
        assert "(model)" in sae.evaluators["stability"].notes[0]


# Resuming ---------------------------------------------------------------------------------------


def test_what_is_finished_is_not_measured_again(evaluate: Any, monkeypatch, tmp_path: Path) -> None:
    measured: list[str] = []
    measure_sae = module.measure_sae

    def interrupt_second(bench: Any, sae: Any, *args: Any, **kwargs: Any) -> Any:
        if sae.name == HOOKS[1]:
            raise KeyboardInterrupt
        return measure_sae(bench, sae, *args, **kwargs)

    monkeypatch.setattr(module, "measure_sae", interrupt_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    partial = Results.load(tmp_path / "out")
    assert not partial.complete and [sae.name for sae in partial.saes] == [HOOKS[0]]
    assert (tmp_path / "out" / "activations").exists()

    def counted(bench: Any, sae: Any, *args: Any, **kwargs: Any) -> Any:
        measured.append(sae.name)
        return measure_sae(bench, sae, *args, **kwargs)

    monkeypatch.setattr(module, "measure_sae", counted)
    results = evaluate()
    assert measured == [HOOKS[1]] and results.complete
    assert results.saes[0] == partial.saes[0]

    def no_forward(*_: Any, **__: Any) -> None:
        raise AssertionError("no forward pass is needed")

    monkeypatch.setattr(forward.ActivationCache, "build", no_forward)
    again = evaluate()
    assert [sae.fingerprint for sae in again.saes] == [sae.fingerprint for sae in results.saes]
    assert again.dataset == results.dataset


def test_other_settings_or_weights_are_measured_anew(
    evaluate: Any, run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(run, own)
    shutil.rmtree(own / HOOKS[1])

    def fingerprint(**changes: Any) -> str:
        found = evaluate(own, evaluators="pair_depth", **changes).saes[0]
        return found.evaluators["pair_depth"].fingerprint

    found = [fingerprint(), fingerprint(n_permutations=3), fingerprint(seed=5)]
    found.append(fingerprint(options={"pair_depth": {"k": 3}}))
    shutil.rmtree(own / HOOKS[0])
    settings = json.loads((own / "runner_cfg.json").read_text())
    save_sae(own / HOOKS[0], HOOKS[0], settings, seed=9)
    found.append(fingerprint(output_path=tmp_path / "again"))
    assert len(set(found)) == len(found)


def save_other_weights(vit_folder: Path, folder: Path) -> None:
    """The model of a folder with other weights."""
    shutil.copytree(vit_folder, folder, dirs_exist_ok=True)
    other = transformers.AutoModel.from_pretrained(vit_folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(folder)


def test_another_model_is_measured_anew(
    evaluate: Any, vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    def numbers(**changes: Any) -> Any:
        found = evaluate(evaluators="reconstruction", **changes)
        return numbers_of(found), [sae.fingerprint for sae in found.saes]

    save_other_weights(vit_folder, tmp_path / "other")
    other = load_vision_model(tmp_path / "other")
    expected = numbers(override_model=other, output_path=tmp_path / "alone")
    assert repr(numbers()) != repr(expected)
    assert repr(numbers(override_model=other)) == repr(expected)
    with pytest.raises(
        ConfigError, match="with other weights of the model or metadata, which would"
    ):
        evaluate(evaluators="pair_depth")

    folder, run = tmp_path / "model", tmp_path / "run"  # a model that is saved again in its folder
    shutil.copytree(vit_folder, folder)
    save_sae(run, HOOKS[0], run_settings(folder, world, eval_split="validation"))

    def own() -> Any:
        found = evaluate(run, override_model=None, evaluators="reconstruction", output_path=run)
        return found.saes[0].evaluators["reconstruction"].metrics["fvu"].value

    before = own()
    assert own() == before
    save_other_weights(vit_folder, folder)
    assert own() != before


def test_the_model_that_an_sae_names_may_be_given(
    evaluate: Any, vit: Any, vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    """As after a training, which evaluates with the model that it has loaded."""
    settings = run_settings(vit_folder, world, eval_split="validation")
    settings["model_fingerprint"] = model_fingerprint(vit)
    save_sae(tmp_path / "run", HOOKS[0], settings)
    folder = {"output_path": tmp_path / "run"}
    evaluate(tmp_path / "run", evaluators="reconstruction", **folder)
    both = evaluate(tmp_path / "run", evaluators="pair_depth", override_model=None, **folder)
    assert list(both.evaluators) == ["pair_depth", "reconstruction"]


def test_another_file_of_an_option_is_measured_anew(evaluate: Any, tmp_path: Path) -> None:
    def monosemanticity(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        np.save(tmp_path / "x.npy", rng.standard_normal((32, 5)).astype(np.float32))
        options = {"monosemanticity": {"encoder": str(tmp_path / "x.npy")}}
        return repr(numbers_of(evaluate(evaluators="monosemanticity", options=options)))

    first = monosemanticity(0)
    assert monosemanticity(0) == first != monosemanticity(1)


@pytest.mark.parametrize("names", [("None", "NA", "007"), ("1", "2", "10")])
def test_nodes_of_any_name_keep_their_place_in_a_further_evaluation(
    evaluate: Any, vit: Any, tmp_path: Path, names: tuple[str, ...]
) -> None:
    rng, photos = np.random.default_rng(0), tmp_path / "photos"
    for c, name in enumerate([f"animal/{n}" for n in names] + ["plant/=oak", "plant/rose"]):
        (photos / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 90, (20, 20, 3)) + np.array([40 * c, 0, 160 - 40 * c])
            Image.fromarray(pixels.astype(np.uint8)).save(photos / name / f"{i}.png")
    settings = {"dataset_path": str(photos), "split": "train", "taxonomy": str(photos)}
    settings |= {"allow_train_split": True}
    names = ["ontological_coverage", "pair_depth"]
    whole = evaluate(evaluators=names, output_path=tmp_path / "whole", **settings)
    for name in names:
        results = evaluate(evaluators=name, **settings)
    for found, expected in zip(results.saes, whole.saes, strict=True):
        assert found.node_f1 == pytest.approx(expected.node_f1) and found.node_f1
        assert len(found.most_specific) == len(expected.most_specific) > 0


def test_an_evaluator_that_failed_is_tried_again(evaluate: Any, monkeypatch) -> None:
    cls = module.EVALUATORS["lch_height"]

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("once")

    with monkeypatch.context() as patch:
        patch.setattr(cls, "compute", fail)
        failed = evaluate()
    assert set(failed.errors.values()) == {"ValueError: once"}
    assert failed.saes[0].evaluators["ontological_coverage"].metrics
    assert evaluate().errors == {}


# Inner nodes as classes -------------------------------------------------------------------------


def test_inner_nodes_may_be_classes(evaluate: Any, vit_folder: Path, tmp_path: Path) -> None:
    """Pictures of "animal" beside pictures of a kind of animal, with every evaluator."""
    generator = np.random.default_rng(0)
    for c, name in enumerate(("animal", "animal/dog", "animal/dog/pug", "animal/cat", "plant")):
        place = tmp_path / "photos" / name
        place.mkdir(parents=True)
        for i in range(6):
            pixels = generator.integers(0, 90, (16, 16, 3)) + 30 * c
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    settings = {
        "model_name": str(vit_folder),
        "dataset_path": str(tmp_path / "elsewhere"),
        "tokens": "class",
        "taxonomy": str(tmp_path / "photos"),
    }
    save_sae(tmp_path / "sae", HOOKS[0], settings)
    results = evaluate(
        tmp_path / "sae",
        dataset_path=str(tmp_path / "photos"),
        split="train",
        evaluators="all",
    )
    assert results.errors == {}
    assert results.dataset.classes == ["animal", "cat", "dog", "plant", "pug"]
    tree = Taxonomy.from_json(json.dumps(results.taxonomy.tree))
    assert tree.height[tree.class_nodes].tolist() == [2, 0, 1, 0, 0]
    assert write_report(results, interactive=False).exists()


# Merging ----------------------------------------------------------------------------------------


def numbers_of(results: Results) -> dict[str, dict[str, tuple[Any, ...]]]:
    return {
        f"{sae.id} {evaluator}": {
            metric: (number.value, {n: (null.mean, null.p) for n, null in number.nulls.items()})
            for metric, number in found.metrics.items()
        }
        for sae in results.saes
        for evaluator, found in sae.evaluators.items()
    }


def test_other_evaluators_are_added_to_those_that_are_finished(
    evaluate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ["ontological_coverage", "lch_height", "pair_depth"]
    together = evaluate(evaluators=names, output_path=tmp_path / "together")
    first = evaluate(evaluators=names[0])
    measured: list[list[str]] = []
    measure_sae = module.measure_sae

    def recorded(bench: Any, *args: Any, **kwargs: Any) -> Any:
        measured.append(list(bench.chosen))
        return measure_sae(bench, *args, **kwargs)

    monkeypatch.setattr(module, "measure_sae", recorded)
    evaluate(evaluators=names[1])
    merged = evaluate(evaluators=["pair_depth", "ontological_coverage"])
    assert measured == [["lch_height"]] * 2 + [["pair_depth"]] * 2
    assert repr(numbers_of(merged)) == repr(numbers_of(together))
    assert list(merged.evaluators) == list(together.evaluators)
    assert merged.settings["evaluators"] == list(merged.evaluators)
    assert merged.settings["options"] == together.settings["options"]
    for sae, whole, alone in zip(merged.saes, together.saes, first.saes, strict=True):
        assert sae.node_f1 == pytest.approx(whole.node_f1) == alone.node_f1
        for which in ("most_specific", "least_specific"):
            cards = [[(card.latent, card.node) for card in getattr(s, which)] for s in (sae, whole)]
            assert cards[0] == cards[1] and cards[0]
        files = [
            f for e in sae.evaluators.values() for f in (*e.tables.values(), *e.figures.values())
        ]
        assert files and all((tmp_path / "out" / file).is_file() for file in files)
    metrics = [{p.name for p in (tmp_path / f / "metrics").iterdir()} for f in ("out", "together")]
    assert metrics[0] == metrics[1]


def test_other_options_replace_the_evaluator_that_is_named(evaluate: Any) -> None:
    first = numbers_of(evaluate(evaluators=["pair_depth", "lch_height"]))
    results = evaluate(evaluators="pair_depth", options={"pair_depth": {"k": 2}})
    second = numbers_of(results)
    assert set(first) == set(second)
    changed = {name for name in first if repr(first[name]) != repr(second[name])}
    assert changed and all(name.endswith("pair_depth") for name in changed)
    assert results.settings["options"]["pair_depth"]["k"] == 2


def test_numbers_under_other_conditions_are_dropped_only_when_told(
    evaluate: Any, tmp_path: Path
) -> None:
    evaluate(evaluators=["ontological_coverage", "pair_depth"])
    tables = set((tmp_path / "out" / "tables").rglob("*.csv"))
    before = (tmp_path / "out" / "results.json").read_bytes()
    for changes, named in (({"seed": 5}, "settings"), ({"max_images": 24}, "images")):
        with pytest.raises(
            ConfigError,
            match=rf"has numbers of {HOOKS[0]}, {HOOKS[1]} with other {named}, which would be dropped: "
            r"ontological_coverage; allowed: .*--replace",
        ):
            evaluate(evaluators="pair_depth", **changes)
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    both = evaluate(evaluators=["pair_depth", "ontological_coverage"], seed=5)
    assert both.settings["seed"] == 5 and len(both.evaluators) == 2
    one = evaluate(evaluators="pair_depth", seed=5, replace=True)
    assert set(one.evaluators) == {"pair_depth"}
    left = set((tmp_path / "out" / "tables").rglob("*.csv"))
    assert left < tables and not any("ontological_coverage" in path.name for path in left)


def test_cards_show_the_images_that_were_measured_on(
    evaluate: Any, world: Path, tmp_path: Path
) -> None:
    """Rows of two sets of images have the same numbers."""
    other = tmp_path / "other"
    shutil.copytree(world, other)
    for file in (other / "validation").rglob("*.png"):
        ImageOps.invert(Image.open(file)).save(file)
    old: set[Path] = set()
    for place in (world, other):
        images = load_images(str(place), split="validation")
        taxonomy = str(place / "validation")
        options = {"dataset_path": str(place), "taxonomy": taxonomy, "replace": True}
        results = evaluate(evaluators="ontological_coverage", **options)
        cards = [card for sae in results.saes for card in (*sae.most_specific, *sae.least_specific)]
        shown = {image.index: image.thumbnail for card in cards for image in card.images}
        assert shown
        for index, name in shown.items():
            content = (tmp_path / "out" / str(name)).read_bytes()
            assert content == thumbnail(images.decode(index))
        now = set((tmp_path / "out" / "thumbnails").rglob("*.jpg"))
        assert len(now) == len(shown) and not now & old
        old = now


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(evaluate: Any, folder: Path, message: str, *given: Any, **changes: Any) -> None:
    """No file of the folder is changed by a call that is refused."""
    before = files_in(folder)
    with pytest.raises(ConfigError, match=message):
        evaluate(*given, output_path=folder, **changes)
    assert files_in(folder) == before


def test_numbers_of_saes_that_are_not_given_again_are_dropped_only_when_told(
    evaluate: Any, run: Path, tmp_path: Path
) -> None:
    first, second = (run / hook for hook in HOOKS)
    out = tmp_path / "out"
    evaluate(first, evaluators=["pair_depth", "cpcc"])
    for evaluators in (["lch_height"], ["pair_depth", "cpcc"]):
        refused(
            evaluate,
            out,
            rf"^output_path: {out} has numbers of SAEs that this call does not evaluate \({HOOKS[0]}\), "
            r"which would be dropped: pair_depth, cpcc; allowed: another output_path, these SAEs and "
            r"evaluators too, or replace=True \(--replace\)\.$",
            second,
            evaluators=evaluators,
        )
    both = evaluate([first, second], evaluators=["pair_depth", "cpcc"])
    assert [sae.id for sae in both.saes] == list(HOOKS)
    told = evaluate(second, evaluators="lch_height", replace=True)
    assert [(sae.id, list(sae.evaluators)) for sae in told.saes] == [(HOOKS[1], ["lch_height"])]
    assert not any(HOOKS[0] in str(path) for path in files_in(out / "tables"))


def test_another_sae_of_the_same_name_does_not_replace_numbers(
    evaluate: Any, run: Path, vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    settings = run_settings(vit_folder, world)
    for seed in (0, 9):
        save_sae(tmp_path / str(seed) / "sae", HOOKS[0], settings, seed=seed)
    first, other = (tmp_path / name / "sae" for name in ("0", "9"))
    evaluate(first, evaluators="pair_depth")
    for evaluator in ("pair_depth", "lch_height"):
        message = "has numbers of sae with other weights, which would be dropped: pair_depth"
        refused(evaluate, tmp_path / "out", message, other, evaluators=evaluator)
    both = evaluate([first, other], evaluators="pair_depth")
    assert [sae.id for sae in both.saes] == ["0/sae", "9/sae"]
    # The same weights, read elsewhere.
    message = "has numbers of sae with other hook_name, tokens, which would be dropped: lch_height"
    evaluate(first, evaluators="lch_height", output_path=tmp_path / "a")
    elsewhere = {"hook_name": HOOKS[1], "tokens": "patch"}
    refused(evaluate, tmp_path / "a", message, first, evaluators="pair_depth", **elsewhere)
    again = evaluate(first, evaluators="lch_height", output_path=tmp_path / "a", **elsewhere)
    assert again.saes[0].tokens == "patch"


def test_in_its_own_folder_an_sae_that_is_trained_anew_is_measured_anew(
    evaluate: Any, run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(run, own)
    evaluate(own, output_path=own)
    shutil.rmtree(own / HOOKS[0])
    save_sae(own / HOOKS[0], HOOKS[0], json.loads((own / "runner_cfg.json").read_text()), seed=9)
    message = f"has numbers of {HOOKS[0]} with other weights, which would be dropped: ontological"
    refused(evaluate, own, message, own, evaluators="lch_height")
    again = evaluate(own, output_path=own).saes
    assert [sae.weights for sae in again] == [sae.weights_digest() for sae in find_saes(own)]


def test_numbers_that_cannot_be_kept_or_read_are_not_replaced(
    evaluate: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = evaluate(evaluators="pair_depth")
    shutil.rmtree(out / "tables" / HOOKS[1])
    message = f"has numbers of {HOOKS[1]} whose files are missing, .* dropped: pair_depth;"
    refused(evaluate, out, message, evaluators="lch_height")
    again = evaluate(evaluators=["pair_depth", "lch_height"])
    for sae, before in zip(again.saes, whole.saes, strict=True):
        found, expected = (each.evaluators["pair_depth"].metrics for each in (sae, before))
        assert {n: m.value for n, m in found.items()} == {n: m.value for n, m in expected.items()}
    (out / "results.json").write_text('{"schema": "taxolens.results/9"}')
    message = r"has results that cannot be read, and would be replaced \(.*results/9.*--replace"
    refused(evaluate, out, message, evaluators="pair_depth")
    assert evaluate(evaluators="pair_depth", replace=True).complete


# Bad input --------------------------------------------------------------------------------------


def test_training_images_are_refused(evaluate: Any, world: Path, caplog) -> None:
    with pytest.raises(ConfigError, match=r"split: .* was trained on .*\(train\).*held-out"):
        evaluate(split="train")
    results = evaluate(split="train", allow_train_split=True)
    assert results.dataset.seen_in_training
    assert "no image is held out" in caplog.text
    assert "Not held out" in write_report(results, interactive=False).read_text()


def test_the_same_images_under_another_name_are_refused(
    evaluate: Any, vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    images = load_images(world, split="validation")
    settings = {
        "model_name": str(vit_folder),
        "dataset_path": "somewhere/else",
        "dataset_fingerprint": images.fingerprint,
    }
    save_sae(tmp_path / "sae", HOOKS[0], settings)
    with pytest.raises(ConfigError, match="was trained on somewhere/else"):
        evaluate(tmp_path / "sae", dataset_path=str(world), taxonomy=str(world / "validation"))


def test_a_model_trained_on_since_is_named(
    training: Any, world: Path, vit_folder: Path, tmp_path: Path, caplog: Any
) -> None:
    """Its folder has the same name, and other weights than when the SAEs were trained."""
    place = shutil.copytree(vit_folder, tmp_path / "vit")
    other = shutil.copytree(vit_folder, tmp_path / "other")
    cfg = training.multi(
        model_name=str(place),
        dataset_path=str(world),
        eval_split="validation",
        taxonomy=str(world / "validation"),
        saes={hook: training.sae() for hook in HOOKS},
        hook_names={hook: hook for hook in HOOKS},
    )
    VisionMultiSAETrainingRunner(cfg).run()
    for hook in HOOKS:
        metadata = json.loads((training.output / hook / "cfg.json").read_text())["metadata"]
        assert metadata["model_fingerprint"] == model_fingerprint(load_vision_model(vit_folder))
    given = {**FAST, "evaluators": ["pair_depth"], "nulls": []}

    def said(run: Path, n: int, **changes: Any) -> int:
        caplog.clear()
        evaluate_run(run, **{**given, **changes}, output_path=tmp_path / f"out{n}")
        return caplog.text.count("is not the model that")

    assert said(training.output / HOOKS[0], 0) == 0
    weights = load_file(place / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("norm1.weight"))
    weights[name][0] += 0.125
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    assert said(training.output, 1) == 1
    assert f"{place} is not the model that {', '.join(HOOKS)} were trained on" in caplog.text
    assert said(training.output, 2, model_name=str(other)) == 0  # another one on purpose
    converted = read_sae(str(training.output / HOOKS[0])).cfg.metadata
    assert converted.model_fingerprint == metadata["model_fingerprint"]
    converted = read_sae(str(training.output / HOOKS[0]), model_name="other").cfg.metadata
    assert getattr(converted, "model_fingerprint", None) is None


def test_corrupt_images_are_skipped_and_named(evaluate: Any, world: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world, broken)
    (broken / "validation" / WORLD_CLASSES[0] / "3.png").write_bytes(b"no picture")
    common = {"dataset_path": str(broken), "taxonomy": str(broken / "validation")}
    results = evaluate(**common, max_corrupt_share=0.5)
    assert results.dataset.n_images == 31
    (skipped,) = results.dataset.skipped
    assert (
        "3.png" in skipped.reason
        and f"{skipped.index}" in write_report(results, interactive=False).read_text()
    )
    with pytest.raises(DataError, match="corrupt"):
        evaluate(**common, output_path=tmp_path / "strict", max_corrupt_share=0.0)


def test_numbers_of_images_that_could_be_read_then_are_not_mixed_with_those_of_now(
    evaluate: Any, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Bytes of 256 images identify a data set: of more, one that could not be read may be read later."""
    monkeypatch.setattr(dataset, "FINGERPRINT_IMAGES", 2)
    moving = tmp_path / "moving"
    shutil.copytree(world, moving)
    file = moving / "validation" / WORLD_CLASSES[3] / "2.png"
    content = file.read_bytes()
    common: dict[str, Any] = {"dataset_path": str(moving), "taxonomy": str(moving / "validation")}
    common |= {"max_corrupt_share": 0.5}
    file.write_bytes(b"")
    assert evaluate(**common, evaluators="pair_depth").dataset.n_images == 31
    file.write_bytes(content)
    out = tmp_path / "out"
    message = (
        rf"has numbers of {HOOKS[0]}, .* when other images could be read, .* dropped: pair_depth"
    )
    before = (out / "results.json").read_bytes()
    with pytest.raises(ConfigError, match=message):
        evaluate(**common, evaluators="lch_height")
    assert (out / "results.json").read_bytes() == before
    both = evaluate(**common, evaluators=["pair_depth", "lch_height"])
    assert "31 images that could be read, and now 32 can be: they are measured again" in caplog.text
    alone = evaluate(**common, evaluators=["pair_depth", "lch_height"], output_path=tmp_path / "b")
    assert both.dataset.n_images == 32 and not both.dataset.skipped
    assert repr(numbers_of(both)) == repr(numbers_of(alone))


def test_images_that_change_between_two_models_end_the_evaluation(
    evaluate: Any, vit_folder: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "FINGERPRINT_IMAGES", 2)
    moving = tmp_path / "moving"
    shutil.copytree(world, moving)
    settings = run_settings(vit_folder, moving)
    for size in (16, 32):
        save_sae(tmp_path / f"at_{size}", HOOKS[0], {**settings, "image_size": size})
    measure_sae = module.measure_sae

    def then_break(*args: Any, **kwargs: Any) -> Any:
        (moving / "validation" / WORLD_CLASSES[3] / "2.png").write_bytes(b"")
        return measure_sae(*args, **kwargs)

    monkeypatch.setattr(module, "measure_sae", then_break)
    with pytest.raises(
        DataError, match=r"images: 31 could be read for one model, and 32 .* another"
    ):
        evaluate([tmp_path / "at_16", tmp_path / "at_32"], max_corrupt_share=0.5)


def test_a_bound_of_pixels_is_a_condition_of_the_numbers(evaluate: Any, tmp_path: Path) -> None:
    plain = evaluate(evaluators="pair_depth")
    assert "max_image_pixels" not in plain.settings
    message = rf"has numbers of {HOOKS[0]}, .* with other settings, .* dropped: pair_depth"
    refused(evaluate, tmp_path / "out", message, evaluators="lch_height", max_image_pixels=500)
    bounded = evaluate(evaluators="pair_depth", max_image_pixels=500)
    assert bounded.settings["max_image_pixels"] == 500
    assert bounded.saes[0].fingerprint != plain.saes[0].fingerprint


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"evaluators": ["lch_hight"]}, UnknownNameError, "did you mean 'lch_height'"),
        (
            {"options": {"pair_dept": {}}},
            ConfigError,
            "evaluator in options: not known; given 'pair_dept'",
        ),
        (
            {"options": {"lch_height": {"tow": 1}}},
            ConfigError,
            "option of lch_height: not known; given 'tow'",
        ),
        ({"nulls": ["shufled"]}, ConfigError, "nulls: not known .did you mean 'shuffled'"),
        ({"controls": ["palnted"]}, ConfigError, "did you mean 'planted'"),
        (
            {"aggregate": "sum"},
            ConfigError,
            "aggregate: not known; given 'sum'; allowed: max, mean",
        ),
        ({"n_permutations": 0}, ConfigError, "n_permutations: not possible; given 0"),
        ({"split": "nowhere"}, ConfigError, "nowhere"),
        ({"taxonomy": "imagnet"}, ConfigError, "imagnet"),
        ({"taxonomy": "imagenet"}, ConfigError, "animal_0"),
    ],
)
def test_wrong_settings_are_refused_before_the_work(
    evaluate: Any, monkeypatch, settings: dict[str, Any], error: type, message: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("refused too late")

    monkeypatch.setattr(forward.ActivationCache, "build", never)
    with pytest.raises(error, match=message):
        evaluate(**settings)


def test_saes_that_do_not_fit_are_refused_before_the_forward_pass(
    evaluate: Any, vit_folder: Path, world: Path, tmp_path: Path, monkeypatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("refused too late")

    monkeypatch.setattr(forward.ActivationCache, "build", never)
    settings = {"model_name": str(vit_folder), "dataset_path": str(world)}
    taxonomy = str(world / "validation")
    save_sae(tmp_path / "narrow", HOOKS[0], settings, d_in=12)
    with pytest.raises(
        ConfigError, match=r"narrow: d_in: not the width of .*; given 12; allowed: 16"
    ):
        evaluate(tmp_path / "narrow", taxonomy=taxonomy)
    save_sae(tmp_path / "astray", "blocks.7.hook_resid_post", settings)
    with pytest.raises(UnknownNameError, match=r"blocks\.7\.hook_resid_post"):
        evaluate(tmp_path / "astray", taxonomy=taxonomy)
    save_sae(tmp_path / "torn", HOOKS[0], settings)
    (tmp_path / "torn" / "sae_weights.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="torn: the SAE cannot be loaded"):
        evaluate(tmp_path / "torn", taxonomy=taxonomy)


def test_no_taxonomy_and_no_held_out_split(
    evaluate: Any, vit_folder: Path, world: Path, photos: Path, tmp_path: Path
) -> None:
    settings = {"model_name": str(vit_folder), "dataset_path": str(world)}
    save_sae(tmp_path / "sae", HOOKS[0], settings)
    with pytest.raises(ConfigError, match=r"^taxonomy: not in the metadata, and not given;"):
        evaluate(tmp_path / "sae")
    with pytest.raises(ConfigError, match=r"split: .* has no split validation or test"):
        evaluate(tmp_path / "sae", dataset_path=str(photos), taxonomy=str(photos))


# Runs on disk -----------------------------------------------------------------------------------


def test_find_saes(run: Path, tmp_path: Path) -> None:
    found = find_saes(run)
    assert [sae.id for sae in found] == list(HOOKS)
    assert {sae.run for sae in found} == {"study"}
    assert found[0].hook_name == HOOKS[0] and found[0].setting("split") == "train"
    (bare,) = find_saes(run / HOOKS[1])
    assert bare.id == bare.run == HOOKS[1] and bare.layer == 1
    both = find_saes([run / HOOKS[0], run / HOOKS[1]])
    assert [sae.id for sae in both] == list(HOOKS)


def test_blocks_come_in_natural_order_and_checkpoints_do_not_count(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("blocks.10", "blocks.9", "checkpoints/abc/500"):
        save_sae(run / name, f"{name}.hook", {})
    (run / "checkpoints/abc/500/trainer_state.pt").touch()
    assert [sae.name for sae in find_saes(run)] == ["blocks.9", "blocks.10"]
    (checkpoint,) = find_saes(run / "checkpoints/abc/500")
    assert checkpoint.name == "500"


def test_superscripts_and_circled_digits_are_no_numbers(tmp_path: Path) -> None:
    names = ["٣", "k9²", "k10²", "①"]  # the first is a decimal digit, as int() reads it
    for name in names:
        save_sae(tmp_path / name, HOOKS[0], {})
    assert [sae.id for sae in find_saes(tmp_path)] == names


def test_a_checkpoint_is_read_with_what_scales_its_inputs(tmp_path: Path) -> None:
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=16, d_sae=24, k=4, normalize_activations="expected_average_only_in"
        )
    )
    sae.save_model(tmp_path)
    ActivationScaler(scaling_factor=3.0).save(str(tmp_path / "activation_scaler.json"))
    (tmp_path / "trainer_state.pt").touch()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    loaded = find_saes(tmp_path)[0].load()
    assert not isinstance(loaded, TopKTrainingSAE)
    torch.testing.assert_close(loaded.decode(loaded.encode(x)), sae.eval()(3 * x) / 3)


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    for seed in ("a", "b"):
        save_sae(tmp_path / seed / "out", HOOKS[0], {})
    found = find_saes([tmp_path / "a" / "out", tmp_path / "b" / "out"])
    assert [sae.id for sae in found] == ["a/out", "b/out"]
    with pytest.raises(ConfigError, match="is given twice"):
        find_saes([tmp_path / "a", tmp_path / "b" / ".." / "a"])
    with pytest.raises(ConfigError, match="out is given twice, once in another folder"):
        find_saes([tmp_path / "a", tmp_path / "a" / "out"])


def test_saes_that_links_lead_to_are_found_once(tmp_path: Path) -> None:
    """A run and its SAEs below a link; a data set below one is not searched any further."""
    for i, name in enumerate(("runs/l0", "else/l1", "else/deep/l2", "else/too/deep/l3")):
        save_sae(tmp_path / name, HOOKS[0], {}, seed=i)
    runs = tmp_path / "runs"
    links = {
        "l1": "else/l1",
        "other": "else",
        "a_latest": "runs/l0",
        "up": ".",
        "l0/loop": "runs/l0",
    }
    for name, target in links.items():
        (runs / name).symlink_to(tmp_path / target, target_is_directory=True)
    assert [sae.id for sae in find_saes(runs)] == ["l0", "l1", "other/deep/l2"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "l1").symlink_to(tmp_path / "else/l1", target_is_directory=True)
    assert [sae.id for sae in find_sources(tmp_path / "links")] == ["l1"]


def test_two_saes_never_share_an_id(run: Path, tmp_path: Path) -> None:
    """The SAE in a run's own folder, beside one in a folder of the run's name; and two calls' SAEs."""
    for seed, folder in enumerate(("x", "x/x", "x/x-2", "y/x")):
        save_sae(tmp_path / folder, HOOKS[0], {}, seed=seed)
    found = find_saes(tmp_path / "x")
    paths = {sae.id: sae.path for sae in found}
    place = tmp_path / "x"
    assert paths == {"x-2-2": place, "x": place / "x", "x-2": place / "x-2"}
    both = find_saes([tmp_path / "x", run])
    assert len({sae.id for sae in both}) == len(both) == 5
    others = find_saes(tmp_path / "y")
    with pytest.raises(ConfigError, match=r"runs: two SAEs have the id 'x' \(.*x/x and .*y/x\)"):
        find_sources([*found, *others])
    assert find_sources(found) == found


def test_unusable_folders(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a folder; allowed"):
        find_saes(tmp_path / "nowhere")
    for name in ("study.sh", "study1.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=r"study_1 is not a folder; allowed: run folders"):
        find_saes(tmp_path / "study_1")
    (tmp_path / "study1").mkdir()
    for given, meant in (("study_1", "study1"), ("study_1.pt", "study1.pt")):
        meant = rf"{given} is not a folder \(did you mean '{tmp_path / meant}'\?\); allowed"
        with pytest.raises(ConfigError, match=meant):
            find_saes(tmp_path / given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no SAE; allowed: a folder with cfg.json"):
        find_saes(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no folder is given"):
        find_saes([])
    torn = tmp_path / "torn"
    shutil.copytree(run / HOOKS[0], torn)
    weights = torn / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"torn: the SAE cannot be loaded"):
        find_saes(torn)[0].load()
    shutil.copy(run / HOOKS[0] / weights.name, weights)
    cfg = json.loads((torn / "cfg.json").read_text())
    cfg["architecture"], cfg["metadata"]["requires_plugin"] = "unheard", "other-package"
    (torn / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(
        ConfigError, match="given 'unheard'; allowed: install the plugin 'other-package'"
    ):
        find_saes(torn)[0].load()
    (torn / "cfg.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cfg.json: not JSON"):
        find_saes(torn)


# During training --------------------------------------------------------------------------------


def test_training_evaluator_reads_the_held_out_images(training: Any, world: Path, vit: Any) -> None:
    cfg = training.multi(
        dataset_path=str(world),
        taxonomy=str(world / "validation"),
        evaluators=["pair_depth", "ontological_coverage"],
    )
    state = torch.random.get_rng_state()
    evaluator = make_training_evaluator(cfg, vit)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(evaluator.held_out[HOOKS[0]]) == 32  # validation, of which the config says nothing
    sae = TopKTrainingSAE(training.sae())
    sae.cfg.metadata.hook_name = HOOKS[1]
    metrics = evaluator(sae, iter(()), ActivationScaler())
    assert "eval/ontological_coverage/internal_f1" in metrics
    assert "eval/ontological_coverage/internal_f1/permuted_classes" in metrics
    assert all(isinstance(value, float) for value in metrics.values())
    cfg.eval_split = "train"
    with pytest.raises(ConfigError, match="eval_split: trained on; given 'train'"):
        make_training_evaluator(cfg, vit)
