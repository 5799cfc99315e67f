"""`taxolens evaluate`: trained SAEs against a class tree, on held-out images."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ...registry.errors import ConfigError
from . import outcome, shell

HELP = """\
Measures every SAE of one or many runs on held-out images, each number beside its null controls,
and writes results.json and report.html. What is not given is taken from the run's own settings.
What an earlier call with the same settings has finished is not done again."""

EXAMPLES = """\
examples:
  taxolens evaluate output/my_run --evaluators all
  taxolens evaluate seed0 seed1 --taxonomy imagenet --split validation --output_path comparison"""


def run(args: list[str]) -> None:
    parser = _parser()
    given = vars(parser.parse_args(args))
    as_json, static = given.pop("json"), given.pop("static")
    wandb = {key: given.pop(key) for key in ("log_to_wandb", "wandb_project", "run_name")}
    settings = {key: value for key, value in given.items() if value is not None}
    with shell.working() as print_json:
        from ..evaluation.evaluate import evaluate_run
        from ..reporting.report import write_report

        results = evaluate_run(settings.pop("runs"), **settings)
        report = write_report(results, interactive=not static)
        if wandb["log_to_wandb"]:
            from ..reporting.wandb_log import log_results

            log_results(
                results, report=report, project=wandb["wandb_project"], name=wandb["run_name"]
            )
        if as_json:
            print_json(outcome.as_dict(results, report))
    if not as_json:
        outcome.show(results, report)
    outcome.raise_errors(results)


def _parser() -> shell.Parser:
    parser = shell.Parser(
        prog="taxolens evaluate",
        usage="taxolens evaluate RUN ... [FLAG VALUE ...]",
        description=HELP,
        epilog=EXAMPLES,
        argument_default=None,
    )
    add = parser.add_argument
    add(
        "runs", nargs="+", metavar="RUN", help="a run's output_path, a checkpoint, or an SAE folder"
    )
    add("--output_path", metavar="PATH", help="where everything goes; by default into the run")
    add("--json", action="store_true", help="places and headline numbers as JSON on stdout")
    add("--static", action="store_true", help="no interactive figures in the report (5 MB less)")

    add = parser.add_argument_group("what is measured").add_argument
    add(
        "--evaluators",
        nargs="+",
        metavar="NAME",
        help="names of `taxolens list evaluators`, or all",
    )
    add(
        "--options",
        type=_options,
        metavar="JSON",
        help='options of evaluators: \'{"lch_height": {"rule": "topk"}}\'',
    )
    add("--taxonomy", metavar="NAME", help="the class tree: a registered name, a folder or a file")
    add("--aggregate", help="many tokens an image: an image's latent is their max or mean")

    add = parser.add_argument_group("on which images").add_argument
    add("--dataset_path", metavar="PATH", help="hub name, folder of class folders, parquet files")
    add("--dataset_name", metavar="NAME", help="the configuration of a dataset with several")
    add("--split", metavar="NAME", help="a held-out one; by default validation, else test")
    add("--image_column", metavar="NAME")
    add("--label_column", metavar="NAME")
    add("--max_images", type=int, metavar="N")
    add("--allow_train_split", action="store_true", help="measure on images trained on; it is said")

    add = parser.add_argument_group("null controls").add_argument
    add("--nulls", nargs="+", metavar="NAME", help="permuted_classes shuffled random neurons")
    add("--controls", nargs="+", metavar="NAME", help="planted: detectors that know the tree")
    add("--n_permutations", type=int, metavar="N", help="draws of the permuted classes; 10")
    add("--seed", type=int, metavar="N")

    add = parser.add_argument_group("how").add_argument
    add("--device", help="by default a GPU where there is one")
    add("--batch_size", type=int, metavar="N", help="images in one forward pass; 64")
    add("--num_workers", type=int, metavar="N", help="processes that decode images")
    add("--keep_activations", action="store_true", help="keep the activations of the images too")
    add("--log_to_wandb", action="store_true", help="log the results to Weights & Biases")
    add("--wandb_project", metavar="NAME", default="taxolens")
    add("--run_name", metavar="NAME")
    return parser


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error})") from None
    if not isinstance(options, dict):
        raise ConfigError(f"options: given {text!r}; allowed: evaluator names with their options.")
    return options
