"""Vision models with hook points, images, and activations of images at hook points."""
