"""Readers of other libraries' SAE files: same latents, same reconstruction, or a clear refusal."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sae_files
import torch
import yaml
from sae_files import D_IN, D_SAE, FILES, OLD_SAEV, SAEFile, saev_header
from sae_lens import SAE
from sae_lens.saes.transcoder import Transcoder
from safetensors.torch import save_file
from taxolens.registry.errors import CheckpointError, ConfigError, UnknownNameError
from taxolens.registry.evaluators.parts.null_latents import TwinLatents
from taxolens.registry.evaluators.parts.sae_latents import SAELatents
from taxolens.registry.loaders.parts.checkpoint import Checkpoint
from taxolens.registry.loaders.parts.facts import FACTS
from taxolens.registry.loaders.parts.read import (
    Source,
    converter,
    find_loader,
    read_sae,
    save_sae,
)
from taxolens.registry.loaders.parts.safe_pickle import Record
from taxolens.registry.table import LOADERS, Loader


def gives(sae, file: SAEFile) -> None:
    """Latents and reconstruction are the library's, to 1e-5 of the largest."""
    with torch.no_grad():
        z = sae.encode(file.x)
        x_hat = sae(file.x)
    for found, expected in ((z, file.z), (x_hat, file.x_hat)):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert 0 < (file.z != 0).float().mean() < 0.7, "an SAE that tests something"


@pytest.fixture(params=FILES, ids=list(FILES))
def file(request, tmp_path) -> SAEFile:
    return FILES[request.param](tmp_path)


# -- right ------------------------------------------------------------------------------------------


def test_latents_and_reconstruction_are_the_librarys(file):
    entry, reason = find_loader(file.path)
    assert (entry.name, bool(reason)) == (file.loader, True)
    sae = read_sae(file.path, **file.given)
    assert sae.cfg.architecture() == file.architecture
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.dtype) == (D_IN, D_SAE, "float32")
    gives(sae, file)
    for name, value in file.metadata.items():
        assert sae.cfg.metadata[name] == value, name


def test_an_untrained_twin_has_the_same_rule(file):
    sae = read_sae(file.path, **file.given)
    if isinstance(sae, Transcoder):
        with pytest.raises(ConfigError, match="random: b_dec is the mean at the output of a trans"):
            TwinLatents.fit(SAELatents(sae), file.x)
        return
    twin, other = (TwinLatents.fit(SAELatents(sae), file.x, seed) for seed in (0, 1))
    with torch.no_grad():
        z, decoded = twin.reconstruct(file.x)
        wanted = (sae.encode(file.x) != 0).sum(1).float()
        fires = (z != 0).sum(1).float()
        if hasattr(sae.cfg, "k"):  # the same k for each input, of those that are positive
            assert ((fires == sae.cfg.k) | (z >= 0).all(1)).all() and fires.max() <= sae.cfg.k
        else:
            # A pursuit has whole steps.
            assert fires.mean() == pytest.approx(float(wanted.mean()), rel=0.05, abs=0.5)
        assert type(twin.sae) is type(sae) and z.shape == (len(file.x), D_SAE)
        assert decoded.shape == file.x.shape and torch.isfinite(decoded).all()
        assert not torch.equal(z, other.encode(file.x))


def test_a_converted_folder_gives_the_same(file, tmp_path):
    sae = read_sae(file.path, **file.given)
    folder = save_sae(sae, tmp_path / "new" / "converted")
    gives(SAE.load_from_disk(folder).eval(), file)
    again = read_sae(folder)
    gives(again, file)
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert again.cfg.metadata.to_dict() == metadata
    if file.loader != "sae_lens":
        assert metadata["source"] == file.loader
        assert metadata["source_format"].startswith(f"{file.loader}: ")
        assert metadata["source_file"] == Checkpoint(file.path).path.name
        unknown = {"model_name", "hook_name", "tokens"} - set(metadata)
        noted = " ".join(metadata["notes"])
        assert all(name in noted for name in unknown)


def test_converted_folders_load_where_taxolens_is_not(tmp_path, forks):
    for number, make in enumerate(FILES.values()):
        (tmp_path / f"{number}").mkdir()
        made = make(tmp_path / f"{number}")
        folder = save_sae(read_sae(made.path, **made.given), tmp_path / "out" / f"{number}")
        save_file({"x": made.x, "x_hat": made.x_hat}, folder / "expected.safetensors")
    script = """
        import sys
        from pathlib import Path
        sys.modules["taxolens"] = None
        import torch
        from safetensors.torch import load_file
        from sae_lens import SAE
        folders = sorted(Path(sys.argv[1]).iterdir())
        for folder in folders:
            expected = load_file(folder / "expected.safetensors")
            with torch.no_grad():
                found = SAE.load_from_disk(folder)(expected["x"])
            torch.testing.assert_close(found, expected["x_hat"], rtol=1e-5, atol=3e-5)
        print(len(folders))
    """
    done = forks.run(script, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(FILES)


def test_through_sae_lens_itself(tmp_path):
    file = FILES["saev schema 1 before"](tmp_path)
    disk = LOADERS["saev"].disk
    assert disk is not None
    gives(SAE.load_from_disk(file.path, converter=partial(disk, subtract_b_dec=True)), file)
    gives(SAE.load_from_disk(file.path, converter=converter(subtract_b_dec=True)), file)


def test_a_model_and_a_hook_point_are_given(tmp_path):
    file = FILES["prisma relu"](tmp_path)
    place = {"model_name": "mine", "hook_name": "blocks.1.hook_resid_post", "tokens": "patch"}
    metadata = read_sae(file.path, **place).cfg.metadata
    assert {name: metadata[name] for name in place} == place
    assert metadata["given"] == place
    folder = save_sae(read_sae(file.path), tmp_path / "converted")
    assert read_sae(folder, **place).cfg.metadata["tokens"] == "patch"


def test_aliases_of_facts(tmp_path):
    file = FILES["overcomplete TopKSAE"](tmp_path)
    given = {"class": "TopKSAE", "k": "5", "dictionary_normalization": "l2", "model": "vit"}
    assert read_sae(file.path, **given).cfg.metadata["model_name"] == "vit"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_types_are_read(tmp_path, dtype):
    file = FILES["clip_scope"](tmp_path)
    content = torch.load(file.path)
    state = {name: value.to(dtype) for name, value in content["model_state_dict"].items()}
    torch.save({**content, "model_state_dict": state}, file.path)
    sae = read_sae(file.path)
    assert sae.cfg.dtype == "float32"
    assert torch.equal(sae.W_enc, state["enc"].float())
    assert read_sae(file.path, dtype="bfloat16").W_enc.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=r"dtype: unknown; given 'int8'; allowed: float32"):
        read_sae(file.path, dtype="int8")


