"""SAELens's folders of earlier versions: what its reader of today ignores is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...files import read_json_object
from .facts import shown

ACTIVATIONS = ("activation_fn_str", "activation_fn")  # of versions 3 to 5
FACTORS = ("finetuning_scaling_factor", "scaling_factor")  # (d_sae,), of the decoder's inputs


def read_folder(
    path: str | Path, device: str = "cpu", cfg_overrides: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """SAELens's ``sae_lens_disk_loader``: the config as it is in the file, and the state dict.

    Raises:
        ConfigError: an activation function or a factor of the latents that SAELens no longer has, and
            reads as none.
    """
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

    _check_activation(path, read_json_object(Path(path) / "cfg.json"))
    cfg, state = sae_lens_disk_loader(path, device, dict(cfg_overrides or {}))
    if factors := [name for name in FACTORS if name in state]:
        raise ConfigError(
            f"{path}: {factors[0]}",
            "SAELens no longer multiplies latents by it",
            allowed="W_dec with each row multiplied by its factor, without the tensor and with "
            "finetuning_scaling_factor false in cfg.json",
        )
    return cfg, state


def _check_activation(path: str | Path, cfg: Mapping[str, Any]) -> None:
    for name in ACTIVATIONS:
        said = cfg.get(name)
        kwargs = cfg.get("activation_fn_kwargs")
        k = kwargs.get("k") if isinstance(kwargs, Mapping) else None
        architecture = cfg.get("architecture") or "standard"
        is_topk = said == "topk" and (k or cfg.get("k")) and architecture in ("standard", "topk")
        if said not in (None, "relu") and not is_topk:
            raise ConfigError(
                f"{path}: {name}",
                f"SAELens would read it as if it were none (architecture {shown(architecture)})",
                given=shown(said),
                allowed="relu, or topk with k of the architecture standard",
            )
