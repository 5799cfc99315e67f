"""SAELens's own folders: checkpoints of a training run, and settings that SAELens no longer has."""

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, StandardTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from taxolens.plugin.training.runner import load_training_sae
from taxolens.registry.errors import CheckpointError
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
