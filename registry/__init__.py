"""WHAT a config can name."""
