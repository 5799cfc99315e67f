"""An atlas: all published SAEs of a model by name, from a hub laid out as the real one is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import sae_files
import torch
from forked_ranks import run_ranks
from hub import Hub, serving
from taxolens.plugin import cli
from taxolens.plugin.evaluation import atlas as module
from taxolens.plugin.evaluation import evaluate, forward
from taxolens.plugin.evaluation.atlas import atlas, published_saes
from taxolens.plugin.reporting.atlas_table import atlas_table
from taxolens.plugin.reporting.headlines import headlines
from taxolens.plugin.reporting.results import Results
from taxolens.registry.errors import ConfigError
from taxolens.registry.loaders.parts.releases import releases as find_releases
from taxolens.registry.ranks import Ranks
from test_evaluate import FAST, HOOKS, save_sae
from tiny_runs import WIDTH

MODEL = "laion/tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three repositories of Prisma, two of them of the model, and one of saev."""
    monkeypatch.setattr(sae_files, "D_IN", WIDTH)
    with serving(tmp_path / "hub", tmp_path / "cache", monkeypatch) as found:
        for i, (name, model, layer, kind) in enumerate(
            (
                ("sae-a", f"open-clip:{MODEL}", 0, "topk"),
                ("sae-b", MODEL, 1, "relu"),
                ("sae-c", "another/model", 0, "relu"),
            )
        ):
            cfg = {"d_in": WIDTH, "model_name": model, "hook_point_layer": layer}
            for key, value in cfg.items():
                monkeypatch.setitem(sae_files.PRISMA_CFG, key, value)
            (made := tmp_path / f"made{i}").mkdir()
            sae_files.prisma(made, "standard", kind, "none", "hub")
            target = found.root / "Prisma-Multimodal" / name
            shutil.copytree(made, target)
        (made := tmp_path / "saev").mkdir()
        file = sae_files.FILES["saev schema 5"](made)
        target = found.root / "osunlp" / "SAE_X" / "layer_1" / "run" / "sae.pt"
        target.parent.mkdir(parents=True)
        shutil.copy(file.path, target)
        yield found


@pytest.fixture
def asked(vit: Any, world: Path, tmp_path: Path) -> dict[str, Any]:
    images = {"dataset_path": str(world), "taxonomy": str(world / "validation")}
    return {**FAST, **images, "override_model": vit, "output_path": tmp_path / "out"}


def test_saes_of_a_model_are_found_without_their_weights(hub: Hub) -> None:
    left_out: dict[str, str] = {}
    assert published_saes(MODEL, left_out=left_out) == ["prisma:sae-a", "prisma:sae-b"]
    assert left_out["saev:SAE_X/layer_1/run"] == "its model is not known without its weights"
    assert "clip-scope:*" in left_out and "does not exist" in left_out["clip-scope:*"]
    assert {Path(name).name for name in hub.downloads} == {"config.json"}
    assert published_saes("another/model", ["prisma"]) == ["prisma:sae-c"]
    with pytest.raises(ConfigError, match=r"releases: not known .did you mean .prisma"):
        published_saes(MODEL, ["prism"])


