"""Class trees: the Taxonomy type and where trees come from."""
