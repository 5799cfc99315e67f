"""Class trees: `Taxonomy` and its sources."""

from .load import load_taxonomy
from .taxonomy import Taxonomy

__all__ = ["Taxonomy", "load_taxonomy"]
