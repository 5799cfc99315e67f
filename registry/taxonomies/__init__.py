"""Trees of classes: the `Taxonomy` itself and where one comes from."""

from .load import load_taxonomy
from .taxonomy import Taxonomy

__all__ = ["Taxonomy", "load_taxonomy"]
