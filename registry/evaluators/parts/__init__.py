"""Statistics, samples, probes and null latents that evaluators share. Nothing here is registered."""
