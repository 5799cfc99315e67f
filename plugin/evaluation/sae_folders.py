"""Search for trained SAEs on disk: run folders, checkpoints, SAE folders."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import torch
from sae_lens import SAE
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from ...registry.coerce import MisfitError, coerce, is_real
from ...registry.errors import CheckpointError, ConfigError, TaxolensError
from ...registry.files import (
    UnreadableError,
    file_digest,
    is_path,
    open_regular,
    read_json_object,
    reason,
    why,
)
from ...registry.heads import head_key
from ...registry.loaders.parts.checkpoint import is_weights_name
from ...registry.loaders.parts.old_folder import read_folder
from ...registry.loaders.parts.training_checkpoint import (
    as_inference_folder,
    is_training_checkpoint,
)
from ...registry.names import near_paths
from ..reporting.series import layer_of, natural_key

logger = logging.getLogger(__name__)

SAE_SCHEMA = "taxolens.sae/1"  # version of our keys in the metadata: docs/formats/saes.md

RUNS = "run folders, checkpoints or SAE folders"
LISTED = "an architecture of `taxolens list architectures`"
LINKED_DEPTH = 2  # a run, and the SAEs in it

# Type of the settings that are read from metadata and runner_cfg.json; another one is refused.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("model_name", "hook_name", "tokens", "requires_plugin", "revision"), str),
    **dict.fromkeys(("model_revision", "attn_implementation", "source_format", "taxonomy"), str),
    **dict.fromkeys(("dataset_path", "dataset_name", "split", "image_column", "label_column"), str),
    **dict.fromkeys(("eval_dataset_path", "eval_dataset_name", "eval_split"), str),
    **dict.fromkeys(("model_fingerprint", "dataset_fingerprint"), str),
    "training_architecture": str,
    **dict.fromkeys(("image_size", "max_images", "eval_max_images", "hook_head_index"), int),
    **dict.fromkeys(("jpeg_edge", "n_images"), int),
    **dict.fromkeys(("store_batch_size_prompts", "num_workers", "max_image_pixels"), int),
    "max_corrupt_share": float,
    "holdout": float,
    "holdout_seed": int,
    "streaming": bool,
    "evaluators": list[str],
    "model_from_pretrained_kwargs": dict[str, Any],
}


@dataclass(frozen=True)
class SAEFolder:
    """A saved SAE.

    Attributes:
        id, run, name: see `find_saes`.
        path: its folder.
        cfg: its cfg.json.
        settings: the runner_cfg.json of its run, {} where there is none.
    """

    id: str
    run: str
    name: str
    path: Path
    cfg: Mapping[str, Any]
    settings: Mapping[str, Any]

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting from the SAE's own metadata, else from its run's settings.

        Raises:
            CheckpointError: it is not of the type in `TYPES`.
        """
        for file, source in (
            (SAE_CFG_FILENAME, self.cfg.get("metadata") or {}),
            (RUNNER_CFG_FILENAME, self.settings),
        ):
            if (found := source.get(name)) is not None:
                try:
                    return coerce(found, TYPES.get(name, Any), name)
                except MisfitError as error:
                    raise CheckpointError(self.path / file, error) from None
        return default

    @property
    def hook_name(self) -> str:
        """The hook point that it reads."""
        return self._required("hook_name")

    @property
    def head(self) -> int | None:
        """The head that it reads there; None: all heads, or there are none."""
        return self.setting("hook_head_index")

    @property
    def key(self) -> str:
        """The name of the activations that it reads; see `head_key`.

        Raises:
            CheckpointError: it reads a head, and its d_in is no width.
        """
        d_in = self.cfg.get("d_in")
        if self.head is None:
            return self.hook_name
        if type(d_in) is not int or d_in < 1:
            where = self.path / SAE_CFG_FILENAME
            raise CheckpointError(where, "d_in: not possible", given=d_in, allowed="the width")
        return head_key(self.hook_name, self.head, d_in)

    @property
    def model_name(self) -> str:
        """The model that it reads."""
        return self._required("model_name")

    @property
    def tokens(self) -> str:
        """Which tokens of an image it reads."""
        return self._required("tokens")

    @property
    def architecture(self) -> str:
        """The architecture in its config, "" where it names none."""
        return str(self.cfg.get("architecture", ""))

    @property
    def trained_as(self) -> str:
        """The architecture that was trained, as SAELens records it; else `architecture`.

        The two differ where an architecture is saved as another, such as `topk`.
        """
        return str(
            (self.cfg.get("metadata") or {}).get("training_architecture") or self.architecture
        )

    @property
    def constraint(self) -> str | None:
        """What was held at its random start in training, None for an ordinary SAE."""
        return (self.cfg.get("metadata") or {}).get("constraint")

    @property
    def layer(self) -> int | None:
        """The first whole number in the hook name, None where there is none."""
        return layer_of(self.hook_name)

    def weights_digest(self) -> str:
        """Digest of the file of weights, which is read once."""
        return self._weights_digest

    @cached_property
    def _weights_digest(self) -> str:
        return file_digest(self.path / SAE_WEIGHTS_FILENAME)

    def load(self, device: str = "cpu") -> SAE[Any]:
        """Load the SAE, for inference.

        Raises:
            CheckpointError: the weights are incomplete, damaged or not those of the config.
            ConfigError: SAELens does not have its architecture, or no longer its activation function.
        """
        is_checkpoint = is_training_checkpoint(self.path)
        known = SAE_TRAINING_CLASS_REGISTRY if is_checkpoint else SAE_CLASS_REGISTRY
        if self.architecture and self.architecture not in known:
            needed = self.setting("requires_plugin")
            raise ConfigError(
                self.path,
                "an architecture that SAELens does not have",
                given=self.architecture,
                allowed=f"install the plugin {needed!r}" if needed else LISTED,
            )
        try:
            if is_checkpoint:
                sae = load_checkpoint(self.path, device)
            else:
                sae = SAE.load_from_disk(self.path, device=device, converter=read_folder)
        except TaxolensError:
            raise
        except Exception as error:
            raise CheckpointError(self.path, f"the SAE cannot be loaded: {why(error)}") from error
        check_usable(self.path, sae)
        return sae.eval()

    def _required(self, name: str) -> str:
        found = self.setting(name)
        if not found:
            raise ConfigError(
                self.path / SAE_CFG_FILENAME,
                f"metadata has no {name!r}",
                allowed=f"`taxolens evaluate` or `taxolens convert` with --{name}",
            )
        return found


