"""Ready-made studies: one YAML file each, with the settings of a training run by SAELens's names.

A preset starts with comment lines that say what it is (the first line), what it costs
(`# Cost: ...`) and where it comes from (`# Source: ...`); the lines up to the next such word, or
to an empty comment line, belong together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, UnknownNameError
from ..names import unknown_name_message

FOLDER = Path(__file__).parent
PRESETS: tuple[str, ...] = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@dataclass(frozen=True)
class Preset:
    """A preset's name, and its own words about itself."""

    name: str
    description: str
    cost: str
    source: str


def load_preset(name: str) -> dict[str, Any]:
    """The settings of the preset `name`.

    Raises:
        UnknownNameError: no such preset; the nearest names are listed.
    """
    return read_settings(_path(name))


def describe_preset(name: str) -> Preset:
    """What the comment lines at the head of the preset say."""
    parts = {"description": "", "cost": "", "source": ""}
    part = "description"
    for line in _path(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").strip()
        word, colon, rest = text.partition(":")
        if colon and word.lower() in ("cost", "source"):
            part, text = word.lower(), rest.strip()
        elif not text:
            part = ""
        if part:
            parts[part] = f"{parts[part]} {text}".strip()
    return Preset(name, **parts)


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in the YAML (or JSON) file at `path`.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds something else than a mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("config", f"{path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", f"{path} is no YAML: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(
            "config", f"{path} holds a {type(settings).__name__}", allowed="`name: value` lines"
        )
    return settings


def _path(name: str) -> Path:
    if name not in PRESETS:
        raise UnknownNameError(unknown_name_message("preset", name, list(PRESETS)))
    return FOLDER / f"{name}.yaml"
