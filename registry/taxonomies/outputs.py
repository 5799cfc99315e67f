"""Which class of a taxonomy each output of a classifier stands for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import imagenet
from .taxonomy import Taxonomy


def classes_of_outputs(taxonomy: Taxonomy, names: Sequence[str]) -> np.ndarray:
    """(outputs,) int64, the class of each output; −1 where its name is that of no class.

    A name is the id of a class, its human name or its WordNet words ("tench, Tinca tinca"), in
    small or large letters, with spaces or underscores. A thousand names in the usual order of
    ImageNet-1k are taken by their place, as two pairs of them are the same. Of several classes or
    several outputs with one human name, none is taken.
    """
    place = {c: i for i, c in enumerate(taxonomy.classes)}
    by_id = _places(taxonomy.classes)
    by_label = _places([taxonomy.label(v) for v in taxonomy.class_nodes])
    once = _places(names)
    found = []
    for name, synset in zip(names, imagenet.synsets(names)):
        plain = _plain(name)
        by_name = by_label.get(plain, -1) if plain in once else -1
        found.append(by_id.get(plain, place.get(synset or "", by_name)))
    return np.array(found, dtype=np.int64)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _places(names: Sequence[str]) -> dict[str, int]:
    """name -> its place, of the names that are there once."""
    plain = [_plain(name) for name in names]
    return {name: i for i, name in enumerate(plain) if plain.count(name) == 1}
