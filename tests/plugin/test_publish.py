"""Publishing: the files of a repository, its card, and the upload through the real huggingface_hub client."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub import serving
from sae_lens import SAE
from safetensors.torch import save_file
from taxolens.plugin import cli
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.evaluation.publish import public_name, publish
from taxolens.plugin.reporting.metric_table import summary_rows
from taxolens.plugin.reporting.results import Results
from taxolens.registry.errors import CheckpointError, ConfigError, DataError, TaxolensError
from test_evaluate import FAST, HOOKS, save_sae
from tiny_runs import run_settings


@pytest.fixture(scope="module")
def run(vit_folder: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated run of two SAEs."""
    folder = tmp_path_factory.mktemp("runs") / "study"
    more = {"seed": 42, "lr": 0.001, "logger": {"wandb_entity": "someone"}}
    more |= {"eval_split": "validation", "output_path": str(folder)}
    settings = run_settings(vit_folder, world, **more)
    for i, hook in enumerate(HOOKS):
        save_sae(folder / hook, hook, {k: settings[k] for k in ("model_name", "tokens")}, seed=i)
    (folder / "runner_cfg.json").write_text(json.dumps(settings))
    evaluate_run(folder, **{**FAST, "evaluators": [*FAST["evaluators"], "reconstruction"]})
    return folder


def test_a_dry_run_writes_what_would_be_uploaded(run: Path, tmp_path: Path) -> None:
    assert cli.main(["publish", str(run), "me/saes", "--dry-run", str(tmp_path / "out")]) == 0
    out = tmp_path / "out"
    found = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()}
    own = {f"{hook}/{name}" for hook in HOOKS for name in ("cfg.json", "sae_weights.safetensors")}
    own |= {f"{hook}/runner_cfg.json" for hook in HOOKS}
    assert found == own | {"README.md", "metric.svg", "results.json", "report.html"}
    for hook in HOOKS:
        assert torch.equal(
            SAE.load_from_disk(out / hook).W_enc, SAE.load_from_disk(run / hook).W_enc
        )
    assert "data:image/jpeg" in (out / "report.html").read_text()
    assert (out / "metric.svg").read_text().startswith("<svg")
    with pytest.raises(ConfigError, match="dry_run: already there"):
        publish(run, "me/saes", dry_run=out)


