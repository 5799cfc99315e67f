"""Loading of plugins, built-in and third-party, which fill the tables by their hooks."""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from ..registry import table
from ..registry.errors import ConfigError
from ..registry.nulls import NULLS
from . import builtin, hookspecs, sae_lens_bridge, transformer_lens_bridge
from .registration import TABLES, is_half_imported, is_imported, within_an_import

ENTRY_POINT_GROUP = "taxolens"
BLOCK_VARIABLE = "TAXOLENS_BLOCK_PLUGINS"
IMPORTED_FIRST = {"register_architectures", "register_vision_models"}  # subclass the library's

pm = pluggy.PluginManager("taxolens")
pm.add_hookspecs(hookspecs)
pm.register(builtin, name="taxolens")

_to_load: list[EntryPoint] | None = None  # None: not searched for yet
_filled: set[tuple[str, str]] = set()  # (plugin, hook) pairs that were called
_skipped: set[str] = set()
_running: set[str] = set()
_locks = {hook: threading.RLock() for hook in TABLES}
_loaders: list[tuple[str, table.Loader]] = []  # by plugin; SAELens does not have them yet


def load_plugins() -> None:
    """Load every plugin that is not loaded yet and fill all tables; further calls do nothing.

    It imports SAELens and TransformerLens. Calling it is optional: a table is filled when it is
    first read, and entries are registered with SAELens and TransformerLens when these are imported.

    The built-ins come first. A third-party plugin that cannot be imported, or whose hook raises,
    is named in a warning and skipped. Plugins named in `TAXOLENS_BLOCK_PLUGINS` (comma-separated)
    are not loaded.
    """
    for hook in TABLES:
        fill(hook)


def fill(hook: str) -> None:
    """Fill the table of `hook`: call it in every plugin where it was not called yet."""
    library = TABLES[hook][1]
    if library and hook in IMPORTED_FIRST:
        import_module(library)  # calls `fill_for_libraries` at its end
    if _load_entry_points():
        fill_for_libraries()
    _call(hook)


def fill_for_libraries() -> None:
    """Register the entries of SAELens and TransformerLens with those of the two that are imported.

    A table that another thread is filling is left to that thread: this one may be inside the
    import of a library for which the other waits.
    """
    _load_entry_points()
    for hook, (_, library) in TABLES.items():
        if is_imported(library):
            _call(hook, wait=False)
    while _loaders and is_imported("sae_lens"):
        name, loader = _loaders.pop(0)
        try:
            sae_lens_bridge.add_loader(loader)
        except ConfigError as error:
            _skip(name, error)


def other_plugins() -> list[EntryPoint]:
    """The entry points of other packages' plugins, without the blocked ones."""
    blocked = blocked_plugins()
    return [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in blocked]


def _load_entry_points() -> bool:
    """Load the plugins of other packages; return whether any is new.

    A plugin whose own import has not ended is left for the next call.
    """
    global _to_load
    if _to_load is None:
        _to_load = other_plugins()
    if not _to_load or within_an_import():
        return False
    before = len(pm.get_plugins())
    for entry_point in list(_to_load):
        plugin, problem = None, None
        try:
            plugin = entry_point.load()
        except Exception as error:
            problem = error
        if is_half_imported(entry_point.module) or entry_point not in _to_load:
            continue  # the latter: another thread has loaded it
        _to_load.remove(entry_point)
        try:
            if problem is not None:
                raise problem
            pm.register(plugin, name=entry_point.name)
        except Exception as error:
            _skip(entry_point.name, error)
    return len(pm.get_plugins()) > before


def _call(hook: str, *, wait: bool = True) -> None:
    if not _locks[hook].acquire(blocking=wait):
        return
    try:
        if hook in _running:  # the plugin reads the table that it fills
            return
        _running.add(hook)
        for name, plugin in pm.list_name_plugin():
            if plugin is not None and name not in _skipped and (name, hook) not in _filled:
                _fill_table(hook, name, plugin)
                _filled.add((name, hook))
    finally:
        _running.discard(hook)
        _locks[hook].release()


