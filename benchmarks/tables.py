"""The tables and measured numbers of README.md and docs/evaluators.md, from the stored results.

    python benchmarks/tables.py

Between `<!-- photographs: glance -->` and `<!-- /photographs -->` stands the table `glance` of
docs/results/photographs.json; names of metrics in its place give their tables, and `demo@0,3: pair_depth` shows two
blocks. Inside a sentence the markers enclose one number. Tests compare both pages with the stored results,
and list the numbers outside markers: none of them is measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from taxolens.registry.presentation import shown_metrics
from timing import RESULTS, ROOT, on_what, table

PAGES = (ROOT / "README.md", ROOT / "docs" / "evaluators.md")
MODEL = ROOT / "plugin" / "demo_assets" / "model" / "metrics.json"
MARKED = re.compile(r"<!-- (\w+)(@[\d,]+)?: (.*?) -->(\n?)(.*?)<!-- /\1 -->", re.DOTALL)
Found = Mapping[str, Any]
"""Name of a stored result -> its content."""

CONSTRAINTS = ("frozen_decoder", "soft_frozen_decoder", "frozen_encoder")
OF_X = {"topk": "activations", "untrained": "activations of the untrained model"}
NULLS = {
    "permuted_classes": "classes permuted",
    "shuffled": "labels shuffled",
    "random": "untrained twin",
    "neurons": "neurons",
}
NAMES = {
    "topk": "TopK",
    "matryoshka": "Matryoshka",
    "frozen_decoder": "decoder frozen",
    "soft_frozen_decoder": "decoder soft-frozen",
    "frozen_encoder": "encoder frozen",
    "untrained": "TopK on the untrained model",
}


TREES = ("2x2x2", "3x3", "3x3x3", "tiny-imagenet")
WORLDS = {"Without": ("noise", "flat"), "With": ("planted", "groups")}
CLASS_SIZES = ("balanced", "one large", "long tail", "absent")
LEVEL, BAR = 0.05, 0.07


# Of a study ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """The stored numbers of a study."""

    data: dict[str, Any]
    shown: tuple[int, ...] = ()

    @property
    def blocks(self) -> list[int]:
        """The blocks that are shown; by default all."""
        return sorted(self.shown or {sae["block"] for sae in self.data["saes"]})

    def at(self, block: int, kind: str, constraint: str | None = None) -> dict[str, Any]:
        """The numbers of one SAE; `kind` is "topk", "matryoshka" or "untrained"."""
        for sae in self.data["saes"]:
            own = "untrained" if sae["model"] == "untrained" else sae["architecture"]
            if sae["block"] == block and own.startswith(kind) and sae["constraint"] == constraint:
                return sae["metrics"]
        return {}

    def rows(self, metric: str) -> Iterator[list[str]]:
        """[name, its cell at every block] of a metric: each SAE, its nulls and its controls.

        A number of the activations is the same for every SAE of a model: it has one row.
        """
        of_x = self._is_of_x(metric)
        for kind in ("topk", "untrained") if of_x else ("topk", "matryoshka", "untrained"):
            own = [self.at(block, kind).get(metric) for block in self.blocks]
            if not any(own):
                continue
            yield [f"**{(OF_X if of_x else NAMES)[kind]}**", *map(value_cell, own)]
            for null, name in NULLS.items():
                cells = [null_cell(number, null) for number in own]
                if any(cells):
                    yield [name, *cells]
            for constraint in () if of_x else CONSTRAINTS:
                held = [self.at(block, kind, constraint).get(metric) for block in self.blocks]
                if any(held):
                    yield [NAMES[constraint], *map(value_cell, held)]

    def _is_of_x(self, metric: str) -> bool:
        """Whether the SAE and all its controls have the same number at every block."""
        found = [
            [
                self.at(block, "topk", constraint).get(metric, {}).get("value")
                for block in self.blocks
            ]
            for constraint in (None, *CONSTRAINTS)
        ]
        return any(found[0]) and all(values == found[0] for values in found)


def value_cell(number: dict[str, Any] | None) -> str:
    """Value ± half of its interval, and in brackets the number behind it."""
    if not number or number["value"] is None:
        return "–"
    text = short(number["value"])
    if number.get("low") is not None:
        text += f" ±{short((number['high'] - number['low']) / 2)}"
    return text + (f" ({number['support']:,})" if "support" in number else "")


def null_cell(number: dict[str, Any] | None, null: str) -> str:
    """Mean of a null, with p where there are many draws; ! where the number is not past it."""
    found = (number or {}).get("nulls", {}).get(null)
    if not found or found.get("mean") is None:
        return ""
    text = short(found["mean"])
    if found["n"] >= 19 and "p" in found:
        text += f" (p {short_p(found['p'])})"
    return text + ("!" if found.get("left_behind") is False else "")


def short(value: float) -> str:
    """Three decimals below 10, without a leading zero."""
    value = round(value, 3) + 0.0  # no −0
    text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return (
        text.replace("0.", ".", 1).replace("-", "−") if abs(value) < 1 else text.replace("-", "−")
    )


def short_p(p: float) -> str:
    return f"{p:.2f}".lstrip("0")


def metric_table(found: Stored, *metrics: str) -> str:
    """The tables of metrics `evaluator/metric`, or of the headlines of an evaluator."""
    parts = []
    for name in metrics:
        evaluator = name.partition("/")[0]
        info = found.data["evaluators"].get(evaluator)
        if info is None:
            return "Not measured here."
        headlines = shown_metrics(info["headlines"], info["directions"])
        if not info["directions"]:
            parts.append(descriptive_table(found, evaluator))
        for metric in [name] if "/" in name else [f"{evaluator}/{m}" for m in headlines]:
            head = [f"`{metric.partition('/')[2]}`", *(f"block {b}" for b in found.blocks)]
            parts.append(table(head, found.rows(metric)))
    return "\n\n".join(parts)


def descriptive_table(found: Stored, evaluator: str) -> str:
    """All metrics of an evaluator without directions: of TopK, and of the untrained model."""
    rows = []
    for kind in ("topk", "untrained"):
        known = dict.fromkeys(key for block in found.blocks for key in found.at(block, kind))
        for key in known:
            if key.startswith(f"{evaluator}/"):
                cells = [value_cell(found.at(block, kind).get(key)) for block in found.blocks]
                rows.append([f"{NAMES[kind]}: `{key.partition('/')[2]}`", *cells])
    return table(["", *(f"block {b}" for b in found.blocks)], rows)


def glance_table(found: Stored) -> str:
    """Which metric tells a trained SAE from what, and at which blocks (TopK)."""
    columns = (*NULLS, *CONSTRAINTS, "untrained")
    rows = []
    for evaluator, info in found.data["evaluators"].items():
        for metric in shown_metrics(info["headlines"], info["directions"]):
            key = f"{evaluator}/{metric}"
            higher = info["directions"].get(metric)
            own = {block: found.at(block, "topk").get(key) for block in found.blocks}
            if higher is None or not any(own.values()):
                continue
            draws = max(
                (n["nulls"]["permuted_classes"]["n"] for n in own.values()
                 if n and "permuted_classes" in n.get("nulls", {})), default=0,
            )  # fmt: skip
            cells = [str(draws or "–")]
            for column in columns:
                told = [tells(found, b, key, column, higher) for b in found.blocks]
                past = [str(b) for b, yes in zip(found.blocks, told, strict=True) if yes]
                judged = any(yes is not None for yes in told)
                cells.append(", ".join(past) if past else "no" if judged else "–")
            rows.append([f"`{evaluator}` {metric.replace('_', ' ')}", *cells])
    names = [NULLS.get(c) or NAMES[c] for c in columns[:-1]] + ["untrained model"]
    return table(["metric", "draws", *names], rows)


def setting(found: Stored) -> str:
    """What was measured on what, and the L0 of every SAE."""
    data, permuted = found.data, found.data["permuted_classes"]
    training = data["training_images"]
    text = (
        f"Trained on {training['trained']:,} images, those of the untrained model on {training['untrained']:,}. Measured on "
        f"{data['images']:,} others, {data['fit_images']:,} of them to fit; {data['classes']:,} classes in "
        f"{data['nodes']:,} nodes, {permuted['movable']} of {permuted['present']} classes can be exchanged; "
        f"{permuted['draws']} distinct trees, {data['settings']['n_twins']} twins, "
        f"{data['settings']['n_groups']} groups for the intervals, one seed."
    )
    l0 = {
        (s["block"], s["model"], s["architecture"], s["constraint"]): s["l0"] for s in data["saes"]
    }
    rows = []
    for model, kind, constraint in dict.fromkeys(key[1:] for key in l0):
        name = NAMES["untrained"] if model == "untrained" else NAMES[kind.partition("_")[0]]
        of = [l0.get((block, model, kind, constraint)) for block in found.blocks]
        cells = ["–" if n is None else f"{n:.1f}" for n in of]
        rows.append([f"{name}, {NAMES[constraint]}" if constraint else name, *cells])
    return f"{text}\n\n{table(['L0 of an image', *(f'block {b}' for b in found.blocks)], rows)}"


def tells(found: Stored, block: int, key: str, other: str, higher: bool) -> bool | None:
    """Whether the TopK SAE is past a null, or past another SAE by more than both intervals."""
    number = found.at(block, "topk").get(key)
    if not number or number["value"] is None or "undecided" in number:
        return None
    if other in NULLS:
        null = number.get("nulls", {}).get(other)
        if null is None:
            return None
        return null["q"] <= 0.05 if "q" in null else null.get("left_behind")
    rival = found.at(block, "untrained").get(key) if other == "untrained" else found.at(block, "topk", other).get(key)  # fmt: skip
    if not rival or rival["value"] is None or number.get("low") is None or rival.get("low") is None:
        return None
    if rival["value"] == number["value"]:  # of the activations, not of the SAE
        return None
    return number["low"] > rival["high"] if higher else number["high"] < rival["low"]


# Of known truth -----------------------------------------------------------------------------------


def planted_table(data: Mapping[str, Any]) -> str:
    """The headline metrics of planted detectors, each beside the mean over its permuted trees."""
    text = (
        f"Tiny-ImageNet's tree ({data['classes']:,} classes, {data['images_per_class']} images each, "
        f"{data['nodes']:,} nodes of which {data['distinct_nodes']:,} have distinct classes), one latent for "
        "each distinct node, no model."
    )
    rows = []
    for key in data["headlines"]:
        numbers = [world.get(key) for world in data["worlds"].values()]
        if any(number and number["value"] is not None for number in numbers):
            rows.append([metric_name(key), *map(planted_cell, numbers)])
    return f"{text}\n\n{table(['metric', *data['worlds']], rows)}"


def planted_cell(number: dict[str, Any] | None) -> str:
    """Value, and in brackets the mean over the permuted trees and p; ! where it is not past them."""
    if not number or number["value"] is None:
        return "–"
    null = (
        null_cell(number, "permuted_classes").replace("(", "").replace(")", "").replace(" p", ", p")
    )
    return f"{short(number['value'])} ({null})" if null else short(number["value"])


def indicators_table(data: Mapping[str, Any]) -> str:
    """The metrics of node indicators, beside their nulls by labels."""
    text = (
        f"A tree of {data['classes']} classes and {data['nodes']} nodes, {data['images']} images, "
        f"{data['draws']} permuted trees."
    )
    nulls = ("permuted_classes", "shuffled")
    rows = [
        [metric_name(key), value_cell(number), *(null_cell(number, null) for null in nulls)]
        for key, number in data["indicators"].items()
    ]
    return f"{text}\n\n{table(['metric', 'node indicators', *(NULLS[n] for n in nulls)], rows)}"


def cases_table(data: Mapping[str, Any]) -> str:
    """Single metrics of latents and trees whose truth is known, each with what it is compared with."""
    rows = [
        [
            metric_name(case["metric"]),
            case["of"],
            amount(case["value"]),
            "; ".join(f"{name}: {amount(value)}" for name, value in case["beside"].items()),
        ]
        for case in data["cases"]
    ]
    return table(["metric", "of", "value", "beside it"], rows)


def no_hierarchy_table(data: Mapping[str, Any]) -> str:
    """The shares of p ≤ .05 of the headline metrics, for the worlds without and for those with hierarchy."""
    of_trees = [tree for of in data["runs"].values() for tree in of]
    trees = [tree for tree in TREES if tree in of_trees]
    parts = [f"Trees in each cell: {', '.join(trees)}; –: nothing could be judged."]
    for title, worlds in WORLDS.items():
        columns = [f"{world}, {sizes}" for world in worlds for sizes in CLASS_SIZES]
        runs = [n for _, column, n in entries(data["runs"]) if column in columns]
        if not runs:
            continue
        text = f"{title} hierarchy: {min(runs):,} to {max(runs):,} runs of every cell."
        barred = title == "Without"
        if barred:
            cells = [cell for _, column, cell in entries(data["cells"]) if column in columns]
            judged, past = map(sum, zip(*cells, strict=True))
            text += (
                f" {sum(above_bar(*cell) for cell in cells)} of {len(cells):,} cells are bold, those of metrics that "
                f"are not shown included, and {past / judged:.3f} of all p are at most {LEVEL}."
            )
        rows = []
        for key in data["headlines"]:
            of = data["cells"].get(key, {})
            row = [
                " ".join(
                    share(*of.get(tree, {}).get(column, (0, 0)), barred=barred) for tree in trees
                )
                for column in columns
            ]
            if any(cell.strip("– ") for cell in row):
                rows.append([metric_name(key), *row])
        parts += [text, table(["metric", *columns], rows)]
    return "\n\n".join(parts)


def entries(counts: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(tree, "world, sizes", content) of all cells of "runs" or "cells"."""
    for of_trees in counts.values():
        for tree, of in of_trees.items():
            for column, content in of.items():
                yield tree, column, content


