"""Encoders, dictionaries and configs shared by architectures; not registered."""
