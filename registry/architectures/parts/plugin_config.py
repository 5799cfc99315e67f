"""Configs of the architectures that SAELens cannot load by itself."""

from dataclasses import dataclass
from typing import Any

from sae_lens.saes.sae import TrainingSAEConfig
from typing_extensions import override

from ...errors import ConfigError


@dataclass
class PluginTrainingSAEConfig(TrainingSAEConfig):
    """A training config whose saved SAE has in its metadata that it needs taxolens to load."""

    @override
    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        saved = super().get_inference_sae_cfg_dict()
        saved["metadata"]["requires_plugin"] = "taxolens"
        return saved


def check_k(cfg: Any, setting: str = "k") -> None:
    """Check a number of active latents.

    Raises:
        ConfigError: the dictionary has not so many, or none is active.
    """
    k = getattr(cfg, setting)
    if not 0 < k <= cfg.d_sae:
        raise ConfigError(
            setting, "out of range", given=k, allowed=f"above 0, and at most d_sae={cfg.d_sae}"
        )


def refuse_input_normalisation(cfg: Any) -> None:
    """Check for losses over several reconstructions, where SAELens inverts normalisation only once.

    Raises:
        ConfigError: a normalisation is inverted with statistics of the single input.
    """
    if cfg.normalize_activations in ("layer_norm", "constant_norm_rescale"):
        raise ConfigError(
            "normalize_activations",
            f"not possible for {cfg.architecture()}, whose loss has several reconstructions of one input",
            given=cfg.normalize_activations,
            allowed="none, expected_average_only_in or covariance_whitening",
        )


def refuse_whitening(cfg: Any, why: str) -> None:
    """Raises:
    ConfigError: `cfg` has whitening, which cannot be folded after training.
    """
    if cfg.normalize_activations == "covariance_whitening":
        raise ConfigError(
            "normalize_activations",
            f"not possible for {cfg.architecture()}: {why}",
            given=cfg.normalize_activations,
            allowed="none or expected_average_only_in",
        )
