"""Steering: effect on class probabilities of a direction added to activations at a fixed KL."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..base import Intervention
from . import summary
from .readout import Readout, class_probabilities, kl_divergence

NEAR = 0.05
"""Relative tolerance of the KL of a steering strength."""
STEPS = 12
LEAP = 8.0
"""Largest factor by which a strength changes in one step of the search."""


class Steered(NamedTuple):
    """Results of steering along s directions, each at the same KL."""

    strength: np.ndarray  # (s,) length of the added vector; NaN where KL is not reached
    kl: np.ndarray  # (s,) nats
    change: np.ndarray  # (s, C) of each class's probability, mean over the images

    @property
    def reached(self) -> np.ndarray:
        """(s,) bool, whether a strength was found."""
        return np.isfinite(self.strength)


class Effects(NamedTuple):
    """Changes of the node of each of s steered latents, each (s,); NaN where undefined."""

    own: np.ndarray  # by its own latent
    others: np.ndarray  # by the other latents, mean
    random: np.ndarray  # by random directions, mean
    rank: np.ndarray  # the share of the other latents that raise the node less


def steer(
    intervene: Intervention,
    readout: Readout,
    index: Tensor,
    directions: Tensor,
    *,
    kl: float,
    start: float,
    n_classes: int,
) -> Steered:
    """Add each direction, scaled to length 1 and then by a strength, to every chosen token.

    Args:
        index: (n,) positions of the images in the evaluation set.
        directions: (s, d); one of length 0 has no strength.
        kl: mean KL(unmodified ‖ steered) over the images, in nats.
        start: the first strength tried.
    """
    clean = readout(intervene(index))
    before = class_probabilities(clean, readout.classes, n_classes)

    def outputs(direction: Tensor, strength: float) -> Tensor:
        return readout(intervene(index, lambda x: x + strength * direction.to(x)))

    n = len(directions)
    found = Steered(np.full(n, np.nan), np.full(n, np.nan), np.full((n, n_classes), np.nan))
    for i, direction in enumerate(directions):
        length = float(direction.norm())
        if not length > 0:
            continue
        unit = direction / length
        strength, steered = find_strength(lambda s, unit=unit: outputs(unit, s), clean, kl, start)
        if steered is None:
            continue
        found.strength[i] = start = strength  # start of the next search
        found.kl[i] = float(kl_divergence(clean, steered).mean())
        after = class_probabilities(steered, readout.classes, n_classes)
        found.change[i] = (after - before).mean(0).numpy()
    return found


def effects(by_latents: np.ndarray, by_directions: np.ndarray, members: np.ndarray) -> Effects:
    """Compare the effect (s,) of each latent on its node with that of the other latents.

    Args:
        by_latents: (s, C) and
        by_directions: (r, C) changes of the classes' probabilities.
        members: (C, s) whether a class lies below the node of each latent.
    """
    inside = members.astype(float)
    by_latent = by_latents @ inside  # (s steered, s nodes)
    own = np.diagonal(by_latent)
    n = len(own)
    apart = ~np.eye(n, dtype=bool)
    less = (by_latent < own) + 0.5 * (by_latent == own)
    by_direction = by_directions @ inside
    return Effects(
        own,
        others=summary.ratio((by_latent * apart).sum(0), max(n - 1, 0)),
        random=summary.ratio(by_direction.sum(0), len(by_direction)),
        rank=summary.ratio((less * apart).sum(0), max(n - 1, 0)),
    )


def find_strength(
    outputs: Callable[[float], Tensor], clean: Tensor, kl: float, start: float
) -> tuple[float, Tensor | None]:
    """The strength at which the mean KL(clean ‖ steered) is `kl`, and the steered outputs there.

    KL grows about as the square of the strength: each step extrapolates this, or bisects the
    bracket on a logarithmic scale if the result is outside it. (NaN, None) if `STEPS` steps do not
    reach it.

    Args:
        outputs: strength -> log-probabilities (n, O).
        start: the first strength tried, above 0.
    """
    low, high = 0.0, np.inf
    strength = start if start > 0 else 1.0
    for _ in range(STEPS):
        steered = outputs(strength)
        found = float(kl_divergence(clean, steered).mean())
        if abs(found / kl - 1) <= NEAR:
            return strength, steered
        if found < kl:
            low = strength
        else:
            high = strength
        leap = LEAP if found <= 0 else float(np.clip(np.sqrt(kl / found), 1 / LEAP, LEAP))
        following = strength * leap
        if not low < following < high:
            following = np.sqrt(low * high) if low > 0 else high / LEAP
        strength = float(following)
    return float("nan"), None
