"""Evaluation of SAEs that no run of ours has trained: files, folders and published SAEs, with flags."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sae_files
import torch
from hub import serving
from sae_lens import StandardSAE, StandardSAEConfig
from taxolens.hooks.images.source import ImageSource
from taxolens.plugin import cli
from taxolens.plugin.evaluation import forward
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.evaluation.held_out import HeldOut
from taxolens.plugin.evaluation.sae_sources import find_sources, override
from taxolens.plugin.reporting.report import write_report
from taxolens.registry.errors import CheckpointError, ConfigError
from test_evaluate import FAST, HOOKS, save_sae
from tiny_runs import WIDTH, run_settings

PLACE = {"model_name": "vit", "hook_name": HOOKS[0], "tokens": "class"}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makers of other libraries' files with the width of the tiny model."""
    monkeypatch.setattr(sae_files, "D_IN", WIDTH)
    monkeypatch.setitem(sae_files.PRISMA_CFG, "d_in", WIDTH)

    def make(name: str, **prisma: Any) -> Path:
        for key, value in prisma.items():
            monkeypatch.setitem(sae_files.PRISMA_CFG, key, value)
        folder = tmp_path / f"{name} {len(list(tmp_path.iterdir()))}".replace(" ", "_")
        folder.mkdir()
        return sae_files.FILES[name](folder).path

    return make


@pytest.fixture
def own_run(vit_folder: Path, world: Path, tmp_path: Path) -> Path:
    settings = run_settings(vit_folder, world, eval_split="validation")
    folder = tmp_path / "runs" / "mine"
    save_sae(folder, HOOKS[1], settings)
    (folder / "runner_cfg.json").write_text(json.dumps(settings))
    return folder


