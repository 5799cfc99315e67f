"""Outputs of classifiers by their names."""

from __future__ import annotations

import pytest
import taxolens  # noqa: F401 (fills the table of named taxonomies)
from taxolens.registry.taxonomies import Taxonomy, load_taxonomy
from taxolens.registry.taxonomies.outputs import classes_of_outputs

TREE = Taxonomy.from_edges(
    [("root", c) for c in ("x1", "x2", "sea_cow", "a", "b")],
    ["x1", "x2", "sea_cow", "a", "b"],
    names={"x1": "Great heron", "x2": "lamp", "a": "twin", "b": "twin"},
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x2", 1),
        ("X2", 1),
        ("great_heron", 0),
        ("Great  Heron", 0),
        ("sea cow", 2),
        ("twin", -1),  # of two classes
        ("a", 3),
        ("LABEL_0", -1),
        ("", -1),
        ("tench", -1),  # a synset, but none of this tree
    ],
)
def test_ids_and_human_names(name: str, expected: int) -> None:
    assert classes_of_outputs(TREE, [name]).tolist() == [expected]


def test_wordnet_words_and_ids() -> None:
    tree = load_taxonomy("imagenet", classes=["n01443537", "n01440764", "n02012849"])
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus", "n02012849", "tabby", "crane"]
    assert classes_of_outputs(tree, names).tolist() == [1, 0, 2, -1, 2]
    names.append("crane")  # the machine, perhaps
    assert classes_of_outputs(tree, names).tolist() == [1, 0, 2, -1, -1, -1]


def test_a_thousand_names_go_by_their_place() -> None:
    whole = load_taxonomy("imagenet")
    names = [whole.label(v) for v in whole.class_nodes]
    assert names.count("crane") == 2
    assert classes_of_outputs(whole, names).tolist() == list(range(1000))
    part = load_taxonomy("imagenet", classes=["n03126707", "n02012849"])  # both cranes
    found = classes_of_outputs(part, names)
    assert (found >= 0).sum() == 2 and found[whole.classes.index("n03126707")] == 0
