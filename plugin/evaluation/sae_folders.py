"""Search for trained SAEs on disk: run folders, checkpoints, SAE folders."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from ...registry.errors import CheckpointError, ConfigError
from ...registry.files import file_digest
from ..reporting.series import layer_of, natural_key

SAE_SCHEMA = "taxolens.sae/1"  # version of our keys in the metadata: docs/formats/saes.md

RUNS = "run folders, checkpoints or SAE folders"
LISTED = "an architecture of `taxolens list architectures`"


@dataclass(frozen=True)
class SAEFolder:
    """A saved SAE; `settings` is the runner_cfg.json of its run, {} where there is none."""

    id: str
    run: str
    name: str
    path: Path
    cfg: Mapping[str, Any]
    settings: Mapping[str, Any]

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting from the SAE's own metadata, else from its run's settings."""
        for source in (self.cfg.get("metadata") or {}, self.settings):
            if source.get(name) is not None:
                return source[name]
        return default

    @property
    def hook_name(self) -> str:
        """The hook point that it reads."""
        return self._required("hook_name")

    @property
    def model_name(self) -> str:
        """The model that it reads."""
        return self._required("model_name")

    @property
    def tokens(self) -> str:
        """Which tokens of an image it reads."""
        if self.setting("source_format"):  # of another library, for which no tokens can be meant
            return self._required("tokens")
        return self.setting("tokens", "class")

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
        """Digest of the file of weights."""
        return file_digest(self.path / SAE_WEIGHTS_FILENAME)

    def load(self, device: str = "cpu") -> SAE[Any]:
        """Load the SAE, for inference.

        Raises:
            CheckpointError: the weights are incomplete, damaged or not those of the config.
            ConfigError: SAELens does not have its architecture.
        """
        try:
            if (self.path / ACTIVATION_SCALER_CFG_FILENAME).exists():
                return load_checkpoint(self.path, device)
            sae = SAE.load_from_disk(self.path, device=device)
        except KeyError as error:
            needed = self.setting("requires_plugin")
            raise ConfigError(
                self.path,
                "an architecture that SAELens does not have",
                given=error.args[0],
                allowed=f"install the plugin {needed!r}" if needed else LISTED,
            ) from error
        except Exception as error:
            raise CheckpointError(self.path, f"the SAE cannot be loaded: {error}") from error
        return sae.eval()

    def _required(self, name: str) -> str:
        found = self.setting(name)
        if not found:
            convert = f"`taxolens convert` with --{name}"
            raise ConfigError(
                self.path / SAE_CFG_FILENAME,
                f"metadata has no {name!r}",
                allowed=convert if self.setting("source_format") else "metadata that names it",
            )
        return found


def load_checkpoint(path: Path, device: str = "cpu") -> SAE[Any]:
    """An SAE from a checkpoint, with the scaling of its inputs folded into its weights."""
    sae = TrainingSAE.load_from_disk(path, device=device)
    scaler = ActivationScaler()
    scaler.load(path / ACTIVATION_SCALER_CFG_FILENAME)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        whitening = scaler.whitening
        sae.fold_activation_whitening(
            mean=whitening.mean,
            whitening_matrix=whitening.matrix,
            unwhitening_matrix=whitening.inverse_matrix,
        )
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder, device=device).eval()


def find_saes(runs: str | Path | Sequence[str | Path]) -> list[SAEFolder]:
    """Every SAE in the given folders, in natural order of name (block 9 before block 10).

    A folder is a run (runner_cfg.json, and one SAE or a folder for each), a checkpoint, or an SAE
    (cfg.json and sae_weights.safetensors). `id` is unique: the SAE's name, with the run's before it
    where several runs are given.

    Raises:
        ConfigError: a folder does not exist or has no SAE, or metadata is of another version.
        CheckpointError: a cfg.json or runner_cfg.json that is not JSON.
    """
    paths = [Path(p) for p in ([runs] if isinstance(runs, (str, Path)) else runs)]
    if not paths:
        raise ConfigError("runs", "no folder is given", allowed=RUNS)
    repeated = [
        str(path) for path, count in Counter(p.resolve() for p in paths).items() if count > 1
    ]
    if repeated:
        problem = f"{', '.join(repeated)} is given twice"
        raise ConfigError("runs", problem, allowed="each folder once")
    labels = _labels(paths)
    found = [
        sae for path, label in zip(paths, labels, strict=True) for sae in _saes_in(path, label)
    ]
    if len(paths) == 1:
        return found
    counts = Counter(sae.run for sae in found)
    return [
        replace(sae, id=sae.run if counts[sae.run] == 1 else f"{sae.run}/{sae.name}")
        for sae in found
    ]


def _saes_in(path: Path, label: str) -> list[SAEFolder]:
    if not path.is_dir():
        raise ConfigError("runs", f"{path} is not a folder", allowed=RUNS)
    settings = _read_json(path / RUNNER_CFG_FILENAME)
    folders = [
        file.parent
        for file in path.rglob(SAE_CFG_FILENAME)
        if (file.parent / SAE_WEIGHTS_FILENAME).exists() and not _is_older(file.parent, path)
    ]
    if not folders:
        raise ConfigError(
            "runs",
            f"{path} holds no SAE",
            allowed=f"a folder with {SAE_CFG_FILENAME} and {SAE_WEIGHTS_FILENAME}",
        )
    saes = []
    for folder in folders:
        name = label if folder == path else folder.relative_to(path).as_posix()
        cfg = _read_json(folder / SAE_CFG_FILENAME)
        schema = (cfg.get("metadata") or {}).get("taxolens_schema", SAE_SCHEMA)
        if schema != SAE_SCHEMA:
            raise ConfigError(
                folder / SAE_CFG_FILENAME,
                "taxolens_schema: not known",
                given=schema,
                allowed=repr(SAE_SCHEMA),
            )
        saes.append(SAEFolder(name, label, name, folder, cfg, settings))
    return sorted(saes, key=lambda sae: natural_key(sae.name))


def _is_older(folder: Path, run: Path) -> bool:
    """Whether the folder is a checkpoint inside the folder of its run."""
    depth = len(folder.relative_to(run).parts)
    return depth > 1 and (folder / TRAINER_STATE_FILENAME).exists()


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest distinct ends of the paths: ``seed0``, or ``a/sae`` and ``b/sae``."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-length:]).strip("/") or "run" for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(file, f"not JSON: {error}") from None