def test_one_pass_one_table_and_resumed(
    hub: Hub, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, measured = [], []
    build, measure = forward.ActivationCache.build_together, evaluate.measure_sae

    def counted(model: Any, images: Any, wanted: Any, **settings: Any) -> Any:
        passes.extend(list(extraction.hook_names) for extraction in wanted.values())
        return build(model, images, wanted, **settings)

    def stopping(bench: Any, sae: Any, *args: Any, **kwargs: Any) -> Any:
        measured.append(sae.id)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(bench, sae, *args, **kwargs)

    monkeypatch.setattr(forward.ActivationCache, "build_together", counted)
    monkeypatch.setattr(evaluate, "measure_sae", stopping)
    with pytest.raises(KeyboardInterrupt):
        atlas(MODEL, releases=["prisma", "saev"], **asked)
    results = atlas(MODEL, releases=["prisma", "saev"], **asked)
    assert measured == ["prisma/sae-a", "prisma/sae-b", "prisma/sae-b"]
    assert passes == [[*HOOKS], [*HOOKS]], "the second reads what the first has on disk"
    assert results.complete and {sae.model_name for sae in results.saes} == {MODEL}
    table = pd.read_csv(tmp_path / "out" / "atlas.csv")
    assert set(table["sae"][:2]) == {"prisma/sae-a", "prisma/sae-b"}
    assert table["left_out"][:2].isna().all() and table["left_out"][2:].notna().all()
    assert "saev:SAE_X/layer_1/run" in set(table["sae"])


def test_of_many_processes_the_first_writes_the_table(
    hub: Hub, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_atlas

    def written(*args: Any) -> None:
        (tmp_path / f"by rank {Ranks.here().rank}").touch()
        write(*args)

    monkeypatch.setattr(module, "write_atlas", written)
    frames = run_ranks(2, lambda: atlas(MODEL, **asked).frame(), tmp_path / "job")
    assert [path.name for path in tmp_path.glob("by rank *")] == ["by rank 0"]
    assert frames[0].equals(frames[1])
    table = pd.read_csv(asked["output_path"] / "atlas.csv")
    assert table.left_out.isna().sum() == 2


def test_each_process_loads_the_model_on_its_own_gpu(
    hub: Hub, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def loaded(name: str, device: str, **_: Any) -> Any:
        devices.append(device)
        raise InterruptedError

    monkeypatch.setattr(module, "load_vision_model", loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    asked.pop("override_model")
    for rank, given in ((1, {}), (2, {}), (1, {"device": "cpu"})):
        monkeypatch.setattr(Ranks, "here", lambda rank=rank: Ranks(rank, 3, rank))
        with pytest.raises(InterruptedError):
            atlas(MODEL, releases=["prisma"], **asked, **given)
    assert devices == ["cuda:1", "cuda:0", "cpu"]


def test_the_table_counts_what_is_past_the_nulls(hub: Hub, asked: dict[str, Any]) -> None:
    results = atlas(MODEL, releases=["prisma"], **asked)
    table = atlas_table(results).set_index("sae")
    for sae in results.saes:
        numbers = [shown.of(sae) for shown in headlines(results)]
        judged = [n.past_all for n in numbers if n is not None and n.past_all is not None]
        row = table.loc[sae.id]
        assert (row["past"], row["judged"]) == (sum(judged), len(judged))
        assert (row["hook_name"], row["d_sae"]) == (sae.hook_name, sae.d_sae)
        assert (row["l0"], row["l0_token"]) == (sae.l0, sae.l0_token)
        for shown in headlines(results):
            number = shown.of(sae)
            assert row[f"{shown.evaluator}.{shown.metric}"] == pytest.approx(
                number.value, nan_ok=True
            )
    assert list(table["past"]) == sorted(table["past"], reverse=True)


def test_what_does_not_fit_is_left_out(
    hub: Hub, asked: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = hub.root / "Prisma-Multimodal" / "sae-a" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hook_point_layer": 7}))
    files = (hub.root / "Prisma-Multimodal" / "sae-b").glob("*.pt")
    (weights,) = (file for file in files if "sparsity" not in file.name)
    weights.write_bytes(weights.read_bytes()[:400])
    save_sae(tmp_path / "mine", HOOKS[1], {"tokens": "class"})
    results = atlas(MODEL, releases=["prisma"], also=[tmp_path / "mine"], **asked)
    assert [sae.id for sae in results.saes] == ["mine"]
    table = pd.read_csv(tmp_path / "out" / "atlas.csv").set_index("sae")
    assert "blocks.7.hook_resid_post" in table.loc["prisma:sae-a", "left_out"]
    assert "truncated or damaged" in table.loc["prisma:sae-b", "left_out"]
    n_listed = len(find_releases()["prisma"].saes)  # none of them is on this hub
    message = f"no SAE of it can be evaluated; {n_listed + 2} are left out"
    with pytest.raises(ConfigError, match=message):
        atlas(MODEL, releases=["prisma"], **asked)


def test_what_is_missing_is_said_before_anything_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output_path: not given; allowed: a folder"):
        atlas(MODEL)
    with pytest.raises(
        ConfigError, match="dataset_path, taxonomy: not in the metadata, and not given"
    ):
        atlas(MODEL, output_path=tmp_path)
    assert hub.downloads == []


def test_the_command(
    hub: Hub, asked: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["atlas", MODEL, "--releases", "prisma", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["prisma:sae-a", "prisma:sae-b"]
    vit = asked.pop("override_model")
    monkeypatch.setattr(module, "load_vision_model", lambda name, **_: vit)
    flags = {
        k: asked[k]
        for k in ("dataset_path", "taxonomy", "output_path", "n_permutations", "n_groups")
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--evaluators", *FAST["evaluators"], "--static", "--releases", "prisma"]
    assert cli.main(["atlas", MODEL, *words]) == 0
    out = capsys.readouterr().out
    assert "past nulls" in out and "prisma/sae-a" in out
    assert (tmp_path / "out" / "report.html").exists()
    assert Results.load(tmp_path / "out").complete
