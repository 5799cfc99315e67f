"""Series of SAEs: those that form one curve over layers."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from .results import Results, SAEResult


@dataclass(frozen=True)
class Series:
    """SAEs that differ in their layer only, shallowest first; `label` is what they share.

    Their widths may differ, as those of a CNN's stages do.
    """

    label: str
    saes: list[SAEResult]

    def __iter__(self):
        return iter(self.saes)

    def __len__(self) -> int:
        return len(self.saes)


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key that puts ``blocks.10`` after ``blocks.9``."""
    # What \d matches and int() reads; isdigit is true of ² and ① too.
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)
    ]


def all_series(results: Results) -> list[Series]:
    """The SAEs of `results` as curves.

    Names are equal when they differ only in the numbers of their hook point: ``topk_0`` at block 0
    and ``topk_11`` at block 11 are both ``topk_*``.
    """
    alone = Counter(sae.run for sae in results.saes)
    groups: dict[tuple[Key, Kind], list[SAEResult]] = defaultdict(list)
    for sae in results.saes:
        run = sae.run if alone[sae.run] > 1 else ""
        numbers = _numbers(sae)
        key = (run, _without(sae.name, numbers), _without(sae.place, numbers))
        groups[key, kind_of(sae)].append(sae)
    found = []
    for key, saes in _told_apart(groups):
        saes.sort(key=lambda sae: natural_key(sae.hook_name))
        found.append((key if len(saes) > 1 else _own_key(saes[0]), saes))
    varying = [i for i in range(3) if len({key[i] for key, _ in found}) > 1]
    labels = [
        " · ".join(dict.fromkeys(key[i] for i in varying or [2] if key[i])) for key, _ in found
    ]
    for told in zip(*(kind_of(saes[0]) for _, saes in found), strict=True):
        if len(set(told)) > 1:  # the name of a run need not contain its architecture
            labels = [
                label if not fact or fact in label else f"{label} ({fact})"
                for label, fact in zip(labels, told, strict=True)
            ]
    return [Series(label, saes) for label, (_, saes) in zip(labels, found, strict=True)]


Key = tuple[str, str, str]  # run, name and hook point
Kind = tuple[str, str, str, str]


def kind_of(sae: SAEResult) -> Kind:
    """In what SAEs of one curve do not differ: model, tokens, architecture as trained and constraint."""
    return sae.model_name, sae.tokens, sae.trained_as, sae.constraint or ""


def _told_apart(
    groups: dict[tuple[Key, Kind], list[SAEResult]],
) -> Iterator[tuple[Key, list[SAEResult]]]:
    """Split groups with several SAEs at one hook point, which form no curve, into single SAEs."""
    for (key, _), saes in groups.items():
        if len({sae.place for sae in saes}) < len(saes):
            yield from ((_own_key(sae), [sae]) for sae in saes)
        else:
            yield key, saes


def _own_key(sae: SAEResult) -> Key:
    return sae.run, sae.name, sae.place


def _without(name: str, numbers: list[str]) -> str:
    for number in numbers:
        name = re.sub(rf"(?<!\d){number}(?!\d)", "*", name, count=1)
    return name


def is_by_layer(saes: Sequence[SAEResult]) -> bool:
    """Whether the layers of SAEs rise in their order, and no other number of the hook points tells these apart.

    They do not in a CNN, where blocks are counted anew in each stage: ``layer3.5`` comes before ``layer4.2``.
    """
    numbers = [_numbers(sae) for sae in saes]
    if any(sae.layer is None or sae.layer != int(own[0]) for sae, own in zip(saes, numbers)):
        return False
    varying = [set(column) for column in zip_longest(*numbers) if len(set(column)) > 1]
    layers = [int(own[0]) for own in numbers]
    return len(varying) <= 1 and all(a < b for a, b in pairwise(layers))


def positions(series: Series) -> list[tuple[float, str]]:
    """(position on the layer axis, its tick label) of each SAE of a series: its layer, or its rank."""
    if is_by_layer(series.saes):
        return [(float(sae.layer or 0), str(sae.layer)) for sae in series]
    return [(float(i), ".".join(_numbers(sae)) or sae.hook_name) for i, sae in enumerate(series)]


def _numbers(sae: SAEResult) -> list[str]:
    return re.findall(r"\d+", sae.hook_name)


def layer_of(hook_name: str) -> int | None:
    """The first whole number in a hook name: 3 of ``blocks.3.hook_resid_post``."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", hook_name)
    return int(found.group(1)) if found else None
