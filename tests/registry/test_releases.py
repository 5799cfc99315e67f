"""Published SAEs by name: the table, and the files of a hub laid out as the real one is."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import sae_files
import torch
import write_releases
from hub import Hub, serving
from sae_files import D_IN, FILES
from sae_lens import SAE, TrainingSAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from taxolens.registry.errors import ConfigError, TaxolensError
from taxolens.registry.loaders.parts import releases as module
from taxolens.registry.loaders.parts.checkpoint import Checkpoint
from taxolens.registry.loaders.parts.facts import FACTS
from taxolens.registry.loaders.parts.hub import published_in
from taxolens.registry.loaders.parts.read import Source, load_source, read_sae
from taxolens.registry.loaders.parts.releases import Release, find_published, releases
from taxolens.registry.table import LOADERS

PRISMA = "Prisma-Multimodal/sae-top_k-64-cls_only-layer_9-hook_resid_post"
DINOV2 = "osunlp/SAE_DINOv2_24K_ViT-B-14_IN1K"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(tmp_path / "hub", tmp_path / "cache", monkeypatch) as found:
        yield found


@pytest.fixture
def small(monkeypatch):
    """The table with the sizes of the tests' files in place of the published ones."""

    def change(release: str, id: str | None = None, **facts):
        old = releases()[release]
        known = {**old.known, **(facts if id is None else {})}
        saes = {i: {**row, **(facts if i == id else {})} for i, row in old.saes.items()}
        changed = Release(old.name, old.loader, old.repository, old.files, old.hook_name, known,
                          old.note, saes)  # fmt: skip
        monkeypatch.setitem(module.releases(), release, changed)

    return change


def put(hub: Hub, file: sae_files.SAEFile, repository: str, name: str) -> None:
    """A file of one of the makers, with its config.json, as it lies on the hub."""
    target = hub.root / repository / name
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Checkpoint(file.path).path
    shutil.copy(made, target)
    if (config := made.parent / "config.json").exists():
        shutil.copy(config, target.parent / "config.json")


def gives(sae, file: sae_files.SAEFile, x=None) -> None:
    with torch.no_grad():
        assert torch.allclose(sae(file.x if x is None else x), file.x_hat, atol=1e-4)


def prisma(hub: Hub, tmp_path: Path, repository: str = PRISMA, k: int = 5) -> sae_files.SAEFile:
    (folder := tmp_path / "made").mkdir(exist_ok=True)
    file = sae_files.prisma(folder, "standard", "topk", "layer_norm", "hub")
    put(hub, file, repository, "n_images_2600058.pt")
    (hub.root / repository / "n_images_2600058_log_feature_sparsity.pt").write_bytes(b"")
    (hub.root / repository / "README.md").write_text("# not needed")
    return file


def test_the_table_is_complete_and_names_what_exists():
    for release in releases().values():
        entry = LOADERS[release.loader]
        assert release.name in entry.releases and entry.huggingface is not None
        assert release.files and release.repository.count("/") == 1
        for sae in map(release.find, release.saes):
            assert set(sae.known) | set(sae.asks_for) <= set(entry.asks_for), str(sae)
            for name, value in sae.known.items():
                FACTS[name].parse(value)
            assert not set(sae.known) & set(sae.asks_for)
            assert set(sae.sources) == {*sae.known, *sae.shown} - {"l0"}, f"{sae}: no source"
            listed = get_pretrained_saes_directory()[release.name]
            assert listed.saes_map[sae.id] == str(sae)


def test_the_page_shows_the_table():
    """Where this fails: python docs/formats/write_releases.py"""
    page = write_releases.PAGE.read_text()
    assert write_releases.page_of(page) == page
    assert write_releases.page_of(page.replace("| `class` |", "| `all` |")) == page
    for release in releases().values():
        for id in release.saes:
            assert f"| `{release.name}:{id}` | " in page


def test_from_pretrained_of_prismas_layout(hub, tmp_path, small):
    file = prisma(hub, tmp_path)
    small("prisma", "clip-b-32/layer-9-cls-topk", k=5)
    sae = SAE.from_pretrained("prisma", "clip-b-32/layer-9-cls-topk")
    gives(sae, file)
    metadata = sae.cfg.metadata
    assert metadata.hook_name == "blocks.9.hook_resid_post" and metadata.tokens == "class"
    assert metadata.release == "prisma:clip-b-32/layer-9-cls-topk"
    assert (metadata.repository, metadata.source) == (PRISMA, "prisma")
    assert metadata.commit == hub.commit(hub.folder(PRISMA)) and metadata.given == {}
    assert sorted(hub.downloads) == [f"{PRISMA}/config.json", f"{PRISMA}/n_images_2600058.pt"]
    gives(SAE.from_pretrained("prisma", "clip-b-32/layer-9-cls-topk"), file)
    assert len(hub.downloads) == 2, "a second call downloads nothing"
    SAE.from_pretrained("prisma", "clip-b-32/layer-9-cls-topk", force_download=True)
    assert len(hub.downloads) == 4