def above_bar(judged: int, past: int) -> bool:
    """Whether the share is above .07, and more than two standard errors above .05."""
    allowed = max(BAR, LEVEL + 2 * math.sqrt(LEVEL * (1 - LEVEL) / judged))
    return past / judged > allowed


def share(judged: int, past: int, *, barred: bool) -> str:
    """The share of judged runs past the null; bold where it is above the bar."""
    if not judged:
        return "–"
    value = past / judged
    text = f"{value:.2f}".lstrip("0") if value < 1 else "1"
    return f"**{text}**" if barred and above_bar(judged, past) else text


def metric_name(key: str) -> str:
    """`evaluator` metric, of a key "evaluator/metric"."""
    evaluator, _, metric = key.partition("/")
    return f"`{evaluator}` {metric}"


def amount(value: float | None) -> str:
    """A count, or a number as `short` writes it."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else short(value)


# Of costs -----------------------------------------------------------------------------------------


def cost_table(found: Found) -> str:
    """Time of the evaluators and of what it is compared with, and memory."""
    counted, mono, delta = (found[n] for n in ("evaluators", "monosemanticity", "hyperbolicity"))
    drawn = [found["draws"], found["draws_21841"]]
    rows = [
        [
            f"values, with the labels shuffled and with {counted['permutations']} permuted trees",
            size(counted),
            *beside(counted["spent"], counted["seconds"]["encoding"], "encoding"),
            gib(counted["peak GiB"]),
        ],
        *(
            [
                f"{of['draws']} permuted trees alone",
                size(of),
                *beside(of["evaluators"]["all"]["draws"], of["encoding"], "encoding"),
                gib(of["peak GiB"]),
            ]
            for of in drawn
        ),
        *(
            ["MonoScore", size(mono), *beside(mono["seconds"]["streamed"], mono["seconds"][peer], name), ""]
            for peer, name in (
                ("pairs in turn", "the pairs in turn, as published"),
                ("pairs as matrices", "all pairs at once, as dense matrices"),
            )
        ),
        [
            "δ from one base point",
            f"{delta['points']:,} points",
            *beside(delta["seconds"]["ours"], None, ""),
            f"{gib(delta['GiB'])}, all triples {gib(delta['GiB of all triples'])}",
        ],
    ]  # fmt: skip
    machines = dict.fromkeys(on_what(of) for of in (counted, *drawn, mono, delta))
    head = ["", "of", "time", "beside", "ratio", "memory"]
    return f"{table(head, rows)}\n\n{'; '.join(machines)}."


def size(of: Mapping[str, Any]) -> str:
    """How many images, classes and latents."""
    return ", ".join(f"{of[n]:,} {n}" for n in ("images", "classes", "latents") if n in of)


def beside(own: float | None, peer: float | None, name: str) -> list[str]:
    """Ours in seconds, what it is compared with, and ours over that."""
    if own is None or peer is None:
        return [seconds(own), "", ""]
    share = own / peer
    ratio = f"{share:.2f}".lstrip("0") if share >= 0.1 else f"1/{float(f'{1 / share:.2g}'):,.0f}"
    return [seconds(own), f"{name}: {seconds(peer)}", ratio]


def seconds(value: float | None) -> str:
    """A time, with its unit."""
    if value is None:
        return "–"
    if value >= 120:
        return f"{value / 60:.0f} min"
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def gib(value: float) -> str:
    """Memory, with its unit."""
    return f"{value:.1f} GiB" if value >= 1 else f"{value:.2f} GiB".lstrip("0")


def speed(data: Mapping[str, Any]) -> str:
    """How many times as fast the sparse step is: the lowest and the highest of SAELens's architectures."""
    named = ("topk", "batchtopk", "matryoshka_batchtopk")
    ratios = [r["ratio"] for r in data["rows"] if r["architecture"].partition(",")[0] in named]
    return f"{min(ratios):.1f} to {max(ratios):.1f}"


