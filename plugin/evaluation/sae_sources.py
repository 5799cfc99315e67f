"""SAEs that no run of ours has saved, as sources of an evaluation; and settings that replace an SAE's metadata."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from ...registry.errors import ConfigError, TaxolensError
from ...registry.hashing import fingerprint
from ...registry.loaders.parts.checkpoint import is_weights_name
from ...registry.loaders.parts.facts import FACTS, OF_THE_MODEL
from ...registry.loaders.parts.read import Source, read_sae
from .sae_folders import SAEFolder, check_usable, distinct_ends, find_saes, folders_with_cfg

logger = logging.getLogger(__name__)

NEEDED = ("model_name", "hook_name", "tokens")
OF_A_RUN = ("dataset_path", "split", "taxonomy")  # what the SAE of a run records
RECORDED_AS = {"dataset_path": ("eval_dataset_path", "dataset_path"), "taxonomy": ("taxonomy",)}
ALLOWED = {
    **{name: FACTS[name].allowed for name in NEEDED},
    "dataset_path": "labelled images: a hub name, a folder or parquet files",
    "taxonomy": "a name of `taxolens list taxonomies`, a folder or a file",
}


@dataclass(frozen=True)
class ReadSAE(SAEFolder):
    """An SAE that `read_sae` reads, from another library's file or from a release.

    `path` is the source as it was given, and `digest` is of its tensors.
    """

    digest: str = ""

    @classmethod
    def read(cls, source: Source, name: str) -> ReadSAE:
        """The SAE of a source, for which it is read once.

        Raises:
            ConfigError, CheckpointError: see `read_sae`.
        """
        sae = read_sae(str(source))
        digest = fingerprint(
            part
            for key, tensor in sorted(sae.state_dict().items())
            for part in (key, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        )
        return cls(name, name, name, Path(str(source)), sae.cfg.to_dict(), {}, digest)

    def weights_digest(self) -> str:
        """Digest of its tensors."""
        return self.digest

    def load(self, device: str = "cpu") -> SAE[Any]:
        """Load the SAE, for inference; see `read_sae` and `check_usable` for the errors raised."""
        sae = read_sae(str(self.path), device=device)
        check_usable(self.path, sae)
        return sae


Sources: TypeAlias = str | Path | Sequence[str | Path | SAEFolder]


def find_sources(runs: Sources, *, left_out: dict[str, str] | None = None) -> list[SAEFolder]:
    """Every SAE of the given sources: folders of SAELens first, in the order of `find_saes`.

    Further sources, in their order: a file or folder of another library, ``loader:path``, and
    ``release:id`` or ``owner/repository:folder`` on the Hugging Face hub.

    Args:
        runs: the sources. SAEs that an earlier call gave are given back.
        left_out: gets those of the further sources that cannot be read, with the reason; None raises.

    Raises:
        ConfigError: sources that cannot be found or read, all in one message; or two SAEs with one id,
            such as those of two earlier calls.
        CheckpointError: a damaged file.
    """
    given = [runs] if isinstance(runs, (str, Path)) else list(runs)
    saes = [run for run in given if isinstance(run, SAEFolder)]
    sources = [Source.of(run) for run in given if not isinstance(run, SAEFolder)]
    if saes and sources:
        problem = "SAEs of an earlier call and sources together"
        raise ConfigError("runs", problem, given=[*map(str, sources)], allowed="one of the two")
    if saes:
        return _distinct(saes)
    others = [source for source in sources if is_other(source)]
    if len(set(others)) < len(others):
        raise ConfigError("runs", "one is given twice", given=[*map(str, others)], allowed="once")
    folders = [source.path for source in sources if source not in others]
    found = find_saes(folders, several=len(sources) > 1) if folders or not others else []
    taken, problems = {sae.id for sae in found}, []
    for name, source in _names(others).items():
        while name in taken:
            name += "-2"
        taken.add(name)
        try:
            found.append(ReadSAE.read(source, name))
        except TaxolensError as error:
            if left_out is not None:
                left_out[str(source)] = str(error)
            elif isinstance(error, ConfigError):
                problems.append(f"{source}: {error}")
            else:
                raise
    if problems:
        raise ConfigError("runs", " ".join(problems), allowed="sources that can be read")
    return _distinct(found)


def _distinct(saes: list[SAEFolder]) -> list[SAEFolder]:
    """The SAEs, of which numbers and files are told apart by `id`. Raises ConfigError where two have one."""
    places: dict[str, Path] = {}
    for sae in saes:
        if sae.id in places:
            problem = f"two SAEs have the id {sae.id!r} ({places[sae.id]} and {sae.path})"
            allowed = "all folders in one call (of find_saes, find_sources or evaluate_run), which names them apart"
            raise ConfigError("runs", problem, allowed=allowed)
        places[sae.id] = sae.path
    return saes


def _names(sources: Sequence[Source]) -> dict[str, Source]:
    """Distinct names that can be paths: of a release its id too, of a file the end of its path."""
    files = [source for source in sources if source.release is None]
    ends = distinct_ends([Path(source.path) for source in files]) if files else []
    names = dict(zip(ends, files, strict=True))
    for source in sources:
        if source.release is not None:
            parts = f"{source.release}/{source.path}".split("/")
            names["/".join(part for part in parts if part.strip("."))] = source
    return names


def is_other(source: Source) -> bool:
    """Whether the source is none that `find_saes` reads."""
    path = Path(source.path)
    if source.release is not None or source.loader is not None or path.is_file():
        return True
    if not path.is_dir() or (path / RUNNER_CFG_FILENAME).exists():
        return False
    if folders_with_cfg(path):
        return False
    return any(
        is_weights_name(file.name) and file.name != SAE_WEIGHTS_FILENAME
        for file in path.rglob("*")
        if file.is_file()
    )


def override(saes: Sequence[SAEFolder], **given: Any) -> list[SAEFolder]:
    """The SAEs with `given` in place of their metadata; None leaves it.

    Raises:
        ConfigError: one hook point for SAEs that were trained at different ones.
    """
    given = {name: value for name, value in given.items() if value is not None}
    hooks = {sae.setting("hook_name") for sae in saes} - {None}
    if "hook_name" in given and len(hooks) > 1:
        raise ConfigError(
            "hook_name",
            f"the SAEs were trained at {len(hooks)} hook points",
            given=given["hook_name"],
            allowed="SAEs of one hook point",
        )
    return [_with(sae, given) for sae in saes] if given else list(saes)


def _with(sae: SAEFolder, given: dict[str, Any]) -> SAEFolder:
    for name, value in given.items():
        if (old := sae.setting(name)) not in (None, value):
            logger.warning("%s: %s is %r, and %r is used.", sae.id, name, old, value)
    settings, metadata = dict(sae.settings), dict(sae.cfg.get("metadata") or {})
    if given.get("model_name") not in (None, sae.setting("model_name")):
        for name in OF_THE_MODEL:  # they belong to the model that is replaced
            settings.pop(name, None)
            metadata.pop(name, None)
    return replace(sae, cfg={**sae.cfg, "metadata": {**metadata, **given}}, settings=settings)


def of_own_runs(saes: Sequence[SAEFolder]) -> list[SAEFolder]:
    """Those whose settings name images or a tree: SAEs of runs, and not those of other libraries."""
    return [
        sae
        for sae in saes
        if not (isinstance(sae, ReadSAE) or sae.setting("source_format"))
        and any(sae.setting(name) for name in OF_A_RUN)
    ]


def unknown_of(sae: SAEFolder) -> list[str]:
    """Which of model, hook point and tokens are neither recorded nor given."""
    return [name for name in NEEDED if not sae.setting(name)]


def check_complete(saes: Sequence[SAEFolder], **given: Any) -> None:
    """Check that everything is known that an evaluation needs.

    Args:
        saes: what is evaluated.
        **given: dataset_path and taxonomy, as given; None where they are not.

    Raises:
        ConfigError: one list of everything that is missing, with the flags for it.
    """
    runs = of_own_runs(saes)
    missing = {name: [sae.id for sae in saes if name in unknown_of(sae)] for name in NEEDED}
    missing = {name: ids for name, ids in missing.items() if ids}
    for name, value in given.items():
        if not (value or any(sae.setting(own) for sae in runs for own in RECORDED_AS[name])):
            missing[name] = []
    if missing:
        lines = [
            f"--{name}{' for ' + ', '.join(ids) if len(saes) > 1 and ids else ''} ({ALLOWED[name]})"
            for name, ids in missing.items()
        ]
        several = {name for name, ids in missing.items() if len(ids) > 1}
        one_by_one = ", or `taxolens convert` where they differ" if several else ""
        raise ConfigError(
            ", ".join(missing),
            "not in the metadata, and not given",
            allowed="; ".join(lines) + one_by_one,
        )
