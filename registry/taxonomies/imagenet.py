"""ImageNet-1k: the WordNet 3.0 hypernyms of the 1,000 ILSVRC synsets.

examples/derive_imagenet_taxonomy.py generates the data; data/WORDNET-LICENSE.txt is its notice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..errors import ConfigError
from ..names import did_you_mean, nearest
from ..table import TaxonomySource
from .taxonomy import Taxonomy

DATA = Path(__file__).with_name("data") / "imagenet.json"


class WordNet(NamedTuple):
    """The packaged part of WordNet."""

    taxonomy: Taxonomy
    words: dict[str, tuple[str, ...]]  # synset id -> its words, the usual one first


@cache
def _wordnet() -> WordNet:
    data = json.loads(DATA.read_text("utf-8"))
    words = {synset: tuple(joined.split(", ")) for synset, (joined, _) in data["nodes"].items()}
    edges = [(up, synset) for synset, (_, ups) in data["nodes"].items() for up in ups]
    names = {synset: ws[0] for synset, ws in words.items()}
    return WordNet(Taxonomy.from_edges(edges, data["classes"], names), words)


def imagenet(classes: Sequence[str] | None = None) -> Taxonomy:
    """The WordNet tree over ImageNet-1k or a subset.

    Args:
        classes: labels in order, each a synset id ("n01440764"; any synset of the tree may be a
            class), its offset ("01440764"), a class number from 0 to 999 in the order of the ids,
            or WordNet words as data sets write them ("tench, Tinca tinca", "tench"). Words that no
            ILSVRC synset has are those of inner nodes ("dog"). None takes all 1,000 in the order
            of their ids, the usual order of labels. A thousand names in that order are taken by
            position: at least 900 are words of the class there, and no other is a word of other
            synsets alone.

    Raises:
        ConfigError: a label is none of these, or fits several synsets.
    """
    taxonomy = _wordnet().taxonomy
    if classes is None or tuple(classes) == taxonomy.classes:
        return taxonomy
    if _is_usual_order(classes):
        return taxonomy
    return taxonomy.restrict([_synset(label) for label in classes])


def _is_usual_order(labels: Sequence[str]) -> bool:
    """Whether 1,000 names follow the order of the synset ids.

    Some names are ambiguous (two cranes, two maillots), and data sets distinguish them in different
    ways ("crane2"). Their positions identify them if nearly all other names fit theirs, and none is
    a name of other synsets alone, which a list in another order would hold.
    """
    taxonomy, words = _wordnet()
    if len(labels) != len(taxonomy.classes):
        return False
    misfits = [
        (position, label)
        for position, (label, synset) in enumerate(zip(labels, taxonomy.classes))
        if not set(_words(label)) & set(words[synset])
    ]
    if len(misfits) > 0.1 * len(labels):
        return False
    return not any(_is_elsewhere(label, position) for position, label in misfits)


def _is_elsewhere(label: str, position: int) -> bool:
    """Whether a label is known, but neither as the class of this position nor as a node above it."""
    taxonomy = _wordnet().taxonomy
    found = _fitting(label)
    return bool(found) and all(position not in taxonomy.leaves(taxonomy.index(s)) for s in found)


def synsets(labels: Sequence[str]) -> list[str | None]:
    """The synset of each label, as in `imagenet`; None where it is unknown or ambiguous."""
    if _is_usual_order(labels):
        return list(_wordnet().taxonomy.classes)
    fitting = map(_fitting, labels)
    return [found[0] if len(found) == 1 else None for found in fitting]


def _fitting(label: str) -> list[str]:
    taxonomy, words = _wordnet()
    if label in words:
        return [label]
    if label.isdecimal():
        if len(label) <= 3:
            return [taxonomy.classes[int(label)]]
        return [synset] if (synset := f"n{label:0>8}") in words else []
    for by_all, by_any in _by_words():  # the ILSVRC synsets first
        found = by_all.get(_words(label)) or by_any.get(label.replace("_", " "))
        if found:
            return found
    return []


def _synset(label: str) -> str:
    taxonomy, words = _wordnet()
    found = _fitting(label)
    if len(found) > 1:
        meant = ", ".join(f"{s} ({', '.join(words[s])})" for s in found)
        raise ConfigError(
            f"class {label!r}", f"fits several ImageNet synsets: {meant}", allowed="their ids"
        )
    if not found:
        known = [*taxonomy.classes, *(word for _, by_any in _by_words() for word in by_any)]
        near = did_you_mean(nearest(label, known))
        raise ConfigError(
            "ImageNet class",
            f"not known{f' ({near})' if near else ''}",
            given=label,
            allowed="a WordNet 3.0 synset id of the ImageNet-1k tree, its offset or words, or a class "
            "number; another tree is given as a .csv or .json of parent,child",
        )
    return found[0]


def _words(label: str) -> tuple[str, ...]:
    return tuple(label.replace("_", " ").split(", "))


@cache
def _by_words() -> list[tuple[dict[tuple[str, ...], list[str]], dict[str, list[str]]]]:
    """The ILSVRC synsets, then the inner nodes, by all their words and by each of them."""
    taxonomy, words = _wordnet()
    classes = set(taxonomy.classes)
    return [
        _indexed({synset: words[synset] for synset in taxonomy.classes}),
        _indexed({synset: found for synset, found in words.items() if synset not in classes}),
    ]


def _indexed(
    words: dict[str, tuple[str, ...]],
) -> tuple[dict[tuple[str, ...], list[str]], dict[str, list[str]]]:
    by_all: dict[tuple[str, ...], list[str]] = {}
    by_any: dict[str, list[str]] = {}
    for synset, found in words.items():
        by_all.setdefault(found, []).append(synset)
        for word in found:
            by_any.setdefault(word, []).append(synset)
    return by_all, by_any


IMAGENET = TaxonomySource(
    name="imagenet",
    load=imagenet,
    description="WordNet 3.0 hypernyms over ImageNet-1k or any part of it (Tiny-ImageNet, …)",
    source="https://wordnet.princeton.edu",
)
