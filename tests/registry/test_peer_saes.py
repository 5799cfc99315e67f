"""Files that the real libraries wrote, with the latents that they give (not part of the project).

They lie in ``../shared/data/peer-saes`` beside the checkout, or where TAXOLENS_PEER_SAES says. Each
folder has an about.json (what the file holds and what a user must say) and expected.safetensors.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from taxolens.registry.errors import ConfigError
from taxolens.registry.loaders.parts.checkpoint import Checkpoint
from taxolens.registry.loaders.parts.read import find_loader, read_sae, save_sae

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(os.environ.get("TAXOLENS_PEER_SAES", ROOT.parent / "shared" / "data" / "peer-saes"))
ABOUT = {path.parent: json.loads(path.read_text()) for path in sorted(PEERS.glob("*/about.json"))}
REASON = f"no folder of other libraries' SAEs at {PEERS}; set TAXOLENS_PEER_SAES to one"
LOADER_OF = {
    "clipscope": "clip_scope",
    "conceptscope": "patchsae",
    "hugofry": "patchsae",
    "prisma2024": "prisma",
    "saelensv": "sae_lens",
    "saevlm": "sae_for_vlm",
    "usae": "universal_sae",
}
ELSEWHERE = ("file_name", "model", "attachment_point", "layer", "tokens")  # in names of folders

pytestmark = pytest.mark.skipif(not ABOUT, reason=REASON)


def folders(expressible: bool) -> list:
    found = [p for p, about in ABOUT.items() if about["expressible"] is expressible]
    return [pytest.param(p, id=p.name) for p in found] or [None]


def read(folder: Path, path: Path | None = None):
    about = ABOUT[folder]
    given = {k: v for k, v in about["not_in_file"].items() if k not in ELSEWHERE}
    return read_sae(path or folder / about["entry"], **given)


def assert_as_expected(sae, folder: Path) -> None:
    """To 1e-5 of the largest expected value, or of 1 where that is smaller."""
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        z = sae.encode(expected["x"])
        is_transcoder = ABOUT[folder]["kind"] == "transcoder"
        x_hat = sae(expected["x"]) if is_transcoder else sae.decode(z)
    for name, found in (("z", z), ("x_hat", x_hat)):
        difference = (found - expected[name]).abs().max()
        assert difference <= 1e-5 * max(1.0, float(expected[name].abs().max())), name


@pytest.mark.parametrize("folder", folders(expressible=True))
def test_latents_reconstruction_and_conversion(folder, tmp_path):
    about = ABOUT[folder]
    entry, _ = find_loader(folder / about["entry"])
    assert entry.name == LOADER_OF.get(about["source"], about["source"])
    sae = read(folder)
    assert_as_expected(sae, folder)
    converted = save_sae(sae, tmp_path / "sae")
    assert_as_expected(SAE.load_from_disk(converted), folder)
    assert_as_expected(read_sae(converted), folder)


@pytest.mark.parametrize("folder", folders(expressible=False))
def test_what_sae_lens_cannot_say_is_refused(folder):
    with pytest.raises(ConfigError, match="SAELens"):
        read(folder)


@pytest.mark.parametrize("folder", folders(expressible=True))
def test_what_the_file_says_is_in_the_metadata(folder):
    metadata = read(folder).cfg.metadata
    said = ABOUT[folder]["in_file"]
    if "hook_point" in said:
        assert metadata.hook_name == said["hook_point"]
        assert metadata.model_name == said["model_name"]
    if "cls_token_only" in said:
        patch = "patch" if said["use_patches_only"] else "all"
        assert metadata.tokens == ("class" if said["cls_token_only"] else patch)
    if "out_hook_point" in said and metadata.hook_name_out:
        assert metadata.hook_name_out == said["out_hook_point"]
    if said.get("block_layer") == -2:
        blocks = {"openai/clip-vit-large-patch14": 24, "openai/clip-vit-base-patch16": 12}
        assert metadata.hook_name == f"blocks.{blocks[said['model_name']] - 2}.hook_resid_post"
    if said.get("lm_name"):
        assert (metadata.model_name, metadata.layer) == (said["lm_name"], said["layer"])


def test_converted_folders_load_where_taxolens_is_not(tmp_path, forks):
    for folder, about in ABOUT.items():
        if about["expressible"]:
            save_sae(read(folder), tmp_path / folder.name)
    script = """
        import sys
        from pathlib import Path
        sys.modules["taxolens"] = None
        import torch
        from safetensors.torch import load_file
        from sae_lens import SAE
        peers, folders = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir())
        for folder in folders:
            expected = load_file(peers / folder.name / "expected.safetensors")
            with torch.no_grad():
                found = SAE.load_from_disk(folder)(expected["x"])
            scale = max(1.0, float(expected["x_hat"].abs().max()))
            assert (found - expected["x_hat"]).abs().max() <= 1e-5 * scale, folder.name
        print(len(folders))
    """
    done = forks.run(script, PEERS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(about["expressible"] for about in ABOUT.values())


@pytest.mark.parametrize("folder", [pytest.param(p, id=p.name) for p in ABOUT] or [None])
def test_every_pickle_is_read_by_the_machine_that_runs_nothing(folder, monkeypatch):
    """The files that torch's own restricted reader takes are read by ours too, to the same numbers."""
    from taxolens.registry.loaders.parts import safe_pickle

    names = [name for name in ABOUT[folder]["pickles"] or {} if (folder / name).is_file()]
    for name in names:
        checkpoint = Checkpoint(folder / name)
        known = checkpoint.content
        with monkeypatch.context() as patched:
            patched.setattr(safe_pickle, "_weights_only", lambda file: None)
            ours = Checkpoint(folder / name).content
        assert flat(ours).keys() == flat(known).keys()
        for key, tensor in flat(known).items():
            assert torch.equal(tensor, flat(ours)[key]), key


def flat(value, prefix="") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else ()
    found: dict[str, torch.Tensor] = {}
    for key, item in items:
        found |= flat(item, f"{prefix}.{key}")
    return found