def test_the_normalisation_comes_from_a_file_too(tmp_path):
    vector = torch.arange(D_IN) / 10
    np.save(tmp_path / "mean.npy", vector.numpy())
    torch.save(vector, tmp_path / "mean.pt")
    (tmp_path / "mean.json").write_text(json.dumps(vector.tolist()))
    (tmp_path / "sae").mkdir()
    header = saev_header(5, "TopK")
    file = sae_files.saev(
        tmp_path / "sae", header, subtract=False, act="topk", mean=vector.tolist(), scale=2.0
    )
    for mean in (*map(str, tmp_path.glob("mean.*")), json.dumps(vector.tolist()), vector):
        gives(read_sae(file.path, mean=mean, scale="2"), file)
    assert read_sae(file.path, mean=vector).cfg.metadata["given"]["mean"] == f"{D_IN} numbers"


@pytest.mark.parametrize("name", ["prisma gated", "dictionary_learning GatedAutoEncoder"])
def test_a_mean_goes_into_gated_saes(tmp_path, name):
    file = FILES[name](tmp_path)
    if name.startswith("prisma"):
        with pytest.raises(ConfigError, match=r"mean, scale: they cannot be folded .* layer_norm"):
            read_sae(file.path, mean=1.0)
        return
    shifted = read_sae(file.path, mean=1.5, scale=0.5)
    plain = read_sae(file.path)
    x = file.x * 0.5 + 1.5
    with torch.no_grad():
        assert torch.allclose(shifted.encode(x), plain.encode(file.x), atol=1e-5)
        assert torch.allclose(shifted(x), plain(file.x) * 0.5 + 1.5, atol=1e-5)


def test_a_mean_goes_into_a_pursuit_and_a_scale_does_not(tmp_path):
    file = FILES["overcomplete MpSAE, module"](tmp_path)
    shifted, plain = read_sae(file.path, mean=1.5), read_sae(file.path)
    with torch.no_grad():
        assert torch.allclose(shifted(file.x + 1.5), plain(file.x) + 1.5, atol=1e-5)
    with pytest.raises(ConfigError, match="scale: no scale can be folded into a matching pursuit"):
        read_sae(file.path, scale=2.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_overcompletes_tied_and_untied_encoders(tmp_path, tied, bias):
    n = sae_files.Numbers(11)
    state = {"dictionary._weights": n.dec, "dictionary.multiplier": torch.tensor(0.0)}
    dictionary = sae_files.normalize_l2(n.dec)
    if tied:
        state |= {
            "encoder.tied_to._weights": n.dec,
            "encoder.tied_to.multiplier": torch.tensor(0.0),
        }
    else:
        state["encoder.weight"] = n.enc.T
    pre = n.x @ (dictionary.T if tied else n.enc)
    if bias:
        state["encoder.bias"] = n.b_enc
        pre = pre + n.b_enc
    torch.save(state, tmp_path / "sae.pth")
    z = sae_files.topk(pre.relu(), 5)
    given = sae_files.OVERCOMPLETE_GIVEN["TopKSAE"]
    file = SAEFile(tmp_path / "sae.pth", n.x, z, z @ dictionary, "overcomplete", "topk")
    gives(read_sae(file.path, **given), file)


@pytest.mark.parametrize("rows", ["l1", "max_l1", "max_l2", "identity"])
def test_overcompletes_rows(tmp_path, rows):
    file = FILES["overcomplete JumpSAE"](tmp_path)
    weights = sae_files.Numbers(4).dec
    norms = weights.norm(p=2 if "2" in rows else 1, dim=1, keepdim=True)
    expected = weights / {"l1": norms, "identity": 1}.get(rows, norms.max())
    sae = read_sae(file.path, dictionary_normalization=rows)
    assert torch.allclose(sae.W_dec, expected * torch.tensor(-0.2).exp(), atol=1e-6)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "JumpSAE"])
def test_a_latent_at_its_threshold_is_kept_as_overcomplete_does(tmp_path, kind):
    threshold = (
        torch.tensor([0.5, 0.5, 0.5]) if kind == "BatchTopKSAE" else torch.tensor([0.1, 1, 9])
    )
    state = {
        "encoder.final_block.0.weight": torch.eye(3),
        "encoder.final_block.0.bias": torch.zeros(3),
    }
    state |= {"dictionary._weights": torch.eye(3), "dictionary.multiplier": torch.tensor(0.0)}
    given = {"dictionary_normalization": "identity"}
    if kind == "JumpSAE":
        state["thresholds"] = threshold.double().log()
    else:
        given |= {"sae_class": kind, "threshold": 0.5}
    torch.save(state, tmp_path / "sae.pth")
    sae = read_sae(tmp_path / "sae.pth", **given)
    below = torch.nextafter(threshold, torch.zeros(3))
    with torch.no_grad():
        assert torch.equal(sae.encode(threshold), threshold)
        assert torch.equal(sae.encode(below), torch.zeros(3))


