"""Evaluation on several ranks: the same results as one process, resumed, and errors that are named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import RankError, run_ranks
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from taxolens.plugin.evaluation import evaluate as module
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.evaluation.team import Team
from taxolens.plugin.reporting.results import Results
from taxolens.registry.errors import ConfigError
from taxolens.registry.files import only_writer
from taxolens.registry.ranks import Ranks

HOOKS = ("blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def run(vit_folder: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three SAEs of different widths, as the runner writes it."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    settings = {
        "model_name": str(vit_folder),
        "dataset_path": str(world),
        "split": "train",
        "tokens": "class",
        "taxonomy": str(world / "validation"),
    }
    for i, hook in enumerate(HOOKS):
        with torch.random.fork_rng():
            torch.manual_seed(i)
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=24 + 8 * i, k=4))
            torch.nn.init.normal_(sae.W_enc)
        for name, value in {"hook_name": hook, **settings}.items():
            sae.cfg.metadata[name] = value
        (folder / hook).mkdir(parents=True)
        sae.save_inference_model(folder / hook)
    (folder / "runner_cfg.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def evaluate(run: Path, vit: Any) -> Any:
    def call(folder: Path, **changes: Any) -> Results:
        settings = {
            "evaluators": ["ontological_coverage", "reconstruction", "stability"],
            "n_permutations": 3,
            "n_twins": 2,
            "n_groups": 3,
            "controls": ["planted"],
            "progress": False,
            "override_model": vit,
            "output_path": folder,
        }
        return evaluate_run(run, **{**settings, **changes})

    return call


def content(folder: Path) -> dict[str, Any]:
    """Every file of a results folder, durations left out."""
    found: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    results = json.loads(found["results.json"])
    del results["created"], results["provenance"]["seconds"]
    for sae in results["saes"]:
        del sae["seconds"]
        for evaluator in sae["evaluators"].values():
            del evaluator["seconds"]
    return {**found, "results.json": results}


@pytest.fixture(scope="module")
def one_thread() -> Any:
    """As each rank has; the order of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", [2, 5])
def test_any_number_of_ranks_gives_the_results_of_one(
    evaluate: Any, tmp_path: Path, one_thread: None, size: int
) -> None:
    """Two ranks share three SAEs; of five, two and two and one share the passes of an SAE each."""
    alone = evaluate(tmp_path / "alone")
    assert alone.errors == {} and len(alone.saes) == 3
    found = run_ranks(size, lambda: evaluate(tmp_path / "ranks").frame(), tmp_path / "job")
    expected = content(tmp_path / "alone")
    shared = content(tmp_path / "ranks")
    assert shared["results.json"] == expected["results.json"]
    assert shared == expected
    assert all(frame.equals(alone.frame()) for frame in found)


