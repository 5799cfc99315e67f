"""Taxonomies from CIFAR-100, folders and files, and the one door to them."""

from __future__ import annotations

import json

import pytest
import taxolens
from taxolens.registry.errors import ConfigError, UnknownNameError
from taxolens.registry.taxonomies import Taxonomy, load_taxonomy

TREE = Taxonomy.from_edges(
    [("animal", "dog"), ("animal", "cat"), ("dog", "pug"), ("dog", "husky")],
    ["pug", "cat", "husky"],
)


@pytest.mark.parametrize("name", list(taxolens.TAXONOMIES))
def test_what_every_named_taxonomy_holds(name):
    source = taxolens.TAXONOMIES[name]
    assert source.name == name and source.description and source.source
    whole = source.load(None)
    some = [whole.classes[-1], whole.classes[0], whole.classes[len(whole.classes) // 2]]
    assert list(source.load(some).classes) == some
    assert load_taxonomy(name, classes=some) == source.load(some)
    assert Taxonomy.from_json(whole.to_json()) == whole
    with pytest.raises(ConfigError, match="no-such-class"):
        source.load([*some, "no-such-class"])


def test_cifar100_has_two_levels():
    taxonomy = load_taxonomy("cifar100")
    assert len(taxonomy.classes) == 100 and list(taxonomy.classes) == sorted(taxonomy.classes)
    assert taxonomy.max_depth == 2 and len(set(taxonomy.cut(1))) == 20
    assert (taxonomy.n_leaves[taxonomy.depth == 1] == 5).all()
    lawn_mower = taxonomy.classes.index("lawn_mower")
    assert taxonomy.label(taxonomy.cut(1)[lawn_mower]) == "vehicles 2"


def test_cifar100_reads_names_as_data_sets_spell_them():
    taxonomy = load_taxonomy("cifar100", classes=["aquarium fish", "cra", "lobster"])
    assert taxonomy.classes == ("aquarium_fish", "crab", "lobster")
    with pytest.raises(ConfigError, match=r"class: not known .did you mean 'lobster'"):
        load_taxonomy("cifar100", classes=["lobter"])


@pytest.fixture
def folders(tmp_path):
    top = tmp_path / "animal"
    for leaf in ("dog/pug", "dog/husky", "cat", ".hidden"):
        (top / leaf).mkdir(parents=True)
        (top / leaf / "1.jpg").touch()
    return top


def test_folders_make_a_tree(folders):
    taxonomy = load_taxonomy(folders)
    assert taxonomy.classes == ("cat", "husky", "pug")
    assert [taxonomy.label(v) for v in taxonomy.path_to_root(taxonomy.index("pug"))] == [
        "pug",
        "dog",
        "animal",
    ]
    assert load_taxonomy(str(folders), classes=["pug", "cat"]).classes == ("pug", "cat")


def test_a_folder_with_files_of_its_own_is_a_class(folders):
    (folders / "dog" / "mongrel.jpg").touch()
    taxonomy = load_taxonomy(folders)
    assert taxonomy.classes == ("cat", "dog", "husky", "pug")
    assert taxonomy.n_leaves[taxonomy.index("dog")] == 3


def test_folders_of_one_name_go_by_their_path(folders):
    (folders / "dog" / "other").mkdir()
    (folders / "dog" / "other" / "1.jpg").touch()
    (folders / "bird" / "other").mkdir(parents=True)
    (folders / "bird" / "other" / "1.jpg").touch()
    taxonomy = load_taxonomy(folders)
    assert {"bird/other", "dog/other"} <= set(taxonomy.classes)
    assert taxonomy.label(taxonomy.index("bird/other")) == "other"
    assert load_taxonomy(folders, classes=["dog/pug", "cat"]).classes == ("pug", "cat")


def test_empty_folders_stand_for_classes_where_no_file_is(tmp_path):
    for leaf in ("b/x", "b/y", "a"):
        (tmp_path / leaf).mkdir(parents=True)
    assert load_taxonomy(tmp_path).classes == ("a", "x", "y")


def test_a_folder_without_folders_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no class folders in"):
        load_taxonomy(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "parent,child\nanimal,dog\nanimal,cat\ndog,pug\ndog,husky\n"),
        ("t.csv", "parent;child\nanimal;dog\nanimal;cat\ndog;pug\ndog;husky\n"),
        ("t.csv", "parent\tchild\nanimal\tdog\nanimal\tcat\ndog\tpug\ndog\thusky\n"),
        ("t.csv", "Child,Parent\ndog,animal\ncat,animal\npug,dog\nhusky,dog\nanimal,\n"),
        ("t.csv", "parent,child,rank\nanimal,dog\nanimal,cat\ndog,pug,\ndog,husky\n"),
        ("t.csv", "\nparent,child\nanimal,dog\nanimal,cat\ndog,pug\ndog,husky\n"),
        ("t.csv", "\n \n;;\nparent;child\nanimal;dog\nanimal;cat\ndog;pug\ndog;husky\n"),
        ("t.csv", "\ufeff,animal\nanimal, dog\nanimal,cat\n\ndog,pug\ndog,husky"),
        ("t.json", '[["animal","dog"],["animal","cat"],["dog","pug"],["dog","husky"]]'),
        ("t.json", '{"animal": ["dog", "cat"], "dog": ["pug", "husky"]}'),
        ("t.json", '{"animal": {"dog": ["pug", "husky"], "cat": []}}'),
        ("t.json", TREE.to_json()),
    ],
)
def test_files_of_edges(tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8")
    classes = ["pug", "cat", "husky"]
    assert load_taxonomy(tmp_path / name, classes=classes) == TREE
    expected = TREE.classes if text == TREE.to_json() else ("cat", "husky", "pug")
    assert load_taxonomy(tmp_path / name).classes == expected


def test_classes_in_another_form_of_unicode(tmp_path):
    (tmp_path / "t.csv").write_text("tree,f\u00ec r\ntree,oak\n", "utf-8")
    composed = load_taxonomy(tmp_path / "t.csv", classes=["oak", "fi\u0300 r"])
    assert composed.classes == ("oak", "f\u00ec r")
    with pytest.raises(ConfigError, match="given twice"):
        load_taxonomy(tmp_path / "t.csv", classes=["f\u00ec r", "fi\u0300 r", "oak"])


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "tree.csv").touch()
    with pytest.raises(ConfigError, match=rf"no such file \(did you mean '{tmp_path}/tree\.csv'"):
        load_taxonomy(tmp_path / "tre.csv")