def test_a_module_saved_in_training(tmp_path):
    """Its dictionary is made from the weights: what was fused before may be older."""
    file = FILES["overcomplete mlp_bn_1, module"](tmp_path)
    checkpoint = Checkpoint(file.path)
    layer = checkpoint.content.fields["_modules"]["dictionary"]
    layer.fields["_fused_dictionary"] = layer.fields["_fused_dictionary"] * 2
    with pytest.raises(AssertionError):
        gives(read_sae(checkpoint), file)
    layer.fields["training"] = True
    gives(read_sae(checkpoint), file)
    blocks = checkpoint.content.fields["_modules"]["encoder"].fields["_modules"]["final_block"]
    blocks.fields["_modules"]["1"].fields["eps"] = 0.5
    with pytest.raises(AssertionError):
        gives(read_sae(checkpoint), file)


def test_folders_and_files(tmp_path):
    made = FILES["dictionary_learning BatchTopKSAE"](tmp_path)
    gives(read_sae(tmp_path), made)  # the folder above trainer_0: ae.pt counts, not its checkpoints
    gives(read_sae(made.path / "ae.pt"), made)
    gives(read_sae(made.path / "checkpoints" / "ae_600.pt"), made)
    (made.path / "ae.pt").unlink()
    torch.save({}, made.path / "checkpoints" / "ae_900.pt")
    with pytest.raises(
        ConfigError, match=r"path: which of checkpoints/ae_600.pt, checkpoints/ae_900"
    ):
        read_sae(made.path)
    with pytest.raises(ConfigError, match=r"path: not found; given '.*none\.pt'"):
        read_sae(tmp_path / "none.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"path: it holds no weights; .*allowed: a file of weights"
    ):
        read_sae(tmp_path / "empty")