def check_usable(where: Path | str, sae: SAE[Any]) -> None:
    """Check what SAELens loads without a word and every number would be wrong with.

    Raises:
        CheckpointError: a field of the config is of another type than its class declares, `k` is not from 1 to d_sae, or a weight is not finite.
    """
    hints = get_type_hints(type(sae.cfg))
    for each in fields(sae.cfg):
        if each.name != "metadata":
            try:
                coerce(getattr(sae.cfg, each.name), hints[each.name], each.name)
            except MisfitError as error:
                raise CheckpointError(where, error) from None
    for name, tensor in sae.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(where, f"{name} has values that are not finite")
    k = getattr(sae.cfg, "k", None)
    if k is not None and not (is_real(k) and 0 < k <= sae.cfg.d_sae):
        raise CheckpointError(where, "k: not possible", given=k, allowed=f"1 to {sae.cfg.d_sae}")


def load_checkpoint(path: Path, device: str = "cpu") -> SAE[Any]:
    """An SAE from a checkpoint, with the scaling of its inputs folded into its weights."""
    with as_inference_folder(path, device) as folder:
        return SAE.load_from_disk(folder, device=device).eval()


def find_saes(runs: str | Path | Sequence[str | Path], *, several: bool = False) -> list[SAEFolder]:
    """Every SAE in the given folders, in natural order of name (block 9 before block 10).

    A folder is a run (runner_cfg.json, and one SAE or a folder for each), a checkpoint, or an SAE
    (cfg.json and sae_weights.safetensors). Links are followed; an SAE to which several names lead is
    there once. `id` is unique: the SAE's name, with the run's before it
    where several runs are given, or `several` says that there are others beside. The SAE in a run's own
    folder has the run's name, with -2 where a folder in it has that one.

    Raises:
        ConfigError: a folder does not exist or has no SAE, or metadata is of another version.
        CheckpointError: a cfg.json or runner_cfg.json that is not JSON.
    """
    given = [runs] if isinstance(runs, (str, Path)) else runs
    for run in given:
        if not is_path(str(run)):
            raise ConfigError("runs", "not a path", given=str(run), allowed=RUNS)
    paths = [Path(p).expanduser() for p in given]
    if not paths:
        raise ConfigError("runs", "no folder is given", allowed=RUNS)
    repeated = [
        str(path) for path, count in Counter(p.resolve() for p in paths).items() if count > 1
    ]
    if repeated:
        problem = f"{', '.join(repeated)} is given twice"
        raise ConfigError("runs", problem, allowed="each folder once")
    labels = distinct_ends(paths)
    found = [
        sae for path, label in zip(paths, labels, strict=True) for sae in _saes_in(path, label)
    ]
    if len(paths) == 1 and not several:
        return found
    within = [str(p) for p, count in Counter(s.path.resolve() for s in found).items() if count > 1]
    if within:
        problem = f"{within[0]} is given twice, once in another folder"
        raise ConfigError("runs", problem, allowed="each SAE once")
    counts = Counter(sae.run for sae in found)
    return [
        replace(sae, id=sae.run if counts[sae.run] == 1 else f"{sae.run}/{sae.name}")
        for sae in found
    ]


