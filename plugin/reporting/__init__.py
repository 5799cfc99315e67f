"""What a measurement leaves: results.json, tables, the report, W&B."""