def test_a_saved_folder_is_never_written_over(tmp_path):
    file = FILES["clip_scope"](tmp_path)
    sae = read_sae(file.path)
    (tmp_path / "empty").mkdir()
    save_sae(sae, tmp_path / "empty")
    with pytest.raises(ConfigError, match="output: already there"):
        save_sae(sae, tmp_path / "empty")
    with pytest.raises(ConfigError, match="output: already there"):
        save_sae(sae, file.path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["22_resid", "empty"]


# -- which loader -------------------------------------------------------------------------------------


def test_nothing_recognises_a_file_of_something_else(tmp_path):
    torch.save({"conv1.weight": torch.ones(3), "fc.bias": torch.ones(2)}, tmp_path / "resnet.pt")
    with pytest.raises(ConfigError) as caught:
        read_sae(tmp_path / "resnet.pt")
    message = str(caught.value)
    assert message.startswith(
        "loader: none recognises the file, a dict with the keys conv1.weight, fc"
    )
    for entry in LOADERS.values():
        assert f"{entry.name} ({entry.description})" in message
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="none recognises the file, a list"):
        read_sae(tmp_path / "list.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "linear.pt")
    with pytest.raises(ConfigError, match=r"an object of torch\.nn\.modules\.linear\.Linear"):
        read_sae(tmp_path / "linear.pt")


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "runner_cfg.json"])
def test_a_file_of_an_sae_folder_is_refused_with_the_folder(tmp_path, name):
    for file in ("cfg.json", "sae_weights.safetensors", "runner_cfg.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(ConfigError, match=f"given '.*{name}'; allowed: {tmp_path}"):
        read_sae(tmp_path / name)


def test_several_recognise_a_file(tmp_path, monkeypatch):
    file = FILES["clip_scope"](tmp_path)
    twin = Loader(
        "twin", disk=LOADERS["clip_scope"].disk, recognises=lambda checkpoint: "its looks"
    )
    monkeypatch.setitem(LOADERS._entries, "twin", twin)
    with pytest.raises(
        ConfigError, match=r"several recognise .* --loader with one of .*twin \(its"
    ):
        read_sae(file.path)
    gives(read_sae(file.path, "clip_scope"), file)
    monkeypatch.setitem(LOADERS._entries, "twin", Loader("twin", recognises=lambda c: 1 / 0))
    gives(read_sae(file.path), file)  # a recogniser that fails recognises nothing
    with pytest.raises(ConfigError, match="loader: reads no local files; given 'twin'"):
        read_sae(file.path, "twin")
    with pytest.raises(UnknownNameError, match=r"loader: not known .did you mean 'clip_scope'"):
        read_sae(file.path, "clipscope")


def test_a_loader_of_a_third_party(tmp_path, monkeypatch):
    def disk(path, device, cfg_overrides, *, temperature="1"):
        number = float(Path(path).read_text()) * float(temperature)
        cfg = {"architecture": "standard", "d_in": 1, "d_sae": 1, "dtype": "float32"}
        cfg |= {"device": device, "metadata": {"sae_lens_version": "6.54.0"}}
        one = torch.tensor([number])
        return cfg, {"W_enc": one[:, None], "W_dec": one[:, None], "b_enc": one, "b_dec": one}

    entry = Loader(
        "textual",
        disk=disk,
        recognises=lambda c: "a .txt" if c.path.suffix == ".txt" else None,
        asks_for={"temperature": "what the number is multiplied by"},
    )
    monkeypatch.setitem(LOADERS._entries, "textual", entry)
    (tmp_path / "sae.txt").write_text("2.5")
    assert read_sae(tmp_path / "sae.txt", temperature="2").b_enc.item() == 5.0


def test_a_path_may_name_its_loader():
    assert Source.of("saev:a/b:c.pt") == Source("a/b:c.pt", loader="saev")
    assert Source.of("C:/saev/sae.pt") == Source("C:/saev/sae.pt")
    assert Source.of("sae.pt") == Source("sae.pt")


def test_the_wrong_loader_says_so(tmp_path):
    for name in ("saev schema 5", "msae ReLU", "overcomplete JumpSAE, module", "patchsae"):
        (folder := tmp_path / name.replace(" ", "_")).mkdir()
        file = FILES[name](folder)
        for loader in LOADERS:
            if loader != file.loader:
                with pytest.raises((ConfigError, CheckpointError)):
                    read_sae(file.path, loader)


# -- what is asked for --------------------------------------------------------------------------------

MISSING = {
    "saev schema 1 before": ["subtract_b_dec"],
    "overcomplete TopKSAE": ["sae_class", "dictionary_normalization"],
    "overcomplete JumpSAE": ["dictionary_normalization"],
    "overcomplete RATopKSAE": ["k", "delta"],
    "universal_sae without its yaml": ["mean", "std", "k", "dictionary_normalization"],
    "clip_scope without k": ["k"],
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_one_list(tmp_path, name):
    file = FILES[name](tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_sae(file.path)
    message = str(caught.value)
    assert message.startswith(", ".join(MISSING[name]) + ": not in ")
    for fact in MISSING[name]:
        assert f"--{fact} (" in message
        assert FACTS[fact].allowed in message
        assert fact in LOADERS[file.loader].asks_for
    assert "read_sae" in message


def test_a_class_brings_its_own_questions(tmp_path):
    file = FILES["overcomplete BatchTopKSAE"](tmp_path)
    with pytest.raises(ConfigError, match=r"^threshold, dictionary_normalization: not in"):
        read_sae(file.path, sae_class="BatchTopKSAE")
    with pytest.raises(ConfigError, match=r"^k, dictionary_normalization: not in"):
        read_sae(file.path, sae_class="TopKSAE")
    with pytest.raises(
        ConfigError, match="SAELens has no class that gives its latents; given 'SAE'"
    ):
        read_sae(file.path, sae_class="SAE", dictionary_normalization="l2")


def test_dictionary_learning_without_its_config(tmp_path):
    file = sae_files.dictionary_learning(tmp_path, "BatchTopKSAE", config=False)
    with pytest.raises(ConfigError, match=r"^sae_class: not in .*MatryoshkaBatchTopKSAE"):
        read_sae(file.path)
    gives(read_sae(file.path, sae_class="BatchTopKSAE"), file)


def test_a_superscript_is_no_k_of_an_msae_file(tmp_path):
    file = sae_files.msae(tmp_path, "TopKReLU_5", name="mine.pth")
    with pytest.raises(ConfigError, match="k: "):
        read_sae(file.path, activation="TopKReLU_²")


def test_a_renamed_msae_file(tmp_path):
    file = sae_files.msae(tmp_path, "TopKReLU_5", name="mine.pth")
    with pytest.raises(ConfigError, match=r"^activation, normalize, soft_cap: not in"):
        read_sae(file.path)
    gives(read_sae(file.path, activation="TopKReLU_5", normalize=False, soft_cap=0), file)
    gives(read_sae(file.path, activation="TopKReLU", k="5", normalize="false", soft_cap="0"), file)
    content = Checkpoint(file.path).content
    torch.save({"model": content["model"]}, file.path)
    said = {"activation": "TopKReLU_5", "normalize": False, "soft_cap": 0}
    with pytest.raises(ConfigError, match=r"^mean, scale: not in .*1 / scaling_factor"):
        read_sae(file.path, **said)
    mean = sae_files.Numbers(7).mean
    gives(read_sae(file.path, **said, mean=mean, scale=1 / 0.37), file)


def universal_runs(top):
    """Checkpoints of one name, each in its place: the file of one run, and a copy as another run's."""
    file = sae_files.universal_sae(top)
    other = top / "weights" / "other_run" / "SigLIP" / file.path.name
    other.parent.mkdir(parents=True)
    shutil.copyfile(file.path, other)
    config = yaml.safe_load((top / "results/config.yaml").read_text())
    return file, other, config


def write_universal(top, config, path, **said):
    entry = {**config["model_zoo"]["SigLIP"], "checkpoint_path": str(path), **said}
    found = {**config, "sae_params": {**config["sae_params"], "top_k": 3}}
    text = yaml.safe_dump({**found, "model_zoo": {"SigLIP": entry}})
    (top / "results/config_b.yaml").write_text(text)


def test_a_universal_sae_has_the_facts_of_its_own_run(tmp_path):
    file, other, config = universal_runs(tmp_path)
    with pytest.raises(ConfigError, match=r"^mean, std, k, dictionary_normalization: not in"):
        read_sae(other)  # the only yaml is of the other run
    write_universal(tmp_path, config, other, model_mean=1.5, model_std=9.0)
    gives(read_sae(file.path), file)
    sae = read_sae(other)
    assert sae.cfg.k == 3
    note = f"k, mean and std stand in config_b.yaml, for {other}"
    assert note in sae.cfg.metadata.notes


def test_a_universal_sae_that_was_moved_is_named_by_one_yaml(tmp_path):
    file, _, config = universal_runs(tmp_path)
    moved = tmp_path / "downloads" / file.path.name
    moved.parent.mkdir()
    shutil.copyfile(file.path, moved)
    gives(read_sae(moved), file)
    write_universal(tmp_path, config, "/elsewhere/other_run/SigLIP/" + moved.name)
    with pytest.raises(ConfigError, match=r"^mean, std, k, dictionary_normalization: not in"):
        read_sae(moved)  # the two say different things


def test_prisma_without_its_config(tmp_path):
    file = sae_files.prisma(tmp_path, "standard", "topk", "layer_norm", "hub")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="loader: none recognises"):
        read_sae(tmp_path / "n_images_2600.pt")
    with pytest.raises(ConfigError, match=r"^activation, normalize_activations: not in"):
        read_sae(tmp_path / "n_images_2600.pt", "prisma")
    given = {"activation": "topk", "k": 5, "normalize_activations": "layer_norm"}
    gives(read_sae(tmp_path / "n_images_2600.pt", "prisma", **given), file)


WRONG = [
    ("clip_scope", {"k": 6}, r"k: not what .* holds; given 6; allowed: 5"),
    ("clip_scope without k", {"k": 0}, r"k: it cannot be that; given '0'; allowed: a whole number"),
    ("clip_scope without k", {"k": "six"}, r"k: it cannot be that; given 'six'"),
    ("clip_scope without k", {"k": 2.5}, r"k: it cannot be that; given '2.5'"),
    ("clip_scope without k", {"k": True}, r"k: it cannot be that; given 'True'"),
    ("clip_scope without k", {"k": 41}, r"k: more than there are latents; given 41; allowed: 1 to 40"),
    ("clip_scope", {"threshold": 1.0}, r"threshold: .* has no use for it; allowed: model_name, "),
    ("saev schema 5", {"k": 5}, r"k: .* has no use for it; allowed: leave it out"),
    ("saev schema 5", {"subtract_b_dec": True}, r"subtract_b_dec: not what .* given True; allowed: Fal"),
    ("saev without schema", {"subtract_b_dec": False}, r"subtract_b_dec: not what .* allowed: True"),
    ("saev schema 1 before", {"subtract_b_dec": "maybe"}, r"given 'maybe'; allowed: true or false"),
    ("saev schema 5", {"mean": [1.0, 2.0]}, r"mean: of another width; given 2; allowed: 12 numbers"),
    ("saev schema 5", {"mean": "none.npy"}, r"mean: it cannot be that; given 'none\.npy'"),
    ("saev schema 5", {"mean": [float("nan")] * D_IN}, r"mean: it cannot be that; given 'a list'"),
    ("saev schema 5", {"scale": 0}, r"scale: it cannot be that; given '0'; allowed: a positive"),
    ("saev schema 5", {"tokens": "cls"}, r"tokens: .* given 'cls'; allowed: class, patch, register"),
    ("universal_sae", {"k": 6}, r"k: not what .* given 6; allowed: 5"),
    ("universal_sae", {"mean": 0.0}, r"mean: not what .* given 0\.0; allowed: -0\.03"),
    ("msae TopKReLU", {"k": 6}, r"k: not what"),
    ("msae TopKReLU", {"mean": [0.0] * D_IN}, r"mean: not what"),
    ("overcomplete TopKSAE, module", {"k": 4}, r"k: not what .* given 4; allowed: 5"),
    ("overcomplete BatchTopKSAE, module", {"threshold": 0.7}, r"threshold: not what"),
    ("dictionary_learning AutoEncoderTopK", {"k": 6}, r"k: not what .* given 6; allowed: 5"),
    ("prisma topk, layer_norm", {"k": 6}, r"k: not what"),
    ("prisma relu", {"normalize_activations": "layer_norm"}, r"normalize_activations: not what"),
    ("sae_v", {"k": 5}, r"k: .* has no use for it; allowed: model_name, hook_name, tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "message"), WRONG)
def test_wrong_facts(tmp_path, name, given, message):
    file = FILES[name](tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_sae(file.path, **given)


# -- what is refused ----------------------------------------------------------------------------------


def coupled(folder, schema, commit, **more):
    header = saev_header(schema, "BatchTopK", commit) | more
    return sae_files.saev(folder, header, subtract=False, act="topk")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: coupled(f, 1, "d991de3", cls="BatchTopK"), "depend on the other rows"),
        *(
            (lambda f, commit=commit: coupled(f, 2, commit), "depend on the other rows")
            for commit in ("8d38c23", "9ecf55b", "4ddfb89", "afb8679", "89cb76f", "2fe190b")
        ),
        (lambda f: coupled(f, 5, "3d73f1f"), r"BatchTopK without its threshold; given 'BatchTopK'"),
        (lambda f: sae_files.saev(f, saev_header(6, "Relu"), subtract=False), "schema: unknown; given '6'"),
        (lambda f: sae_files.saev(f, saev_header(4, "Gelu"), subtract=False), "activation: unknown"),
        (lambda f: sae_files.prisma(f, "standard", "tanh-relu", "none", "hub"), "given 'tanh-relu'"),
        (lambda f: sae_files.prisma(f, "gated", "topk", "none", "hub"), "no gated SAE with it"),
        (lambda f: sae_files.prisma(f, "jumprelu", "relu", "none", "hub"), "architecture: not read"),
        (lambda f: sae_files.prisma(f, "standard", "relu", "batch", "hub"), "holds what it cannot be; given 'batch'"),
        (lambda f: sae_files.msae(f, "BatchTopKReLU_5"), "keeps the largest of a whole batch"),
        (lambda f: sae_files.msae(f, "TopKabs_5"), "activation: SAELens has none; given 'TopKabs'"),
        (lambda f: sae_files.msae(f, "x", name="40_12_ReLU_003_False_False_30.0_a.pth"), "no tanh"),
        (lambda f: sae_files.msae(f, "x", name="40_12_ReLU_003_False_True_0.0_a.pth"), "each row"),
        (lambda f: sae_files.msae(f, "x", name="12_40_ReLU_003_False_False_0.0_a.pth"), "file's name"),
        (lambda f: sae_files.msae(f, "ReLU_003", name="40_12_JumpReLU_False_False_0.0.pth"), "log_thresh"),
    ],
)  # fmt: skip
def test_what_sae_lens_cannot_say_is_refused(tmp_path, make, message):
    file = make(tmp_path)
    given = {"subtract_b_dec": True} if "d991de3" in str(Checkpoint(file.path).header) else {}
    with pytest.raises((ConfigError, CheckpointError), match=message):
        read_sae(file.path, **given)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
        {"normalize_activations": "layer_norm"},
        {"normalize_activations": "constant_norm_rescale"},
    ],
)
def test_transcoders_that_sae_lens_has_not(tmp_path, change):
    file = FILES["prisma skip transcoder"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=r"transcoder: SAELens's have ReLU, and undo no normali"):
        read_sae(file.path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"encoder.final_block.1.weight": torch.ones(D_SAE)},
            "no layer normalisation over the latents",
        ),
        (
            {"encoder.mlp_blocks.0.0.weight": torch.ones(D_IN, D_IN)},
            "given 'encoder.mlp_blocks.0.0.w",
        ),
        ({"Q": torch.ones(4)}, "given 'QSAE'"),
    ],
)
def test_encoders_of_overcomplete_that_sae_lens_has_not(tmp_path, extra, message):
    file = FILES["overcomplete TopKSAE"](tmp_path)
    torch.save({**torch.load(file.path), **extra}, file.path)
    given = dict(file.given)
    if "Q" in extra:
        del given["sae_class"], given["k"]
    with pytest.raises(ConfigError, match=message):
        read_sae(file.path, **given)


