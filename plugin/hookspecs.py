"""The five hooks through which a plugin, ours included, adds to taxolens.

Each hook is called once, with a typed `register` callable, when its table is first read or the
library that it registers with is imported. So a hook imports what it registers in its own body: a
list of evaluators then waits for no architecture. A plugin implements the hooks it needs with `@taxolens.hookimpl` and announces itself in its own
pyproject.toml::

    [project.entry-points.taxolens]
    my_plugin = "my_package.my_module"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    from ..hooks.models.families import VisionFamily
    from ..registry.evaluators.base import Evaluator
    from ..registry.table import Architecture, Loader, TaxonomySource

hookspec = pluggy.HookspecMarker("taxolens")
hookimpl = pluggy.HookimplMarker("taxolens")


class RegisterArchitecture(Protocol):
    def __call__(self, architecture: Architecture, /) -> None: ...


class RegisterVisionModel(Protocol):
    def __call__(self, family: VisionFamily, /) -> None: ...


class RegisterEvaluator(Protocol):
    def __call__(self, evaluator: type[Evaluator[Any]], /) -> None: ...


class RegisterTaxonomy(Protocol):
    def __call__(self, source: TaxonomySource, /) -> None: ...


class RegisterLoader(Protocol):
    def __call__(self, loader: Loader, /) -> None: ...


@hookspec
def register_architectures(register: RegisterArchitecture) -> None:
    """Add SAE architectures: `register(Architecture(name, training_class, ...))`.

    The name can then stand in any SAELens config and after SAELens's `--architecture`.
    """


@hookspec
def register_vision_models(register: RegisterVisionModel) -> None:
    """Add model families: `register(VisionFamily(name, ...))`.

    A family says which Hugging Face architectures it taps and with which TransformerLens adapter.
    """


@hookspec
def register_evaluators(register: RegisterEvaluator) -> None:
    """Add evaluators: `register(MyEvaluator)`, a subclass of `Evaluator` with a `name`."""


@hookspec
def register_taxonomies(register: RegisterTaxonomy) -> None:
    """Add class trees: `register(TaxonomySource(name, load, ...))`."""


@hookspec
def register_loaders(register: RegisterLoader) -> None:
    """Add readers of other libraries' SAE files: `register(Loader(name, disk=...))`.

    Releases that a loader names can then be given to SAELens's `SAE.from_pretrained`.
    """
