"""Architectures, evaluators, taxonomies, presets and loaders that a config names."""