@pytest.mark.parametrize("kind", ["QSAE", "OMPSAE"])
def test_modules_of_overcomplete_that_sae_lens_has_not(tmp_path, kind):
    checkpoint = Checkpoint(FILES["overcomplete TopKSAE, module"](tmp_path).path)
    checkpoint.content.kind = f"overcomplete.sae.{kind}"
    with pytest.raises(
        ConfigError, match=f"no class that gives its latents; given '{kind}'; allowed"
    ):
        read_sae(checkpoint)


def encoder_of(checkpoint):
    return checkpoint.content.fields["_modules"]["encoder"]


@pytest.mark.parametrize(
    "kind",
    ["my_study.CentredEncoder", "my_study.MLPEncoder", "overcomplete.sae.modules.AttentionEncoder"],
)
def test_an_encoder_class_of_the_users_own_is_refused(tmp_path, kind):
    checkpoint = Checkpoint(FILES["overcomplete TopKSAE, module"](tmp_path).path)
    encoder_of(checkpoint).kind = kind
    with pytest.raises(ConfigError, match=f"encoder: a class whose latents .*given '{kind}'"):
        read_sae(checkpoint)
    weight = torch.zeros(D_SAE, D_IN)  # one without blocks, as TieableEncoder is
    encoder_of(checkpoint).fields.update(_modules={}, _parameters={"weight": weight})
    with pytest.raises(ConfigError, match=f"encoder: a class whose latents .*given '{kind}'"):
        read_sae(checkpoint)


