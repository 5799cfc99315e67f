"""The five hooks by which a plugin, ours included, adds to taxolens.

Each hook is called once, with a typed `register` callable, when its table is first read or the
library that it registers with is imported. A hook imports what it registers in its own body, so
that listing evaluators imports no architecture. A plugin implements the hooks it needs with
`@taxolens.hookimpl` and is declared in its own pyproject.toml::

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
    """Registers one SAE architecture."""

    def __call__(self, architecture: Architecture, /) -> None: ...


class RegisterVisionModel(Protocol):
    """Registers one model family."""

    def __call__(self, family: VisionFamily, /) -> None: ...


class RegisterEvaluator(Protocol):
    """Registers one evaluator class."""

    def __call__(self, evaluator: type[Evaluator[Any]], /) -> None: ...


class RegisterTaxonomy(Protocol):
    """Registers one class tree."""

    def __call__(self, source: TaxonomySource, /) -> None: ...


class RegisterLoader(Protocol):
    """Registers one reader of SAE files."""

    def __call__(self, loader: Loader, /) -> None: ...


@hookspec
def register_architectures(register: RegisterArchitecture) -> None:
    """Add SAE architectures: `register(Architecture(name, training_class, ...))`.

    The name is then valid in any SAELens config and after SAELens's `--architecture`.
    """


@hookspec
def register_vision_models(register: RegisterVisionModel) -> None:
    """Add model families: `register(VisionFamily(name, ...))`.

    A family lists the Hugging Face architectures that it taps, and their TransformerLens adapter.
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

    SAELens's `SAE.from_pretrained` then accepts the releases that the loader lists.
    """
