"""Vision models with hook points: loading, hook names, tokens, forward passes, interventions."""