def test_no_path_of_this_machine_is_published(run: Path, tmp_path: Path) -> None:
    publish(run, "me/saes", dry_run=tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_text()
            assert str(run.parent.parent) not in text and "someone" not in text, file
    assert public_name("facebook/dinov2-small") == "facebook/dinov2-small"
    assert (public_name(str(run)), public_name(None), public_name(3)) == ("study", None, 3)


def test_no_path_inside_settings_and_sentences_is_published(run: Path, tmp_path: Path) -> None:
    copy, private = tmp_path / "study", tmp_path / "my private"
    shutil.copytree(run, copy)
    content = json.loads((copy / "results.json").read_text())
    options = {"monosemanticity": {"encoder": f"{private}/emb.npy", "k": [3, f"{private}/a"]}}
    content["settings"]["options"] = options
    content["dataset"]["skipped"] = [{"index": 3, "reason": f"{private}/7.jpg: not an image"}]
    for sae in content["saes"]:
        found = sae["evaluators"]["lch_height"]
        found["error"] = f"OSError: no file '{private}/emb.npy', see https://example.org/a/b"
        found["notes"] = [f"embedded by ({tmp_path}/emb.npy), and/or 3/4 of it"]
    (copy / "results.json").write_text(json.dumps(content))
    settings = json.loads((copy / "runner_cfg.json").read_text())
    settings["more"] = {"nested": [{"path": str(private)}], "k": 3}
    (copy / "runner_cfg.json").write_text(json.dumps(settings))
    publish(copy, "me/saes", dry_run=tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            assert str(tmp_path) not in file.read_text(), file
    published = json.loads((tmp_path / "out" / "results.json").read_text())
    assert published["settings"]["options"] == {
        "monosemanticity": {"encoder": "emb.npy", "k": [3, "a"]}
    }
    assert published["dataset"]["skipped"] == [{"index": 3, "reason": "7.jpg: not an image"}]
    found = published["saes"][0]["evaluators"]["lch_height"]
    assert found["error"] == "OSError: no file 'emb.npy', see https://example.org/a/b"
    assert found["notes"] == ["embedded by (emb.npy), and/or 3/4 of it"]
    written = json.loads((tmp_path / "out" / HOOKS[0] / "runner_cfg.json").read_text())
    assert written["more"] == {"nested": [{"path": "my private"}], "k": 3}
    assert public_name("~/runs/mine") == "mine"


def test_the_card_has_every_number_with_its_nulls(run: Path, tmp_path: Path) -> None:
    publish(run, "me/saes", dry_run=tmp_path / "out", licence="mit")
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    assert yaml.safe_load(front)["library_name"] == "saelens"
    assert "base_model" not in yaml.safe_load(front), (
        "a folder of this machine is no model of the hub"
    )
    assert f'SAE.from_pretrained("me/saes", "{HOOKS[0]}")' in text
    assert "seed 42" in text and "learning rate 0.001" in text
    results = Results.load(tmp_path / "out")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    for sae in results.saes:
        (row,) = [r for r in rows if r[0] == f"| `{sae.id}`"]
        assert f"{sae.l0:.3g}" == row[7]
        explained = sae.evaluators["reconstruction"].metrics["explained_variance"].value
        assert f"{sae.l0_token:.3g}" == row[8] and f"{explained:.3g} |" == row[9]
    for number in summary_rows(results):
        (row,) = [
            r
            for r in rows
            if r[0].replace("\\", "") == f"| {number['title']}" and r[1] == f"`{number['sae']}`"
        ]
        shown = [number["value"], *(number[n] for n in ("permuted_classes", "shuffled", "random"))]
        assert [row[2], *row[4:7]] == [f"{v:.3g}" if v == v else "–" for v in shown]
        assert row[3] == ("–" if number["support"] is None else f"{number['support']:,}")
        assert row[8] == (f"{number['p']:.3g}" if number["p"] == number["p"] else "–")


def test_the_upload_and_back(
    run: Path, tmp_path: Path, monkeypatch, world: Path, vit_folder
) -> None:
    with serving(tmp_path / "hub", tmp_path / "cache", monkeypatch) as hub:
        assert cli.main(["publish", str(run), "me/saes", "--private", "--no_report"]) == 0
        assert [c["summary"] for c in hub.commits] == ["2 SAEs with taxolens"]
        assert hub.private == {"me/saes"}
        assert not (hub.root / "me/saes/report.html").exists()
        sae = SAE.from_pretrained("me/saes", HOOKS[1])
        assert torch.equal(sae.W_enc, SAE.load_from_disk(run / HOOKS[1]).W_enc)
        (hub.root / "me/saes/notes.txt").write_text("kept")
        publish(run, "me/saes", licence="mit")
        assert (hub.root / "me/saes/notes.txt").exists() and len(hub.commits) == 2
        results = evaluate_run(
            f"me/saes:{HOOKS[1]}",
            model_name=str(vit_folder),
            dataset_path=str(world),
            taxonomy=str(world / "validation"),
            output_path=tmp_path / "out",
            **FAST,
        )
        (again,) = results.saes
        (first,) = [sae for sae in Results.load(run).saes if sae.hook_name == HOOKS[1]]
        for name in FAST["evaluators"]:
            assert again.evaluators[name].metrics.keys() == first.evaluators[name].metrics.keys()
            for metric, number in again.evaluators[name].metrics.items():
                assert number.value == pytest.approx(
                    first.evaluators[name].metrics[metric].value, nan_ok=True
                )


@pytest.mark.parametrize(
    "name",
    [
        "sparsity.safetensors",
        "sae_weights.safetensors",
        "cfg.json",
        "../runner_cfg.json",
        "../results.json",
    ],
)
def test_no_link_has_a_file_from_elsewhere_published(run: Path, tmp_path: Path, name: str) -> None:
    """A run of someone else may hold links to private files."""
    copy, private = tmp_path / "study", tmp_path / "private"
    shutil.copytree(run, copy)
    file = copy / HOOKS[0] / name
    if file.exists():
        file.resolve().rename(private)
    else:
        private.write_text("a key")
    file.symlink_to(private)
    with pytest.raises(ConfigError, match=r"run: .*lies outside of .*allowed: a copy of the file"):
        publish(copy, "me/saes", dry_run=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_tensors_are_published_as_tensors(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(run, copy)
    sparsity = copy / HOOKS[0] / "sparsity.safetensors"
    save_file({"sparsity": torch.zeros(3)}, sparsity)
    publish(copy, "me/saes", dry_run=tmp_path / "good")
    published = tmp_path / "good" / HOOKS[0] / "sparsity.safetensors"
    assert published.read_bytes() == sparsity.read_bytes()
    sparsity.write_text("a key")
    with pytest.raises(CheckpointError, match="not a file of tensors"):
        publish(copy, "me/saes", dry_run=tmp_path / "out")


def test_numbers_of_other_weights_are_refused(run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "study"
    shutil.copytree(run, changed)
    publish(changed, "me/saes", dry_run=tmp_path / "same")
    shutil.rmtree(changed / HOOKS[0])
    cfg = json.loads((run / HOOKS[0] / "cfg.json").read_text())
    save_sae(changed / HOOKS[0], HOOKS[0], cfg["metadata"] | {"tokens": "class"}, seed=9)
    with pytest.raises(
        ConfigError, match=f"results: they have no numbers of {re.escape(HOOKS[0])} with"
    ):
        publish(changed, "me/saes", dry_run=tmp_path / "out")
    publish(changed / HOOKS[1], "me/saes", dry_run=tmp_path / "one", results=run)
    (only,) = Results.load(tmp_path / "one").saes
    assert only.id == HOOKS[1]
    text = json.loads((changed / "results.json").read_text())
    (changed / "results.json").write_text(json.dumps({**text, "complete": False}))
    with pytest.raises(ConfigError, match="results: the evaluation is not complete"):
        publish(changed / HOOKS[1], "me/saes", results=changed, dry_run=tmp_path / "two")


def test_numbers_are_published_with_the_model_that_they_are_of(run: Path, tmp_path: Path) -> None:
    content = json.loads((run / "results.json").read_text())
    for sae in content["saes"]:
        sae["model_name"] = "/home/someone/fine_tuned"  # as with --model_name
    (tmp_path / "results.json").write_text(json.dumps(content))
    publish(run, "me/saes", results=tmp_path, dry_run=tmp_path / "out")
    assert {sae.model_name for sae in Results.load(tmp_path / "out").saes} == {"fine_tuned"}
    assert "fine" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_published(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="repository: no name; given 'saes'; allowed: OWNER/NAME"):
        publish(run, "saes")
    with pytest.raises(DataError, match="not found; allowed: what `taxolens evaluate RUN` writes"):
        publish(run / HOOKS[0], "me/saes")
    checkpoint = tmp_path / "500"
    shutil.copytree(run / HOOKS[0], checkpoint)
    (checkpoint / "trainer_state.pt").touch()
    with pytest.raises(ConfigError, match="500 is a checkpoint; allowed: the output of a run"):
        publish(checkpoint, "me/saes", results=run, dry_run=tmp_path / "out")
    with serving(tmp_path / "hub", tmp_path / "cache", monkeypatch) as hub:
        hub.close()
        with pytest.raises(TaxolensError, match="repository: the hub's me/saes cannot be reached"):
            publish(run, "me/saes")