def _fill_table(hook: str, name: str, plugin: object) -> None:
    others = [other for other in pm.get_plugins() if other is not plugin]
    try:
        pm.subset_hook_caller(hook, others)(register=_registrars(name)[hook])
    except Exception as error:
        if plugin is builtin:
            raise
        _skip(name, error)


def _registrars(plugin: str) -> dict[str, Callable[[Any], None]]:
    """For each hook its `register` callable, which records `plugin` as the source of an entry."""

    def architecture(entry: table.Architecture) -> None:
        sae_lens_bridge.check_architecture(entry)
        table.ARCHITECTURES.register(entry.name, entry, plugin=plugin)
        sae_lens_bridge.add_architecture(entry)

    def vision_model(family: Any) -> None:
        table.VISION_MODELS.register(family.name, family, plugin=plugin)
        transformer_lens_bridge.add_family(family)

    def evaluator(entry: Any) -> None:
        if problem := _undeclared(entry):
            raise ConfigError(
                f"plugin {plugin!r}",
                f"not an evaluator: {problem}",
                given=entry,
                allowed="a subclass of taxolens.Evaluator with what docs/plugins.md lists",
            )
        table.EVALUATORS.register(entry.name, entry, plugin=plugin)

    def taxonomy(entry: table.TaxonomySource) -> None:
        table.TAXONOMIES.register(entry.name, entry, plugin=plugin)

    def loader(entry: table.Loader) -> None:
        table.LOADERS.register(entry.name, entry, plugin=plugin)
        if is_imported("sae_lens"):
            sae_lens_bridge.add_loader(entry)
        else:
            _loaders.append((plugin, entry))

    return {
        "register_architectures": architecture,
        "register_vision_models": vision_model,
        "register_evaluators": evaluator,
        "register_taxonomies": taxonomy,
        "register_loaders": loader,
    }


def _undeclared(entry: Any) -> str:
    """What an evaluator lacks that the tables, the report or the nulls read; "" where nothing."""
    from ..registry.evaluators.base import Evaluator

    if not (isinstance(entry, type) and issubclass(entry, Evaluator)):
        return "no subclass of taxolens.Evaluator"
    lacking = [name for name in ("name", "description") if not _is_text(getattr(entry, name, None))]
    if lacking:
        return f"{' and '.join(lacking)}: no text"
    if inspect.isabstract(entry):
        return f"without {', '.join(sorted(entry.__abstractmethods__))}"
    directions = getattr(entry, "higher_is_better", None)
    if not isinstance(directions, Mapping) or not directions:
        return "higher_is_better: no mapping from each metric to True, False or None"
    wrong = [k for k, v in directions.items() if not _is_text(k) or v not in (True, False, None)]
    if wrong:
        return f"higher_is_better: {wrong[0]!r} is not a metric with True, False or None"
    named = [(f"headline {h.metric!r}", h.metric) for h in entry.headlines]
    named += [(f"support of {metric!r}", metric) for metric in entry.support]
    named += [(f"range of {metric!r}", metric) for metric in entry.ranges]
    named += [(f"label of {metric!r}", metric) for metric in entry.labels]
    unknown = [where for where, metric in named if metric not in directions]
    unknown += [f"null {null!r}" for null in entry.nulls if null not in NULLS]
    return f"{unknown[0]}: not known" if unknown else ""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def blocked_plugins() -> set[str]:
    """The plugin names in the environment variable `TAXOLENS_BLOCK_PLUGINS`."""
    names = os.environ.get(BLOCK_VARIABLE, "").split(",")
    return {name.strip() for name in names if name.strip()}


def _skip(name: str, error: Exception) -> None:
    _skipped.add(name)
    warnings.warn(
        f"taxolens skips the plugin {name!r}: {type(error).__name__}: {str(error).rstrip('.')}. "
        f"Set {BLOCK_VARIABLE}={name} to silence this.",
        stacklevel=2,
    )
