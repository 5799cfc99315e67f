"""The whole suite on photographs: SAEs, controls and an untrained model, and the tables of the docs.

    python benchmarks/study.py run --model_name FOLDER --dataset_path FOLDER --output_path FOLDER
    python benchmarks/study.py demo --output_path FOLDER
    python benchmarks/study.py write

`run` trains the SAEs of study.yaml on the training split (they share one forward pass and one cache),
then TopK SAEs on the same model with random weights, measures all of them on the validation split
against the ImageNet tree, and stores every number with its interval, support and nulls in
docs/results/photographs.json. Each part is taken up again where it was stopped; `--evaluators NAME NAME`
measures these alone, and their numbers join those of the other runs into the same folder. `demo` runs the demo and
stores its numbers in docs/results/demo.json. `write`, which ends the others too, writes the tables of
README.md and docs/evaluators.md from these files, between markers such as `<!-- photographs: glance -->`
and `<!-- /photographs -->` (`demo@0,3: pair_depth` shows two blocks). The numbers of planted detectors are those
of planted.py.

The label names of the dataset are WordNet 3.0 synsets. By default the evaluators that run the model again
for every edit or train for every null (`SLOW`), which take minutes an SAE, are left out; "all" has them too.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taxolens.plugin.reporting.headlines import with_q
from taxolens.plugin.reporting.results import Results
from taxolens.registry.presentation import shown_metrics

ROOT = Path(__file__).parent.parent
STORED = {
    "photographs": ROOT / "docs" / "results" / "photographs.json",
    "demo": ROOT / "docs" / "results" / "demo.json",
    "planted": ROOT / "docs" / "results" / "planted.json",
}
PAGES = (ROOT / "README.md", ROOT / "docs" / "evaluators.md")
CONFIG = Path(__file__).with_name("study.yaml")
BLOCK = re.compile(r"<!-- (\w+)(@[\d,]+)?: (.*?) -->\n.*?<!-- /\1 -->", re.DOTALL)
SLOW = ("detection", "reconstruction", "supervised_dictionary", "meta_sae")
SETTINGS = ("n_permutations", "n_twins", "n_groups", "seed")
UNTRAINED_IMAGES = 4000
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


# Running ------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Train, measure and store."""
    import taxolens

    output, dataset = Path(args.output_path), ["--dataset_path", args.dataset_path]
    common = ["--config", str(CONFIG), "--no_evaluate", *dataset]
    trained, untrained = output / "trained", output / "untrained"
    if not (trained / "runner_cfg.json").exists():
        cache = args.cache or str(output / "cache")
        train(*common, "--model_name", args.model_name, "--output_path", str(trained),
              "--cached_activations_path", cache)  # fmt: skip
    model = random_weights(Path(args.model_name), output / "untrained-model")
    if not (untrained / "runner_cfg.json").exists():
        only = output / "untrained.yaml"
        only.write_text(without_controls(CONFIG.read_text()))
        common[1] = str(only)
        train(*common, "--model_name", str(model), "--output_path", str(untrained),
              "--max_images", str(UNTRAINED_IMAGES), "--cached_activations_path",
              str(output / "untrained-cache"))  # fmt: skip
    some, by_default = args.evaluators, [n for n in taxolens.EVALUATORS if n not in SLOW]
    taxolens.evaluate_run(
        [trained, untrained],
        evaluators=some or by_default if some != ["all"] else list(taxolens.EVALUATORS),
        split="validation",
        output_path=output / "+".join(["results", *some]),
        keep_activations=True,
    )
    store(joined(map(Results.load, sorted(output.glob("results*")))), "photographs")


def joined(parts: Iterable[Results]) -> Results:
    """The results of a study whose SAEs or evaluators were measured in parts.

    Raises:
        ValueError: two parts have other images, another tree or other settings of the nulls.
    """
    first, *others = parts
    evaluators, saes = dict(first.evaluators), {(sae.run, sae.name): sae for sae in first.saes}
    for part in others:
        for what in ("dataset", "taxonomy", "permuted_classes"):
            if getattr(part, what) != getattr(first, what):
                raise ValueError(f"{part.folder} has another {what} than {first.folder}")
        if any(part.settings[name] != first.settings[name] for name in SETTINGS):
            raise ValueError(f"{part.folder} has other settings than {first.folder}")
        evaluators |= part.evaluators
        for sae in part.saes:
            known = saes.get((sae.run, sae.name), sae)
            both = {**known.evaluators, **sae.evaluators}
            saes[sae.run, sae.name] = replace(known, evaluators=both)
    return with_q(replace(first, evaluators=evaluators, saes=list(saes.values())))