def folders_with_cfg(top: Path) -> list[Path]:
    """The folders at and below `top` that hold a cfg.json, each once, also those that links lead to.

    A folder to which a link beside it leads has its own name. Links up from `top` are not followed, and others
    no further than `LINKED_DEPTH` folders deep: a run may have a link to its data set.
    """
    found: list[Path] = []
    seen: set[str] = set()
    links: list[str] = []
    for folder, folders, names in os.walk(top):
        seen.add(os.path.realpath(folder))
        if SAE_CFG_FILENAME in names:
            found.append(Path(folder))
        links += filter(os.path.islink, (os.path.join(folder, name) for name in sorted(folders)))
    for link in links:
        if not _is_above(link, top):
            for folder in _below(link, LINKED_DEPTH):
                real = os.path.realpath(folder)
                if real not in seen and os.path.exists(os.path.join(folder, SAE_CFG_FILENAME)):
                    found.append(Path(folder))
                seen.add(real)
    return found


def _below(folder: str, depth: int) -> Iterator[str]:
    """A folder and those up to `depth` below it; files are not listed at the last of them."""
    yield folder
    if depth:
        with suppress(OSError), os.scandir(folder) as entries:
            for place in sorted(entry.path for entry in entries if entry.is_dir()):
                yield from _below(place, depth - 1)


def _is_above(folder: str, top: Path) -> bool:
    return Path(os.path.realpath(top)).is_relative_to(os.path.realpath(folder))


def _saes_in(path: Path, label: str) -> list[SAEFolder]:
    if not path.is_dir():
        fits = is_weights_name if is_weights_name(path.name) else os.path.isdir
        raise ConfigError("runs", f"{path} is not a folder{near_paths(path, fits)}", allowed=RUNS)
    settings = _read_json(path / RUNNER_CFG_FILENAME)
    folders = [
        folder
        for folder in folders_with_cfg(path)
        if (folder / SAE_WEIGHTS_FILENAME).exists() and not _is_older(folder, path)
    ]
    if not folders:
        raise ConfigError(
            "runs",
            f"{path} holds no SAE",
            allowed=f"a folder with {SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME}",
        )
    folders = _of_the_run(path, settings, folders)
    names = {folder: folder.relative_to(path).as_posix() for folder in folders}
    if path in names:
        names[path] = label
        while Counter(names.values())[names[path]] > 1:
            names[path] += "-2"
    saes = []
    for folder, name in names.items():
        cfg = _read_json(folder / SAE_CFG_FILENAME)
        metadata = cfg.get("metadata") or {}
        if not isinstance(metadata, dict):
            where = folder / SAE_CFG_FILENAME
            raise CheckpointError(where, "metadata: not an object", given=type(metadata).__name__)
        for file in _read_by_sae_lens(folder):
            _check_regular(file)
        schema = metadata.get("taxolens_schema", SAE_SCHEMA)
        if schema != SAE_SCHEMA:
            raise ConfigError(
                folder / SAE_CFG_FILENAME,
                "taxolens_schema: not known",
                given=schema,
                allowed=repr(SAE_SCHEMA),
            )
        saes.append(SAEFolder(name, label, name, folder, cfg, settings))
    return sorted(saes, key=lambda sae: natural_key(sae.name))


def _of_the_run(path: Path, settings: Mapping[str, Any], folders: Sequence[Path]) -> Sequence[Path]:
    """The folders that the run's settings list; others, of earlier runs, are named in a warning."""
    saes = settings.get("saes")
    listed = list(saes) if isinstance(saes, Mapping) else ["."] if "sae" in settings else None
    if listed is None:
        return folders
    places = [path / name for name in listed]
    missing = [str(place) for place in places if place not in folders]
    if len(missing) == len(places):
        raise CheckpointError(path, f"none of the SAEs that {RUNNER_CFG_FILENAME} lists is there")
    if missing:
        logger.warning("%s lists SAEs that are missing: %s.", path, ", ".join(missing))
    others = [str(folder) for folder in folders if folder not in places]
    if others:
        logger.warning(
            "%s: not of the run, and left out: %s. Give the folder itself to evaluate one.",
            *(path, ", ".join(others)),
        )
    return [folder for folder in folders if folder in places]


def _is_older(folder: Path, run: Path) -> bool:
    """Whether the folder is a checkpoint inside the folder of its run."""
    depth = len(folder.relative_to(run).parts)
    return depth > 1 and (folder / TRAINER_STATE_FILENAME).exists()


def distinct_ends(paths: Sequence[Path]) -> list[str]:
    """The shortest distinct ends of the paths: ``seed0``, or ``a/sae`` and ``b/sae``."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-length:]).strip("/") or "run" for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _read_by_sae_lens(folder: Path) -> list[Path]:
    return [
        folder / SAE_WEIGHTS_FILENAME,
        *folder.glob(ACTIVATION_SCALER_CFG_FILENAME),
        *folder.glob("*.safetensors"),
    ]


def _check_regular(file: Path) -> None:
    try:
        open_regular(file).close()
    except (OSError, UnreadableError) as error:
        raise CheckpointError(file, reason(error)) from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except FileNotFoundError:
        return {}
    except (OSError, UnreadableError) as error:
        raise CheckpointError(file, reason(error)) from None
