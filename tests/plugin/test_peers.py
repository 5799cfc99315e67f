"""Which SAEs one is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from taxolens.plugin.evaluation.peers import MAX_PEERS, find_peers
from taxolens.plugin.evaluation.sae_folders import SAEFolder


def sae(run: str, layer: int, **changes: Any) -> SAEFolder:
    """A saved SAE after a block of a model."""
    facts = {"architecture": "topk", "d_sae": 64, "model_name": "a/model", **changes}
    hook = facts.pop("hook_name", f"blocks.{layer}.hook_resid_post")
    metadata = {"hook_name": hook, "model_name": facts.pop("model_name"), "tokens": "class"}
    metadata |= {name: facts.pop(name, None) for name in ("constraint", "training_architecture")}
    name = facts.pop("name", hook)
    return SAEFolder(f"{run}/{name}", run, name, Path(), {**facts, "metadata": metadata}, {})


def found(one: SAEFolder, *others: SAEFolder) -> dict[str, str]:
    return {peer.id: relation for peer, relation in find_peers(one, [one, *others])}


def test_alone() -> None:
    assert found(sae("a", 3)) == {}


def test_seeds_come_before_everything_else() -> None:
    one, seed = sae("a", 3), sae("b", 3)
    others = [sae("a", 2), sae("b", 2), sae("c", 3, architecture="standard"), sae("d", 3, d_sae=8)]
    assert found(one, *others, seed) == {seed.id: "seed"}
    assert found(one, *others) == {others[2].id: "hook", others[3].id: "hook"}


def test_an_architecture_saved_as_another_is_no_seed_of_it() -> None:
    """`nested_topk` is saved as `topk`: two of them are seeds of each other, `topk` is another kind."""
    one, other = (sae(run, 3, training_architecture="nested_topk") for run in "ab")
    plain = sae("c", 3, training_architecture="topk")
    assert found(one, plain, other) == {other.id: "seed"}
    assert found(one, plain) == {plain.id: "hook"}
    assert found(plain, sae("d", 3)) == {"d/blocks.3.hook_resid_post": "seed"}, (
        "older: not recorded"
    )


def test_two_kinds_of_one_run_at_one_hook_point() -> None:
    relu = sae("a", 3, name="relu", architecture="standard")
    assert found(sae("a", 3, name="topk"), relu, sae("a", 2)) == {relu.id: "hook"}


@pytest.mark.parametrize(("layer", "expected"), [(0, [3]), (3, [0, 9]), (9, [3, 10]), (10, [9])])
def test_one_run_compares_neighbours_in_natural_order(layer: int, expected: list[int]) -> None:
    run = {i: sae("a", i) for i in (0, 3, 9, 10)}
    elsewhere = [sae("a", i, hook_name=f"blocks.{i}.hook_mlp_out") for i in (2, 4)]
    others = [v for i, v in run.items() if i != layer]
    assert found(run[layer], *others, *elsewhere) == {run[i].id: "layer" for i in expected}


def test_a_control_is_no_peer_of_its_sae() -> None:
    run = [
        sae("a", layer, name=f"{layer}.{constraint}", constraint=constraint)
        for layer in (3, 4)
        for constraint in (None, "frozen_decoder", "frozen_encoder")
    ]
    assert found(run[0], *run[1:]) == {run[3].id: "layer"}
    assert found(run[1], *run) == {run[4].id: "layer"}


def test_layers_may_lie_in_runs_of_their_own() -> None:
    other = sae("b", 5)
    assert found(sae("a", 4), other) == {other.id: "layer"}


def test_other_models_are_last() -> None:
    far, same_name = sae("b", 7, model_name="b/model"), sae("b", 3, model_name="b/model")
    assert list(found(sae("a", 3), far, same_name).items()) == [
        (same_name.id, "model"),
        (far.id, "model"),
    ]


def test_they_are_few() -> None:
    seeds = [sae(f"seed{i}", 3) for i in range(9)]
    assert len(find_peers(seeds[0], seeds)) == MAX_PEERS
