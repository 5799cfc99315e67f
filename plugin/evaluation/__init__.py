"""Measuring trained SAEs on held-out images, each number beside its nulls."""
