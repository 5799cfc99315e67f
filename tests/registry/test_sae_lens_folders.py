"""SAELens's own folders: checkpoints of a training run, and settings that SAELens no longer has."""

import json

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, StandardTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import save_file
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.plugin.training.runner import load_training_sae
from taxolens.registry.errors import CheckpointError, ConfigError
from taxolens.registry.loaders.parts.read import read_sae


def training_checkpoint(folder, scaler):
    """A checkpoint of SAELens's training with decisive weights; gives them."""
    cfg = StandardTrainingSAEConfig(
        d_in=6, d_sae=10, normalize_activations="expected_average_only_in"
    )
    sae = TrainingSAE.from_dict(cfg.to_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    sae.save_model(folder)
    scaler.save(str(folder / "activation_scaler.json"))
    return {name: tensor.detach().double() for name, tensor in sae.named_parameters()}


@pytest.mark.parametrize("whitened", [False, True])
def test_the_scaling_of_a_checkpoint_is_folded_in(tmp_path, whitened):
    generator = torch.Generator().manual_seed(4)
    mean, matrix = (torch.randn(n, generator=generator).double() for n in ((6,), (6, 6)))
    if whitened:
        whitening = ActivationWhitening(mean, matrix, matrix.inverse().contiguous())
        scaler = ActivationScaler(whitening=whitening)
    else:
        mean, matrix = torch.zeros(6).double(), torch.eye(6).double() * 0.37
        scaler = ActivationScaler(scaling_factor=0.37)
    w = training_checkpoint(tmp_path, scaler)
    x = 3 * torch.randn(20, 6, generator=generator).double()
    seen = (x - mean) @ matrix
    z = torch.relu((seen - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    x_hat = (z @ w["W_dec"] + w["b_dec"]) @ matrix.inverse() + mean
    sae = read_sae(tmp_path, dtype="float64", hook_name="blocks.1.hook_resid_post")
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sae(x), x_hat, rtol=1e-4, atol=1e-4)
    assert sae.cfg.normalize_activations == "none"
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    further = load_training_sae(f"sae_lens:{tmp_path}", "cpu")
    assert torch.equal(further.W_enc.double(), w["W_enc"])


def test_a_checkpoint_without_its_whitening_is_refused(tmp_path):
    whitening = ActivationWhitening(torch.zeros(6), torch.eye(6), torch.eye(6))
    training_checkpoint(tmp_path, ActivationScaler(whitening=whitening))
    (tmp_path / "activation_whitening.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"activation_whitening\.safetensors is missing"):
        read_sae(tmp_path)


def test_checkpoints_of_architectures_that_are_saved_as_another(tmp_path):
    cfg = BatchTopKTrainingSAEConfig(d_in=6, d_sae=10, k=2)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    sae.save_model(tmp_path)
    ActivationScaler().save(str(tmp_path / "activation_scaler.json"))
    assert read_sae(tmp_path).cfg.architecture() == "jumprelu"


def old_folder(folder, *, tensors=(), **settings):
    """A folder as SAELens 3 wrote it, and its tensors."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (6, 10), "W_dec": (10, 6), "b_enc": (10,), "b_dec": (6,)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    cfg = {"architecture": "standard", "d_in": 6, "d_sae": 10, "dtype": "float32", "device": "cpu"}
    cfg |= {"hook_name": "blocks.1.hook_resid_post", "activation_fn_kwargs": {}}
    cfg |= {"apply_b_dec_to_input": True, "finetuning_scaling_factor": False}
    (folder / "cfg.json").write_text(json.dumps(cfg | settings))
    save_file(state | dict(tensors), folder / "sae_weights.safetensors")
    return state


READERS = {
    "read_sae": read_sae,
    "evaluate": lambda folder: find_saes(folder)[0].load(),
    "train": lambda folder: load_training_sae(str(folder), "cpu"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str: .*given 'tanh-relu'; allowed"),
        ({"activation_fn": "tanh-relu"}, "activation_fn: .*given 'tanh-relu'; allowed: relu"),
        ({"activation_fn_str": "topk"}, "activation_fn_str: .*given 'topk'; .*topk with k"),
        (
            {
                "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": 2},
                "architecture": "gated",
            },
            r"architecture gated\)",
        ),
    ],
)
def test_activations_that_sae_lens_no_longer_has(tmp_path, reader, settings, message):
    old_folder(tmp_path, **settings)
    with pytest.raises(ConfigError, match=message):
        READERS[reader](tmp_path)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
def test_a_factor_of_the_latents_is_refused(tmp_path, reader, name):
    factor = torch.linspace(0.5, 2, 10)
    old_folder(tmp_path, tensors={name: factor}, finetuning_scaling_factor=True)
    with pytest.raises(
        ConfigError, match="finetuning_scaling_factor: SAELens no longer multiplies"
    ):
        READERS[reader](tmp_path)


@pytest.mark.parametrize("reader", ["read_sae", "evaluate"])
def test_relu_and_topk_of_old_folders_are_read(tmp_path, reader):
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(6))
    for settings, k in (
        ({"activation_fn_str": "relu"}, 10),
        ({}, 10),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}, 3),
    ):
        ones = {"scaling_factor": torch.ones(10)}  # some versions wrote it always
        w = old_folder(tmp_path, tensors=ones, **settings)
        pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        z = torch.relu(pre * (pre >= pre.topk(k).values[:, -1:]))
        with torch.no_grad():
            torch.testing.assert_close(READERS[reader](tmp_path).encode(x), z)