# Pages --------------------------------------------------------------------------------------------

OF_STUDY: dict[str, Callable[[Stored], str]] = {"glance": glance_table, "setting": setting}
"""What a marker of a study names, where it does not name metrics."""
OTHERS: dict[str, Callable[[Found], str]] = {
    "no_hierarchy: headlines": lambda found: no_hierarchy_table(found["no_hierarchy"]),
    "planted: headlines": lambda found: planted_table(found["planted"]),
    "ideal: indicators": lambda found: indicators_table(found["ideal"]),
    "ideal: cases": lambda found: cases_table(found["ideal"]),
    "cost: evaluators": cost_table,
    "sparse_step: times as fast": lambda found: speed(found["sparse_step"]),
    **{
        f"demo_model: {level}": lambda found, level=level: (
            f"{100 * found['demo_model']['validation_accuracy'][level]:.0f} %"
        )
        for level in ("species", "realm")
    },
}
"""Every other marker."""


def made(source: str, shown: tuple[int, ...], what: str, found: Found) -> str:
    """The text between markers.

    Raises:
        KeyError: nothing is made of this marker.
    """
    if source not in ("photographs", "demo"):
        return OTHERS[f"{source}: {what}"](found)
    study = Stored(found[source], shown)
    return OF_STUDY[what](study) if what in OF_STUDY else metric_table(study, *what.split())


def write(text: str, found: Found) -> str:
    """A page with its tables and numbers made again from the stored results."""

    def again(match: re.Match[str]) -> str:
        source, blocks, what, newline = match.groups("")[:4]
        shown = tuple(map(int, blocks.strip("@").split(","))) if blocks else ()
        text = made(source, shown, what, found)
        text = f"\n\n{text}\n\n" if newline else text
        return f"<!-- {source}{blocks}: {what} -->{text}<!-- /{source} -->"

    return MARKED.sub(again, text)


def load() -> dict[str, Any]:
    """Name -> content of all stored results, and of the demo's model."""
    files = {path.stem: path for path in RESULTS.glob("*.json")} | {"demo_model": MODEL}
    return {name: json.loads(path.read_text()) for name, path in files.items()}


def write_pages() -> None:
    """Write all tables and numbers anew."""
    found = load()
    for page in PAGES:
        page.write_text(write(page.read_text(), found))


if __name__ == "__main__":
    write_pages()
