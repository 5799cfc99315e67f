"""SAEs beside their controls trained on random: the same architecture with a part that was not trained."""

from __future__ import annotations

from collections.abc import Sequence

from ...registry.nulls import CONSTRAINTS
from .results import SAEResult

SAEWithControls = tuple[SAEResult, dict[str, SAEResult]]


def with_controls(saes: Sequence[SAEResult]) -> list[SAEWithControls]:
    """Every SAE that was trained without a constraint, with its controls, of those that have one.

    A control of an SAE reads the same hook point (and head) and tokens of the same model and has its
    architecture and widths (own definition). Of several with one constraint it is one of the same
    run, and the one of nearest L0.
    """
    found = []
    for sae in saes:
        if sae.constraint is not None:
            continue
        controls = {}
        for constraint in CONSTRAINTS:
            alike = [o for o in saes if o.constraint == constraint and _kind(o) == _kind(sae)]
            if alike:
                controls[constraint] = min(
                    alike, key=lambda o: (o.run != sae.run, abs(o.l0 - sae.l0))
                )
        if controls:
            found.append((sae, controls))
    return found


def _kind(sae: SAEResult) -> tuple[object, ...]:
    return (sae.model_name, sae.tokens, sae.place, sae.trained_as, sae.d_in, sae.d_sae)
