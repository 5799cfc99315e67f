"""Measuring one SAE: halves, sources of latents, nulls, and evaluators that fail."""

from __future__ import annotations

import gc
import math
import re
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from results_factory import tree
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from taxolens.plugin.evaluation import bench as bench_module
from taxolens.plugin.evaluation import kept_latents
from taxolens.plugin.evaluation import latent_cards as cards
from taxolens.plugin.evaluation.bench import Bench, HeldOutActivations, SAELatents, image_latents
from taxolens.plugin.evaluation.evaluate import choose_evaluators
from taxolens.plugin.evaluation.kept_latents import KeptLatents
from taxolens.plugin.evaluation.measure_sae import share_card_facts
from taxolens.plugin.evaluation.settings import EvaluationSettings
from taxolens.plugin.evaluation.split import Split
from taxolens.plugin.evaluation.training_evaluator import TrainingEvaluator
from taxolens.registry.errors import ConfigError, DataError
from taxolens.registry.evaluators.base import EvaluationContext, Evaluator
from taxolens.registry.evaluators.ontological_coverage import OntologicalCoverage
from taxolens.registry.evaluators.pair_depth import PairDepth
from taxolens.registry.evaluators.parts.accumulators import FiringRate, TopImages
from taxolens.registry.evaluators.parts.null_latents import NeuronLatents
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens.registry.presentation import NodeTable
from taxolens.registry.table import EVALUATORS

D, M = 6, 16
TREE = tree((2, 2, 2))
N_CLASSES = len(TREE.classes)


@pytest.fixture
def labels() -> np.ndarray:
    return np.repeat(np.arange(N_CLASSES), 10)


@pytest.fixture
def held_out(labels: np.ndarray) -> HeldOutActivations:
    generator = np.random.default_rng(0)
    tokens = generator.normal(size=(len(labels), 1, D)).astype(np.float32)
    split = Split.halves(labels, N_CLASSES, 1)
    return HeldOutActivations(tokens + 3, split, tokens[:, 0] * 2, tokens[:, 0] + 4)


@pytest.fixture
def sae() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=M, k=4))
        torch.nn.init.normal_(sae.W_enc)
        torch.nn.init.normal_(sae.W_dec)
    return sae.eval()


@dataclass(frozen=True)
class Options:
    fail: str = ""


class Recorder(Evaluator[Options]):
    """Writes down what it is shown, and fails where it is told to."""

    name = "recorder"
    description = "for tests"
    higher_is_better = {"n": None, "mean_z": True, "place": True, "fixed": True}
    nulls = {"permuted_classes": None, "shuffled": None, "random": None, "neurons": "no meaning"}
    invariant = frozenset({"fixed"})
    Options = Options
    made: list[Recorder] = []

    def __init__(self, context: EvaluationContext, options: Any = None) -> None:
        super().__init__(context, options)
        self.rate = context.share(FiringRate)
        self.batches: list[Any] = []
        self.calibrated: list[Any] = []
        self.made.append(self)

    def _maybe_fail(self, when: str) -> None:
        if self.options.fail in (when, f"{when}@{self.context.source}"):
            raise ValueError(f"told to fail in {when}")

    def calibrate(self, batch: Any) -> None:
        self._maybe_fail("calibrate")
        self.calibrated.append(batch)

    def update(self, batch: Any) -> None:
        self._maybe_fail("update")
        self.batches.append(batch)

    def compute(self, *, permutation=None, shuffled=False) -> dict[str, float]:
        self._maybe_fail("compute")
        if shuffled:
            self._maybe_fail("shuffled")
        z = torch.cat([b.z for b in self.batches])
        place = 0 if permutation is None else -int(permutation[0]) - 1
        return {
            "n": float(len(z)),
            "mean_z": float(z.mean()),
            "place": float(place - shuffled),
            "fixed": 1.0,
        }


def bench(fail: str = "", **changes: Any) -> Bench:
    Recorder.made.clear()
    settings: dict[str, Any] = {
        "taxonomy": TREE,
        "chosen": {"recorder": (Recorder, Options(fail)), "pair_depth": (PairDepth, {"k": 2})},
        "settings": EvaluationSettings(n_permutations=19),
        "images_at_once": 7,
    }
    return Bench(**(settings | changes))


