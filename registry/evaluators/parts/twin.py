"""The untrained twin of an SAE: the same architecture and config with fresh weights.

Own definition throughout. The twin is an SAE of the same class, built by its own constructor from a
copy of the SAE's config, so that its inference rule, run-time normalisation and shapes are the
SAE's. Then:

- decoder rows and encoder columns keep their random directions and get the mean norm of the SAE's,
  since SAELens folds the scale of the inputs into the weights, and the initial norm with it;
- b_dec is the mean of what the SAE subtracts it from (x after run-time normalisation). Where b_dec
  is not subtracted, the biases of the encoder centre its input instead;
- the mean L0, the number of latents that are not 0, negative ones included, is set to the SAE's on
  the sample, by the rule of the architecture:

| rule | of | what is set |
|---|---|---|
| `counted` | topk, abstopk, batchtopk in training, codebook, hsae, tree, qlae, simplicial | nothing: the config fixes the count |
| `stopped` | matching_pursuit, omp | the largest number of steps, where the config stops pursuits early |
| `scaled` | top_afa | the scale of the encoder |
| `shifted` | all others, jumprelu, standard and gated among them | nothing where L0 agrees already; else one threshold for all latents where there is a `threshold`, else `b_enc`, or `b_gate`. A negative threshold is a shift of the biases, so that L0 above m/2 is reached too. |

A class of SAEs may name its rule in `l0_rule`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitTrainingSAE
from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor, nn

from ...errors import ConfigError
from .sae_latents import SAELatents, as_input

TOLERANCE = 0.05  # largest relative difference between the mean L0 of a twin and of its SAE
SEARCH_ROWS = 512  # rows of x on which steps and scale are searched
SEARCH_STEPS = 24  # bisections of the scale, between 2^±SCALE_OCTAVES
SCALE_OCTAVES = 10.0
BIASES = ("b_enc", "b_gate", "b_mag")


def untrained_twin(sae: Any, x: Tensor, l0: float, seed: int) -> Any:
    """An SAE with the class, config and mean L0 of `sae`, and fresh weights.

    Args:
        sae: an SAE of SAELens or of any plugin; it is not changed.
        x: (n, d_in) sample of its inputs.
        l0: mean number of its latents that are not 0, on the sample.
        seed: of the initial weights, which do not depend on the device.

    Raises:
        ConfigError: the architecture has no twin, or none with this L0; the message says why.
    """
    architecture = sae.cfg.architecture()
    if isinstance(sae, Transcoder):
        raise ConfigError(
            "random",
            "b_dec is the mean at the output of a transcoder, which is another hook point",
            given=architecture,
            allowed="an SAE",
        )
    cfg = copy.deepcopy(sae.cfg)
    cfg.device = "cpu"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the SAE's own config
        torch.manual_seed(seed)
        twin = type(sae)(cfg)
    twin = twin.to(sae.device).train(sae.training).requires_grad_(False)
    if not sae.hook_z_reshaping_mode:
        twin.turn_off_forward_pass_hook_z_reshaping()
    _set_scale(twin, sae)
    x = x.to(twin.device, twin.dtype)
    _set_centre(twin, x)
    rule = _rule_of(twin)
    RULES[rule](twin, x, l0)
    if rule in CHECKED and not abs((found := mean_l0(SAELatents(twin), x)) - l0) <= TOLERANCE * l0:
        raise ConfigError(
            "random",
            "its untrained twin has another mean L0, and no threshold or bias that sets it",
            given=f"{found:.4g}",
            allowed=f"{l0:.4g}, that of the SAE",
        )
    return twin


@torch.no_grad()
def mean_l0(latents: SAELatents, x: Tensor) -> float:
    """Mean number of latents that are not 0, negative ones included, over the rows of x (n, d)."""
    return float((latents.encode(x) != 0).sum(1).float().mean())


def _rule_of(twin: Any) -> str:
    """The name of the rule that sets the L0 of a twin."""
    if (declared := getattr(twin, "l0_rule", None)) is not None:
        if declared not in RULES:
            raise ConfigError("l0_rule", "not known", given=declared, allowed=", ".join(RULES))
        return declared
    if isinstance(twin, (TopKSAE, TopKTrainingSAE)):
        return "counted"
    if isinstance(twin, (MatchingPursuitSAE, MatchingPursuitTrainingSAE)):
        return "stopped"
    return "shifted"


def _counted(twin: Any, x: Tensor, l0: float) -> None:
    """The config fixes the count."""


def _stopped(twin: Any, x: Tensor, l0: float) -> None:
    """The number of steps with the nearest L0, at most those of the config."""
    cfg = twin.cfg
    if cfg.residual_threshold <= 0 and not getattr(cfg, "stop_on_duplicate_support", False):
        return
    name = "max_iterations" if hasattr(cfg, "max_iterations") else "k"
    most = getattr(cfg, name) or cfg.d_in
    rows = _some(x)

    def found(steps: int) -> float:
        setattr(cfg, name, steps)
        return mean_l0(SAELatents(twin), rows)

    # L0 grows with the steps and is at most their number; many steps are slow.
    low, stride = max(math.ceil(l0) - 1, 0), 1
    while low + stride < most and found(low + stride) < l0:
        low, stride = low + stride, 2 * stride
    high = min(low + stride, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if found(middle) < l0 else (low, middle)
    nearest = min((s for s in (low, high) if s), key=lambda steps: abs(found(steps) - l0))
    setattr(cfg, name, nearest)


def _scaled(twin: Any, x: Tensor, l0: float) -> None:
    """The scale of the encoder: the larger the latents, the fewer reach the norm of the input."""
    rows = _some(x)
    _, p = _observe(twin, x)
    # The last of the positive latents hardly change the norm, so there must be more than l0.
    if float((p > 0).sum(1).float().mean()) < 1.25 * l0:
        _set_threshold(twin, p, 1.5 * l0)
    initial = [(part.data, part.data.clone()) for part in (twin.W_enc, twin.b_enc)]
    low, high = -SCALE_OCTAVES, SCALE_OCTAVES
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        for part, first in initial:
            part.copy_(first * 2**middle)
        low, high = (middle, high) if mean_l0(SAELatents(twin), rows) > l0 else (low, middle)


def _shifted(twin: Any, x: Tensor, l0: float) -> None:
    """A threshold, where the mean L0 is not that of the SAE already."""
    found, p = _observe(twin, x)
    if p.numel() and abs(found - l0) > TOLERANCE * l0:
        _set_threshold(twin, p, l0)


def _set_threshold(twin: Any, p: Tensor, l0: float) -> None:
    """One threshold t for all pre-activations p (n, m): where p > t, a latent fires."""
    n, p = len(p), p.flatten()
    fire = min(round(l0 * n), len(p))
    # The largest of those that do not fire; below all of them where all fire.
    t = float(p.kthvalue(len(p) - fire).values if fire < len(p) else p.min() - p.abs().max() - 1)
    own = dict(twin.named_parameters(recurse=False))
    if (threshold := own.get("threshold")) is not None:
        threshold.data.fill_(max(t, 0.0))
        t = min(t, 0.0)
    for name in BIASES:
        if name in own:  # a gate below 0 needs a magnitude that is not cut off
            own[name].data.sub_(min(t, 0.0) if name == "b_mag" else t)


def _observe(twin: Any, x: Tensor) -> tuple[float, Tensor]:
    """Mean L0 of the twin, and what passes its `hook_sae_acts_pre`: (n, m), or (n, 0) if nothing does."""
    kept: list[Tensor] = [x[:, :0]]
    handle = twin.hook_sae_acts_pre.register_forward_hook(lambda *call: kept.append(call[2]))
    found = mean_l0(SAELatents(twin), x)
    handle.remove()
    return found, kept[-1].float().reshape(len(x), -1)


def _set_scale(twin: Any, sae: Any) -> None:
    """Give decoder rows and encoder columns the mean norm of the SAE's."""
    own = dict(twin.named_parameters(recurse=False))
    for name, dim in (("W_dec", 1), ("W_enc", 0)):
        if name in own:
            norm = getattr(sae, name).detach().float().norm(dim=dim).mean()
            weight = own[name].data
            weight.copy_(nn.functional.normalize(weight.float(), dim=dim) * norm)


def _set_centre(twin: Any, x: Tensor) -> None:
    """Set b_dec to the mean of the inputs, and centre the encoder where b_dec does not."""
    own = dict(twin.named_parameters(recurse=False))
    if "b_dec" not in own:
        return
    twin.b_dec.data.zero_()
    inputs = twin.process_sae_in(as_input(twin, x))
    twin.b_dec.data.copy_(inputs.float().mean(0))
    if not twin.cfg.apply_b_dec_to_input:
        for name in BIASES:
            if name in own:
                gain = twin.r_mag.exp() if name == "b_mag" else 1.0
                own[name].data.sub_(twin.b_dec @ twin.W_enc * gain)


def _some(x: Tensor) -> Tensor:
    """At most SEARCH_ROWS rows at even distances."""
    return x[:: math.ceil(len(x) / SEARCH_ROWS)]


RULES: dict[str, Callable[[Any, Tensor, float], None]] = {
    "counted": _counted,
    "stopped": _stopped,
    "scaled": _scaled,
    "shifted": _shifted,
}
CHECKED = ("scaled", "shifted")  # the others have the L0 that their config gives to fresh weights
