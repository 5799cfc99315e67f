"""Assignment of a classifier's outputs to the classes of a taxonomy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import imagenet
from .taxonomy import Taxonomy


def classes_of_outputs(taxonomy: Taxonomy, names: Sequence[str]) -> np.ndarray:
    """(outputs,) int64, the class of each output; −1 where its name matches no class.

    A name is the id of a class, its human name or its WordNet words ("tench, Tinca tinca"), in any
    case, with spaces or underscores. A thousand names in the usual order of ImageNet-1k are matched
    by position, as two pairs of them are equal. Human names of several classes or outputs are not
    matched.
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
    """name -> position, for names that occur once."""
    plain = [_plain(name) for name in names]
    return {name: i for i, name in enumerate(plain) if plain.count(name) == 1}
