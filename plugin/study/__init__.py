"""Settings of a training run from flags, files and presets, and the job that carries them out."""

from typing import TYPE_CHECKING

from ...registry.lazy import lazy_names

if TYPE_CHECKING:
    from .settings import SAEChoice, Study, gather

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "settings": [
            *("SAEChoice", "Study", "gather", "study_from", "typed"),
            *("SECTIONS", "ALTERNATIVES", "STUDY_FIELDS"),
        ],
        "sources": ["Settings", "architecture_of", "layers"],
    },
)
