"""Registration with SAELens and TransformerLens, once both they and taxolens are imported.

`import taxolens` imports neither. Where they are imported already, it registers at once; otherwise
a finder, first in `sys.meta_path`, finds exactly these two packages as the other finders do and
gives their loader an `exec_module` that registers after the package's own. Each table of taxolens
is filled when it is first read.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from ..registry import table
from ..registry.machine import without_collection

# hook -> the table that it fills, and the library that its entries are registered with
TABLES = {
    "register_architectures": (table.ARCHITECTURES, "sae_lens"),
    "register_vision_models": (table.VISION_MODELS, "transformer_lens"),
    "register_evaluators": (table.EVALUATORS, None),
    "register_taxonomies": (table.TAXONOMIES, None),
    "register_loaders": (table.LOADERS, "sae_lens"),
}
LIBRARIES = frozenset(library for _, library in TABLES.values() if library)

# Library imported by `_Finder` -> the thread that imports it, None afterwards.
_importing: dict[str, int | None] = {}
_manager = ""


def start(manager: str) -> None:
    """Fill the tables on first read, and register with both libraries once they are imported.

    Args:
        manager: name of the module that does it (`taxolens.plugin.manager`), imported when needed.
    """
    global _manager
    _manager = manager
    for hook, (filled, _) in TABLES.items():
        filled.source = partial(_fill, hook)
    before = LIBRARIES & sys.modules.keys()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if any(is_half_imported(library) for library in before):
        # Another thread imports it. Waiting here could deadlock: it may wait for this thread.
        threading.Thread(target=_register, args=(before,), daemon=True).start()
    elif before:
        _register(before)


def is_imported(library: str | None) -> bool:
    """Whether the library is imported, and its import has ended."""
    if library in _importing:
        return _importing[library] is None
    return library in sys.modules and not is_half_imported(library)


def is_half_imported(module: str) -> bool:
    """Whether the import of the module has begun and not ended."""
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return getattr(spec, "_initializing", False)


def within_an_import() -> bool:
    """Whether this thread is inside the import of one of the libraries.

    A plugin that is loaded now would find that library half imported.
    """
    return threading.get_ident() in _importing.values()


def _fill(hook: str) -> None:
    import_module(_manager).fill(hook)


def _register(libraries: Iterable[str]) -> None:
    for library in libraries:
        import_module(library)  # waits for its end
    import_module(_manager).fill_for_libraries()


class _Finder(MetaPathFinder):
    """Finds the libraries as the other finders do; see the docstring of this module."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname not in LIBRARIES:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            if spec := finder.find_spec(fullname, path, target):
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    _register_after(fullname, spec.loader)
                return spec
        return None


def _register_after(library: str, loader: Loader) -> None:
    own_exec_module = loader.exec_module

    @without_collection()
    def exec_module(module: ModuleType) -> None:
        vars(loader).pop("exec_module", None)
        _importing[library] = threading.get_ident()
        try:
            own_exec_module(module)  # the library's own import
        except BaseException:
            del _importing[library]
            raise
        _importing[library] = None
        try:
            import_module(_manager).fill_for_libraries()
        except Exception as error:  # the library stays importable when registration fails
            warnings.warn(
                f"taxolens could not register with {library}: {type(error).__name__}: {error}",
                stacklevel=2,
            )

    # Only this loader object is changed. If it allows no new attribute, registration waits until a
    # table is read.
    with suppress(AttributeError):
        loader.exec_module = exec_module