def test_what_ranks_had_finished_when_one_was_killed_is_not_done_again(
    evaluate: Any, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is at the widest SAE; rank 1 has one of the two others and is killed."""
    evaluate(tmp_path / "alone")
    measured: list[str] = []
    measure_sae = module.measure_sae

    def killed(bench: Any, sae: Any, *args: Any, **settings: Any) -> Any:
        if Ranks.here().is_first:
            time.sleep(60)
        return measure_sae(bench, sae, *args, **settings)

    def add(self: Any, sae: Any, result: Any) -> None:
        added(self, sae, result)
        if not Ranks.here().is_first:
            os.kill(os.getpid(), signal.SIGKILL)

    added = module.ResultsFolder.add
    with monkeypatch.context() as patch, pytest.raises(RankError, match="rank 1: killed"):
        patch.setattr(module, "measure_sae", killed)
        patch.setattr(module.ResultsFolder, "add", add)
        run_ranks(2, lambda: evaluate(tmp_path / "ranks"), tmp_path / "job")
    part = Results.load(tmp_path / "ranks" / "ranks" / "1")
    assert [sae.id for sae in part.saes] == [HOOKS[0]] and not part.complete

    def counted(bench: Any, sae: Any, *args: Any, **settings: Any) -> Any:
        measured.append(sae.id)
        return measure_sae(bench, sae, *args, **settings)

    monkeypatch.setattr(module, "measure_sae", counted)
    evaluate(tmp_path / "ranks")
    assert measured == [*HOOKS[1:]]
    assert content(tmp_path / "ranks") == content(tmp_path / "alone")


def test_the_error_of_a_rank_ends_all_and_is_named(
    evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_sae = module.measure_sae

    def fails(bench: Any, sae: Any, *args: Any, **settings: Any) -> Any:
        if sae.id == HOOKS[0]:
            raise ConfigError("b_dec", "damaged")
        return measure_sae(bench, sae, *args, **settings)

    monkeypatch.setattr(module, "measure_sae", fails)
    with pytest.raises(RankError) as error:
        run_ranks(2, lambda: evaluate(tmp_path / "out"), tmp_path / "job")
    assert "rank 1: " in str(error.value) and "ConfigError: b_dec: damaged" in str(error.value)
    assert [sae.id for sae in Results.load(tmp_path / "out").saes] in ([], [HOOKS[2]])


def test_a_folder_that_another_process_writes_is_refused_on_every_rank(
    evaluate: Any, tmp_path: Path
) -> None:
    with only_writer(tmp_path / "out", "output_path"), pytest.raises(RankError) as error:
        run_ranks(2, lambda: evaluate(tmp_path / "out"), tmp_path / "job")
    assert "output_path: another process is writing there" in str(error.value)


def test_numbers_of_other_saes_are_dropped_on_no_rank(
    evaluate: Any, run: Path, vit: Any, tmp_path: Path
) -> None:
    few = {"progress": False, "n_permutations": 2, "n_twins": 1, "override_model": vit}
    first, other = (
        {"output_path": tmp_path / "out", "evaluators": name, **few}
        for name in ("ontological_coverage", "lch_height")
    )
    evaluate_run(run / HOOKS[0], **first)
    before = content(tmp_path / "out")
    with pytest.raises(RankError) as error:
        run_ranks(2, lambda: evaluate_run(run / HOOKS[1], **other), tmp_path / "job")
    said = f"has numbers of SAEs that this call does not evaluate ({HOOKS[0]})"
    assert said in str(error.value)
    assert content(tmp_path / "out") == before


def test_an_evaluator_that_fails_on_one_rank_costs_its_own_numbers(
    evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = module.EVALUATORS["ontological_coverage"]
    compute = cls.compute

    def fails(self: Any, **given: Any) -> Any:
        if self.context.d_sae == 40 and self.context.source == "sae":
            raise ValueError("too wide")
        return compute(self, **given)

    monkeypatch.setattr(cls, "compute", fails)
    run_ranks(2, lambda: evaluate(tmp_path / "out"), tmp_path / "job")
    found = Results.load(tmp_path / "out")
    assert "too wide" in str(found.errors)
    assert {sae.id: [n for n, e in sae.evaluators.items() if e.error] for sae in found.saes} == {
        HOOKS[0]: [],
        HOOKS[1]: [],
        HOOKS[2]: ["ontological_coverage"],
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 5}, "settings.seed: 0 on rank 0, 5 on rank 1"),
        ({"evaluators": ["ontological_coverage"]}, "evaluators.reconstruction."),
        (
            {"options": {"stability": {"same": 0.9}}},
            "evaluators.stability.same: 0.7 on rank 0, 0.9 on rank 1",
        ),
        ({"taxonomy": True}, "tree: "),
        ({"dataset_path": True}, "images: "),
    ],
)
def test_ranks_with_other_settings_are_refused_on_each(
    evaluate: Any, world: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    given = dict(changes)
    if "taxonomy" in given:  # with a level less
        edges = [f"root,{place.name}" for place in sorted((world / "validation").glob("*/*"))]
        given["taxonomy"] = tmp_path / "tree.csv"
        given["taxonomy"].write_text("\n".join(["parent,child", *edges]))
    if "dataset_path" in given:
        copy = shutil.copytree(world, tmp_path / "world")
        next((copy / "validation").glob("*/*/0.png")).unlink()
        given["dataset_path"] = str(copy)

    def act() -> str:
        with pytest.raises(ConfigError) as error:
            evaluate(tmp_path / "out", **({} if Ranks.here().is_first else given))
        return str(error.value)

    for message in run_ranks(2, act, tmp_path / "job"):
        assert message.startswith("ranks: the processes of the job do not have the same work: ")
        assert named in message
    assert not (tmp_path / "out" / "results.json").exists()


def test_one_process_of_a_job_can_evaluate_alone(evaluate: Any, tmp_path: Path) -> None:
    def act() -> list[str]:
        if Ranks.here().is_first:
            return []
        found = evaluate(tmp_path / "out", ranks=Ranks(), evaluators="ontological_coverage")
        return [sae.id for sae in found.saes]

    assert run_ranks(2, act, tmp_path / "job") == [[], [*HOOKS]]


# Dealing ------------------------------------------------------------------------------------------


def dealt(size: int, costs: dict[str, float]) -> list[tuple[list[str], Team]]:
    return [Team.deal(Ranks(rank, size), costs, "n") for rank in range(size)]


def test_each_of_many_saes_has_one_rank() -> None:
    costs = {name: 1.0 + len(name) for name in ("a", "bb", "ccc", "dd")}
    names = [mine for mine, _ in dealt(3, costs)]
    assert sorted(chain(*names)) == sorted(costs) and all(names)
    assert all(team.leads and not team.divided for _, team in dealt(3, costs))
    assert dealt(3, costs)[0][1].share({"random 0": 2.0, "neurons 0": 1.0}) == [
        "random 0",
        "neurons 0",
    ]


@pytest.mark.parametrize(("size", "n"), [(2, 1), (5, 2), (7, 3)])
def test_the_passes_of_few_saes_are_dealt_once_each(size: int, n: int) -> None:
    passes = {f"random {i}": 3.0 for i in range(3)} | {f"group {i}": 2.0 for i in range(5)}
    teams = dealt(size, {f"sae {i}": 1.0 for i in range(n)})
    for i in range(n):
        of_one = [team for mine, team in teams if mine == [f"sae {i}"]]
        assert [team.leads for team in of_one] == [True] + [False] * (len(of_one) - 1)
        shares = [team.share(passes) for team in of_one]
        assert sorted(chain(*shares)) == sorted(passes)
        loads = [sum(passes[name] for name in share) for share in shares]
        loads[0] += 6.0  # the SAE's own pass
        assert max(loads) <= 4 / 3 * max(6.0, sum(loads) / len(loads)) + 1e-9
