"""`meta_sae` on decoders that share directions, and on random ones; its groups against loops."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.meta_sae import (
    BATCH,
    MetaLatents,
    MetaSAE,
    MetaSAEOptions,
    decompose,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.taxonomies import Taxonomy

Measured = Callable[..., Any]
QUICK = {"steps": 150, "lr": 5e-3}


def species(
    taxonomy: Taxonomy, one_batch: Measured, copies: int = 4
) -> tuple[Any, np.ndarray, torch.Tensor]:
    """Latents of the classes, several of each, and a decoder: family + genus + own direction."""
    labels = np.repeat(np.arange(12), 20)
    node = np.repeat(taxonomy.class_nodes, copies)
    z = np.repeat(np.eye(12, dtype=np.float32), copies, axis=1)[labels]
    directions = torch.randn(
        len(taxonomy.nodes) + len(node), 100, generator=torch.Generator().manual_seed(0)
    )
    above = torch.zeros(len(node), len(directions))
    for row, (j, v) in zip(above, enumerate(node)):
        row[[*taxonomy.path_to_root(v)[1:-1], len(taxonomy.nodes) + j]] = 1
    return one_batch(z, labels), node, above @ directions


def test_shared_directions_are_explained_and_random_ones_less() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(12, 64, generator=generator)
    pairs = torch.tensor([(a, b) for a in range(12) for b in range(a)])
    rows = torch.nn.functional.normalize(atoms[pairs].sum(1), dim=1)
    noise = torch.nn.functional.normalize(torch.randn(66, 64, generator=generator), dim=1)
    options = MetaSAEOptions(k=2, **QUICK)
    shared, random = (decompose(x, options, 0).explained for x in (rows, noise))
    assert shared > 0.8 and random < 0.6


def test_the_random_state_is_kept_and_equal_seeds_agree() -> None:
    rows = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
    state = torch.get_rng_state()
    runs = [decompose(rows, MetaSAEOptions(steps=20), seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].explained == runs[1].explained != runs[2].explained
    with torch.no_grad():
        assert decompose(rows, MetaSAEOptions(steps=20), 0).explained == runs[0].explained


def test_explained_variance_is_that_of_the_reconstruction() -> None:
    """One meta-latent for each row: nothing is left to explain."""
    rows = torch.eye(8).repeat(4, 1)
    found = decompose(rows, MetaSAEOptions(width=1.0, k=4, steps=600, lr=5e-3), 0)
    assert found.explained > 0.95 and found.acts.shape == (32, 32)
    assert (found.acts > 0).sum() <= 32 * 4


def test_of_rows_that_hardly_differ_one_step_explains_nothing() -> None:
    rows = 1 + 1e-3 * torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    assert decompose(rows, MetaSAEOptions(steps=1, k=1), 0).explained < -100


def test_meta_latents_of_a_planted_tree_group_branches(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    batch, node, decoder = species(animals, one_batch)
    options = {"k": 2, **QUICK}
    (evaluator,) = measured(animals, batch, [MetaSAE], W_dec=decoder, options=options)
    numbers = evaluator.compute()
    assert set(numbers) == set(MetaSAE.higher_is_better) and evaluator.notes() == []
    assert numbers["n_latents"] == 48 and 0 < numbers["n_meta_latents"] <= 12
    assert 0 < numbers["mean_l0"] <= 2
    assert evaluator._nodes.of(evaluator.latents)[0].tolist() == node.tolist()
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(20)]
    for name in ("common_depth", "one_branch_share"):
        assert numbers[name] > max(p[name] for p in permuted), name
    assert {p["explained_variance"] for p in permuted} == {numbers["explained_variance"]}
    table = evaluator.tables()["meta_latents"]
    assert table["n_latents"].sum() == (evaluator.meta.acts > 0).sum()
    assert len(evaluator.figures()["common_depth"].data) == 2


def test_groups_against_loops(
    animals: Taxonomy, one_batch: Measured, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, node, decoder = species(animals, one_batch)
    (evaluator,) = measured(animals, batch, [MetaSAE], W_dec=decoder, options={"steps": 1})
    acts = np.random.default_rng(0).random((48, 9)) * (
        np.random.default_rng(1).random((48, 9)) < 0.1
    )
    acts[:, 0] = 0
    acts[:, 1] = np.arange(48) < 4  # of one node
    acts[:, 2] = node == animals.children[animals.index("bird_0")][0]
    acts[:, 3] = np.isin(node, animals.children[animals.index("bird_0")])
    monkeypatch.setattr(MetaSAE, "meta", MetaLatents(0.0, acts))
    permutation = animals.permutation(1)
    for place in (None, permutation):
        depth, one_branch = evaluator.groups(place)
        own = animals.class_nodes[np.repeat(np.arange(12) if place is None else place, 4)]
        for w in range(9):
            rows = np.flatnonzero(acts[:, w])
            depths = [
                animals.depth[animals.lch([list(animals.class_nodes).index(own[i]) for i in pair])]
                for pair in [(i, j) for i in rows for j in rows if own[i] != own[j]]
            ]
            assert depth[w] == pytest.approx(np.mean(depths) if depths else np.nan, nan_ok=True)
            branches = {animals.path_to_root(own[i])[-2] for i in rows}
            expected = float(len(branches) == 1) if depths else np.nan
            assert one_branch[w] == pytest.approx(expected, nan_ok=True)
    assert np.isnan(evaluator.groups()[0][:3]).all() and evaluator.groups()[0][3] == 2


def test_a_random_decoder_stays_inside_its_null(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    batch, _, _ = species(animals, one_batch)
    decoder = torch.randn(48, 100, generator=torch.Generator().manual_seed(1))
    (evaluator,) = measured(animals, batch, [MetaSAE], W_dec=decoder, options=QUICK)
    value = evaluator.compute()
    permuted = [evaluator.compute(permutation=animals.permutation(s)) for s in range(60)]
    for name in ("common_depth", "one_branch_share"):
        assert value[name] <= np.quantile([p[name] for p in permuted], 0.98), name


def test_silent_latents_and_empty_rows_are_left_out(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    batch, _, decoder = species(animals, one_batch)
    batch.z[:, :8] = 0
    decoder[10] = 0
    (evaluator,) = measured(animals, batch, [MetaSAE], W_dec=decoder, options={"steps": 1})
    assert evaluator.latents.tolist() == [8, 9, *range(11, 48)]


def test_without_a_decoder_or_with_few_rows_it_is_undefined(
    animals: Taxonomy, one_batch: Measured, measured: Measured
) -> None:
    latents = PlantedLatents(animals)
    labels = np.repeat(np.arange(12), 20)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    batch = one_batch(z[:, :12], labels)
    for decoder, rows, note in (
        (None, 0, "There is no decoder"),
        (torch.randn(12, 6), 12, "Only 12 latents fire on 1 images of the fit half; .* needs 16"),
    ):
        (evaluator,) = measured(animals, batch, [MetaSAE], W_dec=decoder)
        assert re.match(note, evaluator.notes()[0])
        numbers = evaluator.compute()
        assert numbers.pop("n_latents") == rows
        assert np.isnan([*numbers.values()]).all() and evaluator.tables() == {}


def test_the_defaults_are_those_of_saebench() -> None:
    """A quarter as many latents as rows, k = 4, 1,500 steps of 1,024 rows, learning rate 5e-4."""
    options = MetaSAE.Options()
    assert (options.width, options.k, options.steps, options.lr) == (0.25, 4, 1500, 5e-4)
    assert BATCH == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0.0}, r"width: out of range; given 0.0; allowed: a number in \(0, 1\]"),
        ({"lr": 0.0}, "lr: out of range; given 0.0; allowed: above 0"),
        ({"steps": 0}, "steps: out of range; given 0; allowed: 1 or more"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MetaSAE.Options(**options)
