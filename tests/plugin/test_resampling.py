"""Resampling of dead latents, against the definition and across a resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import (
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler
from taxolens.plugin.training.resampling import Resampling
from taxolens.registry.errors import ConfigError


def trainer_of(sae: Any, dead: list[int], step: int) -> Any:
    """What the resampling reads of SAELens's trainer, after one step of Adam."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    sum(p.square().sum() for p in sae.parameters()).backward()
    optimizer.step()
    mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    mask[dead] = True
    return SimpleNamespace(
        sae=sae,
        optimizer=optimizer,
        n_training_steps=step,
        dead_neurons=mask,
        activation_scaler=ActivationScaler(),
        n_forward_passes_since_fired=torch.full((sae.cfg.d_sae,), 9),
    )


def test_dead_latents_take_the_direction_of_badly_reconstructed_inputs() -> None:
    torch.manual_seed(0)
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=8, d_sae=6))
    trainer = trainer_of(sae, dead=[1, 4], step=20)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(8))
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    batch = sae.b_dec.detach().repeat(32, 1)  # what b_dec alone reconstructs nearly
    batch[5] += torch.tensor([0.0, 40, 0, 0, 30, 0, 0, 0])
    assert Resampling(sae, every=10, seed=0).before_step(trainer, batch) == 2
    direction = torch.tensor([0, 0.8, 0, 0, 0.6, 0, 0, 0])
    living = [0, 2, 3, 5]
    for latent in (1, 4):
        norm = before["W_dec"][living].norm(dim=1).mean()
        assert torch.allclose(sae.W_dec[latent], direction * norm, atol=1e-5)
        norm = 0.2 * before["W_enc"][:, living].norm(dim=0).mean()
        assert torch.allclose(sae.W_enc[:, latent], direction * norm, atol=1e-5)
        assert sae.b_enc[latent] == 0 and trainer.n_forward_passes_since_fired[latent] == 0
    for moment in ("exp_avg", "exp_avg_sq"):
        state = trainer.optimizer.state
        assert not state[sae.W_dec][moment][[1, 4]].any()
        assert not state[sae.W_enc][moment][:, [1, 4]].any()
        assert state[sae.W_dec][moment][living].any() and state[sae.W_enc][moment][:, living].any()
    assert torch.equal(sae.W_dec[living], before["W_dec"][living])
    assert torch.equal(sae.W_enc[:, living], before["W_enc"][:, living])
    assert torch.equal(sae.b_dec, before["b_dec"])


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
def test_an_input_is_taken_as_the_sae_normalises_it(norm: str, scale: float) -> None:
    torch.manual_seed(0)
    cfg = StandardTrainingSAEConfig(d_in=8, d_sae=6, normalize_activations=norm)
    sae = StandardTrainingSAE(cfg)
    trainer = trainer_of(sae, dead=[1, 4], step=20)
    batch = torch.randn(8).repeat(32, 1)
    batch[5] = 30 * torch.randn(8)
    seen = batch - batch.mean(1, keepdim=True) if norm == "layer_norm" else batch
    # To a length of sqrt(d - 1), or of sqrt(d): of unit standard deviation, or of norm.
    length = 7**0.5 if norm == "layer_norm" else 8**0.5
    seen = length * torch.nn.functional.normalize(seen, dim=1)
    with torch.no_grad():
        sae.b_dec.copy_(seen[0])  # which alone reconstructs the others
    assert Resampling(sae, every=10, seed=0).before_step(trainer, scale * batch) == 2
    direction = torch.nn.functional.normalize(seen[5] - seen[0], dim=0)
    for rows in (sae.W_dec[[1, 4]], sae.W_enc[:, [1, 4]].T):
        found = torch.nn.functional.normalize(rows, dim=1)
        torch.testing.assert_close(found, direction.expand(2, 8), rtol=1e-3, atol=1e-3)
    assert not {"ln_mu", "ln_std", "x_norm_coeff"} & set(vars(sae))


def test_latents_of_jumprelu_get_their_first_threshold_again() -> None:
    torch.manual_seed(0)
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(d_in=8, d_sae=6, jumprelu_init_threshold=0.05)
    )
    trainer = trainer_of(sae, dead=[1, 4], step=20)
    with torch.no_grad():
        sae.threshold.copy_(torch.tensor([0.3, 1e3, 0.3, 0.3, 1e3, 0.3]))
    batch = torch.randn(64, 8)
    assert Resampling(sae, every=10, seed=0).before_step(trainer, batch) == 2
    expected = torch.tensor([0.3, 0.05, 0.3, 0.3, 0.05, 0.3])
    assert torch.equal(sae.threshold.detach(), expected)
    state = trainer.optimizer.state[sae.threshold]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert state[moment].ne(0).tolist() == [True, False, True, True, False, True]
    assert (sae.encode(batch)[:, [1, 4]] > 0).any(0).all()


@pytest.mark.parametrize(("dead", "step"), [([], 20), ([1], 15), ([1], 0), (list(range(6)), 20)])
def test_nothing_changes_at_other_steps_or_without_dead_latents(dead: list[int], step: int) -> None:
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=8, d_sae=6))
    trainer = trainer_of(sae, dead, step)
    before = sae.W_dec.detach().clone()
    assert Resampling(sae, every=10, seed=0).before_step(trainer, torch.randn(16, 8)) == 0
    assert torch.equal(sae.W_dec, before)


def test_inputs_are_drawn_in_proportion_to_the_square_of_their_loss() -> None:
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=2, d_sae=3001))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_enc[:, 0] = sae.W_dec[0] = 1e-3
    trainer = trainer_of(sae, dead=list(range(1, 3001)), step=10)
    batch = torch.tensor([[1.0, 0.0], [0.0, 2**0.5]])  # losses 1 and 2: drawn 1 to 4
    assert Resampling(sae, every=10, seed=0).before_step(trainer, batch) == 3000
    share = float((sae.W_dec[1:, 1] > sae.W_dec[1:, 0]).float().mean())
    assert abs(share - 0.8) < 0.03


def test_a_stopped_run_resamples_the_same(training: Any, caplog: Any) -> None:
    sae = {"sae": TopKTrainingSAEConfig(d_in=16, d_sae=64, k=1)}
    settings = {**sae, "resample_every": 3, "dead_feature_window": 1, "n_checkpoints": 2}
    with caplog.at_level("INFO"):
        whole = training.runner(training.single(**settings)).run()
    assert "dead latents start again" in caplog.text
    middle = sorted(p for p in training.checkpoints.iterdir() if p.name.isdigit())[0]
    again = {
        "output_path": str(Path(training.folder) / "again"),
        "resume_from_checkpoint": str(middle),
    }
    resumed = training.runner(training.single(**settings, **again)).run()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    plain = training.runner(
        training.single(**sae, checkpoint_id="plain", overwrite_output=True)
    ).run()
    assert not torch.equal(plain.W_dec, whole.W_dec)


def test_what_cannot_be_resampled_is_refused(training: Any) -> None:
    gated = GatedTrainingSAEConfig(d_in=16, d_sae=32)
    with pytest.raises(
        ConfigError, match=r"resample_every: not possible for gated.*parameter b_enc"
    ):
        training.runner(training.single(sae=gated, resample_every=3))
    with pytest.raises(ConfigError, match=r"resample_every: a constraint.*allowed: one of the two"):
        training.runner(training.single(constraint="frozen_decoder", resample_every=3))
