"""The plugin for SAELens, TransformerLens and Weights & Biases, and the command line."""
