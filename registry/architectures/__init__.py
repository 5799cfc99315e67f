"""One file per SAE architecture."""

# First of all, so that no module here is half imported when the end of SAELens's import registers
# the architectures; see `taxolens.plugin.registration`.
import sae_lens
