"""Finding trained SAEs on disk: run folders, checkpoints, bare SAE folders."""

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

SAE_SCHEMA = "taxolens.sae/1"  # of our keys in the metadata: docs/formats/saes.md


@dataclass(frozen=True)
class SAEFolder:
    """A saved SAE. `settings` is the runner_cfg.json of its run, {} where there is none."""

    id: str
    run: str
    name: str
    path: Path
    cfg: Mapping[str, Any]
    settings: Mapping[str, Any]

    def setting(self, name: str, default: Any = None) -> Any:
        """From the SAE's own metadata, else from its run's settings."""
        for source in (self.cfg.get("metadata") or {}, self.settings):
            if source.get(name) is not None:
                return source[name]
        return default

    @property
    def hook_name(self) -> str:
        return self._required("hook_name")

    @property
    def model_name(self) -> str:
        return self._required("model_name")

    @property
    def tokens(self) -> str:
        if self.setting("source_format"):  # of another library, for which no tokens can be meant
            return self._required("tokens")
        return self.setting("tokens", "class")

    @property
    def architecture(self) -> str:
        """As its files say, "" where they do not."""
        return str(self.cfg.get("architecture", ""))

    @property
    def trained_as(self) -> str:
        """The architecture that was trained, which SAELens records in the metadata: what saves as
        `topk` may have been trained as another. Where it is not recorded, `architecture`."""
        return str(
            (self.cfg.get("metadata") or {}).get("training_architecture") or self.architecture
        )

    @property
    def layer(self) -> int | None:
        return layer_of(self.hook_name)

    def weights_digest(self) -> str:
        return file_digest(self.path / SAE_WEIGHTS_FILENAME)

    def load(self, device: str = "cpu") -> SAE[Any]:
        """Raises CheckpointError where the weights are torn or not those of the config."""
        try:
            if (self.path / ACTIVATION_SCALER_CFG_FILENAME).exists():
                return load_checkpoint(self.path, device)
            sae = SAE.load_from_disk(self.path, device=device)
        except KeyError as error:
            needed = self.setting("requires_plugin")
            hint = f"; it needs the plugin {needed!r}" if needed else ""
            raise ConfigError(
                self.path, f"SAELens knows no architecture {error.args[0]!r}{hint}"
            ) from error
        except Exception as error:
            raise CheckpointError(self.path, f"the SAE cannot be loaded: {error}") from error
        return sae.eval()

    def _required(self, name: str) -> str:
        found = self.setting(name)
        if not found:
            raise ConfigError(
                self.path / SAE_CFG_FILENAME,
                f"metadata has no {name!r}",
                allowed=f"`taxolens convert` with --{name}"
                if self.setting("source_format")
                else None,
            )
        return found


def load_checkpoint(path: Path, device: str = "cpu") -> SAE[Any]:
    """A SAE that is still in training, as it would be saved now: what scales its inputs folded into
    its weights."""
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

    A folder is a run (runner_cfg.json, and one SAE or a folder for each), a checkpoint, or a bare
    SAE (cfg.json and sae_weights.safetensors). `id` is unique: the SAE's name, with the run's
    before it where several runs are given.

    Raises:
        ConfigError: a folder that does not exist or holds no SAE, or metadata of another version.
        CheckpointError: a cfg.json or runner_cfg.json that is not JSON.
    """
    paths = [Path(p) for p in ([runs] if isinstance(runs, (str, Path)) else runs)]
    if not paths:
        raise ConfigError("runs", "no folder is given")
    repeated = [
        str(path) for path, count in Counter(p.resolve() for p in paths).items() if count > 1
    ]
    if repeated:
        raise ConfigError("runs", f"{', '.join(repeated)} is given twice")
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
        raise ConfigError("runs", f"{path} is not a folder")
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
    """A checkpoint on the way, kept inside the folder of its run."""
    depth = len(folder.relative_to(run).parts)
    return depth > 1 and (folder / TRAINER_STATE_FILENAME).exists()


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart: ``seed0``, or ``a/sae`` and ``b/sae``."""
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
