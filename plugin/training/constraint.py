"""Controls that are trained on random directions: an SAE whose decoder or encoder stays at its start.

Source: "Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?" (2026, arXiv
2602.14111), where decoder or encoder weights are fixed at random initialisation, or decoder rows
keep a cosine of at least .8 with their initial row. Which parameters these are, and the projection
after each step, are our own definition.

Training is SAELens's; a hook of the optimizer restores the constraint after each step. Everything
else of the SAE is trained, b_dec and the thresholds of JumpReLU among it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...registry.errors import CheckpointError, ConfigError

DECODER = ("W_dec",)
ENCODER = ("W_enc", "b_enc", "b_gate", "b_mag", "r_mag")
OTHERS = ("b_dec", "threshold", "levels")
LEAST_COSINE = 0.8
INITIAL_ROWS_FILENAME = "initial_rows.safetensors"


def constrained_parameters(sae: TrainingSAE[Any], constraint: str) -> dict[str, nn.Parameter]:
    """The parameters of decoder (`DECODER`) or encoder (`ENCODER`) that a constraint is about.

    Raises:
        ConfigError: decoder and encoder are not two sets of parameters: tied, computed from others, or with
            parameters of other names.
    """
    own = dict(sae.named_parameters())
    missing = [name for name in ("W_dec", "W_enc") if name not in own]
    unknown = [name for name in own if name not in (*DECODER, *ENCODER, *OTHERS)]
    if missing or unknown:
        fault = f"{missing[0]} is not a parameter" if missing else f"it has {', '.join(unknown)}"
        raise ConfigError(
            "constraint",
            f"not possible for {sae.cfg.architecture()}, whose decoder and encoder cannot be told apart: {fault}",
            given=constraint,
            allowed="an architecture with the parameters W_dec and W_enc",
        )
    names = ENCODER if constraint == "frozen_encoder" else DECODER
    return {name: own[name] for name in names if name in own}


class Constraint:
    """Holds parameters of one SAE in training.

    Args:
        sae: the SAE; its frozen parameters get no gradient from now on.
        constraint: one of `registry.nulls.CONSTRAINTS`.

    Raises:
        ConfigError: see `constrained_parameters`.
    """

    def __init__(self, sae: TrainingSAE[Any], constraint: str) -> None:
        self.parameters = constrained_parameters(sae, constraint)
        self.is_soft = constraint == "soft_frozen_decoder"
        self.first: dict[str, Tensor] = {}
        if not self.is_soft:
            for parameter in self.parameters.values():
                parameter.requires_grad_(False)

    def start(self, optimizer: torch.optim.Optimizer, first: Mapping[str, Tensor] = {}) -> None:
        """Apply the constraint after each step.

        Args:
            optimizer: the optimizer of the SAE.
            first: the initial values; by default the present ones.
        """
        self.first = {
            name: first.get(name, parameter.detach()).clone().to(parameter.device)
            for name, parameter in self.parameters.items()
        }
        optimizer.register_step_post_hook(lambda *_: self.apply())

    @torch.no_grad()
    def apply(self) -> None:
        """Set frozen parameters to their initial values; move soft rows back to the least cosine."""
        for name, parameter in self.parameters.items():
            first = self.first[name]
            # An architecture may change weights outside the optimizer too.
            parameter.copy_(within_cosine(parameter, first) if self.is_soft else first)


def within_cosine(rows: Tensor, first: Tensor, least: float = LEAST_COSINE) -> Tensor:
    """(m, d) the nearest rows of the same norm with a cosine of at least `least` to `first` (m, d).

    Rows that have it are unchanged to the bit. One that is opposite to its initial row takes its direction.
    """
    w, u = rows.float(), nn.functional.normalize(first.float(), dim=1)
    norm = w.norm(dim=1, keepdim=True)
    along = (w * u).sum(1, keepdim=True)
    across = w - along * u
    sine = across.norm(dim=1, keepdim=True)
    edge = least * u + (1 - least**2) ** 0.5 * across / sine
    moved = norm * torch.where(sine > 0, edge, u)
    return torch.where(along < least * norm, moved.to(rows.dtype), rows)


def save_initial_rows(folder: Path, constraint: Constraint) -> None:
    """Write the initial rows of a soft constraint into its SAE's folder of a checkpoint."""
    if constraint.is_soft:
        rows = {name: first.contiguous() for name, first in constraint.first.items()}
        save_file(rows, folder / INITIAL_ROWS_FILENAME)


def load_initial_rows(folder: Path, constraint: Constraint) -> dict[str, Tensor]:
    """Parameter -> its initial rows (d_sae, d_in), of a soft constraint; those of a frozen one are in the weights.

    Raises:
        CheckpointError: the SAE's folder of the checkpoint does not have them.
    """
    if not constraint.is_soft:
        return {}
    try:
        kept = load_file(folder / INITIAL_ROWS_FILENAME)
        return {name: kept[name] for name in constraint.parameters}
    except Exception as error:  # safetensors has its own errors
        raise CheckpointError(
            f"checkpoint {folder}", f"{INITIAL_ROWS_FILENAME} has no initial rows: {error}"
        ) from error
