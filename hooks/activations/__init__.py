"""Activations of images at hook points: extraction, an on-disk cache, a seekable stream."""
