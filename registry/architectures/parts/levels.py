"""Dictionaries with levels: widths, budgets, and the auxiliary loss of one level."""

from collections.abc import Sequence

import torch
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor

from ...errors import ConfigError


def split_by_shares(total: int, shares: Sequence[int]) -> list[int]:
    """`total` as integers close to `shares`, each at least 1; the last has the remainder."""
    parts = [max(1, total * share // sum(shares)) for share in shares[:-1]]
    return [*parts, max(1, total - sum(parts))]


def check_levels(
    name: str, d_sae: int, widths: Sequence[int], budgets: Sequence[int], k: int | None = None
) -> None:
    """Check widths and active latents of levels.

    Args:
        name: of the architecture.
        d_sae: width of the dictionary.
        widths: latents of each level.
        budgets: active latents of each level.
        k: the setting that gives the budgets; None where `level_k` has them.

    Raises:
        ConfigError: the widths do not fill the dictionary, or a budget does not fit its level.
    """
    if not widths or min(widths) < 1 or sum(widths) != d_sae:
        raise ConfigError(
            "level_widths",
            f"not the levels of {name}",
            given=list(widths),
            allowed=f"positive integers with the sum d_sae={d_sae}",
        )
    if len(budgets) == len(widths) and all(1 <= b <= w for b, w in zip(budgets, widths)):
        return
    each = f"between 1 and the width of its level {list(widths)}"
    if k is None:
        raise ConfigError(
            "level_k",
            f"not one for each level of {name}",
            given=list(budgets),
            allowed=f"{len(widths)} integers, each {each}",
        )
    problem = f"gives the levels of {name} {list(budgets)} active latents"
    raise ConfigError("k", problem, given=k, allowed=f"for each {each}")


def level_slices(widths: Sequence[int]) -> list[slice]:
    """The latents of each level."""
    ends = torch.tensor(list(widths)).cumsum(0).tolist()
    return [slice(end - width, end) for end, width in zip(ends, widths)]


def positive_topk(scores: Tensor, k: int) -> Tensor:
    """The k largest positive entries of each row of (..., m), the rest 0."""
    values, indices = scores.relu().topk(k, dim=-1)
    return torch.zeros_like(scores).scatter(-1, indices, values)


def dead_latent_loss(
    hidden_pre: Tensor, dead: Tensor | None, atoms: Tensor, residual: Tensor
) -> Tensor:
    """The auxiliary loss of Gao et al. (2024, arXiv 2406.04093, appendix A.2), as SAELens scales
    it: the strongest d/2 dead latents reconstruct the residual of the others.

    Args:
        hidden_pre: pre-activations of the level, (n, w).
        dead: its dead latents, (w,) bool.
        atoms: its decoder rows in the units of `hidden_pre`, (w, d).
        residual: input minus the level's reconstruction, (n, d), detached.
    """
    if dead is None or (n_dead := int(dead.sum())) == 0:
        return residual.new_zeros(())
    k = residual.shape[-1] // 2
    acts = calculate_topk_aux_acts(min(k, n_dead), hidden_pre, dead)
    error = (acts @ atoms - residual.detach()).square().sum(dim=-1).mean()
    return error * min(n_dead / k, 1.0)
