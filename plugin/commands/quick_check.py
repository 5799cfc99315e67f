"""Flags and architectures of `taxolens train`, found and checked without importing SAELens.

They are parsed from the source of the dataclasses that define the flags, SAELens's and ours.
Completion uses them, and common mistakes are reported before the seconds that the import takes.
`train_flags` makes the full check afterwards.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...registry.errors import ConfigError, UnknownNameError
from ...registry.table import unknown_name_message
from ..builtin import ARCHITECTURES
from ..study.sources import architecture_of, layers, required
from . import shell

OURS = Path(__file__).parents[2]
RUNNER_CLASSES = {
    *("StudyFlags", "VisionFields", "VisionSAERunnerConfig", "VisionLoggingConfig"),
    *("LoggingConfig", "LanguageModelSAERunnerConfig"),
}
NO_FLAGS = {"sae", "logger"}  # fields that hold other dataclasses


def first_look(args: Sequence[str]) -> Any:
    """Parse the three flags that decide which other flags there are."""
    parser = shell.Parser(prog="taxolens train", add_help=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--architecture")
    return parser.parse_known_args(list(args))[0]


def check(args: Sequence[str]) -> dict[str, Any]:
    """Refuse what is wrong for every architecture; return all settings, typed values as text.

    It refuses an unknown preset or architecture, an unreadable file, an unknown flag, a value that
    is not a number where one is needed, and a missing model, dataset or hook point. Where
    third-party plugins are installed, flags and architectures that are not ours or SAELens's may be
    theirs, and pass.

    Raises:
        ConfigError: the first of these, with the message of the full check.
    """
    first = first_look(args)
    sources = layers(preset=first.preset, config=first.config)
    runner = runner_fields()
    given = {
        arg[2:].partition("=")[0]: arg.partition("=")[2] or following
        for arg, following in zip(args, [*args[1:], ""])
        if arg.startswith("--")
    }
    for name, value in given.items():
        _check_number(name, value, runner.get(name, ""))
    of_saes = {name for name in given if not _is_among(name, runner)}
    if not _has_third_parties():
        architecture = architecture_of([*sources, ("", {"architecture": first.architecture})])
        if architecture not in architecture_names():
            raise UnknownNameError(
                unknown_name_message("architecture", architecture, architecture_names())
            )
        known = {*runner, *sae_fields()} if of_saes else runner
        for name in given:
            if not _is_among(name, known):
                raise ConfigError(shell.unknown("argument", f"--{name}", map("--{}".format, known)))
    merged = {key: value for _, settings in sources for key, value in settings.items()} | given
    if not of_saes:  # their flags may not fit the architecture, which the full check reports first
        required(merged)
    return merged


@cache
def runner_fields() -> dict[str, str]:
    """Field -> annotation, of the runner's config, of its logger and of `StudyFlags`."""
    paths = [_sae_lens() / "config.py", OURS / "plugin" / "training" / "config.py"]
    paths.append(Path(__file__).with_name("train_flags.py"))
    return _fields(paths, RUNNER_CLASSES)


@cache
def sae_fields() -> dict[str, str]:
    """Field -> annotation, of the config of any SAE."""
    ours = (OURS / "registry" / "architectures").rglob("*.py")
    return _fields([*(_sae_lens() / "saes").glob("*.py"), *ours], None)


@cache
def architecture_names() -> list[str]:
    """The architectures that SAELens can train, ours included."""
    text = (_sae_lens() / "__init__.py").read_text(encoding="utf-8")
    return sorted({*re.findall(r'register_sae_training_class\(\s*"(\w+)"', text), *ARCHITECTURES})


def _fields(paths: Iterable[Path], classes: set[str] | None) -> dict[str, str]:
    """Name -> annotation, of the fields of these classes, or of all configs."""
    return {
        line.target.id: ast.unparse(line.annotation)
        for path in paths
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        and (node.name in classes if classes else node.name.endswith(("Config", "Settings")))
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and line.target.id not in NO_FLAGS
    }


def _is_among(flag: str, fields: Iterable[str]) -> bool:
    """Whether a flag sets one of `fields`: by its name, after a prefix, or negated by `no`."""
    name = flag.rpartition(".")[2]
    return name in fields or (name.startswith("no") and name[2:] in fields) or name == "help_all"


def _check_number(name: str, value: str, annotation: str) -> None:
    kind = {"int": int, "float": float}.get(annotation.removesuffix(" | None"))
    if kind is None or (annotation.endswith("None") and value.lower() == "none"):
        return
    try:
        kind(value)
    except ValueError:
        raise ConfigError(
            f"argument --{name}",
            "of the wrong type",
            given=value,
            allowed=f"{kind.__name__}; see `taxolens train --help`",
        ) from None


def _has_third_parties() -> bool:
    from ..manager import other_plugins

    return bool(other_plugins())


def _sae_lens() -> Path:
    spec = find_spec("sae_lens")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'sae_lens'", name="sae_lens")
    return Path(spec.origin).parent
