"""`taxolens convert`: from another library's file to a folder that SAELens loads."""

import json

import pytest
import sae_files
import torch
from sae_files import FILES
from sae_lens import SAE
from taxolens.plugin import cli
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.registry.errors import ConfigError
from taxolens.registry.table import LOADERS, Loader


@pytest.fixture
def convert(capsys):
    """Runs `taxolens convert` in this process: exit code, stdout, stderr."""

    def run(*args):
        code = cli.main(["convert", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_a_file_becomes_a_folder(convert, tmp_path):
    file = FILES["saev schema 1 before"](tmp_path)
    out = tmp_path / "saes" / "mine"
    code, stdout, stderr = convert(file.path, out, "--subtract-b-dec", "true", "--tokens=patch")
    assert (code, stderr) == (0, "")
    assert "saev (its first line is JSON with schema 1): saev: schema 1, Relu" in stdout
    assert f"standard, d_in {sae_files.D_IN}, d_sae {sae_files.D_SAE}" in stdout
    assert "note: not in the file, and not given: model_name, hook_name\n" in stdout
    assert f"written: {out}" in stdout
    sae = SAE.load_from_disk(out)
    with torch.no_grad():
        assert torch.allclose(sae(file.x), file.x_hat, atol=1e-5)
    assert sae.cfg.metadata.tokens == "patch"
    assert sae.cfg.metadata.given == {"subtract_b_dec": True, "tokens": "patch"}


def test_what_is_unknown_is_not_guessed_later(convert, tmp_path):
    file = FILES["saev schema 5"](tmp_path)
    assert convert(file.path, tmp_path / "out")[0] == 0
    (sae,) = find_saes(tmp_path / "out")
    for name in ("model_name", "hook_name", "tokens"):
        with pytest.raises(ConfigError, match=f"metadata has no '{name}'; allowed: .* --{name}"):
            getattr(sae, name)
    place = {"model_name": "vit", "hook_name": "blocks.1.hook_resid_post", "tokens": "patch"}
    flags = [f"--{name}={value}" for name, value in place.items()]
    assert convert(file.path, tmp_path / "again", *flags)[0] == 0
    (sae,) = find_saes(tmp_path / "again")
    assert {name: getattr(sae, name) for name in place} == place


def test_json(convert, tmp_path):
    file = FILES["clip_scope"](tmp_path)
    code, stdout, _ = convert(file.path, tmp_path / "out", "--json", "--dtype", "bfloat16")
    said = json.loads(stdout)
    assert code == 0
    assert (said["loader"], said["cfg"]["dtype"]) == ("clip_scope", "bfloat16")
    assert said["metadata"]["hook_name"] == "blocks.22.hook_resid_post"
    assert said["recognised_by"] == "model_state_dict with pre_b, enc and dec"


def test_what_is_missing_is_said_with_its_flags(convert, tmp_path):
    file = FILES["overcomplete TopKSAE"](tmp_path)
    code, stdout, stderr = convert(file.path, tmp_path / "out")
    assert (code, stdout) == (2, "")
    assert "error: sae_class, dictionary_normalization: not in overcomplete checkpoint" in stderr
    assert "--sae_class (its class over there: TopKSAE, BatchTopKSAE, " in stderr
    assert not (tmp_path / "out").exists()
    flags = [f"--{name}={value}" for name, value in file.given.items()]
    assert convert(file.path, tmp_path / "out", *flags)[0] == 0


def test_a_loader_can_be_named(convert, tmp_path):
    file = FILES["clip_scope"](tmp_path)
    code, _, stderr = convert(f"msae:{file.path}", tmp_path / "out")
    assert code in (1, 2)
    assert "not as msae writes it" in stderr
    assert convert(f"clip_scope:{file.path}", tmp_path / "out")[0] == 0
    code, stdout, _ = convert(file.path, tmp_path / "again", "--loader", "clip_scope")
    assert code == 0
    assert "clip_scope (named by the user)" in stdout


def test_facts_of_a_third_partys_loader_are_flags(convert, tmp_path, monkeypatch):
    given = []

    def disk(path, device, cfg_overrides, **facts):
        given.append(facts)
        cfg = {"architecture": "standard", "d_in": 1, "d_sae": 1, "dtype": "float32"}
        cfg |= {"device": device, "metadata": {"sae_lens_version": "6.54.0"}}
        shapes = {"W_enc": (1, 1), "W_dec": (1, 1), "b_enc": (1,), "b_dec": (1,)}
        return cfg, {name: torch.ones(shape) for name, shape in shapes.items()}

    entry = Loader("mine", disk=disk, asks_for={"temperature": "of it"})
    monkeypatch.setitem(LOADERS._entries, "mine", entry)
    (tmp_path / "x.txt").write_text("")
    path = f"mine:{tmp_path / 'x.txt'}"
    assert convert(path, tmp_path / "a", "--temperature", "2")[0] == 0
    assert convert(path, tmp_path / "b", "--temperature=3")[0] == 0
    assert given == [{"temperature": "2"}, {"temperature": "3"}]
    for wrong in (["--temperatur", "2"], ["--temperature"], ["2"]):
        code, _, stderr = convert(path, tmp_path / "c", *wrong)
        assert code == 2
        assert "argument: not known" in stderr and f"given {wrong[0]!r}" in stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["none.pt", "out"], 2, "path: not found; given 'none.pt'"),
        (["none.pt"], 2, "the following arguments are required: OUT"),
        (["none.pt", "out", "--loader", "saef"], 2, "loader: not known (did you mean 'saev'"),
        (["none.pt", "out", "--kk", "3"], 2, "argument: not known (did you mean '--k'"),
    ],
)
def test_wrong_usage(convert, tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    if "saef" in args:
        FILES["clip_scope"](tmp_path).path.rename(tmp_path / "none.pt")
    found, stdout, stderr = convert(*args)
    assert (found, stdout) == (code, "")
    assert message in stderr


def test_a_damaged_file(convert, tmp_path):
    (tmp_path / "torn.pt").write_bytes(FILES["clip_scope"](tmp_path).path.read_bytes()[:500])
    code, _, stderr = convert(tmp_path / "torn.pt", tmp_path / "out")
    assert code == 1
    assert "torn.pt: it cannot be read: the zip archive is truncated or damaged" in stderr
