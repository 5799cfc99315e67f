"""`taxolens report`: writes the report of an evaluation from its results alone."""

from __future__ import annotations

from pathlib import Path

from . import outcome, shell

HELP = """\
Writes report.html, one file that opens without a network, from the results of an evaluation."""

EXAMPLES = """\
examples:
  taxolens report output/my_run
  taxolens report output/my_run/results.json --wandb_dashboard my-team/my-project"""


def parser() -> shell.Parser:
    """The command's own arguments."""
    made = shell.Parser(prog="taxolens report", description=HELP, epilog=EXAMPLES)
    made.add_argument("results", metavar="RESULTS", help="a results.json, or the folder it is in")
    made.add_argument(
        "--output_path", type=Path, metavar="FILE", help="by default report.html beside the results"
    )
    made.add_argument(
        "--static", action="store_true", help="leave the interactive figures out (5 MB less)"
    )
    made.add_argument(
        "--wandb_dashboard",
        metavar="PROJECT",
        help="also save a W&B workspace for these metrics; needs wandb-workspaces and a key",
    )
    made.add_argument("--json", action="store_true", help="where it is, and the headline numbers")
    return made


def run(args: list[str]) -> None:
    """Write the report anew and show the headline numbers."""
    options = parser().parse_args(args)
    with shell.working() as print_json:
        from ..reporting.report import write_report
        from ..reporting.results import Results

        results = Results.load(options.results)
        report = write_report(results, options.output_path, interactive=not options.static)
        if options.wandb_dashboard:
            from ..reporting.wandb_dashboard import save_dashboard

            address = save_dashboard(results, options.wandb_dashboard)
            shell.print_notes([f"W&B dashboard: {address}"])
        if options.json:
            print_json(outcome.as_dict(results, report))
    if not options.json:
        outcome.show(results, report)
