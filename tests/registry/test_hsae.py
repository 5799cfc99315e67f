"""`hsae`: its losses summed latent by latent, its parents chosen by brute force."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sae_lens.saes.sae import TrainStepInput
from taxolens.registry.architectures.hsae import (
    HSAETrainingSAE,
    HSAETrainingSAEConfig,
    family_loss,
    most_similar_parents,
)
from taxolens.registry.architectures.parts.forest import ROOT
from taxolens.registry.errors import ConfigError

WIDTHS = [3, 5, 8]
STARTS = [0, 3, 8, 16]


def make(**overrides):
    torch.manual_seed(0)
    cfg = {"k": 2, "level_widths": WIDTHS, "rescale_acts_by_decoder_norm": False}
    sae = HSAETrainingSAE(HSAETrainingSAEConfig(d_in=6, d_sae=16, **{**cfg, **overrides}))
    sae.W_dec.data *= torch.rand(16, 1) + 0.5
    sae.b_dec.data.normal_()
    return sae


def step(sae, x, dead=None):
    return sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))


def slow_family_loss(acts, atoms, parents):
    total = 0.0
    for p in range(STARTS[-1]):
        children = [c for c in range(STARTS[-1]) if parents[c] == p]
        if children:
            gap = acts[:, p : p + 1] * atoms[p] - sum(
                acts[:, c : c + 1] * atoms[c] for c in children
            )
            total = total + gap.square().sum(1).mean()
    return total


def slow_activations(scores):
    acts = torch.zeros_like(scores)
    for row in range(len(scores)):
        for start, stop in pairwise(STARTS):
            top = start + scores[row, start:stop].argsort(descending=True)[:2]
            acts[row, top] = scores[row, top].relu()
    return acts


def test_family_loss_parent_by_parent():
    torch.manual_seed(1)
    atoms = torch.randn(16, 6, dtype=torch.float64)
    parents = most_similar_parents(torch.randn(16, 6), WIDTHS, 0.2)
    acts = slow_activations(torch.randn(50, 16, dtype=torch.float64)).requires_grad_()
    got = family_loss(acts, atoms, parents, WIDTHS, 2)
    want = slow_family_loss(acts, atoms, parents.tolist())
    torch.testing.assert_close(got, want)
    got_gradient, want_gradient = (torch.autograd.grad(loss, acts)[0] for loss in (got, want))
    fires = acts > 0  # where a latent is 0 it is outside the top k and passes no gradient on
    torch.testing.assert_close(got_gradient[fires], want_gradient[fires])


@pytest.mark.parametrize("rescale", [False, True])
def test_the_whole_loss_written_out(rescale):
    sae = make(swap_probability=0.0, family_coefficient=0.3, rescale_acts_by_decoder_norm=rescale)
    x = torch.randn(30, 6)
    output = step(sae, x)
    norms = sae.W_dec.norm(dim=1) if rescale else torch.ones(16)
    atoms = sae.W_dec / norms[:, None]
    acts = slow_activations(((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms)
    expected, outputs = 0.3 * slow_family_loss(acts, atoms, sae.forest.parents.tolist()), []
    for start, stop in pairwise(STARTS):
        outputs.append(acts[:, start:stop] @ atoms[start:stop] + sae.b_dec)
        expected = expected + (outputs[-1] - x).square().sum(1).mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.sae_out, torch.stack(outputs).mean(0))


def test_swapped_latents_are_replaced_by_their_children():
    sae = make(swap_probability=1.0, family_coefficient=0.0)
    x = torch.randn(30, 6)
    output = step(sae, x)
    parents = sae.forest.parents.tolist()
    for level, (start, stop) in enumerate(pairwise(STARTS)):
        total = sae.b_dec.expand(30, 6)
        for latent in range(start, stop):
            children = [c for c in range(16) if parents[c] == latent]
            for source in children or [latent]:
                total = total + output.feature_acts[:, source : source + 1] * sae.W_dec[source]
        expected = (total - x).square().sum(1).mean()
        torch.testing.assert_close(output.losses[f"level_{level}_mse"], expected)


def test_swaps_are_as_frequent_as_asked():
    sae = make(swap_probability=0.25)
    sae.reassign()
    with_children = sae.forest.parents[sae.forest.parents != ROOT].unique()
    swaps = torch.stack([sae._draw_swaps(s) for s in range(800)]).float().mean(0)
    assert swaps[with_children].mean() == pytest.approx(0.25, abs=0.03)
    assert swaps.sum() == pytest.approx(float(swaps[with_children].sum()))


def test_parents_by_brute_force():
    torch.manual_seed(4)
    rows = torch.randn(16, 6)
    got = most_similar_parents(rows, WIDTHS, 0.2, block=3).tolist()
    unit, expected = F.normalize(rows, dim=1), [ROOT] * 16
    for level in (1, 2):
        above = range(STARTS[level - 1], STARTS[level])
        best = {}
        for latent in range(STARTS[level], STARTS[level + 1]):
            expected[latent] = max(above, key=lambda p: float(unit[p] @ unit[latent]))
            best[latent] = float(unit[expected[latent]] @ unit[latent])
        for latent in sorted(best, key=best.get)[: len(best) // 5]:
            expected[latent] = ROOT
    assert got == expected


def test_parents_are_chosen_anew_on_schedule():
    sae, x = make(reassign_every=2), torch.randn(30, 6)
    step(sae, x)
    first = sae.forest.parents.clone()
    sae.W_enc.data.normal_()
    step(sae, x)
    assert torch.equal(sae.forest.parents, first)
    step(sae, x)
    assert not torch.equal(sae.forest.parents, first)


def test_dead_latents_are_revived_on_the_residual_of_their_level():
    sae, x = make(swap_probability=0.0, aux_loss_coefficient=1.0), torch.randn(30, 6)
    plain = step(sae, x)
    dead = torch.zeros(16, dtype=torch.bool)
    dead[4] = True
    output = step(sae, x, dead)
    level = output.feature_acts[:, 3:8] @ sae.W_dec[3:8] + sae.b_dec
    revived = output.hidden_pre[:, 4:5] * sae.W_dec[4]
    aux = (revived - (x - level)).square().sum(1).mean() / 3  # one dead latent of d/2 = 3
    torch.testing.assert_close(output.loss, plain.loss + aux)


def test_default_levels_are_the_papers():
    assert HSAETrainingSAEConfig(d_in=8, d_sae=30720).widths == [2048, 4096, 8192, 16384]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"swap_probability": 2.0},
            r"swap_probability: out of range; given 2.0; allowed: a number in \[0, 1\]",
        ),
        (
            {"unassigned_share": -0.1},
            r"unassigned_share: out of range; given -0.1; allowed: a number in \[0, 1\]",
        ),
        ({"reassign_every": 0}, "reassign_every: out of range; given 0; allowed: at least 1"),
        (
            {"level_widths": [4, 4]},
            r"level_widths: not the levels of hsae; given \[4, 4\]; allowed: .* the sum d_sae=16",
        ),
    ],
)
def test_wrong_settings_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(**overrides)


@pytest.mark.parametrize(
    ("latent", "parent", "allowed"),
    [
        (9, 0, "latent 9, of level 2; given 0; allowed: 3 to 7, or -1"),  # two levels above
        (9, 8, "latent 9, of level 2; given 8; allowed: 3 to 7, or -1"),
        (2, 1, "latent 2, of level 0; given 1; allowed: -1"),
    ],
)
def test_a_parent_is_of_the_level_above(latent, parent, allowed):
    parents = [ROOT] * 16
    parents[latent] = parent
    with pytest.raises(ConfigError, match=f"parents: not possible for {allowed}"):
        make(parents=parents)
