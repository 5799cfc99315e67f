"""One file per SAE architecture."""

# First, so that modules here are imported completely when SAELens's import registers the
# architectures; see `taxolens.plugin.registration`.
import sae_lens