def test_tied_and_untied_encoders_of_modules(tmp_path):
    file = FILES["overcomplete TopKSAE, module"](tmp_path)
    n = sae_files.Numbers(4)
    dictionary = sae_files.overcomplete_state(n, "TopKSAE")[1]
    for tied in (True, False):
        checkpoint = Checkpoint(file.path)
        modules = checkpoint.content.fields["_modules"]
        encoder = modules["encoder"]
        encoder.kind = "overcomplete.sae.modules.TieableEncoder"
        weight = dictionary if tied else n.enc.T.contiguous()
        encoder.fields["_parameters"] = {"weight": None if tied else weight, "bias": None}
        encoder.fields["_modules"] = {"tied_to": modules["dictionary"]} if tied else {}
        with torch.no_grad():
            z = read_sae(checkpoint).encode(file.x)
        torch.testing.assert_close(z, sae_files.topk((file.x @ weight.T).relu(), 5))
    checkpoint = Checkpoint(file.path)
    encoder = encoder_of(checkpoint)
    encoder.kind = "overcomplete.sae.modules.TieableEncoder"
    encoder.fields["_parameters"] = {}
    encoder.fields["_modules"] = {"tied_to": Record("overcomplete.sae.dictionary.DictionaryLayer")}
    with pytest.raises(ConfigError, match="tied to another dictionary than the SAE's own"):
        read_sae(checkpoint)


def test_a_normalisation_of_modules_that_sae_lens_has_not(tmp_path):
    checkpoint = Checkpoint(FILES["overcomplete TopKSAE, module"](tmp_path).path)
    norm = encoder_of(checkpoint).fields["_modules"]["final_block"].fields["_modules"]["1"]
    norm.kind = "torch.nn.modules.normalization.LayerNorm"  # without weights: no tensor shows it
    with pytest.raises(
        ConfigError, match=r"no such normalisation over the latents; given '.*LayerN"
    ):
        read_sae(checkpoint)


def annealed(name, folder, place, **trainer):
    """A file of dictionary_learning whose k is 5, and 3 in config.json."""
    file = FILES[name](folder)
    top = Checkpoint(file.path).folder
    top = top.parent if top.name == "checkpoints" else top
    config = json.loads((top / "config.json").read_text())
    config["trainer"] |= {"k": 3, **trainer}
    (top / "config.json").write_text(json.dumps(config))
    file.path = top / place
    return file


