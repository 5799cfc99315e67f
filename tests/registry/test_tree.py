"""`tree`: its gate and loss latent by latent, its quotas against every possible allocation."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.saes.sae import TrainStepInput
from taxolens.registry.architectures.parts.forest import ROOT, Forest
from taxolens.registry.architectures.parts.tree_growth import TreeGrowth, fair_quotas
from taxolens.registry.architectures.tree import (
    TreeSAEConfig,
    TreeTrainingSAE,
    TreeTrainingSAEConfig,
    random_forest,
    tree_activations,
)
from taxolens.registry.errors import ConfigError

WIDTHS, BUDGETS = [3, 4, 5], [2, 2, 3]


def make(**overrides):
    torch.manual_seed(0)
    cfg = {"level_widths": WIDTHS, "level_k": BUDGETS, "rescale_acts_by_decoder_norm": False}
    sae = TreeTrainingSAE(TreeTrainingSAEConfig(d_in=6, d_sae=12, **{**cfg, **overrides}))
    sae.W_dec.data *= torch.rand(12, 1) + 0.5
    sae.b_dec.data.normal_()
    return sae


def step(sae, x, dead=None):
    return sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False))


def slow_activations(hidden_pre, parents):
    acts = torch.zeros_like(hidden_pre)
    for row in range(len(hidden_pre)):
        start = 0
        for width, k in zip(WIDTHS, BUDGETS):
            allowed = [
                latent
                for latent in range(start, start + width)
                if parents[latent] == ROOT or acts[row, parents[latent]] > 0
            ]
            allowed.sort(key=lambda latent: -hidden_pre[row, latent])
            for latent in allowed[:k]:
                acts[row, latent] = hidden_pre[row, latent].clamp(min=0)
            start += width
    return acts


@pytest.mark.parametrize("seed", range(3))
def test_activations_latent_by_latent(seed):
    parents = random_forest(WIDTHS, seed)
    hidden_pre = torch.randn(60, 12, generator=torch.Generator().manual_seed(seed))
    got = tree_activations(hidden_pre, torch.tensor(parents), WIDTHS, BUDGETS)
    assert torch.equal(got, slow_activations(hidden_pre, parents))


def test_a_child_never_fires_without_its_parent():
    sae = make()
    parents = sae.forest.parents
    fires = sae.encode(torch.randn(500, 6)) > 0
    children = (parents != ROOT).nonzero().flatten()
    assert fires[:, children].any()
    assert fires[:, parents[children]][fires[:, children]].all()


@pytest.mark.parametrize("rescale", [False, True])
def test_the_loss_is_the_sum_over_cumulative_levels(rescale):
    sae, x = make(rescale_acts_by_decoder_norm=rescale), torch.randn(30, 6)
    norms = sae.W_dec.norm(dim=1) if rescale else torch.ones(12)
    acts = slow_activations(
        ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms, sae.forest.parents.tolist()
    )
    expected = 0.0
    for end in (3, 7, 12):
        out = (acts[:, :end] / norms[:end]) @ sae.W_dec[:end] + sae.b_dec
        expected += (out - x).square().sum(1).mean()
    torch.testing.assert_close(step(sae, x).loss, expected)


def test_the_auxiliary_loss_revives_the_first_level_only():
    sae, x = make(aux_loss_coefficient=1.0), torch.randn(30, 6)
    plain = step(sae, x).loss
    dead = torch.zeros(12, dtype=torch.bool)
    dead[5] = True
    torch.testing.assert_close(step(sae, x, dead).loss, plain)
    dead[1] = True
    output = step(sae, x, dead)
    first = output.feature_acts[:, :3] @ sae.W_dec[:3] + sae.b_dec
    revived = output.hidden_pre[:, 1:2] * sae.W_dec[1]
    aux = (revived - (x - first)).square().sum(1).mean() / 3  # one dead latent of d/2 = 3
    torch.testing.assert_close(output.loss, plain + aux)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 10).map(lambda c: round(c, 2)), min_size=1, max_size=4),
    st.integers(0, 6),
)
def test_quotas_are_the_fairest_of_all(capacity, n):
    quotas = fair_quotas(capacity, n)
    able = [c for c in capacity if c > 0]
    if not able:
        assert sum(quotas) == 0
        return
    assert sum(quotas) == n
    assert all(q == 0 for q, c in zip(quotas, capacity) if c == 0)

    def worst(allocation):
        return min((c / q for c, q in zip(capacity, allocation) if q), default=float("inf"))

    possible = (
        allocation
        for allocation in itertools.product(range(n + 1), repeat=len(capacity))
        if sum(allocation) == n and all(c > 0 or not q for c, q in zip(capacity, allocation))
    )
    assert worst(quotas) == pytest.approx(max(map(worst, possible)))


def test_capacity_is_the_loss_shared_by_parents_that_fired():
    growth = TreeGrowth([2, 2, 2], 5, torch.device("cpu"))
    fired = torch.tensor([True, False, True, True, False, False])
    growth.observe(fired, torch.tensor(6.0))
    assert growth.capacity[1].tolist() == [3, 0, 0, 0, 0, 0, 3]  # latent 0 and the root
    assert growth.capacity[2].tolist() == [1.5, 0, 1.5, 1.5, 0, 0, 1.5]
    assert growth.idle_steps.tolist() == [0, 1, 0, 0, 1, 1]


def test_only_dead_children_move_and_only_to_parents_below_their_quota():
    growth = TreeGrowth([3, 6], 5, torch.device("cpu"))
    growth.capacity[1] = torch.tensor([4.0, 2.0, 9.0, 0, 0, 0, 0, 0, 0, 0])
    growth.idle_steps[2] = 50  # not eligible
    parents = torch.tensor([ROOT] * 3 + [1, 1, 1, 1, 2, ROOT])
    dead = torch.tensor([False] * 3 + [True, False, True, True, True, False])
    moved = growth.reallocate(parents, dead, eligible_within=10)
    # quotas: 4 children for latent 0, 2 for latent 1
    assert moved.tolist() == [ROOT] * 3 + [0, 1, 0, 1, 0, ROOT]


def test_dead_children_go_to_the_root_once_and_the_forest_then_rests():
    sae = make(root_reset_step=1, reallocate_every=1)
    x, dead = torch.randn(30, 6), torch.arange(12) >= 9
    step(sae, x)
    step(sae, x, dead)
    assert (sae.forest.parents[9:] == ROOT).all()
    rested = sae.forest.parents.clone()
    for _ in range(3):
        step(sae, x, torch.ones(12, dtype=torch.bool))
    assert torch.equal(sae.forest.parents, rested)


def test_the_schedule_grows_to_its_limit():
    growth = TreeGrowth([2, 2], 3000, torch.device("cpu"))
    intervals = []
    for _ in range(3):
        growth.schedule(2.0, 10_000)
        intervals.append(int(growth.interval))
    assert intervals == [6000, 10_000, 10_000]


def test_the_forest_is_in_the_saved_config_and_survives_bfloat16(tmp_path):
    sae = make(dtype="bfloat16")
    sae.save_inference_model(tmp_path / "inference")
    sae.save_model(tmp_path / "training")
    parents = sae.forest.parents.tolist()
    cfg = json.loads((tmp_path / "inference" / "cfg.json").read_text())
    assert (cfg["parents"], cfg["level_widths"], cfg["level_k"]) == (parents, WIDTHS, BUDGETS)
    loaded = SAE.load_from_disk(tmp_path / "inference")
    assert loaded.forest.parents.tolist() == parents
    assert loaded.forest.parents.dtype == torch.int64
    assert TreeTrainingSAE.load_from_disk(tmp_path / "training").forest.parents.tolist() == parents


def test_default_levels_are_the_papers():
    cfg = TreeTrainingSAEConfig(d_in=768, d_sae=24576, k=32)
    assert cfg.widths == [1536, 3072, 9216, 10752]
    assert cfg.budgets == [8, 8, 8, 8]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"level_widths": [3, 4]}, r"given \[3, 4\]; allowed: .* the sum d_sae=12"),
        (
            {"level_k": [2, 2]},
            r"level_k: not one for each level.*given \[2, 2\]; allowed: 3 integers",
        ),
        (
            {"level_k": [4, 2, 2]},
            r"level_k: .*given \[4, 2, 2\]; allowed: .*between 1 and the width of its level",
        ),
        (
            {"level_k": [], "k": 2},
            "k: out of range; given 2; allowed: at least the number of levels, 3; or fewer level_widths",
        ),
        (
            {"level_k": [], "k": 12},
            r"k: gives the levels of tree \[4, 4, 4\] active latents; given 12; allowed: .*its level \[3, 4, 5\]",
        ),
    ],
)
def test_wrong_levels_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        make(**overrides)


@pytest.mark.parametrize(
    ("latent", "parent", "allowed"),
    [
        (1, 0, "latent 1, of level 0; given 0; allowed: -1"),
        (5, 3, "latent 5, of level 1; given 3; allowed: 0 to 2, or -1"),  # the first of its own
        (5, 4, "latent 5, of level 1; given 4; allowed: 0 to 2, or -1"),
        (8, 9, "latent 8, of level 2; given 9; allowed: 0 to 6, or -1"),
    ],
)
def test_a_parent_is_of_an_earlier_level(latent, parent, allowed):
    parents = [ROOT] * 12
    parents[latent] = parent
    with pytest.raises(ConfigError, match=f"parents: not possible for {allowed}"):
        make(parents=parents)
    with pytest.raises(ConfigError, match=f"parents: not possible for {allowed}"):
        TreeSAEConfig(d_in=6, d_sae=12, level_widths=WIDTHS, level_k=BUDGETS, parents=parents)
    parents[latent] = ROOT
    assert make(parents=[*parents[:-1], 0]).forest.parents[-1] == 0  # two levels above


def test_a_parent_must_come_before_its_child():
    with pytest.raises(ConfigError, match="an earlier one, or -1"):
        Forest([-1, 2, 0], 3, torch.device("cpu"))
