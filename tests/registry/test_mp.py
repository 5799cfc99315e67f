"""`mp`: its training step against autograd through SAELens's loop, and what it promises in training."""

import pytest
import torch
import torch.nn.functional as F
from sae_lens import SAE
from sae_lens.saes.matching_pursuit_sae import _encode_matching_pursuit
from sae_lens.saes.sae import TrainStepInput
from taxolens.registry.architectures.mp import MPTrainingSAE, MPTrainingSAEConfig
from taxolens.registry.errors import ConfigError


def make(**settings):
    torch.manual_seed(0)
    sae = MPTrainingSAE(MPTrainingSAEConfig(d_in=10, d_sae=30, **{"k": 5, **settings}))
    sae.b_dec.data.normal_()
    return sae


def step(sae, x):
    return sae.training_forward_pass(TrainStepInput(x, {}, None, 0, is_logging_step=True))


def test_a_training_step_is_the_textbook_one():
    sae, x = make(), torch.randn(40, 10)
    W, b = sae.W_dec.detach().clone().requires_grad_(), sae.b_dec.detach().clone().requires_grad_()
    atoms = F.normalize(W, dim=1)
    z = _encode_matching_pursuit(x - b, atoms, 0.0, 5, stop_on_duplicate_support=False)
    loss = (z @ atoms + b - x).square().sum(1).mean()
    expected = torch.autograd.grad(loss, (W, b))

    output = step(sae, x)
    output.loss.backward()
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.feature_acts, z)
    for got, want in zip((sae.W_dec.grad, sae.b_dec.grad), expected):
        assert (got - want).norm() / want.norm() < 1e-5


def test_encoding_outside_training_has_gradients_too():
    sae, x = make(), torch.randn(8, 10, requires_grad=True)
    z = sae.encode(x)
    reference = _encode_matching_pursuit(x - sae.b_dec, sae.dictionary(), 0.0, 5, False)
    (got,) = torch.autograd.grad(z.square().sum(), x)
    (want,) = torch.autograd.grad(reference.square().sum(), x)
    torch.testing.assert_close(got, want)


def test_rows_have_norm_one_and_gradients_no_part_along_them():
    sae = make()
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.1)
    for _ in range(4):
        optimiser.zero_grad()
        step(sae, torch.randn(40, 10)).loss.backward()
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(30))
        along = (sae.W_dec.grad * sae.W_dec).sum(1)
        assert along.abs().max() < 1e-5 * sae.W_dec.grad.norm()
        optimiser.step()


def test_fewer_steps_at_inference_are_a_prefix():
    sae, x = make(), torch.randn(20, 10)
    with torch.no_grad():
        sae.eval()
        sae.cfg.k = 2
        short = sae.encode(x)
        sae.cfg.k = 5
        long = sae.encode(x)
    assert (short != 0).sum(1).max() <= 2
    assert ((long != 0) | (short == 0)).all()


def test_a_saved_one_can_be_run_at_fewer_steps(tmp_path):
    sae, x = make(), torch.randn(20, 10)
    step(sae, x)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        for k in (5, 3, 1):
            sae.cfg.k = loaded.cfg.max_iterations = k
            torch.testing.assert_close(loaded.encode(x), sae.eval().encode(x))
            assert (loaded.encode(x) != 0).sum(1).max() <= k


def test_atom_dropout_leaves_out_atoms_in_training_only():
    sae, x = make(atom_dropout=0.5), torch.randn(400, 10)
    first, second = (step(sae, x).feature_acts.sum(0) > 0 for _ in range(2))
    assert 5 < first.sum() < 25
    assert not torch.equal(first, second)
    sae.eval()
    with torch.no_grad():
        assert (sae.encode(x).sum(0) > 0).sum() > 25


def test_a_hook_that_changes_codes_changes_the_reconstruction():
    sae, x = make(), torch.randn(6, 10)
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: acts * 0)]):
        output = step(sae, x)
    torch.testing.assert_close(output.sae_out, sae.b_dec.expand(6, -1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k: out of range; given 0; allowed: at least 1"),
        (
            {"atom_dropout": 1.0},
            r"atom_dropout: out of range; given 1.0; allowed: a number in \[0, 1\)",
        ),
        (
            {"residual_threshold": -1},
            "residual_threshold: out of range; given -1; allowed: 0 or more",
        ),
        ({"normalize_activations": "covariance_whitening"}, "tied encoder"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        make(**settings)
