"""Everything that taxolens itself registers, through the same hooks as any other plugin."""

from __future__ import annotations

from ..hooks.families import FAMILIES
from ..registry.architectures.mp import MP
from . import hookspecs
from .hookspecs import hookimpl


@hookimpl
def register_vision_models(register: hookspecs.RegisterVisionModel) -> None:
    for family in FAMILIES:
        register(family)


@hookimpl
def register_architectures(register: hookspecs.RegisterArchitecture) -> None:
    register(MP)