def test_csv_may_name_children(tmp_path):
    (tmp_path / "t.csv").write_text("parent,child,name\nn1,n2,pug dog\nn1,n3,\n")
    taxonomy = load_taxonomy(tmp_path / "t.csv")
    assert taxonomy.label(taxonomy.index("n2")) == "pug dog"
    assert taxonomy.label(taxonomy.index("n3")) == "n3"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "t.csv",
            "parent,child\na,b,c,d\n",
            r"t\.csv, line 2: not an edge; given .*allowed: parent,child",
        ),
        ("t.csv", "parent,child\na\n", r"t\.csv, line 2"),
        ("t.csv", "\n\nparent,child\na\n", r"t\.csv, line 4: not an edge"),
        ("t.csv", "\n\n", "no parent-child pair"),
        ("t.csv", "parent,child,parent\na,b,c\n", r"t\.csv, line 1: not an edge"),
        ("t.nwk", "(a,b)c;", r"given 't\.nwk'; allowed: .*docs/taxonomies\.md converts Newick"),
        ("t.csv", "parent,child\n", "no parent-child pair"),
        ("t.csv", "a,b\nb,a\n", "cycle"),
        ("t.csv", f"a,{'x' * 200_000}\n", "not CSV: field larger than field limit"),
        (
            "t.json",
            '{"a": ["b"], "a": ["c"]}',
            "t.json is ambiguous: an object has the key 'a' twice",
        ),
        ("t.csv", "a,b\nc,d\n", "2 roots: 'a', 'c'; allowed: one"),
        ("t.json", "{", r"t\.json is not JSON"),
        ("t.json", '["ab", "cd"]', r"not a pair; given 'ab'; allowed: \[parent, child\]"),
        (
            "t.json",
            '{"a": "b"}',
            "children of 'a' cannot be read; given 'b'; allowed: names or an object",
        ),
        ("t.json", "3", "not a tree; given 'int'; allowed: pairs or an object"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_taxonomy(tmp_path / name)


def test_what_is_neither_a_name_nor_a_path(tmp_path):
    with pytest.raises(UnknownNameError, match=r"taxonomy: not known .did you mean 'imagenet'"):
        load_taxonomy("imagenett")
    with pytest.raises(UnknownNameError, match="Also allowed: a folder"):
        load_taxonomy(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="taxonomy: no such file; given"):
        load_taxonomy(tmp_path / "nowhere.csv")
    (tmp_path / "t.txt").write_text(json.dumps([]))
    with pytest.raises(
        ConfigError, match=r"given 't\.txt'; allowed: a file that ends in \.csv or \.json"
    ):
        load_taxonomy(tmp_path / "t.txt")


def test_a_log_line_counts_the_nodes_with_several_parents(tmp_path, caplog):
    """As of a phylogeny in which two clades have one name."""
    caplog.set_level("INFO")
    (tmp_path / "tree.csv").write_text("r,a\nr,b\na,x\na,y\nb,z\n")
    load_taxonomy(tmp_path / "tree.csv")
    assert not caplog.records
    (tmp_path / "dag.csv").write_text("r,a\nr,b\na,98/97\nb,98/97\n98/97,x\n98/97,y\na,z\nb,w\n")
    load_taxonomy(tmp_path / "dag.csv")
    assert caplog.messages == ["dag.csv: 1 nodes have several parents: '98/97'"]
