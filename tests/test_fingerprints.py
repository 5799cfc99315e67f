"""Fingerprints that lie in files keep their values from release to release.

Each value was computed by the release 0.1.0: checkpoints and results written by it stay valid. That of a
model is of one without a config: one that has a config has another since then.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import torch
from taxolens.hooks.activations.extract import model_fingerprint
from taxolens.hooks.activations.permutation import LazyPermutation
from taxolens.hooks.images.dataset import load_images
from taxolens.plugin.evaluation import forward, results_folder
from taxolens.plugin.evaluation.forward import ModelSetting, activations_of
from taxolens.plugin.evaluation.sae_folders import SAEFolder
from taxolens.plugin.training.checkpoints import RunIdentity, verify_checkpoint, write_manifest
from taxolens.plugin.training.config import _default_cache_path
from taxolens.registry.hashing import uniform


def known_model() -> SimpleNamespace:
    """A model of one family with weights of several types, one of them no multiple of 8 bytes."""
    weights = {
        "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7,
        "a.bias": torch.arange(5, dtype=torch.float16),
        "c.mask": torch.tensor([True, False, True]),
    }
    return SimpleNamespace(
        family="dinov2", original_model=SimpleNamespace(state_dict=lambda: weights)
    )


def known_images(**options):
    cells = [{"bytes": bytes([i, 255 - i]), "path": f"folder/{i}.png"} for i in range(4)]
    cells.append({"bytes": None, "path": "gone.png"})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}
    )
    data = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1, 1]}, features=features)
    return load_images(data.to_iterable_dataset() if options.get("streaming") else data)


def test_of_a_dataset():
    assert known_images().fingerprint == "efb5d1f873c417ce"
    assert known_images(streaming=True).fingerprint == "ba67a934ce5e1340"


def test_of_a_model():
    assert model_fingerprint(known_model()) == "68c2f5bc56a80477"  # type: ignore[arg-type]


def test_folder_of_held_out_activations(monkeypatch, tmp_path):
    built = []
    monkeypatch.setattr(forward, "hook_n_tokens", lambda *_: 5)
    monkeypatch.setattr(forward, "check_tokens", lambda *_: None)
    monkeypatch.setattr(
        forward.ActivationCache, "build", lambda *args, path, **kwargs: built.append(path)
    )
    model = known_model()
    model.cfg = SimpleNamespace(n_prefix_tokens=1)
    setting = ModelSetting("a/model", "class", more=(("a", 1),))
    hooks = ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"]
    held_out = SimpleNamespace(images=SimpleNamespace(fingerprint="0123456789abcdef"), source=None)
    activations_of(held_out, hooks, setting, folder=tmp_path, model=model)  # type: ignore[arg-type]
    assert [path.name for path in built] == ["0187f610"]


def test_folder_of_cached_activations():
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    cfg = SimpleNamespace(
        unique_hook_names=hooks,
        image_source=SimpleNamespace(dataset="some/set"),
        model_name="a/model",
        tokens="class",
    )
    assert _default_cache_path(cfg) == "activations/some_set/a_model/2_hooks_afcbb1a6_class"


def test_of_results(tmp_path):
    facts = ["0123", {"b": 1, "a": [0.5, None]}, np.int64(3), Path("x")]
    assert results_folder._digest(facts) == "edf4e6dc23dc229b"
    (tmp_path / "sae_weights.safetensors").write_bytes(b"weights" * 1000)
    (tmp_path / "cfg.json").write_text("{}")
    folder = SAEFolder.__new__(SAEFolder)
    object.__setattr__(folder, "path", tmp_path)
    assert folder.weights_digest() == (
        "9bdd2b102a4a49a2f82bece21842c0a0b264afaa85c7ed69193e98591b8bdccb"
    )


def test_of_the_files_of_a_checkpoint(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 5000)  # more than one block
    write_manifest(tmp_path, RunIdentity({}, {}), n_training_samples=1, n_training_steps=1)
    verify_checkpoint(tmp_path)
    files = json.loads((tmp_path / "checkpoint.json").read_text())["files"]
    assert files == {
        "weights": {
            "bytes": 1280000,
            "sha256": "7d471e4af16db5a30ce10aebbc29f5178b2edbad6c7dc2e8ff8ee6e4848a726f",
        }
    }


def test_random_numbers_of_images_and_orders_of_a_run():
    """A resumed run goes on in the order it began, and samples of images stay the same."""
    found = uniform([0, 1, 2**40], 5)
    assert found.tolist() == [0.3381464051451539, 0.8426456939626318, 0.2917581539862524]
    assert uniform([7], -1).tolist() == [0.0016970177212215498]
    order = LazyPermutation(10, 3, 1)[np.arange(10)]
    assert order.tolist() == [5, 8, 7, 6, 0, 9, 4, 1, 3, 2]
