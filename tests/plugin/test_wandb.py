"""What W&B was really told: offline runs are read back; nothing that fails there costs a run."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import shutil
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from results_factory import make_results
from sae_lens import LoggingConfig, TopKTrainingSAEConfig
from taxolens.plugin.reporting.results import Results
from taxolens.plugin.reporting.wandb_log import (
    _Dropping,
    ensure_wandb,
    flat_metrics,
    log_results,
    no_second_run,
)
from taxolens.plugin.training.config import VisionLoggingConfig
from taxolens.plugin.training.interrupts import TrainingInterrupted
from taxolens.registry.errors import ConfigError, DivergedError
from wandb_reader import OfflineRun

NOWHERE = "http://127.0.0.1:9"  # the discard port: connections are refused
DOCS = Path(__file__).parents[2] / "docs" / "wandb.md"


@pytest.fixture(autouse=True)
def own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")  # set first, so that the test's changes are undone
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    wandb.finish()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return make_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def logged(results: Results, tmp_path_factory: pytest.TempPathFactory) -> tuple[OfflineRun, Path]:
    """One run with everything in it, read back."""
    folder = tmp_path_factory.mktemp("logged")
    report = folder / "r.html"
    report.write_text("<p>report</p>")
    sae = folder / "sae"
    sae.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors", "trainer_state.pt"):
        (sae / name).write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
            patch.setenv(f"WANDB_{name}", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        place = log_results(
            results, mode="offline", report=report, saes={"a/b": sae}, project="p", name="study"
        )
    assert place is not None and wandb.run is None
    wandb.teardown()
    return OfflineRun(Path(place)), folder


def test_every_metric_lies_under_its_stable_name(logged, results: Results) -> None:
    run, _ = logged
    for sae, evaluator, metric, number in results.rows():
        key = f"{sae.id}/eval/{evaluator}/{metric}"
        assert run.logged(key) == [number.value]
        for name, null in number.nulls.items():
            expected = [] if math.isnan(null.mean) else [null.mean]
            assert run.logged(f"{key}/{name}") == expected
    assert run.summary["blocks.2.hook_resid_post/eval/pair_depth/pair_depth"] > 0


def test_interval_p_draws_and_what_a_number_is_computed_from_are_logged(
    logged, results: Results
) -> None:
    run, _ = logged
    for sae in results.saes:
        key = f"{sae.id}/eval/ontological_coverage/internal_f1"
        number = sae.evaluators["ontological_coverage"].metrics["internal_f1"]
        expected = {
            "low": number.low,
            "high": number.high,
            "p": number.nulls["permuted_classes"].p,
            "draws": 19,
            "support": int(sae.evaluators["ontological_coverage"].metrics["internal_nodes"].value),
            "judged": 1,
        }
        assert {name: run.logged(f"{key}/{name}") for name in expected} == {
            name: [value] for name, value in expected.items()
        }
        assert run.logged(f"{sae.id}/eval/l0") == [sae.l0]
        assert run.logged(f"{sae.id}/eval/ontological_coverage/internal_nodes/judged") == []
    assert run.config["permuted_classes"]["movable"] == 16
    assert run.config["permuted_classes"]["draws"] == 19


def test_what_is_computed_from_little_is_marked(tmp_path: Path) -> None:
    results = make_results(tmp_path, n_layers=1)
    coverage = results.saes[0].evaluators["ontological_coverage"].metrics
    coverage["internal_f1"] = replace(coverage["internal_f1"], support=4)
    results.saes[0] = replace(results.saes[0], l0=213.0, l0_token=16.0)
    flat = flat_metrics(results)
    assert flat["eval/ontological_coverage/internal_f1/judged"] == 0
    assert flat["eval/pair_depth/pair_depth/judged"] == 1
    assert (flat["eval/l0"], flat["eval/l0_token"]) == (213, 16)
    frame = results.frame().set_index("metric")
    assert frame.not_judged["internal_f1"] == "computed from 4, fewer than 5"
    assert frame.not_judged["pair_depth"] == frame.not_judged["internal_nodes"] == ""


def test_curves_over_layers_with_their_nulls(logged, results: Results) -> None:
    run, _ = logged
    assert run.logged("layers/layer") == [0, 1, 2]
    assert run.metrics["layers/*"] == "layers/layer"
    curve = run.logged("layers/pair_depth/pair_depth")
    assert curve == [s.evaluators["pair_depth"].metrics["pair_depth"].value for s in results.saes]
    null = run.logged("layers/pair_depth/pair_depth/permuted_classes")
    assert len(null) == 3 and all(n < v for n, v in zip(null, curve, strict=True))
    (chart,) = run.logged("charts/pair_depth/pair_depth_table")
    assert chart["_type"] == "table-file" and chart["nrows"] == 3 * 5


def test_tables_and_figures(logged, results: Results) -> None:
    run, _ = logged
    (summary,) = run.logged("tables/summary")
    assert (summary["_type"], summary["nrows"]) == ("table-file", len(results.frame()))
    for sae in results.saes:
        (table,) = run.logged(f"{sae.id}/tables/pair_depth/latents")
        assert table["nrows"] == 4
        (figure,) = run.logged(f"{sae.id}/figures/pair_depth/curve")
        assert figure["_type"] == "plotly-file"


def test_config_and_artifacts(logged, results: Results) -> None:
    run, _ = logged
    assert run.run.project == "p" and run.run.display_name == "study"
    assert run.run.job_type == "evaluate"
    assert run.config["settings"]["n_permutations"] == 19
    assert run.config["dataset"]["n_images"] == 60
    assert run.config["taxonomy"] == "tree"
    assert run.config["architectures"] == {sae.id: "topk" for sae in results.saes}
    evaluation = run.artifacts["taxolens-results"]
    names = {entry.path for entry in evaluation.manifest.contents}
    assert {"results.json", "report.html"} <= names
    assert any(name.startswith("tables/") for name in names)
    (staged,) = [e for e in evaluation.manifest.contents if e.path == "results.json"]
    assert json.loads(Path(staged.local_path).read_text())["schema"] == results.schema
    model = run.artifacts["a_b"]
    assert model.type == "model"
    assert {e.path for e in model.manifest.contents} == {"cfg.json", "sae_weights.safetensors"}


def test_records_longer_than_a_block_are_read_back(tmp_path: Path) -> None:
    run = wandb.init(mode="offline", project="p")
    text = "x" * 100_000  # three blocks of the log
    run.log({"long": text, "n": 1})
    run.log({"n": 2})
    folder = Path(run.dir).parent
    wandb.finish()
    read = OfflineRun(folder)
    assert read.logged("long") == [text]
    assert read.logged("n") == [1, 2]


def test_single_sae_has_no_prefix(tmp_path: Path) -> None:
    results = make_results(tmp_path / "r", n_layers=1)
    flat = flat_metrics(results)
    assert "eval/pair_depth/pair_depth" in flat
    assert "eval/pair_depth/pair_depth/permuted_classes" in flat
    assert not any(math.isnan(value) for value in flat.values())


def test_an_active_run_is_used_and_left_open(results: Results) -> None:
    ensure_wandb("offline", project="p", config={"lr": 1})
    run = wandb.run
    assert run is not None
    place = log_results(results)
    assert wandb.run is run
    wandb.finish()
    read = OfflineRun(Path(str(place)))
    assert read.config["lr"] == 1
    assert read.config["evaluation"]["taxonomy"] == "tree"
    assert read.logged("blocks.0.hook_resid_post/eval/pair_depth/pair_depth")


def test_training_logs_losses_evaluations_config_and_saes(
    training: Any, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run of SAELens's trainer over many SAEs, read back."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    cfg = training.multi(
        evaluators=["lch_height"],
        taxonomy=str(world / "validation"),
        eval_dataset_path=str(world),
        eval_split="validation",
        logger=LoggingConfig(
            wandb_project="p", run_name="study", wandb_log_frequency=1, eval_every_n_wandb_logs=5
        ),
    )
    training.runner(cfg).run()
    (file,) = Path(os.environ["WANDB_DIR"]).rglob("offline-run-*/*.wandb")
    run = OfflineRun(file.parent)
    assert run.run.display_name == "study" and run.run.project == "p"
    assert run.config["training_tokens"] == cfg.training_tokens
    for name in ("first", "last"):
        losses = run.logged(f"{name}/losses/overall_loss")
        assert len(losses) == 10 and all(math.isfinite(loss) for loss in losses)
        assert len(run.logged(f"{name}/eval/lch_height/height")) == 2
        assert len(run.logged(f"{name}/eval/lch_height/height/permuted_classes")) == 2
    assert "model" in {artifact.type for artifact in run.artifacts.values()}


class TestATrainingThatDoesNotEnd:
    @pytest.fixture
    def train(self, training: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("WANDB_MODE", "offline")
        wandb.teardown()

        def run(name: str, action: Any = None, **changes: Any) -> None:
            logger = LoggingConfig(wandb_project="p", run_name=name, wandb_log_frequency=1)
            settings = {"checkpoint_id": name, "output_path": str(training.folder / name)}
            cfg = training.single(logger=logger, **settings, **changes)
            sae = None if action is None else training.meddling(cfg.sae, action, step=4)
            training.runner(cfg, override_sae=sae).run()

        return run

    @staticmethod
    def runs() -> dict[str, list[int]]:
        """Name of each W&B run -> the steps that were logged in it."""
        wandb.finish()
        files = sorted(Path(os.environ["WANDB_DIR"]).rglob("offline-run-*/*.wandb"))
        found = [OfflineRun(file.parent) for file in files]
        logged = "losses/overall_loss"
        return {
            run.run.display_name: [row["_step"] for row in run.history if logged in row]
            for run in found
        }

    @pytest.mark.parametrize("error", [ValueError, DivergedError, KeyboardInterrupt])
    def test_its_run_is_not_that_of_the_next_one(self, train, error) -> None:
        def fails() -> None:
            raise error("no")

        with pytest.raises(error):
            train("failed", fails)
        assert wandb.run is None
        train("next")
        found = self.runs()
        assert set(found) == {"failed", "next"}
        assert len(found["failed"]) == 4 and len(found["next"]) == 10

    def test_an_interrupted_one_goes_on_in_it(self, train) -> None:
        with pytest.raises(TrainingInterrupted):
            train("stopped", lambda: signal.raise_signal(signal.SIGTERM))
        train("stopped", resume_from_checkpoint="auto")
        (steps,) = self.runs().values()
        assert len(steps) == len(set(steps)) == 10

    def test_and_another_one_does_not(self, train) -> None:
        with pytest.raises(TrainingInterrupted):
            train("stopped", lambda: signal.raise_signal(signal.SIGTERM))
        train("next")
        found = self.runs()
        assert set(found) == {"stopped", "next"} and len(found["next"]) == 10

    def test_a_run_that_the_caller_has_begun_stays_open(self, train) -> None:
        def fails() -> None:
            raise ValueError("no")

        ensure_wandb("offline", project="p", name="of the caller")
        begun = wandb.run
        with pytest.raises(ValueError):
            train("failed", fails)
        assert begun is not None and wandb.run is begun
        assert list(self.runs()) == ["of the caller"]


def test_several_curves_have_keys_charts_and_tables(results: Results, tmp_path: Path) -> None:
    """Their names have a * for the number of the block."""
    saes = [
        replace(sae, id=f"{sae.hook_name}.{kind}", name=f"{sae.hook_name}.{kind}")
        for sae in results.saes
        for kind in ("a", "b")
    ]
    place = log_results(replace(results, saes=saes), mode="offline", project="p")
    wandb.teardown()
    assert place is not None
    run = OfflineRun(Path(place))
    for kind in ("a", "b"):
        prefix = f"blocks.N.hook_resid_post.{kind}"
        assert run.logged(f"{prefix}/layers/layer") == [sae.layer for sae in results.saes]
        assert len(run.logged(f"{prefix}/layers/pair_depth/pair_depth")) == len(results.saes)


@pytest.mark.parametrize("constraint", ["frozen_decoder", None])
def test_norms_that_are_equal_up_to_rounding_have_a_histogram(
    training: Any, monkeypatch: pytest.MonkeyPatch, constraint: str | None
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    logger = LoggingConfig(wandb_project="p", wandb_log_frequency=1, eval_every_n_wandb_logs=5)
    sae = TopKTrainingSAEConfig(d_in=16, d_sae=256, k=4)
    cfg = training.single(sae=sae, constraint=constraint, logger=logger)
    trained = training.runner(cfg).run()
    (file,) = Path(os.environ["WANDB_DIR"]).rglob("offline-run-*/*.wandb")
    assert len(OfflineRun(file.parent).logged("weights/W_dec_norms")) == 2
    assert "log_histograms" not in vars(trained)


# When W&B fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "short", "0123456789" * 4])
def test_no_key_wrong_key_and_no_server_fall_back_to_offline(
    key: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.teardown()  # W&B reads its environment once
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with caplog.at_level(logging.WARNING):
        assert ensure_wandb(init_timeout=1, project="p") == "offline"
    (line,) = [record.message for record in caplog.records if "W&B" in record.message]
    assert line.startswith("W&B could not start (") and "logs offline; upload it later" in line
    assert "wandb sync" in line
    run = wandb.run
    assert run is not None
    # What SAELens's runners do next: it must find this run, not start its own.
    assert wandb.init(project="p", config={}) is run
    wandb.log({"losses/overall_loss": 0.5}, step=0)
    folder = Path(run.dir).parent
    wandb.finish()
    assert OfflineRun(folder).logged("losses/overall_loss") == [0.5]


def test_where_nothing_can_be_written_logging_is_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: object) -> object:
        if os.environ.get("WANDB_MODE") != "disabled":
            raise OSError(28, "No space left on device")
        return init()

    init = wandb.init
    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        assert ensure_wandb() == "disabled"
    assert "No space left" in caplog.text and "going on disabled" in caplog.text


def test_results_survive_whatever_fails_while_logging(
    results: Results, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError("service died")

    monkeypatch.setattr(wandb, "Table", fail)
    with caplog.at_level(logging.WARNING):
        assert log_results(results, mode="offline", project="p") is None
    assert "service died" in caplog.text and str(results.folder) in caplog.text
    assert wandb.run is None


@pytest.mark.parametrize("mode", ["offline", None])
def test_a_session_that_began_in_another_mode_is_forgotten(monkeypatch, mode) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert ensure_wandb(project="p") == "disabled"
    wandb.finish()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert ensure_wandb(mode, project="p") == "offline"


def test_disabled_and_unknown_modes(results: Results, tmp_path: Path) -> None:
    assert log_results(results, mode="disabled") is None
    assert not list(tmp_path.rglob("*.wandb"))
    with pytest.raises(ConfigError, match=r"'on'.*online, offline, disabled"):
        log_results(results, mode="on")


def test_the_names_are_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name in (
        "eval/<evaluator>/<metric>",
        "layers/<evaluator>/<metric>",
        "layers/layer",
        "charts/<evaluator>/<metric>",
        "tables/<evaluator>/<table>",
        "figures/<evaluator>/<figure>",
        "tables/summary",
        "taxolens-results",
        "wandb sync",
    ):
        assert name in text


def test_a_full_disk_turns_wandb_off_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert ensure_wandb("offline", project="p") == "disabled"
        logger = VisionLoggingConfig(wandb_project="p")
        logger.log(None, "weights", "cfg", None)  # of a run that W&B does not log
    assert [r.message for r in caplog.records] == [f"W&B is off: the disk of {tmp_path} is full."]


def test_a_disk_that_becomes_full_costs_no_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys
) -> None:
    class Full(io.StringIO):
        def write(self, *text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = close = write  # type: ignore[assignment]

    ensure_wandb("offline", project="p")
    streams = [getattr(handler, "stream", None) for handler in logging.getLogger("wandb").handlers]
    dropping = [stream for stream in streams if isinstance(stream, _Dropping)]
    assert dropping
    for stream in dropping:
        monkeypatch.setattr(stream, "_file", Full())
    full = shutil.disk_usage(".")._replace(free=0)
    with caplog.at_level(logging.WARNING, "taxolens"), no_second_run():
        logging.getLogger("wandb").info("a message")
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    wandb.finish()
    assert "Traceback" not in capsys.readouterr().err
    (line,) = [r.message for r in caplog.records if r.name.startswith("taxolens")]
    assert "is full: this W&B log is not complete" in line


def test_a_folder_that_cannot_be_written_gives_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    other = tmp_path.with_name("other")
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    can = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and can(path, mode))
    with caplog.at_level(logging.WARNING, "taxolens"):
        ensure_wandb("offline", project="p")
    found = [r.message for r in caplog.records if "cannot write" in r.message]
    assert found == [f"W&B cannot write into {tmp_path}; it uses {other}."]
    assert other in Path(wandb.run.dir).parents  # type: ignore[union-attr]