def test_a_repository_that_is_not_listed_is_read_by_its_name(hub, tmp_path):
    file = prisma(hub, tmp_path, "Prisma-Multimodal/sae-another")
    gives(SAE.from_pretrained("prisma", "sae-another"), file)
    gives(read_sae("prisma:sae-another"), file)


def test_what_the_table_and_the_file_say_must_agree(hub, tmp_path, small):
    prisma(hub, tmp_path)
    with pytest.raises(
        ConfigError, match=r"k: .*the table of releases differ; given '5'; allowed: 64"
    ):
        SAE.from_pretrained("prisma", "clip-b-32/layer-9-cls-topk")
    small("prisma", "clip-b-32/layer-9-cls-topk", k=5, d_in=768)
    with pytest.raises(
        ConfigError, match=rf"d_in: not that of the table.*given {D_IN}; allowed: 768"
    ):
        SAE.from_pretrained("prisma", "clip-b-32/layer-9-cls-topk")


def test_what_stands_in_no_file_is_asked_for_before_anything_is_downloaded(hub, tmp_path, small):
    file = FILES["saev without schema"](tmp_path)
    put(hub, file, DINOV2, "sae.pt")
    small("saev", "dinov2-b14", d_in=D_IN)
    with pytest.raises(ConfigError, match=r"mean: not in saev:dinov2-b14.*--mean .*768 numbers in"):
        SAE.from_pretrained("saev", "dinov2-b14")
    assert hub.downloads == []
    mean = np.linspace(-1, 1, D_IN).astype("float32")
    np.save(tmp_path / "mean.npy", mean)
    sae = read_sae("saev:dinov2-b14", mean=str(tmp_path / "mean.npy"))
    # the SAE was trained on (x - mean) / scale: raw activations go in and come out
    x = file.x * 2.01812 + torch.from_numpy(mean)
    with torch.no_grad():
        expected = file.x_hat * 2.01812 + torch.from_numpy(mean)
        assert torch.allclose(sae(x), expected, atol=1e-4)
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.tokens) == (
        "blocks.10.hook_resid_post",
        "patch",
    )
    converter = functools.partial(LOADERS["saev"].huggingface, mean=mean.tolist())
    again = SAE.from_pretrained("saev", "dinov2-b14", converter=converter)
    assert torch.equal(again.W_enc, sae.W_enc)
    with pytest.raises(ConfigError, match=r"kk: .* has no use for it"):
        read_sae("saev:dinov2-b14", kk=3)
    with pytest.raises(ConfigError, match=r"scale: .* given 3.0"):
        read_sae("saev:dinov2-b14", mean=mean.tolist(), scale=3.0)


def test_layers_and_runs_of_one_repository(hub, tmp_path):
    repository = "osunlp/SAE_DINOv3_TopK"
    (folder := tmp_path / "made").mkdir()
    file = FILES["saev schema 5"](folder)
    for layer, run in ((13, "abc"), (13, "def"), (15, "ghi")):
        put(hub, file, repository, f"layer_{layer}/{run}/sae.pt")
    (hub.root / repository / "manifest.jsonl").write_text('{"path": "layer_13/abc/sae.pt"}\n')
    sae = read_sae("saev:SAE_DINOv3_TopK/layer_13/abc")
    gives(sae, file)
    assert sae.cfg.metadata.hook_name == "blocks.13.hook_resid_post"
    assert hub.downloads == [f"{repository}/layer_13/abc/sae.pt"]
    gives(read_sae("saev:SAE_DINOv3_TopK/layer_15"), file)
    with pytest.raises(
        ConfigError,
        match=r"several files .* fit; given 'layer_13'; allowed: .*layer_13/abc/sae.pt, ",
    ):
        read_sae("saev:SAE_DINOv3_TopK/layer_13")
    with pytest.raises(
        ConfigError, match=r"no file of weights .* fit; given 'layer_9'; allowed: .*"
    ):
        read_sae("saev:SAE_DINOv3_TopK/layer_9")
    found = published_in(releases()["saev"])
    assert [sae.id for sae in found] == [
        *releases()["saev"].saes,
        "SAE_DINOv3_TopK/layer_13/abc",
        "SAE_DINOv3_TopK/layer_13/def",
        "SAE_DINOv3_TopK/layer_15/ghi",
    ]


def test_the_folders_name_survives_the_cache(hub, tmp_path, small):
    """CLIP-Scope and sae-for-vlm have the block in a folder's name; the cache holds links."""
    small("clip-scope", k=5, d_in=D_IN, d_sae=sae_files.D_SAE)
    (folder := tmp_path / "made").mkdir()
    file = FILES["clip_scope"](folder)
    for name in ("22_resid/1200013184.pt", "11_resid/600013184.pt"):
        put(hub, file, "lewington/CLIP-ViT-L-scope", name)
    for id in ("22_resid", "22_resid/1200013184.pt"):
        sae = SAE.from_pretrained("clip-scope", id)
        gives(sae, file)
        assert sae.cfg.metadata.hook_name == "blocks.22.hook_resid_post"
    assert len(hub.downloads) == 1
    (folder := tmp_path / "vlm").mkdir()
    file = FILES["sae_for_vlm MatryoshkaBatchTopKSAE"](folder)
    run = next(parent.name for parent in file.path.parents if "activations" in parent.name)
    put(hub, file, "mateuszpach/sae-for-vlm", f"{run}/trainer_0/ae.pt")
    sae = SAE.from_pretrained("sae-for-vlm", run)
    gives(sae, file)
    assert sae.cfg.metadata.model_name == read_sae(file.path).cfg.metadata.model_name is not None


