"""A forward pass that stops after the last of the requested hook points."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from ...registry.errors import ConfigError
from .layout import not_one_row
from .points import firings, resolve_hook_name, taps
from .tapped import TappedModel

Reduce = Callable[[Tensor], Tensor]
K = TypeVar("K", bound=Hashable)


class _Done(Exception):
    """Raised when every requested hook point has fired."""


def run_to_hooks(
    model: TappedModel,
    pixel_values: Tensor,
    hook_names: Sequence[str],
    *,
    reduce: Reduce | None = None,
) -> dict[str, Tensor]:
    """The activations at `hook_names`, from one forward pass that stops after the last of them.

    Args:
        model: a vision model.
        pixel_values: (B, 3, H, W), preprocessed; moved to the model's device and dtype.
        hook_names: names of hook points, aliases too; no patterns.
        reduce: applied to each activation as it is captured, for example to keep the class token
            alone; what it leaves out is then not kept in memory.

    Returns:
        Activations (B, T, d), or what `reduce` makes of them, under the names asked for. Feature
        maps are (B, H*W, C), pooled features (B, 1, d), heads are joined; attention patterns are
        (B, heads, T, T). Where an SAE is spliced in: what it puts out.

    Raises:
        UnknownNameError, ConfigError: as `resolve_hook_name`.
        ConfigError: the activations have not one row for each image.
    """
    return captured(model, pixel_values, {name: (name, reduce) for name in hook_names})


@torch.no_grad()
def captured(
    model: TappedModel, pixel_values: Tensor, wanted: Mapping[K, tuple[str, Reduce | None]]
) -> dict[K, Tensor]:
    """As `run_to_hooks`, with a `reduce` for each activation that is wanted.

    Args:
        model: a vision model.
        pixel_values: (B, 3, H, W), preprocessed.
        wanted: any key -> (name of a hook point, `reduce`); several keys may have one hook point.
    """
    if not wanted:
        return {}
    at: dict[str, list[K]] = {}
    for key, (name, _) in wanted.items():
        at.setdefault(resolve_hook_name(model, name), []).append(key)
    expected = firings(model)
    left = {name: expected[name].times for name in at}
    activations: dict[K, Tensor] = {}

    def capture(name: str, activation: Tensor) -> None:
        left[name] -= 1
        if left[name] > 0:  # of a submodule that is used several times, the last use counts
            return
        if len(activation) != len(pixel_values):
            problem = not_one_row(activation.shape, len(pixel_values))
            raise ConfigError(f"hook {name!r}", problem, allowed="another hook point")
        for key in at[name]:
            reduce = wanted[key][1]
            activations[key] = _reduced(activation, reduce) if reduce else activation
        if len(activations) == len(wanted):
            raise _Done

    cfg = model.cfg
    pixel_values = pixel_values.to(device=cfg.device, dtype=cfg.dtype, non_blocking=True)
    with taps(model, list(left), capture), model.lean(), suppress(_Done):
        model(pixel_values, return_type=None)
    return {key: activations[key] for key in wanted}


def _reduced(activation: Tensor, reduce: Reduce) -> Tensor:
    kept = reduce(activation)
    if kept.untyped_storage().nbytes() > kept.nbytes:  # a view would keep the whole alive
        kept = kept.clone(memory_format=torch.contiguous_format)
    return kept