# Halves -----------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(3, 6))
def test_groups_left_out_are_a_partition_with_every_class_in_each(labels, groups) -> None:
    split = Split.halves(np.array(labels), 6)
    rest = [split.without(group, groups) for group in range(groups)]
    left_out = [set(split.order) - set(one.order) for one in rest]
    assert sorted(i for one in left_out for i in one) == sorted(split.order)
    for one, out in zip(rest, left_out, strict=True):
        assert set(one.order[: one.n_fit]) <= set(split.order[: split.n_fit])
        assert set(one.order[one.n_fit :]) <= set(split.order[split.n_fit :])
        for half in (split.order[: split.n_fit], split.order[split.n_fit :]):
            for label in range(6):
                members = [i for i in half if labels[i] == label]
                here = sum(i in out for i in members)
                assert len(members) // groups <= here <= -(-len(members) // groups)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 3), st.integers(1, 9))
def test_halves(labels: list[int], seed: int, size: int) -> None:
    split = Split.halves(np.array(labels), 6, seed)
    assert sorted(split.order) == list(range(len(labels)))
    assert abs(split.n_fit - split.n_score) <= 1
    fit, score = split.order[: split.n_fit], split.order[split.n_fit :]
    for c in range(6):
        assert abs((split.labels[fit] == c).sum() - (split.labels[score] == c).sum()) <= 1
    for half in (fit, score):  # a class is as frequent in a half as it truly is
        assert sorted(split.shuffled[half]) == sorted(split.labels[half])
    passed = list(split.batches(size))
    assert np.array_equal(np.concatenate([positions for positions, _ in passed]), split.order)
    halves = [is_fit for positions, is_fit in passed for _ in positions]
    assert halves == [True] * split.n_fit + [False] * split.n_score
    assert np.array_equal(split.order, Split.halves(np.array(labels), 6, seed).order)
    assert set(split.sample(4)) <= set(fit)


def test_halves_mix_classes_and_depend_on_the_seed(labels: np.ndarray) -> None:
    split = Split.halves(labels, N_CLASSES, 0)
    assert len(set(labels[split.order[:10]])) > 3
    assert not np.array_equal(split.order, Split.halves(labels, N_CLASSES, 1).order)


def test_labels_outside_the_taxonomy_are_named() -> None:
    with pytest.raises(
        DataError, match=r"labels: not classes of the taxonomy; given \[-1, 7\]; allowed: 0 … 2"
    ):
        Split.halves(np.array([0, 7, -1]), 3)
    with pytest.raises(DataError, match="no image left"):
        Split.halves(np.array([]), 3)


# Sources ----------------------------------------------------------------------------------------


def test_an_image_s_latents_are_the_largest_of_its_tokens(sae: Any, monkeypatch) -> None:
    x = torch.randn(5, 3, D, generator=torch.Generator().manual_seed(0))
    source = SAELatents(sae)
    nothing = torch.zeros(5, dtype=torch.int64)
    z = sae.encode(x.flatten(0, 1)).unflatten(0, (5, 3))
    for aggregate, expected in (("max", z.amax(1)), ("mean", z.mean(1))):
        for at_once in (2**26, 1):
            monkeypatch.setattr(bench_module, "LATENTS_AT_ONCE", at_once)
            found = image_latents(source, x, aggregate=aggregate, labels=nothing, index=nothing)
            torch.testing.assert_close(found, expected)


