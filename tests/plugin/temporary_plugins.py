"""Plugins for the length of a test."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import taxolens
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from taxolens.plugin import manager, registration


@contextmanager
def temporary_plugins() -> Iterator[Callable[..., None]]:
    """`load(name, hook=implementation, ...)` registers a module-like plugin; all that these added is
    taken out again at the end."""
    tables = (
        taxolens.ARCHITECTURES,
        taxolens.VISION_MODELS,
        taxolens.EVALUATORS,
        taxolens.TAXONOMIES,
        taxolens.LOADERS,
    )
    manager.load_plugins()
    before = [(dict(table._entries), dict(table._plugins)) for table in tables]
    training_before = dict(SAE_TRAINING_CLASS_REGISTRY)
    names: list[str] = []

    def load(name: str, **hooks) -> None:
        module = types.ModuleType(name)
        for hook, implementation in hooks.items():
            setattr(module, hook, taxolens.hookimpl(implementation, specname=hook))
        manager.pm.register(module, name=name)
        names.append(name)
        manager.load_plugins()

    try:
        yield load
    finally:
        for name in names:
            manager.pm.unregister(name=name)
            manager._filled -= {(name, hook) for hook in registration.TABLES}
            manager._skipped.discard(name)
        for table, (entries, plugins) in zip(tables, before):
            table._entries, table._plugins = entries, plugins
        SAE_TRAINING_CLASS_REGISTRY.clear()
        SAE_TRAINING_CLASS_REGISTRY.update(training_before)
