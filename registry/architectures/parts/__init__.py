"""Encoders, dictionaries and configs that architectures share. Nothing here is registered."""
