"""Activations of images at hook points: extraction, an on-disk cache, a seekable stream."""

from typing import TYPE_CHECKING

from ...registry.lazy import lazy_names

if TYPE_CHECKING:
    from .stream import ActivationStream

__getattr__, __dir__, __all__ = lazy_names(__name__, {"stream": ["ActivationStream"]})
