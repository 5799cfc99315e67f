"""`taxolens train`: trains SAEs at one or many hook points, evaluates them, writes the report."""

from __future__ import annotations

import argparse
from typing import Any

from ...hooks.images.workers import worker_context
from ...registry.ranks import Ranks
from . import outcome, quick_check, shell

NO_WORKERS = (None, 0, "0", "none")  # or none that are known before the images are

HELP = """\
usage: taxolens train [--preset NAME] [--config study.yaml] [FLAG VALUE ...]

Trains SAEs on the activations of a vision model, through SAELens's trainer: one SAE, or many hook
points from one forward pass. Then evaluates them on held-out images and writes the report.
Settings come from the preset, then the file, then the flags; the later one wins.

where the settings come from:
  --preset NAME                  a packaged study; `taxolens list presets` shows them
  --config FILE                  a YAML file: any flag below, `name: value`
  --architecture NAME            the kind of SAE, standard by default; its own fields become flags
                                 (--k for topk ...); `taxolens list architectures` shows them

what is tapped:
  --model_name NAME              a Hugging Face model, or a folder
  --hook_names NAME ...          hook points or patterns: blocks.5.hook_resid_post
                                 "blocks.*.hook_resid_post" "blocks.{0,5,11}.hook_mlp_out"
  --tokens CHOICE                class (default), patch, register, all, mean_patch
  --image_size N                 pixels a side, where the model allows another than its own

on which images:
  --dataset_path PATH            hub name, folder of class folders, parquet file or folder
  --split NAME                   train by default
  --holdout X                    hold out this share of every class for the evaluation, or
  --eval_dataset_path, --eval_split
                                 other held-out images; validation or test by default
  --max_images N                 use the first N images only
  --num_workers N                processes that decode images; by default the cores but one

how it trains:
  --training_tokens N            or --epochs X: passes over the images
  --d_sae N                      or --expansion_factor X: d_sae = X * d_in, d_in from the model
  --lr X  --train_batch_size_tokens N  --seed N  --device DEVICE  --dtype DTYPE
  --use_cached_activations       keep the activations of one forward pass on disk and train on them
  --cached_activations_path PATH
  --n_checkpoints N              checkpoints on the way, under --checkpoint_path
  --resume_from_checkpoint PATH  go on from a checkpoint; `auto`: from the newest intact one

what comes out:
  --output_path PATH             SAEs, results.json and report.html; `output` by default
  --taxonomy NAME                the class tree: a name of `taxolens list taxonomies`, or a file
  --evaluators NAME ...          which evaluators run
  --no_evaluate                  stop after training
  --log_to_wandb BOOL  --wandb_project NAME  --run_name NAME
  --dry_run                      check everything, print the plan and the time that it will take,
                                 train nothing; --ranks N: on N processes
  --json                         the plan or the results as JSON on stdout

  --help_all                     every flag, with SAELens's own description of each

examples:
  taxolens train --preset laptop --dataset_path photos/ --taxonomy tree.csv --holdout 0.2
  taxolens train --config study.yaml --architecture topk --k 32 --hook_names "blocks.*.hook_resid_post"
"""


def parser() -> argparse.ArgumentParser:
    """Every flag of every architecture, for completion; `train_flags` has the parser that is used."""
    made = argparse.ArgumentParser(prog="taxolens train")
    for name, annotation in {**quick_check.sae_fields(), **quick_check.runner_fields()}.items():
        options: dict[str, Any] = {}
        if annotation == "bool":
            options = {"nargs": "?", "choices": ["true", "false"]}
        elif annotation.startswith("list"):
            options = {"nargs": "*"}
        made.add_argument(f"--{name}", **options)
    made.add_argument("--help_all", action="store_true", help="every flag")
    return made


