"""Known facts about the shipped WordNet tree."""

from __future__ import annotations

import pytest
import taxolens  # noqa: F401 (fills the table of named taxonomies)
from taxolens.registry.errors import ConfigError
from taxolens.registry.taxonomies import Taxonomy, load_taxonomy

DOG, ANIMAL, ARTIFACT = "n02084071", "n00015388", "n00021939"
# The 202 classes of the copy of Tiny-ImageNet on which the methods were tried.
TINY_IMAGENET = """
    n01443537 n01629819 n01641577 n01644900 n01698640 n01742172 n01768244 n01770393 n01774384
    n01774750 n01784675 n01855672 n01882714 n01910747 n01917289 n01944390 n01945685 n01950731
    n01983481 n01984695 n02002724 n02056570 n02058221 n02074367 n02085620 n02094433 n02099601
    n02099712 n02106662 n02113799 n02123045 n02123394 n02124075 n02125311 n02129165 n02132136
    n02165456 n02190166 n02206856 n02226429 n02231487 n02233338 n02236044 n02268443 n02279972
    n02281406 n02321529 n02364673 n02395406 n02403003 n02410509 n02415577 n02423022 n02437312
    n02480495 n02480855 n02481823 n02486410 n02504458 n02509815 n02666196 n02669723 n02699494
    n02730930 n02769748 n02788148 n02791270 n02793495 n02795169 n02802426 n02808440 n02814533
    n02814860 n02815834 n02823428 n02837789 n02841315 n02843684 n02883205 n02892201 n02906734
    n02909870 n02917067 n02927161 n02948072 n02950826 n02963159 n02977058 n02988304 n02999410
    n03014705 n03026506 n03042490 n03085013 n03089624 n03100240 n03126707 n03160309 n03179701
    n03201208 n03250847 n03255030 n03355925 n03388043 n03393912 n03400231 n03404251 n03424325
    n03444034 n03447447 n03544143 n03584254 n03599486 n03617480 n03637318 n03649909 n03662601
    n03670208 n03706229 n03733131 n03763968 n03770439 n03796401 n03804744 n03814639 n03837869
    n03838899 n03854065 n03891332 n03902125 n03930313 n03937543 n03970156 n03976657 n03977966
    n03980874 n03983396 n03992509 n04008634 n04023962 n04067472 n04070727 n04074963 n04099969
    n04118538 n04133789 n04146614 n04149813 n04179913 n04251144 n04254777 n04259630 n04265275
    n04275548 n04285008 n04311004 n04328186 n04356056 n04366367 n04371430 n04376876 n04398044
    n04399382 n04417672 n04456115 n04465501 n04486054 n04487081 n04501370 n04507155 n04532106
    n04532670 n04540053 n04560804 n04562935 n04596742 n04597913 n06596364 n07579787 n07583066
    n07614500 n07615774 n07695742 n07711569 n07715103 n07720875 n07734744 n07747607 n07749582
    n07753592 n07768694 n07871810 n07873807 n07875152 n07920052 n09193705 n09246464 n09256479
    n09332890 n09428293 n10148035 n12267677
""".split()  # noqa: SIM905


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
