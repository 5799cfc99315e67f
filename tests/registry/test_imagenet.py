"""Known facts about the shipped WordNet tree."""

from __future__ import annotations

from pathlib import Path

import pytest
import taxolens  # noqa: F401 (fills the table of named taxonomies)
from taxolens.registry.errors import ConfigError
from taxolens.registry.taxonomies import Taxonomy, load_taxonomy
from taxolens.registry.taxonomies.imagenet import synsets

DOG, ANIMAL, ARTIFACT = "n02084071", "n00015388", "n00021939"
# The 202 classes of the copy of Tiny-ImageNet on which the methods were tried.
CLASSES = Path(__file__).parents[2] / "benchmarks" / "tiny_imagenet.txt"
TINY_IMAGENET = CLASSES.read_text().split()


@pytest.fixture(scope="module")
def tree() -> Taxonomy:
    return load_taxonomy("imagenet")


def test_shape(tree):
    assert len(tree.classes) == 1000 and list(tree.classes) == sorted(tree.classes)
    assert len(tree.nodes) == 1860 and len(tree.edges()) == 1937
    assert tree.label(tree.root) == "entity"
    assert tree.max_depth == 18
    assert sum(len(parents) > 1 for parents in tree.parents) == 75


def test_class_zero_and_last(tree):
    assert tree.label(tree.class_nodes[0]) == "tench"
    assert tree.label(tree.class_nodes[999]) == "toilet tissue"


def test_dogs(tree):
    dog = tree.index(DOG)
    assert tree.n_leaves[dog] == 118
    assert tree.lch(tree.leaves(dog)) == dog
    assert len(tree.parents[dog]) == 2  # canine and domestic animal
    path = [tree.label(v) for v in tree.path_to_root(dog)]
    assert path[:3] == ["dog", "canine", "carnivore"] and path[-1] == "entity"


def test_animals_and_artifacts_show_that_height_is_no_generality(tree):
    animal, artifact = tree.index(ANIMAL), tree.index(ARTIFACT)
    assert tree.n_leaves[animal] == 398 and tree.n_leaves[artifact] == 522
    assert tree.generality[artifact] > tree.generality[animal]
    assert tree.height[artifact] < tree.height[animal]


def test_tiny_imagenet():
    tree = load_taxonomy("imagenet", classes=TINY_IMAGENET)
    assert tree.classes == tuple(TINY_IMAGENET) and len(tree.classes) == 202
    assert tree.label(tree.root) == "physical entity"  # not "entity": rooted at its own LCH
    animal, artifact = tree.index(ANIMAL), tree.index(ARTIFACT)
    assert (tree.n_leaves[animal], tree.height[animal]) == (60, 11)
    assert (tree.n_leaves[artifact], tree.height[artifact]) == (118, 9)


def test_a_part_is_rooted_at_its_own_lch(tree):
    dogs = [tree.classes[c] for c in tree.leaves(tree.index(DOG))]
    part = load_taxonomy("imagenet", classes=dogs[::-1])
    assert part.nodes[part.root] == DOG and part.classes == tuple(dogs[::-1])


def test_any_synset_of_the_tree_may_be_a_class(tree):
    part = load_taxonomy("imagenet", classes=[DOG, "n02110958", "n02123045"])
    assert part.label(part.root) == "carnivore"
    assert list(part.leaves(part.index(DOG))) == [0, 1]


def test_names_as_data_sets_write_them():
    part = load_taxonomy("imagenet", classes=["tench, Tinca tinca", "pug", "sea_lion"])
    assert part.classes == ("n01440764", "n02110958", "n02077923")


def test_a_thousand_names_in_the_usual_order_need_not_be_unique(tree):
    names = [tree.label(v) for v in tree.class_nodes]
    assert len(set(names)) < 1000  # two cranes, two maillots
    names[517] = "crane2"
    assert load_taxonomy("imagenet", classes=names) is tree


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("crane", r"fits several ImageNet synsets: n02012849 \(crane\), n03126707 \(crane\)"),
        ("pgu", "ImageNet class: not known .did you mean 'pug'"),
        (
            "n99999999",
            "ImageNet class: not known.*given 'n99999999'.*another tree is given as a .csv or .json",
        ),
    ],
)
def test_labels_off_the_tree(label, message):
    with pytest.raises(ConfigError, match=message):
        load_taxonomy("imagenet", classes=[label, "n02110958"])


@pytest.mark.parametrize(
    ("labels", "synsets"),
    [
        (["0", "207", "999"], ("n01440764", "n02099601", "n15075141")),  # golden retriever is 207
        (["02099601", "1440764"], ("n02099601", "n01440764")),
        (["dog", "bird", "fish"], (DOG, "n01503061", "n02512053")),
        (["hot dog", "domestic dog"], ("n07697537", DOG)),
        (["motor vehicle, automotive vehicle", "feline"], ("n03791235", "n02120997")),
    ],
)
def test_numbers_offsets_and_the_words_of_inner_nodes(labels, synsets):
    assert load_taxonomy("imagenet", classes=labels).classes == synsets


def test_words_of_several_inner_nodes_are_refused():
    with pytest.raises(ConfigError, match=r"class 'cat': fits several .*n02121620.*n02127808"):
        load_taxonomy("imagenet", classes=["cat", "dog"])
    with pytest.raises(ConfigError, match=r"not known.*given '1234'"):
        load_taxonomy("imagenet", classes=["1234", "5"])


def torchvision_like(tree: Taxonomy) -> list[str]:
    """First words, and the two names that torchvision writes in its own way."""
    names = [tree.label(v) for v in tree.class_nodes]
    names[517], names[639] = "crane bird", "tank suit"
    return names


def test_two_exchanged_names_are_no_usual_order(tree):
    names = torchvision_like(tree)
    names[0], names[207] = names[207], names[0]  # tench and golden retriever
    found = synsets(names)
    assert (found[0], found[207]) == ("n02099601", "n01440764")
    with pytest.raises(ConfigError, match="'crayfish': fits several ImageNet synsets"):
        load_taxonomy("imagenet", classes=names)
    for position in [i for i, synset in enumerate(found) if synset is None]:
        names[position] = tree.classes[position]
    part = load_taxonomy("imagenet", classes=names)
    swapped = [*tree.classes]
    swapped[0], swapped[207] = swapped[207], swapped[0]
    assert part.classes == tuple(swapped)


def test_published_lists_of_names_are_taken_by_position(tree):
    names = torchvision_like(tree)
    assert load_taxonomy("imagenet", classes=names) is tree
    assert synsets(names) == list(tree.classes)
    names = [name.replace(" ", "_") for name in names]
    # open_clip's words for these classes are those of nodes above them
    names[27], names[97], names[831], names[970] = "newt", "duck", "couch", "mountain"
    assert load_taxonomy("imagenet", classes=names) is tree
