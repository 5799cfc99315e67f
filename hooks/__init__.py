"""WHERE vision models are tapped: families, token selection, images to activations."""
