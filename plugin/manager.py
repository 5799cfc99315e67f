"""Loads the plugins, built-in and third-party, and fills the tables through their hooks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import pluggy

from ..registry import table
from ..registry.errors import ConfigError
from . import builtin, hookspecs, sae_lens_bridge, transformer_lens_bridge

ENTRY_POINT_GROUP = "taxolens"
BLOCK_VARIABLE = "TAXOLENS_BLOCK_PLUGINS"

pm = pluggy.PluginManager("taxolens")
pm.add_hookspecs(hookspecs)

_filled: set[str] = set()


def load_plugins() -> None:
    """Load every plugin that is not loaded yet and fill the tables; calling it again is free.

    The built-ins come first. A third-party plugin that cannot be imported, or whose hook raises,
    is named in a warning and skipped. `TAXOLENS_BLOCK_PLUGINS` (names, comma-separated) keeps
    plugins out.
    """
    if not pm.has_plugin("taxolens"):
        pm.register(builtin, name="taxolens")
        _load_entry_points()
    for name, plugin in pm.list_name_plugin():
        if plugin is not None and name not in _filled:
            _filled.add(name)
            _fill_tables(name, plugin)


def _load_entry_points() -> None:
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.name in blocked_plugins():
            pm.set_blocked(entry_point.name)
            continue
        try:
            pm.register(entry_point.load(), name=entry_point.name)
        except Exception as error:
            _warn_skipped(entry_point.name, error)


def _fill_tables(name: str, plugin: object) -> None:
    others = [other for other in pm.get_plugins() if other is not plugin]
    for hook, register in _registrars(name).items():
        try:
            pm.subset_hook_caller(hook, others)(register=register)
        except Exception as error:
            if plugin is builtin:
                raise
            _warn_skipped(name, error)
            return


def _registrars(plugin: str) -> dict[str, Callable[[Any], None]]:
    """For each hook its `register` callable, which knows the plugin that it serves."""

    def architecture(entry: table.Architecture) -> None:
        sae_lens_bridge.check_architecture(entry)
        table.ARCHITECTURES.register(entry.name, entry, plugin=plugin)
        sae_lens_bridge.add_architecture(entry)

    def vision_model(family: Any) -> None:
        table.VISION_MODELS.register(family.name, family, plugin=plugin)
        transformer_lens_bridge.add_family(family)

    def evaluator(entry: Any) -> None:
        if not isinstance(entry, type) or not isinstance(getattr(entry, "name", None), str):
            raise ConfigError(
                f"plugin {plugin!r} registers {entry!r} as an evaluator; allowed: a subclass of "
                "taxolens.Evaluator with a `name`."
            )
        table.EVALUATORS.register(entry.name, entry, plugin=plugin)

    def taxonomy(entry: table.TaxonomySource) -> None:
        table.TAXONOMIES.register(entry.name, entry, plugin=plugin)

    def loader(entry: table.Loader) -> None:
        table.LOADERS.register(entry.name, entry, plugin=plugin)
        sae_lens_bridge.add_loader(entry)

    return {
        "register_architectures": architecture,
        "register_vision_models": vision_model,
        "register_evaluators": evaluator,
        "register_taxonomies": taxonomy,
        "register_loaders": loader,
    }


def blocked_plugins() -> set[str]:
    """The plugin names in the environment variable `TAXOLENS_BLOCK_PLUGINS`."""
    names = os.environ.get(BLOCK_VARIABLE, "").split(",")
    return {name.strip() for name in names if name.strip()}


def _warn_skipped(name: str, error: Exception) -> None:
    warnings.warn(
        f"taxolens skips the plugin {name!r}: {type(error).__name__}: {error}. "
        f"Set {BLOCK_VARIABLE}={name} to silence this.",
        stacklevel=2,
    )