@pytest.mark.parametrize("place", ["checkpoints/ae_600.pt", "ae.pt"])
@pytest.mark.parametrize("kind", ["AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_k_that_dictionary_learning_anneals(tmp_path, kind, place):
    in_training = {} if place.startswith("checkpoints") else {"k_anneal_steps": 100}
    file = annealed(f"dictionary_learning {kind}", tmp_path, place, **in_training)
    sae = read_sae(file.path)
    gives(sae, file)
    said = "k is the file's, 5, where config.json says 3: it was annealed in training"
    assert (said in sae.cfg.metadata.notes) == (kind == "AutoEncoderTopK")


def test_k_that_differs_from_the_configs_is_confirmed_by_the_user(tmp_path):
    file = annealed("dictionary_learning AutoEncoderTopK", tmp_path, "ae.pt")
    with pytest.raises(
        ConfigError, match=r"k: config.json and .* differ; given 3\.0; allowed: 5, given as"
    ):
        read_sae(file.path)
    with pytest.raises(ConfigError, match=r"k: not what .* holds; given 3; allowed: 5"):
        read_sae(file.path, k=3)
    gives(sae := read_sae(file.path, k=5), file)
    assert "config.json says 3: as given" in " ".join(sae.cfg.metadata.notes)


def test_a_class_of_dictionary_learning_that_is_not_read(tmp_path):
    file = FILES["dictionary_learning AutoEncoder"](tmp_path)
    trainer = json.loads((file.path / "config.json").read_text())["trainer"]
    (file.path / "config.json").write_text(
        json.dumps({"trainer": {**trainer, "dict_class": "CrossCoder"}})
    )
    with pytest.raises(
        ConfigError, match="sae_class: none of theirs; given 'CrossCoder'; allowed: Auto"
    ):
        read_sae(file.path)


def test_an_activation_other_than_relu_in_a_module(tmp_path):
    checkpoint = Checkpoint(FILES["overcomplete TopKSAE, module"](tmp_path).path)
    encoder = checkpoint.content.fields["_modules"]["encoder"]
    encoder.fields["_modules"]["final_activation"].kind = "torch.nn.modules.activation.SiLU"
    with pytest.raises(ConfigError, match=r"encoder: its last activation; given '.*SiLU'"):
        read_sae(checkpoint)


def test_gated_pickles_of_patchsae(tmp_path):
    checkpoint = Checkpoint(FILES["patchsae"](tmp_path).path)
    checkpoint.content["cfg"].fields["gated_sae"] = True
    with pytest.raises(ConfigError, match="gated_sae: upstream has no forward for it"):
        read_sae(checkpoint)


def test_a_block_counted_from_the_end_of_an_unknown_model(tmp_path):
    checkpoint = Checkpoint(FILES["patchsae"](tmp_path).path)
    checkpoint.content["cfg"].fields["model_name"] = "mine/vit"
    metadata = read_sae(checkpoint).cfg.metadata
    assert (metadata.hook_name, metadata.block_layer) == (None, -2)
    assert "not in the file, and not given: hook_name" in metadata.notes


# -- broken files -------------------------------------------------------------------------------------


def edited(name: str, folder: Path, change) -> Path:
    """A file of `FILES` whose state dict `change` has changed."""
    file = FILES[name](folder)
    path = Checkpoint(file.path).path
    content = torch.load(path)
    state = content.get("model_state_dict", content) if isinstance(content, dict) else content
    change(state)
    torch.save(content, path)
    return path


def turn(name):
    def change(state):
        state[name] = state[name].T.contiguous()

    return change


TURNED = [
    ("clip_scope", "enc", "W_enc"),
    ("clip_scope", "dec", "W_dec"),
    ("prisma relu", "W_enc", "W_enc"),
    ("prisma gated", "W_dec", "W_dec"),
    ("dictionary_learning AutoEncoderTopK", "encoder.weight", "W_enc"),
    ("dictionary_learning JumpReluAutoEncoder", "W_dec", "W_dec"),
    ("dictionary_learning GatedAutoEncoder", "decoder.weight", "W_dec"),
    ("overcomplete TopKSAE", "dictionary._weights", "W_dec"),
    ("overcomplete JumpSAE", "encoder.final_block.0.weight", "W_enc"),
]


@pytest.mark.parametrize(("name", "tensor", "ours"), TURNED)
def test_a_transposed_matrix(tmp_path, name, tensor, ours):
    path = edited(name, tmp_path, turn(tensor))
    given = sae_files.OVERCOMPLETE_GIVEN.get(name.split()[-1], {})
    with pytest.raises(
        CheckpointError, match=rf"{ours}: transposed, beside .* given \(\d+, \d+\); all"
    ):
        read_sae(path, **given)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("clip_scope", "pre_b"),
        ("prisma relu", "b_enc"),
        ("dictionary_learning BatchTopKSAE", "b_dec"),
    ],
)
def test_a_missing_tensor(tmp_path, name, tensor):
    path = edited(name, tmp_path, lambda state: state.pop(tensor))
    with pytest.raises((CheckpointError, ConfigError), match=f"{tensor}|none recognises"):
        read_sae(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("overcomplete mlp_bn_1", "encoder.final_block.1.weight"),
        ("overcomplete mlp_bn_1", "encoder.final_block.1.bias"),
        ("overcomplete mlp_bn_1", "encoder.final_block.1.running_mean"),
        ("overcomplete RATopKSAE", "dictionary.multiplier"),
        ("overcomplete RATopKSAE", "dictionary.Relax"),
    ],
)
def test_a_missing_tensor_is_not_taken_for_its_default(tmp_path, name, tensor):
    path = edited(name, tmp_path, lambda state: state.pop(tensor))
    given = {"sae_class": "TopKSAE", "k": 5, "dictionary_normalization": "l2"}
    if "RATopK" in name:
        given = {"k": 5, "delta": 0.9}
    with pytest.raises(CheckpointError, match=f"{re.escape(tensor)} is not in it"):
        read_sae(path, **given)


def test_a_batch_topk_that_has_lost_its_threshold(tmp_path):
    """The momentum in its header is that of the threshold; without both it is older, and per row."""
    header = saev_header(4, "BatchTopK")
    header["cfg"]["activation"]["params"]["momentum"] = 0.1
    path = sae_files.saev(tmp_path, header, subtract=False, act="topk").path
    with pytest.raises(ConfigError, match="BatchTopK without its threshold"):
        read_sae(path)


