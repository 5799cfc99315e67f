"""Evaluation of trained SAEs on held-out images, each number beside its null controls."""