def test_of_signed_latents_the_largest_in_size_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a loop over images and latents; of +2 and -2 it is +2."""
    z = torch.randint(-3, 4, (6, 4, 5), generator=torch.Generator().manual_seed(1)).float()
    z[0, :, 0] = torch.tensor([-2.0, 1.0, 2.0, 0.0])

    class Signed:
        d_sae = 5

        def encode(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
            return x

    expected = torch.tensor(
        [[max(z[i, :, j].tolist(), key=lambda v: (abs(v), v)) for j in range(5)] for i in range(6)]
    )
    nothing = torch.zeros(6, dtype=torch.int64)
    for at_once in (2**26, 1):
        monkeypatch.setattr(bench_module, "LATENTS_AT_ONCE", at_once)
        source: Any = Signed()
        found = image_latents(source, z, aggregate="max", labels=nothing, index=nothing)
        assert torch.equal(found, expected)
    assert found[0, 0] == 2 and (found < 0).any() and not torch.equal(found, z.amax(1))


@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("factor", [None, 3.0])
def test_what_is_decoded_is_on_the_scale_of_x(normalise: str, factor: float | None) -> None:
    """A dictionary of all directions and their negatives gives x back, however it is normalised."""
    sae = StandardSAE(StandardSAEConfig(d_in=D, d_sae=2 * D, normalize_activations=normalise))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.zero_(), sae.b_dec.zero_()
    x = 5 + torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    source = SAELatents(sae, None if factor is None else ActivationScaler(scaling_factor=factor))
    with torch.no_grad():
        z, decoded = source.reconstruct(x)
        assert torch.equal(z, source.encode(x))
    torch.testing.assert_close(decoded, x, atol=1e-4, rtol=1e-4)
    if normalise == "none":
        torch.testing.assert_close(z[:, :D], (x * (factor or 1.0)).relu())


def test_tokens_of_one_image_share_its_label() -> None:
    planted = PlantedLatents(TREE, recall=1.0, false_alarm=0.0, binary=True)
    labels = torch.tensor([0, 5])
    x = torch.zeros(2, 3, D)
    z = image_latents(planted, x, aggregate="max", labels=labels, index=torch.arange(2))
    expected = TREE.membership[labels.numpy()][:, planted.node]
    assert np.array_equal(z.bool().numpy(), expected)


def test_null_sources_have_the_shape_and_sparsity_of_the_sae(
    sae: Any, held_out: HeldOutActivations
) -> None:
    found = bench().null_sources(SAELatents(sae), held_out)
    assert list(found) == ["random", "neurons"]
    (random, other, third), (neurons,) = found["random"], found["neurons"]
    assert type(random.sae) is type(other.sae) is type(third.sae) is type(sae)
    assert not torch.equal(random.W_dec, other.W_dec)
    x = torch.from_numpy(held_out.tokens[:, 0])
    nothing = torch.zeros(len(x), dtype=torch.int64)
    z = random.encode(x, labels=nothing, index=nothing)
    assert z.shape[1] == random.d_sae == M
    assert (z > 0).sum(1).float().mean() == pytest.approx(4, abs=1)
    torch.testing.assert_close(random.b_dec, x.mean(0), atol=0.5, rtol=0)
    assert isinstance(neurons, NeuronLatents) and neurons.d_sae == 2 * D


def test_an_sae_without_a_twin_has_the_reason_in_its_place(
    sae: Any, held_out: HeldOutActivations, monkeypatch
) -> None:
    def fit(latents: Any, x: Any, **_: Any) -> Any:
        raise ValueError("no constructor")

    monkeypatch.setattr(bench_module.TwinLatents, "fit", fit)
    tested = bench()
    sources = tested.null_sources(SAELatents(sae), held_out)
    assert sources["random"] == "topk has no untrained twin: ValueError: no constructor"
    done = tested.run(SAELatents(sae), held_out)
    found = tested.metrics(done, {"random": sources["random"], "neurons": []})
    assert found["recorder"]["mean_z"].nulls["random"].reason == sources["random"]


def test_a_null_without_meaning_is_not_computed(sae: Any, held_out: HeldOutActivations) -> None:
    chosen = {"recorder": (Recorder, None)}
    tested = bench(chosen=chosen, settings=EvaluationSettings(nulls=("neurons", "shuffled")))
    assert tested.null_sources(SAELatents(sae), held_out) == {}
    assert tested.chosen_for("neurons") == {}


# Memory of a pass -------------------------------------------------------------------------------


def test_a_pass_leaves_no_arrays_to_the_garbage_collector(
    sae: Any, held_out: HeldOutActivations
) -> None:
    every = [name for name, cls in EVALUATORS.items() if not cls.wants_intervention]
    tested = bench(chosen=choose_evaluators(every, None))
    made: list[weakref.ref[Any]] = []
    stream = bench_module.stream

    def watched(context: EvaluationContext, *args: Any, **kwargs: Any) -> Any:
        done = stream(context, *args, **kwargs)
        made.extend(map(weakref.ref, [*done.evaluators.values(), *context._shared.values()]))
        return done

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bench_module, "stream", watched)
            tested.left_out(SAELatents(sae), held_out, 0)
            tested.numbers(NeuronLatents.fit(held_out.sample()), held_out, tested.chosen)
        left = [type(one).__name__ for ref in made if (one := ref()) is not None]
    finally:
        gc.enable()
    assert len(made) > 40 and not left


# Latents that are encoded once -------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("signed", [True, False])
def test_latents_encoded_once_are_those_of_every_pass(
    sae: Any, labels: np.ndarray, aggregate: str, signed: bool
) -> None:
    class Signed(SAELatents):
        def encode(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
            z = super().encode(x)
            return torch.where(x[:, :1] > 0, z, -z) if signed else z

    generator = np.random.default_rng(0)
    tokens = generator.normal(size=(len(labels), 3, D)).astype(np.float32)
    patches = HeldOutActivations(tokens, Split.halves(labels, N_CLASSES, 1))
    tested = bench(settings=EvaluationSettings(aggregate=aggregate))
    latents, seen = Signed(sae), []
    kept = tested.encode_once(latents, patches, progress=seen.append)
    assert isinstance(kept, KeptLatents) and sum(seen) == len(patches)
    for source in (latents, kept):
        tested.run(source, patches)
        tested.left_out(source, patches, 2)
    plain, plain_rest, once, once_rest = Recorder.made
    for one, other, exactly in ((plain, once, True), (plain_rest, once_rest, False)):
        for batch, wanted in zip(other.batches, one.batches, strict=True):
            assert torch.equal(batch.index, wanted.index)
            # A row of a product may depend on the other rows of its batch, by rounding.
            tolerance = 0.0 if exactly else 1e-5
            torch.testing.assert_close(batch.z, wanted.z, rtol=tolerance, atol=tolerance)


def test_latents_that_are_too_many_are_encoded_again(
    sae: Any, held_out: HeldOutActivations, monkeypatch
) -> None:
    latents, tested = SAELatents(sae), bench()
    monkeypatch.setattr(kept_latents, "KEPT", 4 * len(held_out))  # k = 4
    seen: list[int] = []
    assert isinstance(tested.encode_once(latents, held_out), KeptLatents)
    monkeypatch.setattr(kept_latents, "KEPT", 4 * len(held_out) - 1)
    assert tested.encode_once(latents, held_out, progress=seen.append) is latents
    assert sum(seen) == len(held_out)


# The pass ---------------------------------------------------------------------------------------


def test_one_pass(sae: Any, held_out: HeldOutActivations, labels: np.ndarray) -> None:
    tested = bench()
    seen: list[int] = []
    done = tested.run(SAELatents(sae), held_out, progress=seen.append)
    (recorder,) = Recorder.made
    assert sum(seen) == len(held_out)
    halves = torch.cat([b.is_fit for b in recorder.batches])
    assert halves.tolist() == sorted(halves.tolist(), reverse=True)
    assert all(b.is_fit.all() for b in recorder.calibrated)
    index = torch.cat([b.index for b in recorder.batches]).numpy()
    assert np.array_equal(index, held_out.split.order)
    batch = recorder.batches[0]
    torch.testing.assert_close(batch.x, torch.from_numpy(held_out.tokens[batch.index, 0]))
    torch.testing.assert_close(batch.mean_patch, torch.from_numpy(held_out.mean_patch[batch.index]))
    torch.testing.assert_close(batch.z, sae.encode(batch.x))
    torch.testing.assert_close(batch.embedding, batch.x + 1)
    torch.testing.assert_close(batch.tokens, torch.from_numpy(held_out.tokens[batch.index]))
    assert done.context.intervene is None and "no evaluator" in done.context.no_intervention
    assert np.array_equal(batch.labels, labels[batch.index])
    assert done.context.source == "sae" and done.context.sae is sae
    assert done.context.W_dec is sae.W_dec
    assert not batch.z.requires_grad


def test_every_metric_stands_beside_its_nulls(sae: Any, held_out: HeldOutActivations) -> None:
    tested = bench()
    latents = SAELatents(sae)
    sources = tested.null_sources(latents, held_out)
    nulls = {
        name: [tested.numbers(source, held_out, tested.chosen_for(name)) for source in draws]
        for name, draws in sources.items()
    }
    done = tested.run(latents, held_out)
    found = tested.metrics(done, nulls, {"planted": {"recorder": {"n": 5.0}}})
    recorder = found["recorder"]
    assert recorder["n"].value == len(held_out)
    assert recorder["n"].controls == {"planted": 5.0}
    assert recorder["n"].nulls["random"].left_behind is None
    permuted = recorder["place"].nulls["permuted_classes"]
    draws = [-int(p[0]) - 1.0 for p in done.context.permutations]
    assert (permuted.n, permuted.best) == (19, max(draws))
    assert permuted.mean == pytest.approx(np.mean(draws))
    assert permuted.left_behind is True
    assert recorder["place"].nulls["shuffled"].mean == -1
    draws = [draw["recorder"]["mean_z"] for draw in nulls["random"]]
    assert len(set(draws)) == recorder["mean_z"].nulls["random"].n == 3
    assert recorder["mean_z"].nulls["random"].mean == pytest.approx(np.mean(draws))
    assert recorder["mean_z"].nulls["neurons"].reason == "no meaning"
    assert "does not depend" in str(recorder["fixed"].nulls["permuted_classes"].reason)
    assert found["pair_depth"]["pair_depth"].nulls["neurons"].n == 1


def test_where_no_class_can_move_the_reason_stands_in_place_of_the_null(sae: Any) -> None:
    """Each class has half as many images again as the one before it."""
    labels = np.repeat(np.arange(N_CLASSES), [4, 6, 9, 14, 21, 32, 48, 72])
    tokens = np.random.default_rng(0).normal(size=(len(labels), 1, D)).astype(np.float32)
    uneven = HeldOutActivations(tokens, Split.halves(labels, N_CLASSES, 1))
    tested = bench(settings=EvaluationSettings(nulls=("permuted_classes", "shuffled")))
    found = tested.metrics(tested.run(SAELatents(sae), uneven))["pair_depth"]["pair_depth"]
    reason = (
        "no two of the 8 classes present have a like number of images (within a factor of 1.25), so "
        "none can be exchanged"
    )
    assert found.nulls["permuted_classes"].reason == reason and found.nulls["shuffled"].n == 1
    assert found.not_judged == f"no draw of permuted classes: {reason}" and found.past_all is None


def test_numbers_do_not_depend_on_the_batch_size(sae: Any, held_out: HeldOutActivations) -> None:
    chosen = {"coverage": (OntologicalCoverage, None), "pair_depth": (PairDepth, {"k": 4})}
    found = [
        bench(chosen=chosen, images_at_once=size).run(SAELatents(sae), held_out)
        for size in (3, 1000)
    ]
    for name in chosen:
        one, other = (done.compute(name) for done in found)
        assert one == pytest.approx(other, nan_ok=True)


def test_planted_detectors_leave_the_nulls_behind(held_out: HeldOutActivations) -> None:
    planted = PlantedLatents(TREE, recall=1.0, false_alarm=0.0)
    planted.source = "sae"
    tested = bench(chosen={"coverage": (OntologicalCoverage, None)})
    metrics = tested.metrics(tested.run(planted, held_out))["coverage"]
    assert metrics["internal_f1"].value == 1.0
    assert metrics["internal_f1"].nulls["permuted_classes"].left_behind is True
    assert metrics["internal_f1"].nulls["shuffled"].left_behind is True
    assert metrics["leaf_f1"].nulls["permuted_classes"].left_behind is None


# Failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["calibrate", "update", "compute"])
def test_an_evaluator_that_fails_costs_only_itself(sae: Any, held_out, when: str) -> None:
    tested = bench(fail=when)
    done = tested.run(SAELatents(sae), held_out)
    found = tested.metrics(done)
    assert "recorder" not in found and "pair_depth" in found
    assert done.errors == {"recorder": f"ValueError: told to fail in {when}"}


def test_a_failure_under_a_null_keeps_the_value(sae: Any, held_out: HeldOutActivations) -> None:
    tested = bench(fail="update@random")
    latents = SAELatents(sae)
    random = tested.null_sources(latents, held_out)["random"][0]
    nulls = {"random": [tested.numbers(random, held_out, tested.chosen_for("random"))]}
    found = tested.metrics(tested.run(latents, held_out), nulls)["recorder"]["mean_z"]
    assert found.value > 0
    assert found.nulls["random"].reason == "failed: ValueError: told to fail in update"

    tested = bench(fail="shuffled")
    done = tested.run(latents, held_out)
    found = tested.metrics(done)["recorder"]["mean_z"]
    assert found.value > 0 and found.nulls["shuffled"].n == 0
    assert "recorder" in done.errors


def test_wrong_options_are_refused_before_a_pass() -> None:
    with pytest.raises(ConfigError, match="k: too small; given 1; allowed: 2 or more"):
        choose_evaluators("pair_depth", {"pair_depth": {"k": 1}})


# During training --------------------------------------------------------------------------------


def test_training_evaluator(sae: Any, held_out: HeldOutActivations) -> None:
    chosen = {"recorder": (Recorder, None), "pair_depth": (PairDepth, {"k": 2})}
    hook = "blocks.0.hook_resid_post"
    evaluator = TrainingEvaluator({hook: held_out}, TREE, chosen)
    sae.cfg.metadata.hook_name = hook
    before = torch.random.get_rng_state(), np.random.get_state()
    plain = evaluator(sae, iter(()), ActivationScaler())
    scaled = evaluator(sae, iter(()), ActivationScaler(scaling_factor=2.0))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1][1])
    assert plain["eval/recorder/n"] == len(held_out)
    assert "eval/recorder/place/permuted_classes" in plain
    assert not any(key.endswith(("/random", "/neurons", "/shuffled")) for key in plain)
    x = torch.from_numpy(held_out.tokens[:, 0])
    assert plain["eval/recorder/mean_z"] == pytest.approx(sae.encode(x).mean().item(), rel=1e-4)
    assert scaled["eval/recorder/mean_z"] == pytest.approx(
        sae.encode(2 * x).mean().item(), rel=1e-4
    )


# Cards ------------------------------------------------------------------------------------------


def placed(*rows: tuple[int, str, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["latent", "node", "f1"])


def test_most_and_least_specific() -> None:
    rows = placed(
        (0, "thing.0", 0.9),  # 4 classes
        (1, "thing.0.0", 0.8),  # 2 classes
        (2, "thing.0.0.0", 0.7),
        (3, "thing.0.0.1", 0.95),
        (4, "thing.1", 0.2),  # detects its node badly
    )
    most, least = cards.pick(rows, TREE, 2)
    assert most == [3, 2]
    assert least == [0, 1]
    assert cards.pick(rows[:1], TREE, 2) == ([0], [])
    assert cards.pick(rows[:0], TREE) == ([], [])
    # Latents of one class are never the least specific, even where there is no other.
    assert cards.pick(rows[2:4], TREE, 1) == ([1], [])
    assert cards.pick(rows[1:4], TREE, 2) == ([2, 1], [0])
    assert not set(cards.pick(rows, TREE, 6)[0]) & set(cards.pick(rows, TREE, 6)[1])


def places(tables: dict[str, pd.DataFrame], **sources: NodeTable | None) -> cards.NodeTables:
    """Each evaluator has one table, `t`."""
    return cards.NodeTables({name: {"t": t} for name, t in tables.items()}, sources, TREE, 8)


def test_a_latent_stands_at_the_node_it_detects_best() -> None:
    node = ["thing.0", "thing.1", "thing.0.0", "thing.0.1"]
    nodes = placed(*zip([1, 1, -1, 2], node, [0.5, 0.9, 0.0, np.nan], strict=True))
    found = places({"one": nodes}, one=NodeTable("t"), other=None)
    assert found.placed_latents().to_dict("records") == [
        {"latent": 1, "node": "thing.1", "f1": 0.9}
    ]
    assert found.node_f1() == {"thing.0": 0.5, "thing.1": 0.9, "thing.0.0": 0.0}
    empty = places({}, one=NodeTable("t"))
    assert empty.placed_latents().empty and empty.node_f1() == {}


def test_the_share_of_images_above_the_threshold_is_that_of_the_table() -> None:
    rows = placed((1, "thing.0", 0.5), (2, "thing.1", 0.9)).assign(share=[0.25, 0.5])
    found = places({"one": rows}, one=NodeTable("t", fires_on="share")).placed_latents()
    assert found[["latent", "fires_on"]].to_numpy().tolist() == [[2, 0.5], [1, 0.25]]


def test_of_several_evaluators_the_one_of_smallest_priority_places_latents() -> None:
    low, high = placed((3, "thing", 0.1)), placed((4, "thing.0", 0.2))
    both = {"low": low, "high": high}
    found = places(both, high=NodeTable("t"), low=NodeTable("t", f1=None, priority=5))
    assert found.placed_latents()["latent"].tolist() == [3]
    assert np.isnan(found.placed_latents()["f1"]).all()
    assert found.node_f1() == {"thing.0": 0.2}  # the other has none
    found = places(both, high=NodeTable("t"), low=NodeTable("t", latent=None, priority=5))
    assert found.placed_latents()["latent"].tolist() == [4]
    assert found.node_f1() == {"thing": 0.1}
    repeated = placed((3, "thing", 0.4), (4, "thing", 0.7), (5, "thing", 0.2))
    assert places({"one": repeated}, one=NodeTable("t")).node_f1() == {"thing": 0.7}


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (placed((1, "no such node", 0.5)), "ValueError: nodes .* does not have: 'no such node'"),
        (placed((8, "thing", 0.5)), "ValueError: latents above 7"),
        (placed((1, "thing", 0.5)).drop(columns="f1"), "KeyError: 'f1'"),
        (placed((1, "thing", "good")), "ValueError: could not convert"),  # pyright: ignore
    ],
)
def test_a_table_that_places_no_latents_is_named_and_left_out(
    table: pd.DataFrame, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    sources = {"bad": NodeTable("t", priority=1), "good": NodeTable("t")}
    found = places({"bad": table, "good": placed((2, "thing", 0.3))}, **sources)
    assert found.placed_latents()["latent"].tolist() == [2]
    assert re.search(f"bad: the table 't' places no latents .{why}", caplog.text)


def test_cards_show_the_top_images(
    sae: Any, held_out: HeldOutActivations, labels: np.ndarray
) -> None:
    tested = bench()
    done = tested.run(SAELatents(sae), held_out, prepare=share_card_facts)
    z = sae.encode(torch.from_numpy(held_out.tokens[:, 0]))
    latent = int((z > 0).sum(0).argmax())
    (card,) = cards.make_cards(
        placed((latent, "thing.0.1", 0.6)),
        [0],
        taxonomy=TREE,
        top=done.context.share(TopImages, k=cards.TOP_IMAGES),
        rate=done.context.share(FiringRate),
        image_ids=np.arange(len(held_out)) + 100,
        images="0a1b",
    )
    order = z[:, latent].argsort(descending=True)[: cards.N_IMAGES]
    assert [image.index - 100 for image in card.images] == order.tolist()
    assert [image.activation for image in card.images] == pytest.approx(z[order, latent].tolist())
    assert card.images[0].label == TREE.label(int(TREE.class_nodes[labels[order[0]]]))
    assert card.fires_on == pytest.approx((z[:, latent] > 0).float().mean().item())
    assert math.isnan(card.above_threshold_on)  # the table does not say
    facts = {"top": done.context.share(TopImages, k=cards.TOP_IMAGES), "taxonomy": TREE}
    facts |= {
        "rate": done.context.share(FiringRate),
        "image_ids": np.arange(len(held_out)),
        "images": "",
    }
    said = placed((latent, "thing.0.1", 0.6)).assign(fires_on=[0.125])
    assert cards.make_cards(said, [0], **facts)[0].above_threshold_on == 0.125
    assert card.path[0] == "thing" and len(card.path) == 3 and card.generality == 1
