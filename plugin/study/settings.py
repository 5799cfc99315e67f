"""A study: the settings of a training run, merged and checked before a model is loaded.

A preset, a YAML file and the flags of the command line use the same names, those of the runner's
config, its SAE config and its logger; later sources override earlier ones. Beside SAELens's names
a study has

- `architecture`: the SAE architecture (SAELens: `--architecture`);
- `hook_names`: hook points, or patterns such as `blocks.*.hook_resid_post`;
- `hook_head_indices`: an SAE for each of these heads of every hook point;
- `expansion_factor`: d_sae as a multiple of d_in, and d_in from the model when it is not given;
- `epochs`: training_tokens as passes over the images;
- `saes` (files only): several SAEs for every hook point, `name: {architecture: ..., k: ...}`;
  one may have a `constraint` of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainingSAEConfig

from ...hooks.models.load import device_here
from ...registry.coerce import MisfitError, coerce
from ...registry.errors import ConfigError
from ...registry.heads import head_name
from ...registry.names import did_you_mean, nearest
from ..training.config import (
    VisionMultiSAERunnerConfig,
    VisionSAERunnerConfig,
    training_config_class,
)
from .sources import PRESET, Settings, architecture_of, layers, own_architecture, required

SECTIONS = ("study", "runner", "logger", "sae")

STAND_IN_WIDTH = 1024

# Pairs of fields of which one replaces the other: naming one in a later source drops the other.
ALTERNATIVES = (
    ("hook_name", "hook_names"),
    ("hook_head_index", "hook_head_indices"),
    ("d_sae", "expansion_factor"),
    ("training_tokens", "epochs"),
)
STUDY_FIELDS = {
    "architecture": str,
    "hook_name": str,
    "hook_names": list[str],
    "hook_head_index": int | None,
    "hook_head_indices": list[int],
    "expansion_factor": float,
    "epochs": float,
    "saes": dict[str, Any],
}


@dataclass(frozen=True)
class SAEChoice:
    """One SAE of a study: architecture, constraint, and the fields of its config that were given."""

    architecture: str
    fields: Settings = field(default_factory=dict)
    expansion_factor: float | None = None
    constraint: str | None = None

    def config(self, d_in: int, hook_name: str) -> TrainingSAEConfig:
        """The SAE config for a hook point of width `d_in`.

        Raises:
            ConfigError: d_in differs from the one given, or the config refuses a value.
        """
        given = self.fields.get("d_in", d_in)
        if given != d_in:
            raise ConfigError("d_in", f"not the width of {hook_name}", given=given, allowed=d_in)
        # A copy: SAELens changes lists such as matryoshka_widths in place.
        fields = {**copy.deepcopy(self.fields), "d_in": d_in}
        if self.expansion_factor is not None:
            _check_factor("expansion_factor", self.expansion_factor)
            fields["d_sae"] = round(self.expansion_factor * d_in)
        if "d_sae" not in fields:
            raise ConfigError("d_sae", "not given", allowed="a width, or expansion_factor")
        config_class = training_config_class(self.architecture)
        try:
            return config_class(**fields)
        except (TypeError, ValueError, AssertionError) as error:
            allowed = f"see {config_class.__name__}"
            field = f"architecture {self.architecture!r}"
            raise ConfigError(field, error, allowed=allowed) from error


@dataclass(frozen=True)
class Study:
    """The settings of a training run.

    Attributes:
        saes: the SAEs trained at every hook point, by name; the only one is called "".
        hook_names: hook points and patterns, as written.
        runner: the given fields of the runner's config; missing ones keep their defaults.
        logger: the given fields of SAELens's LoggingConfig.
        epochs: passes over the images, when asked for in place of training_tokens.
        heads: the heads that have SAEs; None stands for all heads of a hook point, joined.
    """

    saes: dict[str, SAEChoice]
    hook_names: tuple[str, ...]
    runner: Settings
    logger: Settings
    epochs: float | None = None
    heads: tuple[int | None, ...] = (None,)

    def config(
        self, widths: Mapping[str, int], *, tokens_per_epoch: int | None = None
    ) -> VisionSAERunnerConfig[Any] | VisionMultiSAERunnerConfig:
        """The runner's config: the single form for one SAE, the multi form for more.

        Args:
            widths: hook point -> d_in there, or of a head, for every hook point that the patterns match.
            tokens_per_epoch: tokens in one pass over the images; needed when epochs were given.

        Raises:
            ConfigError: a field is missing, does not fit, or has no meaning for many SAEs.
        """
        runner = dict(self.runner)
        if self.epochs is not None:
            _check_factor("epochs", self.epochs)
            if tokens_per_epoch is None:
                raise ConfigError(
                    "epochs",
                    "the number of images is unknown before they are streamed",
                    allowed="training_tokens",
                )
            asked = self.epochs * tokens_per_epoch
            if not math.isfinite(asked):
                raise ConfigError("epochs", "too many", given=self.epochs, allowed="fewer")
            tokens = max(1, round(asked))
            batch = runner.get("train_batch_size_tokens")
            if batch is not None and batch > tokens:
                raise ConfigError(
                    "train_batch_size_tokens",
                    f"more than the {tokens:,} tokens of {self.epochs:g} epochs",
                    given=batch,
                    allowed=f"up to {tokens} (left out, it is chosen for the run), or epochs of at "
                    f"least {batch / tokens_per_epoch:.3g}",
                )
            runner["training_tokens"] = tokens
        if len(widths) * len(self.saes) * len(self.heads) == 1:
            ((hook_name, d_in),) = widths.items()
            (choice,) = self.saes.values()
            return self._build(
                VisionSAERunnerConfig,
                runner,
                sae=choice.config(d_in, hook_name),
                hook_name=hook_name,
                hook_head_index=self.heads[0],
                constraint=choice.constraint,
            )
        saes, hook_names, heads, constraint = {}, {}, {}, {}
        for (hook_name, d_in), head in product(widths.items(), self.heads):
            for name, choice in self.saes.items():
                key = ".".join(part for part in (head_name(hook_name, head), name) if part)
                saes[key], hook_names[key] = choice.config(d_in, hook_name), hook_name
                if head is not None:
                    heads[key] = head
                if choice.constraint is not None:
                    constraint[key] = choice.constraint
        return self._build(
            VisionMultiSAERunnerConfig,
            runner,
            saes=saes,
            hook_names=hook_names,
            hook_head_indices=heads or None,
            constraint=constraint or None,
        )

    def draft(self) -> VisionSAERunnerConfig[Any] | VisionMultiSAERunnerConfig:
        """The config with patterns for hook points, and placeholders for widths and image counts.

        An error in it is an error for every model and dataset.
        """
        given = (choice.fields.get("d_in") for choice in self.saes.values())
        width = next((d_in for d_in in given if d_in), STAND_IN_WIDTH)
        return self.config(dict.fromkeys(self.hook_names, width), tokens_per_epoch=1 << 40)

    def _build(self, config_class: type[Any], runner: Settings, **fields: Any) -> Any:
        lacking = sorted(set(runner) - {f.name for f in dataclasses.fields(config_class)})
        if lacking:
            raise ConfigError(
                ", ".join(lacking),
                "no meaning for more than one SAE",
                allowed="left out, or one hook point",
            )
        logger = LoggingConfig(**self.logger)
        try:
            return config_class(**fields, logger=logger, **runner)
        except ConfigError:
            raise
        except (TypeError, ValueError, AssertionError) as error:
            allowed = "see `taxolens train --help_all`"
            raise ConfigError(config_class.__name__, error, allowed=allowed) from error


def _check_factor(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(name, "not possible", given=value, allowed="a number above 0")


def gather(
    *, preset: str | None = None, config: str | Path | None = None, flags: Settings | None = None
) -> Study:
    """The study of a preset, a YAML file and flags; later ones override earlier ones.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a required setting missing.
    """
    return study_from(layers(preset=preset, config=config, flags=flags))


def study_from(sources: Sequence[tuple[str, Settings]]) -> Study:
    """Check and merge the sources; see `gather`.

    A preset's device that this machine lacks is replaced with a warning.
    """
    final = training_config_class(architecture_of(sources))
    merged: dict[str, Settings] = {section: {} for section in SECTIONS}
    for position, (source, settings) in enumerate(sources, start=1):
        running = training_config_class(architecture_of(sources[:position]))
        sections = _sections(settings, source, (running, final))
        if "saes" not in settings:
            _refuse_overruled(merged["study"].get("saes"), settings, sections, source)
        _drop_alternatives(merged, sections, source)
        for section, values in sections.items():
            merged[section].update(values)
    devices = [source for source, settings in sources if "device" in settings]
    if devices and devices[-1].startswith(PRESET):  # of another machine; what was typed is refused
        merged["runner"]["device"] = device_here("device", merged["runner"]["device"])
    return _study(architecture_of(sources), merged)


def _sections(
    settings: Settings, source: str, sae_classes: Sequence[type[Any]]
) -> dict[str, Settings]:
    """The settings of one source, checked and sorted into SECTIONS.

    A field of the logger or of the SAE may be given at the top, as among flags, or under `logger:`
    and `sae:`. At the top, a name that the runner and another section share is the runner's.
    """
    hints = {"study": STUDY_FIELDS, "runner": _runner_hints(), "logger": _hints(LoggingConfig)}
    hints["sae"] = {k: v for cls in sae_classes for k, v in _hints(cls).items() if k != "metadata"}
    found: dict[str, Settings] = {section: {} for section in SECTIONS}
    flat = dict(settings)
    for section in ("logger", "sae"):
        nested = flat.pop(section, None) or {}
        if not isinstance(nested, Mapping):
            raise ConfigError(
                source, f"{section}: not settings", given=nested, allowed="`name: value` lines"
            )
        for key, value in nested.items():
            if section == "sae" and key == "architecture":
                continue
            if key not in hints[section]:
                raise ConfigError(_unknown_key(source, f"{section}.{key}", key, hints[section]))
            found[section][key] = typed(f"{source}: {section}.{key}", value, hints[section][key])
    for key, value in flat.items():
        section = next((s for s in SECTIONS if key in hints[s]), None)
        if section is None:
            known = {name for section in SECTIONS for name in hints[section]}
            raise ConfigError(_unknown_key(source, key, key, known | {"logger", "sae"}))
        found[section][key] = typed(f"{source}: {key}", value, hints[section][key])
    return found


def _refuse_overruled(
    saes: Any, settings: Settings, sections: dict[str, Settings], source: str
) -> None:
    """Refuse a field that SAEs of an earlier source have of their own, which would have no effect."""
    given = {key: value for values in sections.values() for key, value in values.items()}
    if architecture := own_architecture(settings):
        given["architecture"] = architecture
    for name, own in (saes or {}).items():
        for key, value in given.items():
            same = {key, *(other for pair in ALTERNATIVES if key in pair for other in pair)}
            if isinstance(own, Mapping) and same & own.keys() and own.get(key, ...) != value:
                problem = f"saes.{name} has its own {min(same & own.keys())}"
                allowed = "left out, or changed in saes"
                raise ConfigError(f"{source}: {key}", problem, given=value, allowed=allowed)


def _drop_alternatives(
    merged: dict[str, Settings], sections: dict[str, Settings], source: str
) -> None:
    """Remove from earlier sources the alternatives of the fields that this source gives."""
    given = {key for values in sections.values() for key in values}
    for one, other in ALTERNATIVES:
        if one in given and other in given:
            raise ConfigError(
                source, f"{one} and {other} say the same thing", allowed="one of them"
            )
        for key, dropped in ((one, other), (other, one)):
            if key in given:
                for values in merged.values():
                    values.pop(dropped, None)


def _study(architecture: str, merged: dict[str, Settings]) -> Study:
    extra, runner, shared = merged["study"], merged["runner"], merged["sae"]
    hook_names = required({**runner, **extra})
    # The SAE has the device and dtype of the run, unless its own were given.
    for key in ("device", "dtype"):
        if key in runner:
            shared.setdefault(key, runner[key])
    default = SAEChoice(
        architecture, shared, extra.get("expansion_factor"), runner.pop("constraint", None)
    )
    saes = {}
    for name, own in (extra.get("saes") or {"": {}}).items():
        saes[str(name)] = _sae_choice(str(name), own, default)
    heads = extra.get("hook_head_indices") or [extra.get("hook_head_index")]
    return Study(
        *(saes, tuple(hook_names), runner, merged["logger"], extra.get("epochs")),
        heads=tuple(dict.fromkeys(heads)),
    )


def _sae_choice(name: str, own: Any, default: SAEChoice) -> SAEChoice:
    """The SAE of this name, with what all SAEs of the study share as its default."""
    if not isinstance(own, Mapping):
        raise ConfigError(f"saes.{name}", "not settings", given=own, allowed="`name: value` lines")
    architecture = str(own.get("architecture", default.architecture))
    expansion_factor, constraint = default.expansion_factor, default.constraint
    hints = _hints(training_config_class(architecture))
    # Fields of another architecture are left out, so that a preset's l1_coefficient does not stop
    # `--architecture topk`.
    fields = {key: value for key, value in default.fields.items() if key in hints}
    for key, value in own.items():
        if key == "expansion_factor":
            expansion_factor = typed(f"saes.{name}.{key}", value, float)
        elif key == "constraint":
            constraint = typed(f"saes.{name}.{key}", value, str | None)
        elif key in hints:
            fields[key] = typed(f"saes.{name}.{key}", value, hints[key])
        elif key != "architecture":
            raise ConfigError(_unknown_key("saes", f"{name}.{key}", key, hints))
    if "d_sae" in own:
        expansion_factor = None
    return SAEChoice(architecture, fields, expansion_factor, constraint)


def _unknown_key(source: str, shown: str, key: str, known: Iterable[str]) -> str:
    near = did_you_mean(nearest(key, known, cutoff=0.6))
    allowed = "see `taxolens train --help_all`"
    return f"{source}: key not known{f' ({near})' if near else ''}; given {shown!r}; allowed: {allowed}."


def _hints(config_class: type[Any]) -> dict[str, Any]:
    """The public fields of a dataclass with their types."""
    hints = typing.get_type_hints(config_class)
    return {
        f.name: hints[f.name]
        for f in dataclasses.fields(config_class)
        if f.init and not f.name.startswith("_")
    }


def _runner_hints() -> dict[str, Any]:
    both = {**_hints(VisionMultiSAERunnerConfig), **_hints(VisionSAERunnerConfig)}
    placed_elsewhere = {"sae", "saes", "logger", *STUDY_FIELDS}
    return {key: hint for key, hint in both.items() if key not in placed_elsewhere}


def typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of a config field.

    YAML reads `3e-4` as text, and a list where the field is a tuple: both are converted.

    Raises:
        ConfigError: it does not fit; the message names the field, the value and the type.
    """
    try:
        return coerce(value, hint, lenient=True)
    except MisfitError:
        shown = getattr(hint, "__name__", None) if isinstance(hint, type) else None
        shown = shown or str(hint).replace("typing.", "")
        raise ConfigError(name, "of the wrong type", given=value, allowed=shown) from None
