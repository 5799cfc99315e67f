"""HOW taxolens plugs into SAELens, TransformerLens, Weights & Biases and the shell."""
