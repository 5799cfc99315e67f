"""One file per hierarchy evaluator."""
