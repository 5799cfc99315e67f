"""The flags of `taxolens train`, read with simple-parsing as SAELens reads its own.

SAELens's parser returns a complete config, defaults included. Here flags override a preset and a
file, so that only the typed ones are returned: every default is suppressed. simple-parsing cannot
suppress the default of a subgroup; the architecture is therefore looked up first, and its config
class replaces the subgroup that SAELens has there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from typing import Any, NoReturn, get_type_hints

import docstring_parser
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from simple_parsing import ArgumentParser

from ...registry.errors import ConfigError
from ..study.settings import Study, study_from
from ..study.sources import Settings, architecture_of, layers
from ..training.config import VisionSAERunnerConfig, training_config_class
from . import shell
from .quick_check import first_look

# Help of fields without a default; the empty format keeps argparse from adding one.
FOUND_LATER = {
    "d_in": "Width of the activations. Defaults to the width at the hook point.%(default).0s",
    "d_sae": "Number of latents; or give --expansion_factor.%(default).0s",
}


@dataclass
class StudyFlags:
    """The flags of `taxolens train` beside SAELens's fields.

    Args:
        preset (str, optional): A packaged study; `taxolens list presets` shows them.
        config (str, optional): A YAML file with settings by the names of these flags; flags win.
        architecture (str, optional): The kind of SAE; its own fields become flags. Defaults to standard.
        hook_names (list[str]): Hook points, or patterns such as blocks.*.hook_resid_post; one forward pass serves all.
        hook_head_indices (list[int]): At hook_q, hook_k, hook_v or hook_z, one SAE for each of these heads.
        expansion_factor (float, optional): d_sae as a multiple of d_in.
        epochs (float, optional): training_tokens as passes over the images.
        no_evaluate (bool): Stop after training: no evaluation, no report.
        dry_run (bool): Check everything, print the plan and the time that a calibration of some seconds predicts; train nothing.
        ranks (int, optional): Processes for which --dry_run predicts the time. Defaults to those that torchrun has started.
        json (bool): Print the plan or the results as JSON on stdout.
    """

    preset: str | None = None
    config: str | None = None
    architecture: str | None = None
    hook_names: list[str] = field(default_factory=list)
    hook_head_indices: list[int] = field(default_factory=list)
    expansion_factor: float | None = None
    epochs: float | None = None
    no_evaluate: bool = False
    dry_run: bool = False
    ranks: int | None = None
    json: bool = False


@dataclass(frozen=True)
class TrainCommand:
    """A parsed command line: the study, and what to do with it."""

    study: Study
    evaluate: bool
    dry_run: bool
    json: bool
    ranks: int | None = None


def parse(args: Sequence[str]) -> TrainCommand:
    """Read the flags of `taxolens train`, and the preset and the file that they name.

    Raises:
        ConfigError: an unknown flag or key (the nearest names are given), a value of the wrong
            type, or a required setting that is missing.
    """
    first = first_look(args)
    settings = layers(preset=first.preset, config=first.config)
    named = {"architecture": first.architecture} if first.architecture else {}
    architecture = architecture_of([*settings, ("the command line", named)])
    given = _parser(architecture, only_given=True).parse(args)
    own = given.pop("study", {})
    command = {name: own.pop(name, False) for name in ("no_evaluate", "dry_run", "json")}
    ranks = own.pop("ranks", None)
    if ranks is not None and not command["dry_run"]:
        allowed = "with --dry_run; torchrun --nproc-per-node N starts N processes"
        raise ConfigError("ranks", "of the prediction alone", given=ranks, allowed=allowed)
    for name in ("preset", "config", "architecture"):
        own.pop(name, None)
    flags: Settings = {**named, **own, **given.get("run", {})}
    study = study_from([*settings, ("the command line", flags)] if flags else settings)
    return TrainCommand(
        study, not command["no_evaluate"], command["dry_run"], command["json"], ranks
    )


def full_help(args: Sequence[str]) -> str:
    """The help of every flag, for the architecture that `args` name."""
    first = first_look([arg for arg in args if arg != "--help_all"])
    named = ("the command line", {"architecture": first.architecture})
    architecture = architecture_of([*layers(preset=first.preset, config=first.config), named])
    text = io.StringIO()
    _parser(architecture, only_given=False).print_help(text, args=[])
    return text.getvalue()


def _parser(architecture: str, *, only_given: bool) -> _Parser:
    """A parser of every flag; with `only_given` it returns only what was typed."""
    run_class = _run_class(training_config_class(architecture))
    suppressed: dict[str, Any] = {"argument_default": argparse.SUPPRESS} if only_given else {}
    parser = _Parser(
        prog="taxolens train",
        usage="taxolens train [--preset NAME] [--config FILE] [FLAG VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        **suppressed,
    )
    default: dict[str, Any] = {"default": argparse.SUPPRESS} if only_given else {}
    for flags_class, dest in ((StudyFlags, "study"), (run_class, "run")):
        wrapper = parser.add_arguments(flags_class, dest=dest, **default)
        for dataclass_wrapper in (wrapper, *wrapper.descendants):
            shown = dataclass_wrapper.dataclass
            documented = _documented(VisionSAERunnerConfig if shown is run_class else shown)
            for flag in dataclass_wrapper.fields:
                flag.help = FOUND_LATER.get(flag.name) or documented.get(flag.name) or " "
    return parser


def _run_class(config_class: type[Any]) -> type[Any]:
    """A dataclass with the fields of `VisionSAERunnerConfig`, for SAEs of this config class.

    simple-parsing looks for comments in the source of a class and of its bases, once for each field. From
    Python 3.12 on, `typing.Generic`, a base of SAELens's config, has no source: each look parses all of
    `typing`, which takes seconds. This class has no base; nor has it a source, which "builtins" says at once.
    """
    # The parser needs widths; the model's replace them later.
    sae = field(default_factory=partial(config_class, d_in=512, d_sae=4096))
    types = get_type_hints(VisionSAERunnerConfig) | {"sae": config_class}
    own = [
        (f.name, types[f.name], sae if f.name == "sae" else copy.copy(f))
        for f in dataclasses.fields(VisionSAERunnerConfig)
    ]
    run_class = make_dataclass("VisionSAERunnerConfig", own)
    run_class.__doc__ = "SAELens's runner config, and the fields that images need."
    run_class.__module__ = "builtins"
    return run_class


def _documented(config_class: type[Any]) -> dict[str, str]:
    """Field -> its description in the docstrings; a subclass overrides its bases.

    simple-parsing prefers the comments beside a field, which SAELens writes for its own developers,
    and the docstring of the class that first declares it.
    """
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            for param in docstring_parser.parse(base.__doc__ or "").params:
                found[param.arg_name] = " ".join((param.description or "").split())
    return found


class _Parser(ArgumentParser):
    """simple-parsing's parser, which raises `ConfigError` with the nearest flags."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, allowed="see `taxolens train --help`")

    def parse(self, args: Sequence[str]) -> dict[str, Settings]:
        try:
            parsed, rest = self.parse_known_args(list(args))
        except argparse.ArgumentError as error:
            raise ConfigError(self.prog, error, allowed="see `taxolens train --help`") from error
        if rest:
            raise self._unknown(rest[0])
        return vars(parsed)

    def _unknown(self, arg: str) -> ConfigError:
        name = arg.partition("=")[0].removeprefix("--")
        having = [
            a for a, (_, c) in SAE_TRAINING_CLASS_REGISTRY.items() if name in c.__dataclass_fields__
        ]
        if having:
            allowed = f"with --architecture {', '.join(sorted(having))}"
            return ConfigError("argument", "of another architecture", given=arg, allowed=allowed)
        known = {flag for flag in self._option_string_actions if flag.startswith("--")}
        negations = {f"--no{flag.removeprefix('--')}" for flag in known}
        return ConfigError(shell.unknown("argument", arg, known - negations))
