"""What the loaders share: reading files without running them, facts, conversion, recognition."""