def demo(args: argparse.Namespace) -> None:
    """Run the demo and store its numbers."""
    from taxolens.plugin.study.demo import run_demo

    store(run_demo(args.output_path).results, "demo")


def store(results: Results, name: str) -> None:
    """Write the numbers of the tables to docs/results."""
    STORED[name].parent.mkdir(exist_ok=True)
    STORED[name].write_text(json.dumps(stored(results), separators=(",", ":")) + "\n")


def train(*flags: str) -> None:
    """`taxolens train` in a process of its own."""
    subprocess.run([sys.executable, "-m", "taxolens", "train", *flags], check=True)


def without_controls(config: str) -> str:
    """The study with its TopK SAE alone."""
    import yaml

    settings = yaml.safe_load(config)
    settings["saes"] = {"topk": settings["saes"]["topk"]}
    return yaml.safe_dump(settings)


def random_weights(model: Path, folder: Path) -> Path:
    """The same model with random weights, saved with its preprocessing."""
    import shutil

    import torch
    import transformers

    if not (folder / "config.json").exists():
        config = transformers.AutoConfig.from_pretrained(model)
        torch.manual_seed(0)
        getattr(transformers, config.architectures[0])(config).save_pretrained(folder)
        for file in model.glob("preprocessor_config.json"):
            shutil.copy(file, folder)
    return folder


def stored(results: Results) -> dict[str, Any]:
    """The numbers of the tables, without what they do not need: those with a direction, and all of an
    evaluator that has none."""
    infos = results.evaluators.items()
    descriptive = {name for name, info in infos if set(info.directions.values()) == {None}}
    return {
        "images": results.dataset.n_images,
        "fit_images": results.dataset.n_fit,
        "classes": results.taxonomy.n_classes,
        "nodes": results.taxonomy.n_nodes,
        "permuted_classes": vars(results.permuted_classes),
        "settings": {name: results.settings[name] for name in SETTINGS},
        "versions": {k: v for k, v in results.provenance.items() if k not in ("device", "seconds")},
        "evaluators": {
            name: {
                "directions": {m: d for m, d in info.directions.items() if d is not None},
                "headlines": [headline.metric for headline in info.headlines],
                "labels": info.labels,
                "units": {m: of.unit for m, of in info.support.items()},
            }
            for name, info in infos
        },
        "saes": [
            {
                "block": sae.layer,
                "architecture": sae.trained_as,
                "constraint": sae.constraint,
                "model": "untrained" if sae.run.startswith("untrained") else "trained",
                "d_sae": sae.d_sae,
                "l0": rounded(sae.l0),
                "metrics": {
                    f"{evaluator}/{metric}": number_of(number)
                    for evaluator, found in sae.evaluators.items()
                    for metric, number in found.metrics.items()
                    if results.direction(evaluator, metric) is not None or evaluator in descriptive
                },
            }
            for sae in results.saes
        ],
    }


def number_of(number: Any) -> dict[str, Any]:
    """A number with its interval, support and nulls."""
    found = {"value": rounded(number.value)}
    if math.isfinite(number.low):
        found |= {"low": rounded(number.low), "high": rounded(number.high)}
    if number.support is not None:
        found["support"] = number.support
    if number.undecided:
        found["undecided"] = number.undecided
    nulls = {
        name: {
            key: value if isinstance(value, int) else rounded(value)
            for key in ("mean", "n", "p", "q", "left_behind")
            if (value := getattr(null, key)) is not None and value == value
        }
        for name, null in number.nulls.items()
        if null.n
    }
    return found | ({"nulls": nulls} if nulls else {})


