"""Training through SAELens: configs, the runners and what keeps a run whole."""
