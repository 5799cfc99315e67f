"""Outputs of an evaluation: results.json, tables, figures, the report, W&B."""
