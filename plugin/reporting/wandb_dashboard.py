"""A W&B workspace for an evaluation, whose panels show what `log_results` logs.

It needs the extra `workspaces`. Building it needs no account; saving it needs an API key of W&B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...registry.errors import ConfigError, TaxolensError
from .headlines import ShownMetric, headlines
from .results import Results
from .wandb_log import flat_metrics, is_below, layer_rows, prefixed_series

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

TRAINING_METRICS = ("losses/overall_loss", "metrics/explained_variance", "metrics/l0")


def dashboard(results: Results, where: str, *, name: str = "taxolens") -> Workspace:
    """The workspace: headline metrics, then every metric of each evaluator, then the training.

    A metric is drawn with its nulls, over layers where the SAEs form such curves.

    Args:
        results: the results.
        where: "PROJECT" or "ENTITY/PROJECT".
        name: of the saved view.

    Raises:
        ConfigError: the extra is not installed, or `where` is not a project.
    """
    entity, _, project = where.rpartition("/")
    if not project or "/" in entity:
        raise ConfigError(
            "wandb_dashboard", "not possible", given=where, allowed="PROJECT or ENTITY/PROJECT"
        )
    try:
        from wandb_workspaces.workspaces import Section, Workspace
    except ImportError as error:
        raise ConfigError(
            "wandb_dashboard",
            "wandb-workspaces is not installed",
            allowed="pip install 'taxolens[workspaces]'",
        ) from error
    groups: dict[str, Sequence[ShownMetric]] = {"headlines": headlines(results)}
    metrics = [ShownMetric(e, m, results.label(e, m)) for e, m in results.metric_names()]
    for evaluator in dict.fromkeys(metric.evaluator for metric in metrics):
        groups[evaluator] = [metric for metric in metrics if metric.evaluator == evaluator]
    panels = {group: list(_panels(results, wanted)) for group, wanted in groups.items()}
    panels["training"] = list(_training_panels(results))
    return Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            Section(name=group, panels=found, is_open=group == "headlines")
            for group, found in panels.items()
            if found
        ],
    )


def save_dashboard(results: Results, where: str, *, name: str = "taxolens") -> str:
    """Save the workspace as a view of the project; return its address.

    Raises:
        ConfigError: see `dashboard`.
        TaxolensError: W&B did not save it.
    """
    workspace = dashboard(results, where, name=name)
    try:
        workspace.save()
    except Exception as error:  # W&B's errors have no common base
        raise TaxolensError("wandb_dashboard", f"W&B did not save it: {error}") from error
    return workspace.url


def _panels(results: Results, shown: Sequence[ShownMetric]) -> Iterator[Any]:
    from wandb_workspaces.reports.v2 import BarPlot, LinePlot

    curves = prefixed_series(results)
    for headline in shown:
        metric = f"{headline.evaluator}/{headline.metric}"
        for series, prefix in curves:
            logged = dict.fromkeys(key for row in layer_rows(series) for key in row)
            lines = [key for key in logged if is_below(key, f"layers/{metric}")]
            if lines:
                title = " · ".join(filter(None, [headline.title, prefix.rstrip("/")]))
                ys = [f"{prefix}{line}" for line in lines]
                yield LinePlot(title=title, x=f"{prefix}layers/layer", y=list(ys))
        if not curves:
            bars = [key for key in flat_metrics(results) if key.endswith(f"eval/{metric}")]
            if bars:
                yield BarPlot(title=headline.title, metrics=list(bars))


def _training_panels(results: Results) -> Iterator[Any]:
    from wandb_workspaces.reports.v2 import LinePlot

    names = list(dict.fromkeys(sae.name for sae in results.saes))
    for metric in TRAINING_METRICS:
        keys = [f"{name}/{metric}" for name in names] if len(names) > 1 else [metric]
        yield LinePlot(title=metric, y=list(keys))
