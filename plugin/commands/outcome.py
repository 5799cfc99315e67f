"""Output of a finished evaluation: as text, as JSON, and as an error where evaluators failed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...registry.errors import TaxolensError
from . import shell

if TYPE_CHECKING:
    from ..reporting.results import Results


def as_dict(results: Results, report: Path) -> dict[str, Any]:
    """For `--json`: the paths of all files, whether every SAE is measured, headline numbers beside their nulls."""
    from ..reporting.compare import METRICS_FOLDER
    from ..reporting.metric_table import summary_rows
    from ..reporting.results import RESULTS_FILENAME

    return {
        "results": _place(results) / RESULTS_FILENAME,
        "report": report,
        "metrics": _place(results) / METRICS_FOLDER,
        "complete": results.complete,
        "errors": results.errors,
        "summary": summary_rows(results),
    }


def show(results: Results, report: Path) -> None:
    """Print the summary table, and the paths of the other files, on stdout."""
    from ..reporting.compare import METRICS_FOLDER
    from ..reporting.headlines import headlines
    from ..reporting.metric_table import UNFINISHED, legend, summary_table, verdict

    console = shell.console()
    if headlines(results):
        console.print(summary_table(results))
        for text in (legend(results), verdict(results)):
            console.print(text, highlight=False, markup=False)
    else:
        console.print("No evaluator gave a number.", highlight=False)
    if not results.complete:
        console.print(f"[bold yellow]Unfinished.[/] {UNFINISHED}", highlight=False)
    lines = [f"report: {report}"]
    if (metrics := _place(results) / METRICS_FOLDER).is_dir():
        lines.insert(0, f"a table and a figure for every metric: {metrics}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def raise_errors(results: Results) -> None:
    """Report failed evaluators, after everything else is written.

    Raises:
        TaxolensError: an evaluator failed; the message names each with its error.
    """
    if results.errors:
        named = "; ".join(f"{where}: {message}" for where, message in results.errors.items())
        raise TaxolensError(
            "evaluators",
            f"some failed; the numbers of the others are in {_place(results)}; failed: {named}",
        )


def _place(results: Results) -> Path:
    return results.folder or Path()
