"""`taxolens list`: the names that a config can use, each with its description and source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import shell

HELP = """\
Shows what a config can name: one line each, with its source and the plugin that registered it.
Without KIND: everything."""

EXAMPLES = """\
examples:
  taxolens list architectures
  taxolens list evaluators --json"""

Row = dict[str, Any]


def parser() -> shell.Parser:
    """The command's own arguments."""
    made = shell.Parser(prog="taxolens list", description=HELP, epilog=EXAMPLES)
    made.add_argument("kind", nargs="?", metavar="KIND", help=f"one of: {', '.join(KINDS)}")
    made.add_argument("--json", action="store_true", help="as JSON, with every field")
    return made


def run(args: list[str]) -> None:
    """Show the names of one kind, or of all."""
    options = parser().parse_args(args)
    if options.kind is not None and options.kind not in KINDS:
        raise shell.ConfigError(shell.unknown("kind", options.kind, KINDS))
    kinds = KINDS if options.kind is None else [options.kind]
    with shell.working() as print_json:
        listed = {kind: KINDS[kind]() for kind in kinds}
        if options.json:
            print_json(listed if options.kind is None else listed[options.kind])
            return
    for kind, rows in listed.items():
        shell.console().print(_table(kind, rows))


def _table(kind: str, rows: list[Row]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=kind, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("name", style="bold", no_wrap=True)
    for column in ("description", "source", "plugin"):
        table.add_column(column, style="dim" if column != "description" else "", overflow="fold")
    for row in rows:
        table.add_row(
            *(shell.escape(str(row[c])) for c in ("name", "description", "source", "plugin"))
        )
    return table


def _architectures() -> list[Row]:
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    from ...registry.table import ARCHITECTURES

    rows = []
    for name, (_, config_class) in SAE_TRAINING_CLASS_REGISTRY.items():
        if name in ARCHITECTURES:
            entry, plugin = ARCHITECTURES[name], ARCHITECTURES.plugin_of(name)
            about, source = entry.description, entry.source
        else:
            about, source, plugin = _about(config_class), "SAELens", "sae_lens"
        fields = sorted(set(config_class.__dataclass_fields__) - {"metadata"})
        rows.append(_row(name, about, source, plugin, fields=fields))
    return rows


def _models() -> list[Row]:
    from ...registry.table import VISION_MODELS

    return [
        _row(
            name,
            getattr(family, "description", "") or _about(family),
            getattr(family, "source", ""),
            VISION_MODELS.plugin_of(name),
        )
        for name, family in VISION_MODELS.items()
    ]


def _evaluators() -> list[Row]:
    from ...registry.table import EVALUATORS

    return [
        _row(
            name,
            entry.description,
            getattr(entry, "source", ""),
            EVALUATORS.plugin_of(name),
            metrics=dict(entry.higher_is_better),
            nulls=dict(entry.nulls),
            options=sorted(getattr(entry.Options, "__dataclass_fields__", {})),
        )
        for name, entry in EVALUATORS.items()
    ]


def _taxonomies() -> list[Row]:
    from ...registry.table import TAXONOMIES

    return [
        _row(name, entry.description, entry.source, TAXONOMIES.plugin_of(name))
        for name, entry in TAXONOMIES.items()
    ]


def _loaders() -> list[Row]:
    from ...registry.table import LOADERS

    return [
        _row(
            name,
            entry.description,
            ", ".join(entry.releases),
            LOADERS.plugin_of(name),
            releases=sorted(entry.releases),
            asks_for=dict(entry.asks_for),
        )
        for name, entry in LOADERS.items()
    ]


def _presets() -> list[Row]:
    from ...registry.presets import PRESETS, describe_preset

    presets = [describe_preset(name) for name in PRESETS]
    return [_row(p.name, p.description, p.source, "taxolens", cost=p.cost) for p in presets]


KINDS: dict[str, Callable[[], list[Row]]] = {
    "architectures": _architectures,
    "models": _models,
    "evaluators": _evaluators,
    "taxonomies": _taxonomies,
    "presets": _presets,
    "loaders": _loaders,
}


def _row(name: str, description: str, source: str, plugin: str, **more: Any) -> Row:
    return {
        "name": name,
        "description": " ".join(description.split()),
        "source": source,
        "plugin": plugin,
        **more,
    }


def _about(documented: Any) -> str:
    """The first sentence of a docstring."""
    return " ".join((documented.__doc__ or "").split()).split(". ")[0].rstrip(".")
