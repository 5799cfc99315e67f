"""Aliases of modules that moved since 0.1.0; importing one warns and names the new module.

A finder, last in `sys.meta_path`, handles the names that no other finder finds. An old name gives a
separate module that looks every attribute up in the new one, so that classes stay the same objects.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.partition(".")[0]

# (old package, new package) -> the modules that moved and kept their names.
_FOLDERS = {
    ("hooks", "hooks.images"): "decode preprocess",
    ("hooks", "hooks.models"): "bridge families forward hooked_module intervention points tokens",
    ("hooks", "hooks.activations"): "permutation",
    ("plugin", "plugin.study"): "demo job",
    ("plugin", "registry"): "files",
    ("registry.architectures", "registry.architectures.parts"): (
        "forest kmeans levels orthogonal_pursuit plugin_config pursuit pursuit_training "
        "pursuit_triton step_clock tree_growth unit_dictionary"
    ),
    ("registry.evaluators", "registry"): "hashing",
    ("registry.evaluators", "registry.evaluators.parts"): (
        "accumulators image_positions logistic moments planted probes ranks readout samples "
        "summary sums"
    ),
}
# Old module -> the new one, or those that it was split into. A package includes its modules.
MOVED: dict[str, str | tuple[str, ...]] = {
    **{
        f"{a}.{name}": f"{b}.{name}" for (a, b), names in _FOLDERS.items() for name in names.split()
    },
    "hooks.cache": (
        "hooks.activations.cache",
        "hooks.activations.cache_reader",
        "hooks.activations.cache_writer",
    ),
    "hooks.extraction": "hooks.activations.extract",
    "hooks.image_loader": "hooks.images.loader",
    "hooks.image_sources": "hooks.images.sources",
    "hooks.model": "hooks.models.load",
    "plugin.evaluation.cards": "plugin.evaluation.latent_cards",
    "plugin.evaluation.measure": "plugin.evaluation.bench",
    "plugin.evaluation.measured": "plugin.evaluation.measure_sae",
    "plugin.evaluation.nulls": "plugin.evaluation.beside_nulls",
    "plugin.evaluation.record": "plugin.evaluation.results_folder",
    "plugin.evaluation.runs": "plugin.evaluation.sae_folders",
    "plugin.flags": "plugin.commands.train_flags",
    "plugin.reporting.table": "plugin.reporting.metric_table",
    "plugin.reporting.tree": "plugin.reporting.tree_chart",
    "plugin.training.rehearsal": "plugin.training.dry_run",
    "plugin.training.session": "plugin.training.resumable_session",
    "plugin.training.store": "plugin.training.activations_store",
    "registry.evaluators.nulls": "registry.evaluators.parts.null_latents",
}


def start() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def new_places(module: str) -> tuple[str, ...]:
    """The full names of the modules that replace `module`; empty where it has not moved."""
    package, _, old = module.partition(".")
    if package != PACKAGE:
        return ()
    inner = ""
    while old and old not in MOVED:
        old, _, last = old.rpartition(".")
        inner = f".{last}{inner}"
    places = MOVED.get(old, ())
    places = (places,) if isinstance(places, str) else places
    return tuple(f"{PACKAGE}.{place}{inner}" for place in places)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        places = new_places(fullname)
        if not places:
            return None
        return ModuleSpec(fullname, _Alias(places), is_package=True)


class _Alias(Loader):
    """Builds a module of the attributes of the modules `places`."""

    def __init__(self, places: tuple[str, ...]) -> None:
        self.places = places

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        warnings.warn(
            f"{module.__name__} has moved; import it from {' or '.join(self.places)}.",
            FutureWarning,
            stacklevel=2,
        )
        sources = [import_module(place) for place in self.places]

        def __getattr__(name: str) -> Any:
            for source in sources:
                if hasattr(source, name):
                    return getattr(source, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        names = [name for source in sources for name in vars(source) if not name.startswith("_")]
        vars(module).update(__getattr__=__getattr__, __all__=names, __doc__=sources[0].__doc__)
