"""SAELens's own folders, of any version, and those of its fork SAE-V."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, TaxolensError
from ..table import Loader
from .parts.checkpoint import Checkpoint
from .parts.convert import AS_IT_IS
from .parts.facts import OF_THE_MODEL, PLACE, Facts, described
from .parts.old_folder import read_folder
from .parts.training_checkpoint import as_inference_folder, is_training_checkpoint


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    return "cfg.json and sae_weights.safetensors" if checkpoint.is_sae_lens else None


def disk(
    path: str | Path,
    device: str = "cpu",
    cfg_overrides: Mapping[str, Any] | None = None,
    **given: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What SAELens's own reader gives, with the config in today's form.

    Of a checkpoint of a training run it is the SAE for inference, for inputs as they come: their
    scaling or whitening is folded into the weights.
    """
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    checkpoint = Checkpoint.of(path)
    facts = Facts(f"SAELens folder {checkpoint}", given, PLACE)
    try:
        with (
            as_inference_folder(checkpoint.path, device)
            if is_training_checkpoint(checkpoint.path)
            else nullcontext(checkpoint.path)
        ) as folder:
            cfg, state = read_folder(folder, device, cfg_overrides)
        cfg = handle_config_defaulting(cfg)
    except TaxolensError:
        raise
    except Exception as error:
        raise CheckpointError(str(checkpoint), f"the SAE cannot be loaded: {error}") from error
    if cfg.get("architecture") == "topk":  # what a missing key means, but not in training
        cfg = {**AS_IT_IS, **cfg}
    metadata = {"sae_lens_version": version("sae-lens"), **(cfg.get("metadata") or {})}
    if facts.given.get("model_name") not in (None, metadata.get("model_name")):
        metadata = {name: value for name, value in metadata.items() if name not in OF_THE_MODEL}
    return {**cfg, "metadata": {**metadata, **facts.given}}, state


SAE_LENS = Loader(
    "sae_lens",
    disk=disk,
    description="a folder with cfg.json and sae_weights.safetensors",
    recognises=recognises,
    asks_for={name: text for name, text in described(()).items() if name in PLACE},
)
