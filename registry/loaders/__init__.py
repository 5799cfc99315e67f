"""Readers of other libraries' SAE files: one file per library."""
