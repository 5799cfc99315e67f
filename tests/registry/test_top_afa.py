"""`top_afa` against a loop over samples and over every possible k."""

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from taxolens.registry.architectures.top_afa import (
    TopAFATrainingSAE,
    TopAFATrainingSAEConfig,
    select_by_norm,
)


def slow_selection(contributions, target):
    kept = torch.zeros_like(contributions, dtype=torch.bool)
    for row in range(len(contributions)):
        order = contributions[row].argsort(descending=True, stable=True)
        gaps = [
            abs(contributions[row][order[:k]].square().sum().sqrt() - target[row])
            for k in range(1, len(order) + 1)
        ]
        kept[row, order[: gaps.index(min(gaps)) + 1]] = True
    return kept


def test_selection_tries_every_k():
    generator = torch.Generator().manual_seed(0)
    contributions = torch.randn(80, 15, generator=generator, dtype=torch.float64).relu()
    target = 4 * torch.rand(80, generator=generator)
    # whether a latent that contributes nothing is among the kept ones is left open
    got = select_by_norm(contributions, target) & (contributions > 0)
    assert torch.equal(got, slow_selection(contributions, target) & (contributions > 0))
    assert got.sum(dim=1).unique().numel() > 4  # k adapts to the input


def test_an_exact_match_is_found_and_at_least_one_latent_kept():
    contributions = torch.tensor([[3.0, 0.0, 4.0, 1.0], [0.0, 0.0, 2.0, 0.0]])
    kept = select_by_norm(contributions, torch.tensor([5.0, 0.0]))
    assert kept.tolist() == [[True, False, True, False], [False, False, True, False]]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1, 60])
def test_in_half_precision_it_keeps_as_many_latents(dtype, scale, tmp_path):
    """Of norms above 256 the squares have no float16; sums of many small squares no bfloat16."""
    torch.manual_seed(0)
    settings = {"d_in": 64, "d_sae": 512, "decoder_init_norm": 1.0}
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(**settings))
    sae.W_enc.data.copy_(sae.W_dec.T / 2)
    sae.save_inference_model(tmp_path)
    half = TopAFATrainingSAE(TopAFATrainingSAEConfig(**settings, dtype=dtype))
    half.load_state_dict(sae.state_dict())
    x = scale * torch.randn(100, 64)
    wanted = (sae.encode(x) > 0).sum(dim=1).float().mean()
    saved = SAE.load_from_disk(tmp_path, dtype=dtype)
    for other in (half, saved):
        l0 = (other.encode(x.to(other.dtype)) > 0).sum(dim=1).float().mean()
        torch.testing.assert_close(l0, wanted, rtol=0.03, atol=0)
    steps = [TrainStepInput(x.to(each.dtype), {"afa": 1.0}, None, 0, False) for each in (sae, half)]
    exact, afa = (
        each.training_forward_pass(step).losses["afa_loss"]
        for each, step in zip((sae, half), steps, strict=True)
    )
    torch.testing.assert_close(afa.float(), exact, rtol=0.2, atol=0)


def test_the_loss_is_the_papers_times_d_in():
    torch.manual_seed(0)
    settings = {"decoder_init_norm": 1.0, "aux_loss_coefficient": 0.0}
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(d_in=6, d_sae=20, **settings))
    sae.W_dec.data *= torch.rand(20, 1) + 0.5
    sae.b_dec.data.normal_()
    x = torch.randn(40, 6)
    loss = sae.training_forward_pass(TrainStepInput(x, {"afa": 1 / 32}, None, 0, False)).loss

    unit = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    acts = ((x - sae.b_dec) @ sae.W_enc).relu() * sae.W_dec.norm(dim=1)
    acts = acts * slow_selection(acts.detach(), (x - sae.b_dec).norm(dim=1).detach())
    per_coordinate = (acts @ unit + sae.b_dec - x).square().mean()
    afa = (acts.norm(dim=1) - x.norm(dim=1)).square().mean()
    torch.testing.assert_close(loss, 6 * (per_coordinate + afa / 32))


def test_the_encoder_has_no_bias_of_its_own():
    sae = TopAFATrainingSAE(TopAFATrainingSAEConfig(d_in=6, d_sae=20))
    assert not sae.b_enc.requires_grad
    assert not sae.b_enc.any()


def test_the_afa_loss_warms_up():
    cfg = TopAFATrainingSAEConfig(d_in=6, d_sae=20, afa_coefficient=1 / 16, afa_warm_up_steps=10)
    assert TopAFATrainingSAE(cfg).get_coefficients() == {"afa": TrainCoefficientConfig(1 / 16, 10)}
