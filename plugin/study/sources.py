"""The sources of a run's settings: a preset, a file, flags. Imports no large library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...registry.errors import ConfigError
from ...registry.presets import load_preset, read_settings

Settings = dict[str, Any]
PRESET = "preset "  # how the name of a preset begins among the sources


def layers(
    *, preset: str | None = None, config: str | Path | None = None, flags: Settings | None = None
) -> list[tuple[str, Settings]]:
    """The given sources by rising precedence, each with a name for error messages."""
    found: list[tuple[str, Settings]] = []
    if preset is not None:
        found.append((f"{PRESET}{preset!r}", load_preset(preset)))
    if config is not None:
        found.append((str(config), read_settings(Path(config))))
    if flags:
        found.append(("the command line", flags))
    return found


def architecture_of(sources: Sequence[tuple[str, Settings]]) -> str:
    """The architecture in the last source that names one, or SAELens's default."""
    found = (own_architecture(settings) for _, settings in reversed(sources))
    return next((name for name in found if name), "standard")


def own_architecture(settings: Settings) -> str | None:
    """The architecture that the settings of one source name, at the top or under `sae`."""
    sae = settings.get("sae")
    nested = sae.get("architecture") if isinstance(sae, Mapping) else None
    name = settings.get("architecture") or nested
    return str(name) if name else None


def required(settings: Settings) -> list[str]:
    """The hook points and patterns, after a check that the required settings are given.

    Raises:
        ConfigError: no model, no dataset, or no hook points.
    """
    for name in ("model_name", "dataset_path"):
        if not settings.get(name):
            raise ConfigError(name, "not given", allowed="see `taxolens train --help`")
    hook_names = settings.get("hook_names") or [n for n in [settings.get("hook_name")] if n]
    if not hook_names:
        raise ConfigError(
            "hook_names",
            "not given",
            allowed="hook points such as blocks.5.hook_resid_post, or patterns such as blocks.*.hook_resid_post",
        )
    return hook_names
