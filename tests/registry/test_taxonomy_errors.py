"""What a taxonomy refuses, and whom it names."""

from __future__ import annotations

import itertools

import pytest
from taxolens.registry.errors import ConfigError
from taxolens.registry.taxonomies import Taxonomy

EDGES = [("animal", "dog"), ("animal", "cat"), ("dog", "pug")]


@pytest.mark.parametrize(
    ("edges", "classes", "message"),
    [
        ([*EDGES, ("pug", "dog")], None, "cycle dog -> pug -> dog|cycle pug -> dog -> pug"),
        ([("a", "a")], ["a"], "cycle a -> a"),
        ([*EDGES, ("plant", "tree")], None, r"2 roots: 'animal', 'plant'; allowed: one"),
        (EDGES, ["pug", "cta"], r"class: not known .did you mean 'cat'\?"),
        (EDGES, ["x", "y"], r"2 of 2 classes are unknown: 'x', 'y'"),
        (EDGES, ["pug", "pug"], "classes: given twice: 'pug'"),
        (EDGES, [], "classes: none given; allowed: at least one"),
        ([], None, "classes: none given; allowed: at least one"),
    ],
)
def test_from_edges_names_what_is_wrong(edges, classes, message):
    with pytest.raises(ConfigError, match=message):
        Taxonomy.from_edges(edges, classes)


def test_a_long_cycle_is_named_from_parent_to_child():
    edges = [("root", "a"), ("a", "b"), ("b", "c"), ("c", "a")]
    with pytest.raises(ConfigError) as error:
        Taxonomy.from_edges(edges, ["c"])
    named = str(error.value).split("cycle ")[1].split(" (")[0].split(" -> ")
    assert named[0] == named[-1] and len(named) == 4
    assert all(edge in edges for edge in itertools.pairwise(named))


def test_a_cycle_of_any_length_is_a_short_message():
    edges = [(str(i), str((i + 1) % 1000)) for i in range(1000)]
    with pytest.raises(ConfigError, match=r"cycle \d+ -> .* -> 994 more -> \d+ \(") as error:
        Taxonomy.from_edges(edges)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": ("r", "a", "a")}, "nodes: given twice: 'a'"),
        ({"classes": ()}, "classes: none given; allowed: at least one"),
        ({"classes": ("a", "z")}, "class: not known.*given 'z'"),
        ({"parents": ((), (0,))}, "2 given for 3 nodes"),
        ({"parents": ((), (2,), (0,))}, "node 'a' must follow its parents"),
        ({"parents": ((), (), (0,))}, "only the first has none"),
        ({"classes": ("a",)}, "without any class below: 'b'"),
        ({"nodes": ("r", "a", "b"), "parents": ((), (0,), (1,)), "classes": ("b",)}, "not the LCH"),
    ],
)
def test_the_constructor_checks_everything(fields, message):
    whole = {"nodes": ("r", "a", "b"), "parents": ((), (0,), (0,)), "classes": ("a", "b")}
    assert Taxonomy(**whole).nodes == ("r", "a", "b")
    with pytest.raises(ConfigError, match=message):
        Taxonomy(**{**whole, **fields})


def test_restrict_names_unknown_classes():
    taxonomy = Taxonomy.from_edges(EDGES)
    with pytest.raises(ConfigError, match=r"class: not known .did you mean 'pug'"):
        taxonomy.restrict(["pugs"])


def test_from_json_requires_its_own_format():
    with pytest.raises(
        ConfigError, match=r"format: not known; given None; allowed: 'taxolens\.taxonomy/1'"
    ):
        Taxonomy.from_json("{}")
