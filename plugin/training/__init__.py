"""Training with SAELens: configs, runners, checkpoints and exact resumption."""
