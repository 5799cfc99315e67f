"""`taxolens demo`: a small training and evaluation, on the model and images inside the package."""

from __future__ import annotations

from . import outcome, shell

HELP = """\
Runs the main job on drawn pictures with a true class tree and a small vision transformer, both
inside the package: trains a class-token SAE at every block in one pass, measures them on held-out
pictures, writes report.html and an offline W&B run, and prints one table of the numbers beside
their null controls. Two CPU cores, 3 minutes, no network, no account."""

EXAMPLES = """\
examples:
  taxolens demo
  taxolens demo --output_path runs/demo --json"""


def parser() -> shell.Parser:
    """The command's own arguments."""
    made = shell.Parser(prog="taxolens demo", description=HELP, epilog=EXAMPLES)
    made.add_argument(
        "--output_path",
        metavar="PATH",
        default="demo_report",
        help="folder; demo_report by default",
    )
    made.add_argument("--json", action="store_true", help="places and numbers as JSON on stdout")
    return made


def run(args: list[str]) -> None:
    """Run the demo and show its results."""
    options = parser().parse_args(args)
    with shell.working() as print_json:
        with shell.importing():
            from ..study.demo import run_demo

        demo = run_demo(options.output_path)
        if options.json:
            found = outcome.as_dict(demo.results, demo.report)
            print_json({**found, "wandb": demo.wandb_folder, "seconds": round(demo.seconds, 1)})
    if not options.json:
        outcome.show(demo.results, demo.report)
        print(f"W&B run, offline: {demo.wandb_folder}\nthe demo ran for {demo.seconds:.0f} s")
    outcome.raise_errors(demo.results)
