"""The whole suite on photographs: SAEs, controls and an untrained model.

    python benchmarks/study.py run --model_name FOLDER --dataset_path FOLDER --output_path FOLDER
    python benchmarks/study.py demo --output_path FOLDER

`run` trains the SAEs of study.yaml on the training split (they share one forward pass and one cache),
then TopK SAEs on the same model with random weights, measures all of them on the validation split
against the ImageNet tree, and stores every number with its interval, support and nulls in
docs/results/photographs.json. Each part is taken up again where it was stopped; `--evaluators NAME NAME`
measures these alone, and their numbers join those of the other runs into the same folder. `demo` runs the demo and
stores its numbers in docs/results/demo.json. Both write the tables of the docs anew (tables.py).

The label names of the dataset are WordNet 3.0 synsets. By default the evaluators that run the model again
for every edit or train for every null (`SLOW`), which take minutes an SAE, are left out; "all" has them too.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables
import timing
from taxolens.plugin.reporting.headlines import with_q
from taxolens.plugin.reporting.results import Results

CONFIG = Path(__file__).with_name("study.yaml")
SLOW = ("detection", "reconstruction", "supervised_dictionary", "meta_sae")
SETTINGS = ("n_permutations", "n_twins", "n_groups", "seed")
UNTRAINED_IMAGES = 4000


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
    results = joined(map(Results.load, sorted(output.glob("results*"))))
    images = {run.name: training_images(run) for run in (trained, untrained)}
    timing.store("photographs", stored(results) | {"training_images": images}, indent=None)


def training_images(run: Path) -> int:
    """Images that the SAEs of a run were trained on, as each of them records."""
    return json.loads(next(run.rglob("cfg.json")).read_text())["metadata"]["n_images"]


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

    timing.store("demo", stored(run_demo(args.output_path).results), indent=None)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    for name in ("model_name", "dataset_path", "output_path"):
        running.add_argument(f"--{name}", required=True)
    running.add_argument("--cache", help="activations of the training split, from an earlier run")
    running.add_argument("--evaluators", nargs="*", default=[], help="names, or all")
    commands.add_parser("demo").add_argument("--output_path", required=True)
    args = parser.parse_args()
    {"run": run, "demo": demo}[args.command](args)
    tables.write_pages()


if __name__ == "__main__":
    main()
