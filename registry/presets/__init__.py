"""Presets: settings of training runs by SAELens's names, one YAML file each.

A preset starts with comment lines: its description, its cost (`# Cost: ...`) and its source
(`# Source: ...`). Each of these ends at the next one or at an empty comment line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnknownNameError
from ..files import UnreadableError, read_yaml, reason
from ..names import unknown_name_message

FOLDER = Path(__file__).parent
PRESETS: tuple[str, ...] = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


@dataclass(frozen=True)
class Preset:
    """A preset's name and the comments of its file."""

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
    """Parse the comment lines at the head of the preset."""
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
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        settings = read_yaml(path)
    except (OSError, UnreadableError) as error:
        raise ConfigError("config", f"{path} cannot be read ({reason(error)})") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(
            "config", f"{path} contains a {type(settings).__name__}", allowed="`name: value` lines"
        )
    if unnamed := [key for key in settings if not isinstance(key, str)]:
        raise ConfigError(
            "config", f"{path}: a key is no name", given=unnamed[0], allowed="`name: value` lines"
        )
    refuse_remote_code(settings, str(path))
    return settings


def refuse_remote_code(settings: dict[str, Any], where: str) -> None:
    """Check that a file does not allow code to be run that comes with a model or a dataset.

    `dataset_trust_remote_code` is set to False in place: SAELens's configs, where it is True by
    default, have recorded it.

    Raises:
        ConfigError: `model_from_pretrained_kwargs` have `trust_remote_code`.
    """
    more = settings.get("model_from_pretrained_kwargs")
    if isinstance(more, dict) and more.get("trust_remote_code"):
        raise ConfigError(
            where,
            "trust_remote_code: a file cannot allow code to run",
            given=more["trust_remote_code"],
            allowed="""--model_from_pretrained_kwargs '{"trust_remote_code": true}', or the config in Python""",
        )
    if "dataset_trust_remote_code" in settings:
        settings["dataset_trust_remote_code"] = False


def _path(name: str) -> Path:
    if name not in PRESETS:
        raise UnknownNameError(unknown_name_message("preset", name, list(PRESETS)))
    return FOLDER / f"{name}.yaml"