def rounded(value: float) -> float | None:
    """Four significant digits; None where undefined."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


# Tables -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """The stored numbers."""

    data: dict[str, Any]
    shown: tuple[int, ...] = ()

    @classmethod
    def load(cls, name: str) -> Stored:
        return cls(json.loads(STORED[name].read_text()))

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

    def rows(self, metric: str) -> Iterator[tuple[str, list[str]]]:
        """(name, its cell at every block) of a metric: each SAE, its nulls and its controls.

        A number of the activations is the same for every SAE of a model: it has one row.
        """
        of_x = self._is_of_x(metric)
        for kind in ("topk", "untrained") if of_x else ("topk", "matryoshka", "untrained"):
            own = [self.at(block, kind).get(metric) for block in self.blocks]
            if not any(own):
                continue
            yield f"**{(OF_X if of_x else NAMES)[kind]}**", [value_cell(number) for number in own]
            for null, name in NULLS.items():
                cells = [null_cell(number, null) for number in own]
                if any(cells):
                    yield f"{name}", cells
            for constraint in () if of_x else CONSTRAINTS:
                held = [self.at(block, kind, constraint).get(metric) for block in self.blocks]
                if any(held):
                    yield NAMES[constraint], [value_cell(number) for number in held]

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


def table(head: Iterable[str], rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])


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
                rows.append((f"{NAMES[kind]}: `{key.partition('/')[2]}`", cells))
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
            rows.append((f"`{evaluator}` {metric.replace('_', ' ')}", cells))
    names = [NULLS.get(c) or NAMES[c] for c in columns[:-1]] + ["untrained model"]
    return table(["metric", "draws", *names], rows)


def setting(found: Stored) -> str:
    """What was measured on what, and the L0 of every SAE."""
    data, permuted = found.data, found.data["permuted_classes"]
    text = (
        f"{data['images']:,} images, {data['fit_images']:,} of them to fit; {data['classes']:,} classes in "
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
        rows.append((f"{name}, {NAMES[constraint]}" if constraint else name, cells))
    return f"{text}\n\n{table(['L0 of an image', *(f'block {b}' for b in found.blocks)], rows)}"


def planted_table(found: Stored) -> str:
    """The headline metrics of planted detectors, each beside the mean over its permuted trees."""
    data = found.data
    text = (
        f"Tiny-ImageNet's tree ({data['classes']:,} classes, {data['images_per_class']} images each, "
        f"{data['nodes']:,} nodes of which {data['distinct_nodes']:,} have distinct classes), one latent for "
        "each distinct node, no model."
    )
    rows = []
    for key in data["headlines"]:
        numbers = [world.get(key) for world in data["worlds"].values()]
        if any(number and number["value"] is not None for number in numbers):
            evaluator, metric = key.split("/")
            rows.append((f"`{evaluator}` {metric}", [planted_cell(number) for number in numbers]))
    return f"{text}\n\n{table(['metric', *data['worlds']], rows)}"


def planted_cell(number: dict[str, Any] | None) -> str:
    """Value, and in brackets the mean over the permuted trees and p; ! where it is not past them."""
    if not number or number["value"] is None:
        return "–"
    null = (
        null_cell(number, "permuted_classes").replace("(", "").replace(")", "").replace(" p", ", p")
    )
    return f"{short(number['value'])} ({null})" if null else short(number["value"])


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


def write(text: str, results: Mapping[str, Stored]) -> str:
    """A page with its tables made again from the stored numbers."""

    def block(match: re.Match[str]) -> str:
        source, blocks, names = match[1], match[2] or "", match[3].split()
        if source not in results:
            return match[0]
        shown = tuple(map(int, blocks.strip("@").split(","))) if blocks else ()
        found = replace(results[source], shown=shown)
        tables = {"glance": glance_table, "setting": setting}
        if source == "planted":
            made = planted_table(found)
        else:
            made = tables[names[0]](found) if names[0] in tables else metric_table(found, *names)
        return f"<!-- {source}{blocks}: {match[3]} -->\n\n{made}\n\n<!-- /{source} -->"

    return BLOCK.sub(block, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    for name in ("model_name", "dataset_path", "output_path"):
        running.add_argument(f"--{name}", required=True)
    running.add_argument("--cache", help="activations of the training split, from an earlier run")
    running.add_argument("--evaluators", nargs="*", default=[], help="names, or all")
    commands.add_parser("demo").add_argument("--output_path", required=True)
    commands.add_parser("write")
    args = parser.parse_args()
    {"run": run, "demo": demo, "write": lambda _: None}[args.command](args)
    results = {name: Stored.load(name) for name in STORED}
    for page in PAGES:
        page.write_text(write(page.read_text(), results))


if __name__ == "__main__":
    main()
