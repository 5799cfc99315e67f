"""What every registered evaluator promises, ours and third parties' alike."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import taxolens
import torch
from documented_plugin import documented_plugin
from taxolens.plugin.evaluation.latent_cards import NodeTables
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.base import (
    NULLS,
    Accumulator,
    EvaluationContext,
    Evaluator,
    Pass,
)
from taxolens.registry.evaluators.parts.planted import PlantedLatents
from taxolens_example_plugin import ExampleFiringRate, ExampleSiblings

EVALUATORS = {
    **taxolens.EVALUATORS,
    **{cls.name: cls for cls in (ExampleFiringRate, ExampleSiblings, documented_plugin().Siblings)},
}


@pytest.fixture(params=sorted(EVALUATORS))
def evaluator_class(request) -> type[Evaluator]:
    return EVALUATORS[request.param]


@pytest.fixture(scope="module")
def planted_batch(animals, one_batch):
    labels = np.repeat(np.arange(12), 20)
    latents = PlantedLatents(animals, recall=0.9, false_alarm=0.01)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    x = z @ torch.randn(z.shape[1], 24, generator=torch.Generator().manual_seed(0))
    return one_batch(z, labels, x=x, mean_patch=x.flip(1))


def same(one: dict[str, float], other: dict[str, float], **tolerance: float) -> bool:
    return one.keys() == other.keys() and all(
        math.isclose(one[k], other[k], **{"rel_tol": 1e-9, **tolerance})
        or (math.isnan(one[k]) and math.isnan(other[k]))
        for k in one
    )


def test_it_describes_itself(evaluator_class):
    name = evaluator_class.name
    assert EVALUATORS[name] is evaluator_class and name.isidentifier()
    assert evaluator_class.description and len(evaluator_class.description) < 120
    assert evaluator_class.__doc__ and len(evaluator_class.__doc__) > 80
    assert set(evaluator_class.nulls) == set(NULLS)
    for reason in evaluator_class.nulls.values():
        assert reason is None or len(reason) > 10
    assert set(evaluator_class.higher_is_better.values()) <= {True, False, None}
    assert evaluator_class.invariant <= set(evaluator_class.higher_is_better)
    assert evaluator_class.label_free <= evaluator_class.invariant


def test_what_it_shows_is_there(evaluator_class, animals, planted_batch, measured):
    metrics, titles = evaluator_class.higher_is_better, []
    for headline in evaluator_class.headlines:
        assert headline.metric in metrics and headline.title, headline
        titles.append(headline.title)
    assert len(set(titles)) == len(titles)
    assert set(evaluator_class.labels) <= set(metrics)
    source = evaluator_class.node_table
    if source is not None:
        (evaluator,) = measured(animals, planted_batch, [evaluator_class])
        table = evaluator.tables()[source.name]
        latents = evaluator.context.d_sae
        places = NodeTables({"it": {source.name: table}}, {"it": source}, animals, latents)
        assert source.latent or source.f1
        assert not source.latent or len(places.placed_latents())
        assert not source.f1 or all(0 <= f1 <= 1 for f1 in places.node_f1().values())


def test_it_gives_the_metrics_it_names(evaluator_class, animals, planted_batch, measured):
    (evaluator,) = measured(animals, planted_batch, [evaluator_class])
    permutation = animals.permutation(1)
    for numbers in (
        evaluator.compute(),
        evaluator.compute(permutation=permutation),
        evaluator.compute(shuffled=True),
        evaluator.compute(permutation=permutation, shuffled=True),
    ):
        assert set(numbers) == set(evaluator_class.higher_is_better)
        for metric, (least, most) in evaluator_class.ranges.items():
            value = numbers[metric]
            assert math.isnan(value) or least - 1e-6 <= value <= most + 1e-6, (metric, value)
        assert all(type(value) is float for value in numbers.values())
    assert any(math.isfinite(value) for value in evaluator.compute().values())


def test_a_permutation_that_moves_nothing_changes_nothing(
    evaluator_class, animals, planted_batch, measured
):
    (evaluator,) = measured(animals, planted_batch, [evaluator_class])
    value = evaluator.compute()
    assert same(evaluator.compute(permutation=np.arange(12)), value)
    moved = evaluator.compute(permutation=animals.permutation(3))
    for name in evaluator_class.invariant:
        assert same({name: moved[name]}, {name: value[name]}), name
    assert same(evaluator.compute(), value)  # and asking changed nothing
    shuffled = evaluator.compute(shuffled=True)
    for name in evaluator_class.label_free:
        assert same({name: shuffled[name]}, {name: value[name]}), name
    depends = {n: v for n, v in value.items() if n not in evaluator_class.invariant}
    if (
        evaluator_class.nulls["permuted_classes"] is None
        and not np.isnan([*depends.values()]).all()
    ):
        assert not same({n: moved[n] for n in depends}, depends)  # all NaN: it needs a decoder


def test_a_permutation_equals_relabelled_images(evaluator_class, animals, planted_batch, measured):
    """Class c in the place of p[c] is the same as images of c labelled p[c]."""
    permutation = animals.permutation(5)
    (evaluator,) = measured(animals, planted_batch, [evaluator_class])
    place = torch.from_numpy(permutation)
    relabelled = replace(
        planted_batch,
        labels=place[planted_batch.labels],
        shuffled_labels=place[planted_batch.shuffled_labels],
    )
    (other,) = measured(animals, relabelled, [evaluator_class])
    if evaluator_class.nulls["permuted_classes"] is None:
        expected = other.compute()
        assert same(evaluator.compute(permutation=permutation), expected, abs_tol=1e-4)


def test_so_does_a_draw_where_classes_differ_in_size(evaluator_class, animals, one_batch, measured):
    images = np.where(np.arange(12) < 4, 60, 20)
    images[[1, 10]] = 0
    labels = np.repeat(np.arange(12), images)
    latents = PlantedLatents(animals, recall=0.9, false_alarm=0.01)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    x = z @ torch.randn(z.shape[1], 24, generator=torch.Generator().manual_seed(0))
    batch, facts = one_batch(z, labels, x=x), {"W_dec": torch.randn(z.shape[1], 24)}
    (evaluator,) = measured(animals, batch, [evaluator_class], **facts)
    if evaluator_class.nulls["permuted_classes"] is None:
        draw = evaluator.context.permutations[0]
        relabelled = replace(batch, labels=torch.from_numpy(draw)[batch.labels])
        (other,) = measured(animals, relabelled, [evaluator_class], **facts)
        # The random class sets of `lch_height` are others.
        assert same(evaluator.compute(permutation=draw), other.compute(), abs_tol=5e-3)


@pytest.mark.parametrize("size", [7, 64])
def test_small_batches_equal_one(evaluator_class, animals, planted_batch, measured, size):
    (whole,) = measured(animals, planted_batch, [evaluator_class])
    (parts,) = measured(animals, planted_batch, [evaluator_class], size=size)
    assert same(whole.compute(), parts.compute(), rel_tol=1e-4, abs_tol=1e-4)
    assert same(whole.compute(shuffled=True), parts.compute(shuffled=True), abs_tol=1e-4)


# Parts of the images ------------------------------------------------------------------------------


COUNTED = {
    "absorption",
    "feature_geometry",
    "infomec",
    "latent_dendrogram",
    "latent_graph",
    "lch_height",
    "matryoshka_depth",
    "meta_sae",
    "ontological_coverage",
    "pair_depth",
    "parent_child",
    "stability",
    "supervised_dictionary",
    "siblings",
}
"""Evaluators on counts and samples of images, equal to the bit; the others add floats in another order."""


@pytest.fixture(scope="module")
def facts(planted_batch, toy_model) -> dict[str, Any]:
    """A decoder, and a model with a head that can be run again."""
    generator = torch.Generator().manual_seed(1)
    n, width = planted_batch.x.shape
    W_dec = torch.randn(planted_batch.z.shape[1], width, generator=generator)
    x = torch.zeros(n, 1, width)
    x[planted_batch.index, 0] = planted_batch.x
    to_embedding = torch.randn(width, 6, generator=generator)
    to_logits = torch.randn(6, 12, generator=generator)

    def reconstruct(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = (x @ W_dec.T / width - 0.5).relu()
        return z, z @ W_dec

    return {
        "W_dec": W_dec,
        "b_dec": W_dec[0] / 2,
        "reconstruct": reconstruct,
        "intervene": toy_model(x, to_embedding, to_logits, np.arange(12)),
        "class_counts": np.bincount(planted_batch.labels, minlength=12),
    }


def in_parts(
    taxonomy: Any, batch: Any, cls: type[Evaluator], cuts: Sequence[float], join: bool, **facts: Any
) -> Pass:
    """An evaluator over the parts of both halves between these shares of their images, merged in order."""
    shape = (len(batch), batch.x.shape[1], batch.z.shape[1])
    n_fit = int(batch.is_fit.sum())
    edges = [0.0, *cuts, 1.0]
    passes = []
    for _ in edges[1:]:
        context = EvaluationContext(taxonomy, *shape, n_permutations=3, **facts)
        passes.append(Pass(context, {"it": (cls, None)}))
        passes[-1].calibrate(rows(batch, 0, n_fit))
    for start, end in ((0, n_fit), (n_fit, len(batch))):
        for done, low, high in zip(passes, edges, edges[1:], strict=False):
            first, last = (start + round(share * (end - start)) for share in (low, high))
            for at in range(first, last, 16):
                done.update(rows(batch, at, min(at + 16, last)))
        if join and not start:
            states = [done.context.fit_states() for done in passes]
            for done in passes:
                done.context.join_fit(states)
    merged, *others = passes
    for other in others:
        merged.merge(other)
    return merged


def rows(batch: Any, start: int, end: int) -> Any:
    fields = {k: v[start:end] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return replace(batch, **fields)


@pytest.mark.parametrize("cuts", [(0.5,), (0.3, 0.35), (0.0,)], ids=["halves", "thirds", "none"])
def test_merged_parts_equal_one_pass(evaluator_class, animals, planted_batch, facts, cuts):
    """The third case has a first part without images."""
    batch = replace(planted_batch, embedding=planted_batch.x[:, :7].exp())
    whole, merged = (
        in_parts(animals, batch, evaluator_class, given, True, **facts) for given in ((), cuts)
    )
    assert whole.errors == merged.errors == {}
    loose = 0.0 if evaluator_class.name in COUNTED else 1e-6
    for given in ({}, {"shuffled": True}, {"permutation": animals.permutation(2)}):
        one, parts = whole.compute("it", **given), merged.compute("it", **given)
        assert whole.errors == merged.errors == {}
        assert same(one, parts, rel_tol=loose, abs_tol=loose), {
            k: (one[k], parts[k]) for k in one if one[k] != parts[k] and one[k] == one[k]
        }
    tables = [done.evaluators["it"].tables() for done in (whole, merged)]
    for name, table in tables[0].items():
        pd.testing.assert_frame_equal(table, tables[1][name], rtol=1e-5, atol=1e-5)


class Counts(Evaluator):
    """Images, counted by an evaluator that has no merge."""

    name = "counts"
    description = "images"
    higher_is_better = {"images": None}

    def prepare(self) -> None:
        self.images = 0

    def update(self, batch: Any) -> None:
        self.images += len(batch)

    def compute(self, *, permutation: Any = None, shuffled: bool = False) -> dict[str, float]:
        return {"images": float(self.images)}


class Merged(Counts):
    """The same, with a merge."""

    def merge(self, other: Merged) -> None:
        self.images += other.images


class Further(Merged):
    """Its update adds more than the inherited merge knows of."""

    def update(self, batch: Any) -> None:
        super().update(batch)
        self.more = len(batch)


@pytest.mark.parametrize(("cls", "merges"), [(Counts, False), (Merged, True), (Further, False)])
def test_an_update_without_a_merge_is_refused_by_name(animals, planted_batch, cls, merges):
    merged = in_parts(animals, planted_batch, cls, (0.5,), True)
    if merges:
        assert merged.compute("it") == {"images": len(planted_batch)}
    else:
        assert merged.compute("it") is None
        assert merged.errors["it"] == (
            "ConfigError: counts: parts of the images cannot be merged; given 'an update without a "
            "merge'; allowed: a method merge, or all images in one pass."
        )
        assert in_parts(animals, planted_batch, cls, (), True).errors == {}


class Sum(Accumulator):
    """A shared accumulator without a merge."""

    def update(self, batch: Any) -> None:
        pass


class OverSum(Merged):
    """Shares it."""

    def prepare(self) -> None:
        super().prepare()
        self.context.share(Sum)


def test_a_shared_accumulator_without_a_merge_costs_those_that_share_it(animals, planted_batch):
    merged = in_parts(animals, planted_batch, OverSum, (0.5,), True)
    assert merged.compute("it") is None
    assert "shared Sum: ConfigError: Sum: parts of the images cannot" in merged.errors["it"]


def test_probes_of_a_part_of_the_fit_half_are_not_merged(animals, one_batch):
    labels = np.repeat(np.arange(12), 10)
    batch = one_batch(torch.randn(120, 5, generator=torch.Generator().manual_seed(0)), labels)
    merged = in_parts(animals, batch, EVALUATORS["level_information"], (0.5,), False)
    assert merged.compute("it") is None
    assert "probes of the fit half: parts of the images with different" in merged.errors["it"]


@pytest.mark.parametrize("name", ["ontological_coverage", "cpcc", "detection", "reconstruction"])
def test_parts_of_different_calibration_are_not_merged(animals, planted_batch, name):
    shape = (len(planted_batch), planted_batch.x.shape[1], planted_batch.z.shape[1])
    passes = []
    for sample in (rows(planted_batch, 0, 60), rows(planted_batch, 60, 100)):
        passes.append(Pass(EvaluationContext(animals, *shape), {"it": (EVALUATORS[name], None)}))
        passes[-1].calibrate(sample)
        passes[-1].update(sample)
    passes[0].merge(passes[1])
    assert "different calibrations cannot be merged" in passes[0].errors["it"]


def test_what_failed_in_one_part_has_failed(animals, planted_batch):
    class Fails(Merged):
        """Fails in the second part."""

        def update(self, batch: Any) -> None:
            if int(batch.index[0]) == int(planted_batch.index[60]):
                raise ValueError("no such image")
            super().update(batch)

        merge = Merged.merge

    for cuts in ((0.5,), (0.25, 0.5)):
        assert "no such image" in in_parts(animals, planted_batch, Fails, cuts, True).errors["it"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype(evaluator_class, animals, planted_batch, measured, dtype):
    cast = replace(planted_batch, x=planted_batch.x.to(dtype), z=planted_batch.z.to(dtype))
    (evaluator,) = measured(animals, cast, [evaluator_class])
    (exact,) = measured(animals, planted_batch, [evaluator_class])
    assert same(evaluator.compute(), exact.compute(), rel_tol=0.2, abs_tol=0.1)


@pytest.mark.parametrize("case", ["dead latents", "no latents", "one image a class", "one class"])
def test_undefined_is_nan_and_never_raises(evaluator_class, animals, one_batch, measured, case):
    labels = {
        "one image a class": np.arange(12),
        "one class": np.zeros(10, dtype=np.int64),
    }.get(case, np.repeat(np.arange(12), 4))
    width = 0 if case == "no latents" else 5
    fires = 0.0 if case == "dead latents" else 1.0
    z = np.random.default_rng(0).random((len(labels), width)).astype(np.float32) * fires
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (evaluator,) = measured(animals, one_batch(z, labels), [evaluator_class])
        for numbers in (
            evaluator.compute(),
            evaluator.compute(shuffled=True),
            evaluator.compute(permutation=animals.permutation(0)),
        ):
            assert not any(math.isinf(value) for value in numbers.values())
        evaluator.tables()
        evaluator.figures()


def test_a_class_may_be_missing(evaluator_class, animals, one_batch, measured):
    labels = np.append(np.repeat(np.arange(10), 6), 10)  # 10: fit half only; 11: nowhere
    z = (np.eye(12)[labels] + 0.1).astype(np.float32)
    (evaluator,) = measured(animals, one_batch(z, labels), [evaluator_class])
    assert any(math.isfinite(value) for value in evaluator.compute().values())
    evaluator.tables()


@pytest.mark.parametrize(
    "absent", [[1, 10], [*range(6)], [1, *range(6, 12)]], ids=["siblings", "branch", "both"]
)
@pytest.mark.parametrize(
    "name",
    [
        *("ontological_coverage", "detection", "latent_dendrogram", "absorption", "parent_child"),
        *("supervised_dictionary", "level_information", "mistake_severity", "meta_sae", "infomec"),
        "feature_geometry",
    ],
)
def test_a_node_counts_by_its_classes_with_images(name, absent, animals, one_batch, measured):
    """The whole tree tells as much as that of the classes with images, whose root may lie below."""
    present = np.delete(np.arange(12), absent)
    kept = animals.restrict([animals.classes[c] for c in present])
    top = animals.depth[animals.lch(present)]
    labels = np.repeat(np.arange(len(present)), 20)
    latents = PlantedLatents(kept, recall=0.9, false_alarm=0.05)
    z = latents.encode(labels=torch.from_numpy(labels), index=torch.arange(len(labels)))
    generator = torch.Generator().manual_seed(0)
    x = z @ torch.randn(z.shape[1], 24, generator=generator)
    x = x + torch.randn(x.shape, generator=generator)  # else the probes make no error
    decoder = torch.randn(z.shape[1], 24, generator=generator)
    options = {"meta_sae": {"k": 1, "steps": 20}, "feature_geometry": {"min_images": 10}}
    found = []
    for tree, images in ((animals, present[labels]), (kept, labels)):
        batch = one_batch(z, images, x=x)
        (evaluator,) = measured(
            tree, batch, [EVALUATORS[name]], W_dec=decoder, options=options.get(name)
        )
        draws = evaluator.context.permutations
        found.append([evaluator.compute(), *(evaluator.compute(permutation=p) for p in draws)])
    for whole, part in zip(*found, strict=True):
        if "common_depth" in whole:  # a depth in the tree given
            whole["common_depth"] -= top
        close = {"rel_tol": 1e-6, "abs_tol": 1e-12}
        assert same(whole, part, **close), [
            (k, whole[k], part[k]) for k in whole if not same({k: whole[k]}, {k: part[k]}, **close)
        ]


def test_a_node_on_most_images_is_not_tried_for_absorption(animals, one_batch, measured):
    many = np.where(np.arange(12) < 2, 200, 20)  # one genus of six has two thirds of the images
    labels = np.repeat(np.arange(12), many)
    batch = one_batch(np.ones((len(labels), 3), np.float32), labels)
    (evaluator,) = measured(animals, batch, [EVALUATORS["absorption"]], W_dec=torch.ones(3, 5))
    # Always answering "yes" has F1 .8 there, above the bound of a probe that counts.
    tried = set(evaluator.tables()["nodes"]["node"])
    assert tried == {"carnivore", "bird_1", "bird_2", *(f"carnivore_{g}" for g in range(3))}


def test_no_image_seen(evaluator_class, animals):
    evaluator = evaluator_class(EvaluationContext(animals, 0, 5, 3))
    numbers = evaluator.compute()
    assert set(numbers) == set(evaluator_class.higher_is_better)


def test_tables_and_figures_can_be_written(evaluator_class, animals, planted_batch, measured):
    (evaluator,) = measured(animals, planted_batch, [evaluator_class])
    for name, table in evaluator.tables().items():
        assert name.isidentifier() and isinstance(table, pd.DataFrame) and len(table)
        json.loads(table.to_json(orient="records"))
    for name, drawing in evaluator.figures().items():
        assert name.isidentifier() and isinstance(drawing, go.Figure)
        json.loads(drawing.to_json())
        assert len(drawing.data)


def test_a_pass_without_shuffled_labels_raises(evaluator_class, animals, planted_batch, measured):
    (evaluator,) = measured(animals, planted_batch, [evaluator_class], shuffled=False)
    (both,) = measured(animals, planted_batch, [evaluator_class])
    assert same(evaluator.compute(), both.compute())
    if evaluator_class.nulls["shuffled"] is None:
        with pytest.raises(ConfigError, match="the pass was made with shuffled=False"):
            evaluator.compute(shuffled=True)


@pytest.mark.parametrize("options", [[], "", 0, False])
def test_empty_options_of_another_form_are_refused(evaluator_class, options):
    with pytest.raises(ConfigError, match=f"options of {evaluator_class.name}: not options"):
        evaluator_class._options(options)


def test_options_by_name(evaluator_class, animals):
    context = EvaluationContext(animals, 10, 5, 3)
    options = evaluator_class.Options()
    assert evaluator_class(context).options == options
    assert evaluator_class(context, options).options is options
    with pytest.raises(
        ConfigError, match=f"option of {evaluator_class.name}: not known.*given 'colour'"
    ):
        evaluator_class(context, {"colour": "red"})


def test_memory_does_not_grow_with_images(evaluator_class, animals, one_batch, measured):
    def size(n: int) -> int:
        labels = np.arange(n) % 12
        z = np.random.default_rng(0).random((n, 6)).astype(np.float32)
        caps = [f.name for f in fields(evaluator_class.Options) if f.name.endswith("_images")]
        options = dict.fromkeys(caps, 60)  # a capped sample must stop growing at its cap
        (evaluator,) = measured(
            animals, one_batch(z, labels), [evaluator_class], size=24, options=options
        )
        holders = [evaluator, *evaluator.context._shared.values()]
        return sum(bytes_of(vars(h), set()) for h in holders)

    assert size(960) <= 1.25 * size(240)  # a buffer of bounded size may be more or less full


def bytes_of(value: object, seen: set[int]) -> int:
    """Bytes of the arrays below `value`, each once; the context and the taxonomy are shared."""
    if id(value) in seen or type(value).__name__ in ("Taxonomy", "EvaluationContext"):
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.element_size() * value.nelement()
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(bytes_of(v, seen) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(bytes_of(v, seen) for v in value)
    return bytes_of(vars(value), seen) if hasattr(value, "__dict__") else 0


WITHOUT_COUNT = {
    "feature_geometry": {"babel", "coherence", "coactive_babel"},
    "level_information": {f"{f}_variance_share" for f in ("x", "mean_patch", "z")},
    "reconstruction": {
        *("explained_variance", "fvu", "mse", "cossim", "dead_share", "almost_dead_share"),
    },
    "stability": {"relative_cosine", "relative_mrr"},
}
"""Metrics over all images, tokens or latents at once."""


@pytest.mark.parametrize("name", EVALUATORS)
def test_what_a_verdict_rests_on_is_counted(name: str) -> None:
    """Every metric that is compared with nulls says of how many things it is computed."""
    evaluator = EVALUATORS[name]
    compared = {m for m, better in evaluator.higher_is_better.items() if better is not None}
    assert compared - set(evaluator.support) == WITHOUT_COUNT.get(name, set())


@pytest.mark.parametrize("name", EVALUATORS)
def test_support_is_a_count_among_the_metrics(name: str) -> None:
    evaluator = EVALUATORS[name]
    for metric, of in evaluator.support.items():
        assert evaluator.higher_is_better[metric] is not None, metric
        assert evaluator.higher_is_better[of.count] is None, of.count
        assert of.least > 0 and of.unit
