"""A forest over the latents, in the saved state and in the saved config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import Tensor, nn
from typing_extensions import override

from ...errors import ConfigError
from .levels import level_slices

ROOT = -1


def check_parents(
    parents: Sequence[int], widths: Sequence[int], next_level_only: bool = False
) -> None:
    """Check a forest over latents in levels: a parent is of an earlier level.

    Args:
        parents: of each latent; empty where none are given.
        widths: latents of each level.
        next_level_only: a parent is of the level directly above.

    Raises:
        ConfigError: a latent has another parent.
    """
    first = 0
    for level, latents in enumerate(level_slices(widths)):
        for latent, parent in enumerate(parents[latents], latents.start):
            if parent != ROOT and not first <= parent < latents.start:
                above = f"{first} to {latents.start - 1}, or -1" if level else "-1"
                raise ConfigError(
                    "parents",
                    f"not possible for latent {latent}, of level {level}",
                    given=parent,
                    allowed=above,
                )
        first = latents.start if next_level_only else 0


class Forest(nn.Module):
    """`parents` (m,): the parent of each latent, or -1 for none."""

    parents: Tensor

    def __init__(self, parents: Sequence[int], d_sae: int, device: torch.device) -> None:
        super().__init__()
        self.known = list(parents) or [ROOT] * d_sae
        if len(self.known) != d_sae or not all(ROOT <= p < i for i, p in enumerate(self.known)):
            raise ConfigError(
                "parents",
                f"{len(self.known)} entries",
                given=self.known[:8],
                allowed=f"for each of the d_sae={d_sae} latents an earlier one, or -1",
            )
        self.register_buffer("parents", torch.tensor(self.known, device=device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # SAELens's disk loader casts every tensor to the SAE's dtype, which may not represent
        # large indices; the config has them too.
        parents = state_dict.get(prefix + "parents")
        if parents is not None and parents.is_floating_point():
            state_dict[prefix + "parents"] = torch.tensor(self.known, device=parents.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class RecordsForest(TrainingSAE[Any]):
    """Mixin: saved configs contain the forest as `parents`."""

    forest: Forest

    def record_forest(self) -> None:
        """Write the present forest into the config."""
        self.cfg.parents = self.forest.parents.tolist()

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        self.record_forest()
        return super().save_model(path)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        self.record_forest()
        return super().save_inference_model(path)