def test_files_releases_and_runs_share_one_table(
    files: Any, own_run: Path, vit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images and the tree are those of the run; the model runs once for all of its SAEs."""
    there = {"model_name": str(vit_folder), "hook_point_layer": 0, "dataset_path": "/data/imagenet"}
    prisma = files("prisma topk, layer_norm", **there)
    hub = tmp_path / "hub"
    shutil.copytree(files("prisma gated", **there), hub / "Prisma-Multimodal" / "sae-gated")
    passes = []
    build = forward.ActivationCache.build_together

    def counted(model: Any, images: Any, wanted: Any, **settings: Any) -> Any:
        passes.extend(list(extraction.hook_names) for extraction in wanted.values())
        return build(model, images, wanted, **settings)

    monkeypatch.setattr(forward.ActivationCache, "build_together", counted)
    sources = [f"prisma:{prisma}", str(own_run), "prisma:sae-gated"]
    with serving(hub, tmp_path / "cache", monkeypatch) as server:
        results = evaluate_run(sources, output_path=tmp_path / "out", **FAST)
        assert len(server.downloads) == 2
        assert results.errors == {} and results.complete
        assert [sae.id for sae in results.saes] == [
            "mine",
            "n_images_2600.pkl.gz",
            "prisma/sae-gated",
        ]
        assert [sae.hook_name for sae in results.saes] == [HOOKS[1], HOOKS[0], HOOKS[0]]
        assert [sae.architecture for sae in results.saes] == ["topk", "topk", "gated"]
        assert {sae.tokens for sae in results.saes} == {"class"}
        assert results.settings["runs"]["prisma/sae-gated"] == "prisma:sae-gated"
        assert passes == [[HOOKS[1], HOOKS[0]]]
        assert results.dataset.split == "validation" and results.dataset.n_images == 32
        first = [sae.evaluators for sae in results.saes]
        again = evaluate_run(sources, output_path=tmp_path / "out", **FAST)
    assert len(passes) == 1 and [sae.evaluators for sae in again.saes] == first
    assert "prisma/sae-gated" in write_report(results, interactive=False).read_text()


def test_the_numbers_are_those_of_the_converted_folder(
    files: Any, own_run: Path, vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    path = files("prisma topk, layer_norm", model_name=str(vit_folder), hook_point_layer=0)
    assert cli.main(["convert", str(path), str(tmp_path / "folder")]) == 0
    images = {"dataset_path": str(world), "taxonomy": str(world / "validation")}
    one, other = (
        evaluate_run(source, output_path=tmp_path / name, **images, **FAST).saes[0]
        for name, source in (("a", path), ("b", tmp_path / "folder"))
    )
    strip = {"seconds": 0, "tables": {}, "figures": {}, "fingerprint": ""}
    assert {n: replace(e, **strip) for n, e in one.evaluators.items()} == {
        n: replace(e, **strip) for n, e in other.evaluators.items()
    }


def test_what_is_missing_is_one_list(files: Any, tmp_path: Path) -> None:
    paths = [files("saev schema 5"), files("prisma relu")]
    with pytest.raises(ConfigError) as caught:
        evaluate_run(paths, output_path=tmp_path / "out", **FAST)
    said = str(caught.value)
    assert said.startswith(
        "model_name, hook_name, tokens, dataset_path, taxonomy: not in the metadata"
    )
    assert "--hook_name for sae.pt (a hook point" in said
    assert "--dataset_path (labelled images" in said and "--taxonomy (a name of" in said
    assert "--tokens for sae.pt (class, patch" in said
    with pytest.raises(
        ConfigError, match=r"^hook_name, tokens: not in the metadata, and not given;"
    ):
        evaluate_run(paths[0], output_path=tmp_path / "out", model_name="vit", dataset_path="x",
                     taxonomy="imagenet", **FAST)  # fmt: skip


def bare_sae(folder: Path, **metadata: str) -> Path:
    """An SAE folder as SAELens alone writes it."""
    sae = StandardSAE(StandardSAEConfig(d_in=WIDTH, d_sae=24))
    for name, value in metadata.items():
        sae.cfg.metadata[name] = value
    sae.save_model(folder)
    return folder


def test_what_a_folder_of_saelens_does_not_record_is_one_list(
    own_run: Path, vit_folder: Path, world: Path, tmp_path: Path
) -> None:
    out = {"output_path": tmp_path / "out", **FAST}
    bare = bare_sae(tmp_path / "bare")
    with pytest.raises(ConfigError) as caught:
        evaluate_run(bare, **out)
    said = str(caught.value)
    names = ("model_name", "hook_name", "tokens", "dataset_path", "taxonomy")
    assert said.startswith(f"{', '.join(names)}: not in the metadata, and not given; allowed: ")
    assert [part.split(" ")[0] for part in said.partition("allowed: ")[2].split("; ")] == [
        f"--{name}" for name in names
    ]
    place = {"model_name": str(vit_folder), "hook_name": HOOKS[0]}
    images = {"dataset_path": str(world), "taxonomy": str(world / "validation")}
    mine = bare_sae(tmp_path / "mine_too", **place)
    for given in (
        {},
        {"held_out": HeldOut.load(ImageSource(images["dataset_path"]), images["taxonomy"])},
    ):
        with pytest.raises(
            ConfigError, match=r"^tokens: not in the metadata, and not given; allowed: --tokens"
        ):
            evaluate_run(mine, **(given or images), **out)
    # Beside a run, whose images and tree are used, only what the folder lacks.
    with pytest.raises(ConfigError, match=r"^tokens: .*--tokens for mine_too \(class, patch"):
        evaluate_run([own_run, mine], **out)
    results = evaluate_run([own_run, mine], tokens="patch", **out)
    assert [sae.tokens for sae in results.saes] == ["patch", "patch"]
    assert results.dataset.path == str(world)


def test_what_changes_the_latents_is_asked_for_of_all_sources(files: Any, tmp_path: Path) -> None:
    paths = [files("overcomplete TopKSAE"), files("saev schema 1 before")]
    with pytest.raises(ConfigError) as caught:
        evaluate_run(paths, output_path=tmp_path / "out", **FAST)
    said = str(caught.value)
    assert "sae_class, dictionary_normalization: not in overcomplete" in said
    assert "subtract_b_dec: not in saev" in said and "flags of `taxolens convert`" in said


def test_flags_count_for_more_than_metadata(
    files: Any, vit_folder: Path, tmp_path: Path, world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = files("prisma relu", model_name="open-clip:of/another", hook_point_layer=0)
    images = {"dataset_path": str(world), "taxonomy": str(world / "validation")}
    flags = {"model_name": str(vit_folder), "hook_name": HOOKS[1], "tokens": "patch"}
    with caplog.at_level(logging.WARNING):
        results = evaluate_run(path, output_path=tmp_path / "out", **images, **flags, **FAST)
    (sae,) = results.saes
    assert (sae.model_name, sae.hook_name, sae.tokens) == (str(vit_folder), HOOKS[1], "patch")
    assert "tokens is 'class', and 'patch' is used" in caplog.text
    changed = {**flags, "tokens": "class"}
    results = evaluate_run(path, output_path=tmp_path / "out", **images, **changed, **FAST)
    assert results.saes[0].tokens == "class", "numbers of other tokens are not taken over"


def test_a_revision_belongs_to_its_model(own_run: Path) -> None:
    cfg = json.loads((own_run / "cfg.json").read_text())
    cfg["metadata"] |= {"model_revision": "v1", "model_from_pretrained_kwargs": {"seed": 1}}
    (own_run / "cfg.json").write_text(json.dumps(cfg))
    found = find_sources(own_run)
    assert forward.ModelSetting.of(found[0]).revision == "v1"
    assert forward.ModelSetting.of(override(found, tokens="patch")[0]).revision == "v1"
    other = forward.ModelSetting.of(override(found, model_name="other")[0])
    assert (other.model_name, other.revision, other.more) == ("other", None, ())


def test_a_published_sae_lets_no_code_run(
    vit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = {"model_from_pretrained_kwargs": {"trust_remote_code": True}, "tokens": "class"}
    with serving(tmp_path / "hub", tmp_path / "cache", monkeypatch) as hub:
        place = hub.root / "me" / "saes" / "block0"
        save_sae(place, HOOKS[0], {"model_name": str(vit_folder), **trust})
        (sae,) = find_sources("me/saes:block0")
    assert (sae.hook_name, sae.model_name, sae.tokens) == (HOOKS[0], str(vit_folder), "class")
    with pytest.raises(ConfigError, match="trust_remote_code: the SAE was trained on"):
        forward.ModelSetting.of(sae).load([HOOKS[0]], "cpu")


def test_transcoders_are_refused(files: Any, vit: Any, world: Path, tmp_path: Path) -> None:
    files("prisma relu", hook_point_layer=0)  # sets the layer of the config
    (folder := tmp_path / "transcoder").mkdir()
    path = sae_files.prisma_transcoder(folder, True, WIDTH).path
    with pytest.raises(
        ConfigError, match=r"architecture: it predicts another activation .*'skip_tr"
    ):
        evaluate_run(path, output_path=tmp_path / "out", override_model=vit, model_name="vit",
                     dataset_path=str(world), taxonomy=str(world / "validation"), **FAST)  # fmt: skip


def test_one_hook_point_for_saes_of_several_is_refused(own_run: Path, tmp_path: Path) -> None:
    save_sae(tmp_path / "second", HOOKS[0], {})
    found = find_sources([own_run, tmp_path / "second"])
    with pytest.raises(ConfigError, match="hook_name: the SAEs were trained at 2 hook points"):
        override(found, hook_name=HOOKS[0])
    assert [sae.hook_name for sae in override(found[:1], hook_name=HOOKS[0])] == [HOOKS[0]]


def test_sources_that_are_no_saes(files: Any, own_run: Path, tmp_path: Path) -> None:
    path = files("clip_scope")
    (damaged := tmp_path / "damaged.pt").write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        find_sources(damaged)
    with pytest.raises(ConfigError, match="one is given twice"):
        find_sources([path, path])
    with pytest.raises(ConfigError, match="is given twice"):
        find_sources([own_run, own_run])
    found = find_sources(own_run)
    assert find_sources(found) == found
    with pytest.raises(ConfigError, match="SAEs of an earlier call and sources together; given"):
        find_sources([*found, path])
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        find_sources("nowhere")
    with pytest.raises(ConfigError, match="msae:none: path: not found"):
        find_sources("msae:none")
    with pytest.raises(ConfigError, match="output_path: not given; allowed: a folder, where"):
        evaluate_run(path, model_name="m", tokens="class", dataset_path="d", taxonomy="t")


def test_names_of_sources_are_distinct(files: Any) -> None:
    paths = [files("clip_scope"), files("clip_scope")]
    ids = [sae.id for sae in find_sources([*paths, f"clip_scope:{files('clip_scope')}"])]
    assert len(set(ids)) == 3 and all(id.endswith("1200013184.pt") for id in ids)
    same = find_sources(paths[:1])[0]
    assert same.weights_digest() == find_sources(paths[1])[0].weights_digest()
    with torch.no_grad():
        assert torch.equal(same.load().W_dec, find_sources(paths[1])[0].load().W_dec)
