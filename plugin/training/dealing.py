"""Dealing of the SAEs of a run to the processes of a job, by what their training costs.

The cost of an SAE is d_in x d_sae x the factor of its architecture (own definition). The factors are times of a
training step of 512 inputs over that of `topk`, at d_in 256, d_sae 2,048 and k 32, on one thread of a CPU. An
architecture that is not listed counts as 1. A wrong factor costs time, never a bit.
"""

from __future__ import annotations

from collections.abc import Mapping

from sae_lens.saes.sae import TrainingSAEConfig

from ...registry.ranks import Ranks

FACTORS = {
    **{"matching_pursuit": 26.0, "omp": 9.0, "archetypal_topk": 3.4, "archetypal_jumprelu": 3.4},
    **{"qlae": 3.0, "hsae": 2.3, "gated": 1.6, "top_afa": 1.4, "mp": 1.4, "codebook": 0.4},
}


def cost(sae: TrainingSAEConfig) -> float:
    """What a training step of an SAE costs, in units of its weights."""
    return sae.d_in * sae.d_sae * FACTORS.get(sae.architecture(), 1.0)


def owners(ranks: Ranks, saes: Mapping[str, TrainingSAEConfig]) -> dict[str, int]:
    """SAE name -> the rank that trains it; the same on every rank."""
    dealt = ranks.deal({name: cost(sae) for name, sae in saes.items()})
    return {name: rank for rank, names in enumerate(dealt) for name in names}