def run(args: list[str]) -> None:
    """Train, evaluate and report; with `--dry_run`, print the plan only."""
    if not args or "-h" in args or "--help" in args:
        print(HELP, end="")
        return
    if "--help_all" in args:
        with shell.working():
            from .train_flags import full_help

            text = full_help(args)
        print(text, end="")
        return
    if quick_check.check(args).get("num_workers") not in NO_WORKERS and "--dry_run" not in args:
        worker_context()  # its imports run in parallel with ours
    with shell.working() as print_json:
        with shell.importing():
            from ..study.job import Job
            from .train_flags import parse

        command = parse(args)
        is_first = Ranks.here().is_first  # of the processes that torchrun has started
        job = Job(command.study, evaluate=command.evaluate)
        plan = job.plan()
        shown: dict[str, Any] = {"plan": plan}
        evaluated = None
        if command.dry_run:
            if is_first:
                plan["cost"] = job.cost(command.ranks)
        else:
            if is_first:
                shell.print_notes(described(plan))
            job.train()
            if command.evaluate:
                goes_on = f"`taxolens evaluate {plan['output_path']}` goes on: the SAEs are trained"
                with shell.continued_by(goes_on):
                    evaluated = job.evaluate()
                shown |= outcome.as_dict(*evaluated)
        if not is_first:
            return
        if command.json:
            print_json(shown)
    if not command.json:
        if command.dry_run:
            print("\n".join(described(plan)))
        else:
            print(f"SAEs: {plan['output_path']}")
        if evaluated is not None:
            outcome.show(*evaluated)
    if evaluated is not None:
        outcome.raise_errors(evaluated[0])


def described(plan: dict[str, Any]) -> list[str]:
    """The plan as lines of text, to be checked before a long run."""
    points = plan["hook_points"]
    pairs = sorted({(p["d_in"], width) for p in points.values() for width in p["d_sae"]})
    sizes = [f"{d_in} -> {d_sae}" for d_in, d_sae in pairs]
    shown = list(points) if len(points) <= 4 else [*list(points)[:2], "...", list(points)[-1]]
    per_image = f"{plan['tokens_per_image']:,} {plan['tokens']} token(s) each"
    if plan["images"] is None:
        data = f"streamed, {per_image}"
    else:
        data = f"{plan['images']:,}, {per_image}; {plan['epochs']:,.2f} epochs"
    lines = {
        "model": plan["model"],
        "hook points": f"{len(points)}: {' '.join(shown)}",
        "SAEs": f"{plan['saes']} {', '.join(plan['architectures'])}, d_in -> d_sae {', '.join(sizes)}",
        "images": data,
        "training": f"{plan['training_tokens']:,} tokens = {plan['steps']:,} steps of {plan['batch']:,}",
        "disk": ", ".join(
            f"{field} {_bytes(size)}" for field, size in plan["bytes"].items() if size
        ),
        "output": plan["output_path"],
        "resumes from": plan["resumes_from"],
    }
    evaluation = plan["evaluation"]
    if evaluation:
        present, classes = evaluation["classes_with_images"], evaluation["classes"]
        shown = f"{classes}" if present == classes else f"{present} of {classes}"
        held_out = f", {evaluation['holdout']:g} held out" if evaluation["holdout"] else ""
        lines["evaluation"] = (
            f"{evaluation['images']:,} images ({evaluation['split']}{held_out}), {shown} "
            f"classes in a tree of {evaluation['nodes']} nodes; {', '.join(evaluation['evaluators'])}"
        )
    if "cost" in plan:
        lines |= _of_cost(plan["cost"])
    return [f"{name + ':':<15}{text}" for name, text in lines.items() if text]


def _of_cost(cost: dict[str, Any]) -> dict[str, str]:
    """The lines of the cost, as `calibration.cost_of` gives it."""
    rates, seconds, flops, memory = (cost[k] for k in ("rates", "seconds", "flops", "memory"))
    stages = ", ".join(
        f"{name} {_time(seconds[name])}" for name in ("decode", "forward", "sae", "disk")
    )
    return {
        "arithmetic": f"forward {flops['forward']:.2g} FLOP, SAEs {flops['sae']:.2g} FLOP",
        "traffic": f"{_bytes(cost['bytes_written'])} written, {_bytes(cost['bytes_read'])} read",
        "exchange": f"{_bytes(sent)} of gradients sent by each process, not part of the time"
        if (sent := cost["bytes_exchanged"])
        else "",
        "memory": f"model {_bytes(memory['model'])}, SAEs with optimizer {_bytes(memory['saes'])} a "
        "process, without activations",
        "measured here": f"decode {rates['decode']:,.0f} images/s a core, forward "
        f"{rates['forward']:,.1f} images/s, SAEs together {rates['sae']:,.0f} tokens/s, disk write "
        f"{_bytes(rates['write'])}/s, read {_bytes(rates['read'])}/s ({cost['device']}, "
        f"{cost['threads']} threads, in {_time(cost['calibration_seconds'])})",
        "time": f"{_time(seconds['training'])} for the training on {cost['ranks']} process(es) with "
        f"{cost['cores']} core(s), {cost['num_workers']} worker(s) and such a device each: {stages}",
        "bottleneck": cost["bottleneck"],
    }


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:,.1f} GB"
