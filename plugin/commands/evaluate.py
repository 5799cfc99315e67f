"""`taxolens evaluate`: measures trained SAEs against a class tree, on held-out images."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser

from ...hooks.images.workers import worker_context
from ...registry.errors import ConfigError
from ...registry.files import UnreadableError, parse_json
from ...registry.ranks import Ranks
from ..evaluation.settings import EvaluationSettings
from . import outcome, shell

HELP = """\
Measures every SAE of one or many runs, or SAEs of other libraries, on held-out images, each number
beside its null controls, and writes results.json and report.html. What is not given is taken from the
SAE's metadata and the run's own settings; all that is missing is listed.
What an earlier call with the same settings has finished is not done again.
Under torchrun the SAEs are dealt to its processes."""

EXAMPLES = """\
examples:
  taxolens evaluate output/my_run --evaluators all
  taxolens evaluate prisma:clip-b-32/layer-9-cls-topk seed0 seed1 --taxonomy imagenet
      --split validation --output_path comparison"""

# The first field of each group of flags, in the order of `EvaluationSettings`.
GROUPS = {
    "evaluators": "what is measured",
    "model_name": "which activations",
    "dataset_path": "on which images",
    "nulls": "null controls",
    "output_path": "how",
}
WITHOUT_FLAG = ("progress",)  # the command always shows it, on stderr


def run(args: list[str]) -> None:
    """Evaluate the runs, write the report, and show the headline numbers."""
    given = vars(parser().parse_args(args))
    as_json, static = given.pop("json"), given.pop("static")
    wandb = {key: given.pop(key) for key in ("log_to_wandb", "wandb_project", "run_name")}
    settings = {key: value for key, value in given.items() if value is not None}
    if settings.get("num_workers"):
        worker_context()  # its imports run in parallel with ours
    with shell.working() as print_json, shell.continued_by("the same command goes on"):
        with shell.importing():
            from ..evaluation.evaluate import evaluate_run
            from ..reporting.report import write_report

        results = evaluate_run(settings.pop("runs"), **settings)
        if not Ranks.here().is_first:
            return
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


def parser() -> shell.Parser:
    """The command's own arguments."""
    made = shell.Parser(
        prog="taxolens evaluate",
        usage="taxolens evaluate RUN ... [FLAG VALUE ...]",
        description=HELP,
        epilog=EXAMPLES,
        argument_default=None,
    )
    add = made.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's output_path, a checkpoint, an SAE folder; a file of another library, "
        "LOADER:PATH; a published SAE, RELEASE:ID",
    )
    add("--json", action="store_true", help="places and headline numbers as JSON on stdout")
    add("--static", action="store_true", help="no interactive figures in the report (5 MB less)")
    add_settings(made)
    add = made.add_argument_group("Weights & Biases").add_argument
    add("--log_to_wandb", action="store_true", help="log the results to Weights & Biases")
    add("--wandb_project", metavar="NAME", default="taxolens")
    add("--run_name", metavar="NAME")
    return made


def add_settings(parser: shell.Parser, without: Sequence[str] = ()) -> None:
    """A flag for every field of `EvaluationSettings` but those `without`, described by its docstring."""
    hints = get_type_hints(EvaluationSettings)
    described = {
        param.arg_name: " ".join((param.description or "").split())
        for param in docstring_parser.parse(EvaluationSettings.__doc__ or "").params
    }
    add = parser.add_argument
    for field in dataclasses.fields(EvaluationSettings):
        if field.name in GROUPS:
            add = parser.add_argument_group(GROUPS[field.name]).add_argument
        if field.name in WITHOUT_FLAG or field.name in without:
            continue
        default, text = field.default, described[field.name]
        if default or type(default) is int:
            shown = " ".join(default) if isinstance(default, tuple) else default
            text += f"; by default {shown}"
        kind = _kind(hints[field.name])
        if field.name.endswith("_path"):
            kind["metavar"] = "PATH"
        add(f"--{field.name}", help=text, **kind)


def _kind(hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a field of this type."""
    kinds = [get_origin(kind) or kind for kind in (get_args(hint) or (hint,))]
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Sequence or Sequence in kinds:
        return {"nargs": "+", "metavar": "NAME"}
    if Mapping in kinds:
        return {"type": _options, "metavar": "JSON"}
    if int in kinds or float in kinds:
        return {"type": int, "metavar": "N"} if int in kinds else {"type": float, "metavar": "X"}
    return {"metavar": "NAME"}


def _options(text: str) -> dict[str, Any]:
    try:
        options = parse_json(text)
    except UnreadableError as error:
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(
            "options", "not an object", given=text, allowed="evaluator names with their options"
        )
    return options
