"""The table of published SAEs: release and id -> repository, file and facts (releases.yaml)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError

TABLE = Path(__file__).parents[1] / "releases.yaml"
SHOWN_ONLY = ("d_in", "d_sae", "l0")  # facts for people, which no loader asks for
SHOWN_IDS = 4  # in a message
LAYER = re.compile(r"(?:^|/)layer_(\d+)(?:/|$)")


@dataclass(frozen=True)
class PublishedSAE:
    """One SAE on the Hugging Face hub.

    Attributes:
        release, id: its name, ``release:id``.
        loader: the loader of its file.
        repository: ``owner/name`` on the hub.
        file: its file of weights, or a part of the path that leads to it; "" where the repository
            holds one SAE.
        files: patterns of files of weights.
        revision: branch, tag or commit; None takes the newest.
        licence: None where it is not known.
        known: facts of the loader, by name.
        shown: d_in, d_sae and l0, as far as they are known.
        asks_for: fact -> where a user finds it, for facts that stand in no file.
        sources: field -> where it stands.
    """

    release: str
    id: str
    loader: str
    repository: str
    file: str = ""
    files: tuple[str, ...] = ()
    revision: str | None = None
    licence: str | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)
    asks_for: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.release}:{self.id}"


@dataclass(frozen=True)
class Release:
    """A release of the table; the fields are described in releases.yaml."""

    name: str
    loader: str
    repository: str
    files: tuple[str, ...]
    hook_name: str | None = None
    known: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    saes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def owner(self) -> str | None:
        """The owner on the hub whose repositories are the SAEs; None where it is one repository."""
        owner, _, rest = self.repository.partition("/")
        return owner if rest == "{id}" else None

    def find(self, id: str) -> PublishedSAE:
        """The SAE of an id, be it listed or not.

        Raises:
            ConfigError: the id can name nothing on the hub.
        """
        row = {**self.known, **self.saes.get(id, {})}
        if id not in self.saes:
            row |= self._place(id)
        own = {f.name for f in fields(PublishedSAE)}
        facts = {name: value for name, value in row.items() if name not in own}
        settings = {name: value for name, value in row.items() if name in own}
        shown = {name: facts.pop(name) for name in SHOWN_ONLY if name in facts}
        layer = LAYER.search(settings.get("file", ""))
        if self.hook_name and layer:
            facts.setdefault("hook_name", self.hook_name.format(layer=layer[1]))
        return PublishedSAE(
            self.name,
            id,
            self.loader,
            files=self.files,
            known=facts,
            shown=shown,
            **{"repository": self.repository, **settings},
        )

    def _some_ids(self) -> str:
        ids = list(self.saes)
        return ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")

    def _place(self, id: str) -> dict[str, str]:
        """Repository and path of an id that is not listed."""
        parts = id.split("/")
        if not all(re.fullmatch(r"[\w.~-]+", part) and part.strip(".") for part in parts):
            raise ConfigError(
                self.name,
                "no such SAE",
                given=id,
                allowed=f"{self._some_ids() or 'a path in its repository'}; see docs/releases.md",
            )
        if self.owner is None:
            return {"file": id}
        return {"repository": f"{self.owner}/{parts[0]}", "file": "/".join(parts[1:])}


@cache
def releases() -> dict[str, Release]:
    """Name -> release, of every release in releases.yaml."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {
        name: Release(name, **{**row, "files": tuple(row["files"])}) for name, row in table.items()
    }


def find_published(name: str) -> PublishedSAE:
    """The SAE of ``release:id``.

    Raises:
        ConfigError: no such release, or an id that can name nothing.
    """
    release, _, id = name.partition(":")
    if release not in releases():
        raise ConfigError("release", "not known", given=release, allowed=", ".join(releases()))
    return releases()[release].find(id)


class Ids(dict[str, str]):
    """id -> ``release:id``, for the table of SAELens: any id is in it, listed ones are iterated."""

    def __init__(self, release: Release) -> None:
        super().__init__({id: f"{release.name}:{id}" for id in release.saes})
        self.release = release.name

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and bool(id)

    def __missing__(self, id: str) -> str:
        return f"{self.release}:{id}"


class Lookups(Mapping[str, Any]):
    """Release -> SAELens's `PretrainedSAELookup`, of the releases with one loader.

    SAELens is imported when the first is read.
    """

    def __init__(self, loader: str) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[str]:
        return (name for name, release in releases().items() if release.loader == self.loader)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, name: str) -> Any:
        from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

        if name not in iter(self):
            raise KeyError(name)
        release = releases()[name]
        saes = {id: release.find(id) for id in release.saes}
        return PretrainedSAELookup(
            release=name,
            repo_id=release.repository,
            model=", ".join(
                sorted({str(sae.known.get("model_name", "")) for sae in saes.values()} - {""})
            ),
            conversion_func=self.loader,
            saes_map=Ids(release),
            expected_var_explained={},
            expected_l0={id: sae.shown["l0"] for id, sae in saes.items() if "l0" in sae.shown},
            neuronpedia_id={},
            norm_scaling_factor={},
            config_overrides=None,
        )