@pytest.mark.parametrize("commit", ["2fe190b", "2fe190b4c", "2fe190b" + "0" * 33])
def test_a_commit_may_be_written_longer(tmp_path, commit):
    header = saev_header(2, "BatchTopK", commit)
    path = sae_files.saev(tmp_path, header, subtract=False, act="topk").path
    with pytest.raises(ConfigError, match="keeps the largest latents of a whole batch"):
        read_sae(path)


@pytest.mark.parametrize("name", ["clip_scope", "prisma relu", "dictionary_learning AutoEncoder"])
def test_an_unknown_tensor_is_no_detail(tmp_path, name):
    path = edited(name, tmp_path, lambda state: state.update(W_more=torch.ones(2)))
    with pytest.raises(
        ConfigError, match=r"it has tensors that .* does not have; given 'W_more'; allo"
    ):
        read_sae(path)


@pytest.mark.parametrize("name", ["clip_scope", "dictionary_learning BatchTopKSAE, interrupted"])
def test_an_unknown_key_beside_the_weights_is(tmp_path, name):
    file = FILES[name](tmp_path)
    path = Checkpoint(file.path).path
    torch.save({**torch.load(path), "wandb_url": "https://..."}, path)
    gives(read_sae(path), file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path, value):
    path = edited("clip_scope", tmp_path, lambda state: state["enc"].view(-1)[3].fill_(value))
    with pytest.raises(CheckpointError, match="W_enc: it holds NaN or infinity"):
        read_sae(path)


def test_tensors_that_are_no_matrices(tmp_path):
    path = edited("clip_scope", tmp_path, lambda state: state.update(dec=torch.ones(4)))
    with pytest.raises(CheckpointError, match="W_dec is no matrix, or a bias no vector"):
        read_sae(path)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
@pytest.mark.parametrize(
    "name",
    [
        "saev schema 5",
        "prisma topk, layer_norm",
        "prisma gated, constant norm",
        "msae ReLU",
        "clip_scope",
    ],
)
def test_a_truncated_file(tmp_path, name, share):
    path = Checkpoint(FILES[name](tmp_path).path).path
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"it cannot be read: .*; allowed: a whole file"):
        read_sae(path)


def test_a_damaged_config(tmp_path):
    file = FILES["prisma relu"](tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: it is not JSON"):
        read_sae(file.path)


def test_a_damaged_folder_of_sae_lens(tmp_path):
    file = FILES["sae_v"](tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="the SAE cannot be loaded"):
        read_sae(file.path)


def test_contradicting_ks(tmp_path):
    path = edited("dictionary_learning AutoEncoderTopK", tmp_path, lambda s: s["k"].fill_(6))
    with pytest.raises(ConfigError, match=r"k: config\.json and .* differ; given 5\.0; allowed: 6"):
        read_sae(path)


@pytest.mark.parametrize("k", ["all", [5], {"k": 5}, -1, 2**70, 1.5])
def test_nonsense_in_a_file(tmp_path, k):
    file = FILES["clip_scope"](tmp_path)
    torch.save({**torch.load(file.path), "k": k}, file.path)
    with pytest.raises((CheckpointError, ConfigError), match=r"k[:,]"):
        read_sae(file.path)


@pytest.mark.parametrize("nonsense", [[], {}, 3, [[1]], "x" * 5000, None, True])
def test_nonsense_in_configs(tmp_path, nonsense):
    """Whatever a stranger's config holds, what comes is an SAE or one of our errors."""
    for number, name in enumerate(("prisma relu", "dictionary_learning BatchTopKSAE")):
        (folder := tmp_path / f"{number}").mkdir()
        file = FILES[name](folder)
        path = Checkpoint(file.path).folder / "config.json"
        config = json.loads(path.read_text())
        inner = config.get("trainer", config)
        for key in list(inner):
            inner_changed = {**inner, key: nonsense}
            changed = {"trainer": inner_changed} if "trainer" in config else inner_changed
            path.write_text(json.dumps(changed))
            try:
                sae = read_sae(file.path)
            except (ConfigError, CheckpointError):
                continue
            json.dumps(sae.cfg.to_dict())


@pytest.mark.parametrize("nonsense", [[], {"a": [1]}, 3, "x", None])
def test_nonsense_in_headers(tmp_path, nonsense):
    for key in ("schema", "cfg", "cls", "commit", "lib"):
        header = {**saev_header(4, "BatchTopK"), key: nonsense}
        file = sae_files.saev(tmp_path, header, subtract=False, act="threshold")
        try:
            gives(read_sae(file.path), file)
        except (ConfigError, CheckpointError):
            assert key in ("schema", "cfg")
    broken = sae_files.saev(tmp_path, OLD_SAEV, subtract=True).path
    broken.write_bytes(b"{" * 1_000_000)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_sae(broken)


# -- the table ----------------------------------------------------------------------------------------


DOCS = (Path(__file__).resolve().parents[2] / "docs" / "loaders.md").read_text()


def test_every_loader_describes_itself():
    names = {name.split()[0] for name in FILES} - {"conceptscope", "hugofry", "sae_v"}
    for name in names:
        entry = LOADERS[name]
        assert entry.description
        assert entry.recognises is not None
        assert set(entry.asks_for) <= set(FACTS)
        assert {"model_name", "hook_name", "tokens"} <= set(entry.asks_for)
    for name in names | {"sae_lens"}:
        assert f"\n| [`{name}`](#" in DOCS or f"\n| `{name}` |" in DOCS, name


def test_the_docs_name_every_fact_and_their_links_lead_somewhere():
    asked, _, _ = DOCS.partition("## Files are not run")
    assert {name for name in FACTS if f"`{name}`" not in asked} == {"top_k"}  # changes nothing
    headings = re.findall(r"^## (.*)$", DOCS, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", DOCS)) <= anchors
