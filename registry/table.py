"""Registries of the names in a config: architectures, models, evaluators, taxonomies, loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from .errors import DuplicateNameError, UnknownNameError
from .names import unknown_name_message

T = TypeVar("T")


class Table(Mapping[str, T], Generic[T]):
    """A read-only mapping from name to entry, filled by `register`.

    Args:
        kind: what an entry is called in error messages, e.g. ``"evaluator"``.

    Attributes:
        source: called before each read, to `register` missing entries.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.source: Callable[[], None] | None = None
        self._entries: dict[str, T] = {}
        self._plugins: dict[str, str] = {}

    def register(self, name: str, entry: T, *, plugin: str = "taxolens") -> None:
        """Add `entry` under `name`; repeating it for the same entry and plugin has no effect.

        Raises:
            DuplicateNameError: the name is registered already; with both plugins in the message.
        """
        if name in self._entries:
            if self._entries[name] is entry and self._plugins[name] == plugin:
                return
            raise DuplicateNameError(
                self.kind,
                f"registered by plugin {self._plugins[name]!r} and by plugin {plugin!r}",
                given=name,
                allowed="another name; TAXOLENS_BLOCK_PLUGINS blocks a plugin",
            )
        self._entries[name] = entry
        self._plugins[name] = plugin

    def plugin_of(self, name: str) -> str:
        """The plugin that registered `name`."""
        self[name]
        return self._plugins[name]

    def __getitem__(self, name: str) -> T:
        entries = self._read()
        if name not in entries:
            raise UnknownNameError(unknown_name_message(self.kind, name, entries))
        return entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return f"Table({self.kind!r}, {sorted(self._read())})"

    def _read(self) -> dict[str, T]:
        if self.source is not None:
            self.source()
        return self._entries


@dataclass(frozen=True)
class Architecture:
    """One SAE architecture, with the classes for SAELens's registries.

    `sae_class` and `sae_config_class` are None where the trained SAE is saved as an architecture
    that SAELens already has: it then loads without this package.
    """

    name: str
    training_class: type[Any]
    training_config_class: type[Any]
    sae_class: type[Any] | None = None
    sae_config_class: type[Any] | None = None
    description: str = ""
    source: str = ""


@dataclass(frozen=True)
class TaxonomySource:
    """A named class tree. `load(classes)` returns the tree over these classes, in this order; with
    None, over all its classes."""

    name: str
    load: Callable[[Any], Any]
    description: str = ""
    source: str = ""


@dataclass(frozen=True)
class Loader:
    """A reader of SAE files of another library.

    Args:
        disk: SAELens's ``PretrainedSaeDiskLoader``: ``(path, device, cfg_overrides) ->
            (cfg_dict, state_dict)``, for ``SAE.load_from_disk(path, converter=...)``. Facts of
            `asks_for` come as keyword arguments.
        huggingface: SAELens's ``PretrainedSaeHuggingfaceLoader``, for ``SAE.from_pretrained``.
        releases: release name -> SAELens's ``PretrainedSAELookup``, read with `huggingface`.
        description: what its files look like.
        recognises: ``checkpoint -> reason``, None where the file (an `os.PathLike` with `.path`,
            `.folder`, `.content`, `.config`) is not of this format. Nothing in the file is run.
        asks_for: facts that a file may lack, by name, with what each is; a user gives them to
            `read_sae` and, as flags, to ``taxolens convert``.
    """

    name: str
    disk: Callable[..., Any] | None = None
    huggingface: Callable[..., Any] | None = None
    releases: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    recognises: Callable[[Any], str | None] | None = None
    asks_for: Mapping[str, str] = field(default_factory=dict)


ARCHITECTURES: Table[Architecture] = Table("architecture")
VISION_MODELS: Table[Any] = Table("vision model family")
EVALUATORS: Table[Any] = Table("evaluator")
TAXONOMIES: Table[TaxonomySource] = Table("taxonomy")
LOADERS: Table[Loader] = Table("loader")

ALL = "all"


def evaluators_named(names: str | Iterable[str]) -> list[str]:
    """The evaluators that a setting names: one, several, or "all".

    Raises:
        UnknownNameError: beside "all", a name that is not registered.
    """
    found = [names] if isinstance(names, str) else list(names)
    if ALL not in found:
        return found
    for name in found:
        if name != ALL:
            EVALUATORS[name]
    return list(EVALUATORS)
