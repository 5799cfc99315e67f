"""Vision models with hook points: loading, hook names, tokens, forward passes, interventions."""

# First of all, so that no module here is half imported when the end of TransformerLens's import
# registers the families; see `taxolens.plugin.registration`.
import transformer_lens
