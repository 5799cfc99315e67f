"""One file per SAE architecture."""