def test_a_revision_is_pinned(hub, tmp_path, small):
    file = prisma(hub, tmp_path, f"{PRISMA}@v1")
    (hub.root / PRISMA).mkdir()
    (hub.root / PRISMA / "n_images_1.pt").write_bytes(b"a later, other file")
    small("prisma", "clip-b-32/layer-9-cls-topk", k=5, revision="v1", licence="mit")
    sae = SAE.from_pretrained("prisma", "clip-b-32/layer-9-cls-topk")
    gives(sae, file)
    assert sae.cfg.metadata.licence == "mit"
    assert sae.cfg.metadata.commit == hub.commit(hub.root / f"{PRISMA}@v1")
    small("prisma", "clip-b-32/layer-9-cls-topk", revision="v2")
    with pytest.raises(ConfigError, match=r"at v2 does not exist"):
        SAE.from_pretrained("prisma", "clip-b-32/layer-9-cls-topk")


def test_without_a_network_the_cache_is_read(hub, tmp_path, monkeypatch):
    file = prisma(hub, tmp_path, "Prisma-Multimodal/sae-another")
    read_sae("prisma:sae-another")
    hub.close()
    gives(read_sae("prisma:sae-another"), file)
    with pytest.raises(TaxolensError, match=r"prisma:sae-third: .* cannot be reached"):
        read_sae("prisma:sae-third")


def test_repositories_in_sae_lens_own_layout(hub, tmp_path):
    (folder := tmp_path / "made").mkdir()
    sae = read_sae(sae_files.prisma(folder, "standard", "relu", "none", "hub").path)
    sae.save_model(hub.root / "me" / "saes" / "block9")
    assert torch.equal(read_sae("me/saes:block9").W_enc, sae.W_enc)
    with pytest.raises(ConfigError, match=r"me/saes:block8: .* lacks the file"):
        read_sae("me/saes:block8")
    with pytest.raises(ConfigError, match=r"mean: release 'me/saes' has no use for it"):
        read_sae("me/saes:block9", mean=1.0)


def test_training_goes_on_from_a_release(hub, tmp_path):
    file = prisma(hub, tmp_path, "Prisma-Multimodal/sae-another")
    sae = load_source(TrainingSAE, "prisma:sae-another")
    assert sae.cfg.architecture() == "topk" and sae.cfg.k == 5
    gives(sae, file)


@pytest.mark.parametrize("name", FILES)
def test_training_starts_from_the_latents_of_the_file(name, tmp_path):
    file = FILES[name](tmp_path)
    if file.architecture not in SAE_TRAINING_CLASS_REGISTRY:
        pytest.skip(f"SAELens cannot train {file.architecture}")
    gives(load_source(TrainingSAE, file.path, **file.given), file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prisma:none", "the hub's Prisma-Multimodal/none does not exist, is private or lacks"),
        ("prisma:a/../b", "prisma: no such SAE; given 'a/../b'; allowed: clip-b-32/layer-0"),
        ("gated/saes:x", "asks for consent; allowed: agree on its page"),
        ("gpt2-small-res-jb:none", "ID none not found in release"),
    ],
)
def test_names_that_name_nothing(hub, name, message):
    hub.gated.add("gated/saes")
    with pytest.raises(ConfigError, match=message):
        read_sae(name)


def test_how_a_text_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Source.of("saev:dinov2-b14") == Source("dinov2-b14", release="saev")
    assert Source.of("saev:runs/sae.pt") == Source("runs/sae.pt", loader="saev")
    assert Source.of("me/saes:block9") == Source("block9", release="me/saes")
    assert Source.of("msae:none") == Source("none", loader="msae")
    Path("dinov2-b14").mkdir()
    assert Source.of("saev:dinov2-b14") == Source("dinov2-b14", loader="saev")
    Path("saev:dinov2-b14").mkdir()
    assert Source.of("saev:dinov2-b14") == Source("saev:dinov2-b14")
    assert str(Source.of("saev:runs/sae.pt")) == "saev:runs/sae.pt"


def test_unknown_releases_are_named():
    with pytest.raises(
        ConfigError, match="release: not known; given 'prism'; allowed: prisma, saev"
    ):
        find_published("prism:x")


SCRIPT = """
import json, sys
import taxolens
from sae_lens import SAE

sae = SAE.from_pretrained("prisma", "sae-another")
print(json.dumps([sae.cfg.metadata.release, sae.cfg.k]))
"""


def test_in_a_process_of_its_own(hub, tmp_path):
    """After `import taxolens` alone, with the client pointed at the server by HF_ENDPOINT."""
    prisma(hub, tmp_path, "Prisma-Multimodal/sae-another")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ["prisma:sae-another", 5]
    assert hub.url == huggingface_hub.constants.ENDPOINT
