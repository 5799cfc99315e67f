"""`supervised_dictionary`: its parts against plain computation, and a model that is a linear map."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.base import InterventionResult
from taxolens.registry.evaluators.supervised_dictionary import (
    SupervisedDictionary,
    answers,
    differs,
    divergence,
    greedy_swap,
    held_out_f1,
    partners,
    run,
    tokens,
)

Measured = Callable[..., Any]
SEEDS = st.integers(0, 10**6)


def rebuilding(encode: Measured, decode: Measured) -> Measured:
    """`reconstruct` of an SAE with these two halves."""
    return lambda x: ((z := encode(x)), decode(z))


# The parts ---------------------------------------------------------------------------------------


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_one_swap_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, target, change, rows = (
        torch.from_numpy(rng.normal(size=size)) for size in ((3, 4), (3, 4), (3, 6), (6, 4))
    )
    found = greedy_swap(x, target, change, rows, 1)
    for i in range(3):
        tried = [x[i], *(x[i] + change[i, j] * rows[j] for j in range(6))]
        nearest = min(float((target[i] - t).norm()) for t in tried)
        assert float((target[i] - found[i]).norm()) == pytest.approx(nearest)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_more_swaps_never_lead_away_and_none_is_taken_twice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, target, change, rows = (
        torch.from_numpy(rng.normal(size=size)) for size in ((2, 5), (2, 5), (2, 4), (4, 5))
    )
    distance = [
        (target - greedy_swap(x, target, change, rows, k)).norm(dim=1) for k in (0, 1, 2, 4, 9)
    ]
    assert all((b <= a + 1e-9).all() for a, b in itertools.pairwise(distance))
    moved = greedy_swap(x, target, change, rows, 9) - x
    taken = torch.linalg.lstsq(rows.T, moved.T).solution.T  # 4 rows in 5 dimensions: independent
    part = taken / change
    assert (torch.minimum(part.abs(), (part - 1).abs()) < 1e-6).all()


def test_orthogonal_latents_swap_all_of_the_difference() -> None:
    z, other = torch.rand(2, 3, 4, dtype=torch.float64)
    rows = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(greedy_swap(z @ rows, other @ rows, other - z, rows, 4), other @ rows)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_held_out_f1_tries_every_threshold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, held = rng.integers(0, 5, size=(2, 12, 2)).astype(float)
    truth, held_truth = rng.random((2, 12, 2)) < 0.5
    found = held_out_f1(scores, truth, held, held_truth)

    def f1(says: np.ndarray, true: np.ndarray) -> float:
        whole = says.sum() + true.sum()
        return 2 * (says & true).sum() / whole if whole else math.nan

    for v in range(2):
        if not truth[:, v].any():
            assert math.isnan(found[v])
            continue
        on_fit = {t: f1(scores[:, v] > t, truth[:, v]) for t in np.arange(-0.5, 4.5)}
        best = [t for t, value in on_fit.items() if value == max(on_fit.values())]
        allowed = [f1(held[:, v] > t, held_truth[:, v]) for t in best]
        assert any(found[v] == pytest.approx(value, nan_ok=True) for value in allowed)


def test_a_score_at_the_threshold_is_not_above_it() -> None:
    """Half-way between 3 and 1; a column that is not finite throughout has no value."""
    scores = np.array([[3.0, 3.0], [1.0, np.nan]])
    truth, held = np.array([[True, True], [False, False]]), np.array([[2.0, 2.0], [3.0, 3.0]])
    found = held_out_f1(scores, truth, held, np.ones((2, 2), dtype=bool))
    assert found == pytest.approx([2 / 3, np.nan], nan_ok=True)


def test_tokens_are_split_into_parts_of_256() -> None:
    x = torch.arange(2 * 300).reshape(2, 300, 1)
    parts = tokens(x)
    assert [len(part) for part in parts] == [256, 256, 88]
    assert torch.cat(parts).flatten().tolist() == list(range(600))


def test_partners_are_of_other_classes() -> None:
    partner, paired = partners(np.array([3, 3, 5, 3]))
    assert partner.tolist() == [2, 2, 3, 2] and paired.all()
    assert not partners(np.array([1, 1]))[1].any()
    assert partners(np.zeros(0, dtype=int))[0].shape == (0,)


def result(embedding: Any, logits: Any = None) -> InterventionResult:
    logits = None if logits is None else torch.tensor(logits)
    return InterventionResult(logits, torch.tensor(embedding))


def test_what_differs_and_what_answers_as_wanted() -> None:
    up, near, right = [[0.0, 1.0]], [[0.1, 1.0]], [[1.0, 0.0]]
    assert not differs(result(up), result(up))[0] and differs(result(up), result(near))[0]
    assert answers(result(right), result(up), result(right))[0]
    assert not answers(result(near), result(up), result(right))[0]
    assert not answers(result([[1.0, 1.0]]), result(up), result(right))[0]  # as near to either
    first, second = [[2.0, 1.0]], [[1.0, 2.0]]
    assert differs(result(up, first), result(up, second))[0]
    assert not differs(result(up, first), result(right, [[9.0, 0.0]]))[0]
    assert differs(result(up, first), result(right))[0]  # logits of one of them are of no use
    assert answers(result(up, second), result(up, first), result(right, second))[0]
    assert not answers(result(up, first), result(up, second), result(up, second))[0]


def test_divergence_of_logits_or_else_of_embeddings() -> None:
    up, right = [[0.0, 1.0]], [[3.0, 0.0]]
    assert divergence(result(up), result(right)) == pytest.approx([1.0])
    assert divergence(result(up, [[0.0, 0.0]]), result(up)) == pytest.approx([0.0])
    found = divergence(result(up, [[0.0, 0.0]]), result(right, [[0.0, np.log(3.0)]]))
    assert found == pytest.approx([np.log(0.5 / 0.25) / 2 + np.log(0.5 / 0.75) / 2])


def test_partners_are_the_next_of_another_class() -> None:
    partner, paired = partners(np.array([0, 0, 1, 1, 0]))
    assert partner.tolist() == [2, 2, 4, 4, 2] and paired.all()
    partner, paired = partners(np.array([3, 3]))
    assert not paired.any() and len(partners(np.zeros(0, dtype=int))[0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_put_in_has_the_type_and_the_order_of_what_was_there(dtype: Any) -> None:
    x = torch.arange(12.0).reshape(6, 1, 2)
    wanted = -torch.arange(12.0).reshape(6, 1, 2)
    edited: list[torch.Tensor] = []

    def intervene(index: torch.Tensor, edit: Any) -> InterventionResult:
        for part in index.split(4):  # a model runs a few images at a time
            edited.append(edit(x[part].to(dtype)))
        return InterventionResult(None, torch.zeros(len(index), 1))

    seen, _ = run(intervene, np.array([5, 0, 1, 2, 3]), wanted[:5])
    assert torch.equal(seen, x[[5, 0, 1, 2, 3]]) and seen.dtype == torch.float32
    assert {part.dtype for part in edited} == {dtype}
    assert torch.equal(torch.cat(edited).float(), wanted[:5])
    edited.clear()
    run(intervene, np.array([5, 0]))
    assert torch.equal(edited[0].float(), x[[5, 0]])


# Planted truth -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(animals: Any) -> dict[str, Any]:
    """Every class has a mean made of directions of its nodes; images scatter little about it."""
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(12), 20)
    nodes = animals.distinct_nodes[animals.distinct_nodes != 0]
    members = torch.from_numpy(animals.membership[:, nodes].astype(np.float32))
    directions = torch.linalg.qr(torch.randn(24, len(nodes), generator=generator)).Q.T
    codes = members[labels] * (2 + 0.1 * torch.rand(len(labels), 1, generator=generator))
    noise = 0.05 * torch.randn(len(labels), 24, generator=generator)
    basis = torch.linalg.svd(directions).Vh
    offset = 3 * basis[-1]  # at right angles to all that the head reads
    x = offset + codes @ directions + noise
    head = torch.linalg.pinv(members @ directions)  # class logits are largest for the own class
    return {
        "labels": labels,
        "x": x,
        "codes": codes,
        "directions": directions,
        "offset": offset,
        "head": 20 * head,
        "nodes": nodes,
    }


@pytest.fixture
def spliced(
    world: dict[str, Any], animals: Any, one_batch: Measured, measured: Measured, toy_model: Any
) -> Any:
    """The evaluator of an SAE with one latent per node, or of another."""

    with_head = toy_model(world["x"][:, None], torch.eye(24), world["head"], np.arange(12))

    def call(*, z: Any = None, model: Any = None, options: Any = None, **facts: Any) -> Any:
        D, offset = world["directions"], world["offset"]
        given = {
            "W_dec": D,
            "reconstruct": rebuilding(
                lambda x: ((x - offset) @ D.T - 0.5).relu() * 4 / 3, lambda z: z @ D + offset
            ),
            "intervene": with_head if model is None else model,
            **facts,
        }
        z = world["codes"] if z is None else z
        batch = one_batch(z, world["labels"], x=world["x"])
        (evaluator,) = measured(animals, batch, [SupervisedDictionary], options=options, **given)
        return evaluator

    return call


def test_latents_that_are_the_nodes_are_ideal(spliced: Any, world: Any) -> None:
    numbers = spliced().compute()
    for metric in ("sufficiency", "necessity", "control", "interpretability", "detected_share"):
        assert numbers[metric] > 0.9, metric
        if metric != "detected_share":
            assert numbers[f"supervised_{metric}"] > 0.95, metric
    assert numbers["occluded"] == numbers["over_split"] == 0
    # For the root's two children, always predicting "yes" has F1 2/3: they are left out.
    assert numbers["supervised_nodes"] == len(world["nodes"]) - 2
    assert numbers["n_nodes"] == numbers["supervised_nodes"]
    assert numbers["latents"] == len(world["nodes"]) and numbers["spliced_images"] == 64


def test_the_root_is_no_node_to_be_found(spliced: Any, world: Any, animals: Any) -> None:
    everywhere = torch.ones(len(world["labels"]), 1)
    evaluator = spliced(z=torch.cat([world["codes"], everywhere], dim=1))
    found = evaluator.found()
    assert animals.root not in evaluator.nodes and len(evaluator.nodes) == len(world["nodes"])
    # Of the groups that are asked for a genus is the largest: 2 of 12 classes.
    assert animals.height[evaluator.nodes[found.node[-1]]] == 1
    assert found.f1[-1] == pytest.approx(2 / 7)
    _, points = evaluator.figures()["nodes"].data
    assert len(points.x) == len(world["nodes"])


def test_an_sae_that_gives_the_mean_is_worth_nothing(spliced: Any, world: Any) -> None:
    mean = world["x"].mean(0)
    numbers = spliced(
        reconstruct=rebuilding(lambda x: torch.zeros(len(x), 20), lambda z: mean.expand(len(z), -1))
    ).compute()
    assert numbers["sufficiency"] == pytest.approx(0, abs=0.1)
    assert numbers["necessity"] == pytest.approx(0, abs=0.1)
    assert numbers["control"] == 0 and 0 < numbers["n_pairs"] <= 64
    assert numbers["supervised_sufficiency"] > 0.97


def test_a_lossless_dictionary_without_sparse_control(spliced: Any, world: Any) -> None:
    """The neurons rebuild x, but four of them do not carry a class."""
    axes = torch.cat([torch.eye(24), -torch.eye(24)])
    mean = world["x"].mean(0)
    encode = lambda x: torch.cat([x - mean, mean - x], dim=1).relu()  # noqa: E731
    z = encode(world["x"])
    neurons = {"reconstruct": rebuilding(encode, lambda z: z @ axes + mean), "W_dec": axes}
    numbers = spliced(z=z, **neurons, source="neurons").compute()
    assert numbers["sufficiency"] == pytest.approx(1) == numbers["necessity"]
    assert numbers["control"] < 0.9
    assert spliced(z=z, **neurons, options={"swaps": 48}).compute()["control"] == 1
    supervised = {k for k in numbers if k.startswith("supervised_")}
    assert all(math.isnan(numbers[k]) for k in supervised)


def test_without_a_head_the_embedding_judges(spliced: Any, world: Any, toy_model: Any) -> None:
    model = toy_model(world["x"][:, None], torch.eye(24))
    evaluator = spliced(model=model)
    numbers = evaluator.compute()
    for metric in ("sufficiency", "necessity", "control"):
        assert numbers[metric] > 0.9, metric
    assert "no classification head" in evaluator.notes()[0]


def test_without_a_model_the_rest_is_there_and_the_reason_too(spliced: Any) -> None:
    with_model = spliced().compute()
    for changes, reason in (
        ({"intervene": None}, "no model is available"),
        ({"intervene": None, "no_intervention": "it is too large"}, "it is too large"),
        ({"reconstruct": None}, r"latents (sae) cannot be decoded"),
    ):
        evaluator = spliced(**changes)
        numbers = evaluator.compute()
        for metric in ("sufficiency", "necessity", "control", "supervised_control"):
            assert math.isnan(numbers[metric])
        assert numbers["supervised_interpretability"] == with_model["supervised_interpretability"]
        assert numbers["detected_share"] == 1
        assert reason in evaluator.notes()[0]
        assert "control" not in evaluator.tables()


def test_images_through_the_model_are_bounded(spliced: Any, world: Any, toy_model: Any) -> None:
    model = toy_model(world["x"][:, None], torch.eye(24))
    evaluator = spliced(model=model, options={"spliced_images": 10})
    numbers = evaluator.compute()
    evaluator.compute(permutation=np.random.default_rng(0).permutation(12))
    evaluator.compute(shuffled=True)
    evaluator.tables()
    assert numbers["spliced_images"] == 10 and model.images == 9 * 10
    spliced(model=model, source="random", options={"spliced_images": 10}).compute()
    assert model.images == 15 * 10


def test_every_token_is_replaced(spliced: Any, world: Any, toy_model: Any) -> None:
    offsets = torch.randn(1, 3, 24, generator=torch.Generator().manual_seed(1))
    offsets -= offsets.mean(1, keepdim=True)
    model = toy_model(world["x"][:, None] + 0.1 * offsets, torch.eye(24))
    assert spliced(model=model).compute()["sufficiency"] > 0.9


def test_a_missing_parent_is_occluded(spliced: Any, world: Any, animals: Any) -> None:
    genera = [i for i, v in enumerate(world["nodes"]) if animals.height[v] == 1]
    z = world["codes"].clone()
    z[:, genera[:2]] = 0
    strict = {"detected": 0.8}  # a species is a detector of its genus with F1 2/3
    evaluator = spliced(z=z, options=strict)
    numbers = evaluator.compute()
    assert (numbers["occluded"], numbers["occluded_share"]) == (2, 1)
    assert numbers["detected_share"] == pytest.approx(1 - 2 / numbers["supervised_nodes"])
    table = evaluator.tables()["nodes"].set_index("node")
    assert table.index[table["occluded"]].tolist() == [
        animals.nodes[world["nodes"][g]] for g in genera[:2]
    ]
    # A missing species has the longer vector: it is missed, not occluded.
    leaf = next(i for i, v in enumerate(world["nodes"]) if animals.height[v] == 0)
    z = world["codes"].clone()
    z[:, leaf] = 0
    numbers = spliced(z=z, options=strict).compute()
    assert (numbers["occluded"], numbers["occluded_share"]) == (0, 0)


def test_ten_latents_of_one_node_are_over_splitting(spliced: Any, world: Any) -> None:
    for copies, expected in ((8, 0), (9, 1)):
        z = torch.cat([world["codes"], world["codes"][:, -1:].repeat(1, copies)], dim=1)
        evaluator = spliced(z=z)
        assert evaluator.compute()["over_split"] == expected
        assert evaluator.tables()["nodes"]["latents"].max() == copies + 1


def test_permuted_classes_and_shuffled_labels_lose_the_tree(spliced: Any, animals: Any) -> None:
    evaluator = spliced()
    value = evaluator.compute()
    permuted = [evaluator.compute(permutation=animals.permutation(i)) for i in range(5)]
    assert max(n["interpretability"] for n in permuted) < value["interpretability"] - 0.05
    # Unions of any classes that lie apart have vectors that detect them.
    assert permuted[0]["supervised_interpretability"] > 0.9
    shuffled = evaluator.compute(shuffled=True)
    assert shuffled["interpretability"] < 0.5 and math.isnan(shuffled["sufficiency"])


def test_a_sample_counts_as_the_images_that_it_stands_for(
    animals: Any, one_batch: Measured, measured: Measured
) -> None:
    """Images of a class are alike here, so any sample of them tells what all of them do; nodes overlap
    in three dimensions, so that F1 depends on how frequent they are."""
    labels = np.repeat(np.arange(12), np.where(np.arange(12) % 4 < 2, 200, 10))
    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)[labels]
    z = np.eye(12, dtype=np.float32)[labels]
    sample, whole = (
        measured(
            animals, one_batch(z, labels, x=x), [SupervisedDictionary], options={"max_images": most}
        )[0]
        for most in (240, 10**6)
    )
    assert len(sample._sample.drawn().index) < 300 and len(whole._sample.drawn().index) == 1260
    assert (whole._weights(False) == 1).all()
    permutation = whole.context.permutations[0]
    for place in (None, permutation):
        some, every = sample.found(place).supervised, whole.found(place).supervised
        for name, values in every._asdict().items():
            assert getattr(some, name) == pytest.approx(values, abs=1e-9, nan_ok=True), name
        assert np.nanmin(every.f1) < 0.9
    fit = np.arange(len(labels)) % 2 == 0  # an even number of images of each class
    assert every.mean == pytest.approx(x[fit].mean(0, dtype=np.float64), abs=1e-9)


def test_options_are_checked() -> None:
    for field in ("max_images", "spliced_images", "swaps"):
        with pytest.raises(
            ConfigError, match=f"{field}: out of range; given 0; allowed: 1 or more"
        ):
            SupervisedDictionary.Options(**{field: 0})
    with pytest.raises(ConfigError, match="detected: out of range; given 0; allowed: a number in"):
        SupervisedDictionary.Options(detected=0)
