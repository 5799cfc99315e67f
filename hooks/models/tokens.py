"""Selection of an image's tokens: class, patch, register, all, or the mean over the patches.

Prefix tokens come first: the class token where the model has one, then its registers. Every prefix
token that is not the class token counts as a register, so DeiT's distillation token does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ...registry.errors import ConfigError
from ...registry.names import unknown_name_message
from .points import as_pair, check_image_size, firings, hook_n_tokens, resolve_hook_name
from .tapped import TappedModel

ALL_COLUMNS = slice(None)
OTHERWISE = "the tokens all, or another hook point"
TOKEN_CHOICES = ("class", "patch", "register", "all", "mean_patch")


def check_tokens(model: TappedModel, tokens: str, hook_name: str | None = None) -> None:
    """Whether the model has such tokens, at a hook point where one is given.

    Raises:
        ConfigError: not one of `TOKEN_CHOICES`, or the model has none of them; the message says
            what to choose. Or the hook point has no tokens, or one vector for each image, which is
            selected by "all"; or its tokens are none with the prefix tokens of a wrapped model, or
            have them in other places.
    """
    if tokens not in TOKEN_CHOICES:
        raise ConfigError(unknown_name_message("tokens", tokens, list(TOKEN_CHOICES)))
    if tokens not in (possible := _possible(model)):
        what = "class token" if tokens == "class" else "register tokens"
        problem = f"{model.cfg.model_name} ({model.family}) has no {what}"
        raise ConfigError("tokens", problem, given=tokens, allowed=", ".join(possible))
    if hook_name is not None:
        _check_point(model, tokens, hook_name)
        if tokens != "all":
            _check_grid(model, hook_name, None)


def tokens_per_image(
    model: TappedModel,
    tokens: str,
    image_size: int | tuple[int, int] | None = None,
    hook_name: str | None = None,
) -> int:
    """How many tokens of one image `tokens` selects.

    Args:
        model: a vision model.
        tokens: one of `TOKEN_CHOICES`.
        image_size: side, or (height, width), of the preprocessed image in pixels; None takes
            what the checkpoint's preprocessing makes.
        hook_name: the hook point; needed for models whose grid shrinks on the way (CNNs).

    Raises:
        ConfigError: as `check_tokens`, or when the number depends on a hook point not given.
    """
    check_tokens(model, tokens)
    cfg = model.cfg
    if image_size is not None:
        check_image_size(model, as_pair(image_size))
    if hook_name is not None:
        if _check_point(model, tokens, hook_name):
            return 1
        if tokens != "all":
            _check_grid(model, hook_name, image_size)
    if tokens in ("class", "mean_patch"):
        return 1
    if tokens == "register":
        return cfg.n_register_tokens
    size = input_size(model) if image_size is None else image_size
    if cfg.patch_size is not None:
        height, width = as_pair(size)
        n_patches = (height // cfg.patch_size) * (width // cfg.patch_size)
    else:
        n_patches = _traced_tokens(model, hook_name, size) - cfg.n_prefix_tokens
    return n_patches + cfg.n_prefix_tokens * (tokens == "all")


def select_tokens(
    activations: Tensor, tokens: str, *, has_class_token: bool, n_register_tokens: int
) -> Tensor:
    """(B, T, d) -> (B, k, d): the chosen tokens, or with "mean_patch" the mean over the patches.

    All choices but "mean_patch" are views of `activations`.

    Raises:
        ConfigError: there are none of them.
    """
    n_prefix = int(has_class_token) + n_register_tokens
    if tokens == "all":
        return activations
    if tokens == "class" and has_class_token:
        return activations[:, :1]
    if tokens == "register" and n_register_tokens:
        return activations[:, int(has_class_token) : n_prefix]
    if tokens in ("patch", "mean_patch") and activations.shape[1] > n_prefix:
        patches = activations[:, n_prefix:]
        return patches if tokens == "patch" else patches.mean(dim=1, keepdim=True)
    raise ConfigError(
        "tokens",
        f"of the {activations.shape[1]} tokens there, {int(has_class_token)} is a class token and "
        f"{n_register_tokens} are registers",
        given=tokens,
        allowed="tokens that are there, or all",
    )


def tokens_of(
    model: TappedModel, activations: Tensor, tokens: str, columns: slice = ALL_COLUMNS
) -> Tensor:
    """`select_tokens` (B, T, d) -> (B, k, d) with the prefix tokens that the model has; of a head, its columns."""
    has_class, n_registers = model.cfg.has_class_token, model.cfg.n_register_tokens
    chosen = select_tokens(
        activations, tokens, has_class_token=has_class, n_register_tokens=n_registers
    )
    return chosen[..., columns]


def put_tokens(
    model: TappedModel,
    activations: Tensor,
    tokens: str,
    new: Tensor,
    columns: slice = ALL_COLUMNS,
) -> Tensor:
    """A copy of (B, T, d) with the chosen tokens, or their `columns`, replaced by `new` (B, k, d).

    Of "mean_patch", the change of the mean is added to every patch (own definition).
    """
    activations = activations.clone()
    if tokens == "mean_patch":
        change = new - tokens_of(model, activations, tokens, columns)
        activations[:, model.cfg.n_prefix_tokens :, ..., columns] += change
    else:  # a view of the clone
        tokens_of(model, activations, tokens, columns).copy_(new)
    return activations


def input_size(model: TappedModel) -> tuple[int, int]:
    """(height, width) in pixels of what the checkpoint's preprocessing makes of any image.

    Where that fixes no size, the size that the model was trained at.
    """
    processor: Any = model.processor
    if processor is not None and not hasattr(processor, "to_dict"):  # a transform
        height, width = model.cfg.image_size
        return tuple(np.asarray(processor(Image.new("RGB", (width, height)))).shape[-2:])
    # a processor fills in what its file leaves out
    settings = processor.to_dict() if processor else model.preprocessor_config or {}
    for field in ("crop_size", "size") if settings.get("do_center_crop") else ("size",):
        size = settings.get(field)
        if isinstance(size, int):
            return size, size
        if not isinstance(size, Mapping):
            continue
        if size.get("height") and size.get("width"):
            return int(size["height"]), int(size["width"])
        if size.get("shortest_edge") and settings.get("crop_pct"):  # ConvNeXt's crops to it
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return model.cfg.image_size


def _possible(model: TappedModel) -> list[str]:
    choices = ["mean_patch", "patch", "all"]
    if model.cfg.n_register_tokens:
        choices.insert(0, "register")
    if model.cfg.has_class_token:
        choices.insert(0, "class")
    return choices


def _check_point(model: TappedModel, tokens: str, hook_name: str) -> bool:
    """Whether a hook point has one vector for each image in place of tokens."""
    cfg = model.cfg
    shape = firings(model)[resolve_hook_name(model, hook_name)].shape
    if len(shape) != 3:
        problem = f"activations {shape} of no tokens"
        raise ConfigError("hook_names", problem, given=hook_name, allowed="(images, tokens, width)")
    if shape[1] > 1 or not (cfg.patch_size or cfg.n_prefix_tokens):  # a grid may be of one place
        return False
    if tokens not in ("all", "class"):
        problem = f"{hook_name!r} has one vector for each image, no {tokens} tokens"
        allowed = "all, or another hook point"
        raise ConfigError("tokens", problem, given=tokens, allowed=allowed)
    return True


def _check_grid(
    model: TappedModel, hook_name: str, image_size: int | tuple[int, int] | None
) -> None:
    """A wrapped model's prefix tokens were counted by names: others must be the image's.

    Where the probe tells which tokens are no part of an image, these must be the prefix tokens.
    Else the others must form a square grid.
    """
    cfg = model.cfg
    if cfg.patch_size is not None:
        return
    fixed = fixed_places(model, hook_name)
    if fixed is not None and fixed != tuple(range(cfg.n_prefix_tokens)):
        raise misplaced(model, hook_name, fixed)
    is_sequence = resolve_hook_name(model, hook_name) in getattr(model, "sequence_points", ())
    if not cfg.n_prefix_tokens and (fixed is not None or not is_sequence):
        return
    height, width = input_size(model) if image_size is None else as_pair(image_size)
    n_patches = hook_n_tokens(model, hook_name, (height, width)) - cfg.n_prefix_tokens
    if height == width and isqrt(max(n_patches, 0)) ** 2 != n_patches:
        raise ConfigError(
            "hook_names",
            f"{cfg.model_name} seems to have {cfg.n_prefix_tokens} prefix tokens, but "
            f"without them the {n_patches} tokens there are no square grid",
            given=hook_name,
            allowed=OTHERWISE,
        )


def fixed_places(model: TappedModel, hook_name: str) -> tuple[int, ...] | None:
    """The places of the tokens there that are no part of an image; None where they are not known.

    At the model's own image size; of a family's model None.
    """
    tapped: Any = model
    if resolve_hook_name(model, hook_name) not in getattr(model, "sequence_points", ()):
        return None
    return tapped.fixed_tokens.get(hook_n_tokens(model, hook_name))


def misplaced(model: TappedModel, hook_name: str, fixed: Sequence[int]) -> ConfigError:
    """The error where the tokens that are no part of an image are not the prefix tokens."""
    n_tokens, n_prefix = hook_n_tokens(model, hook_name), model.cfg.n_prefix_tokens
    some = ", ".join(map(str, fixed[:3])) + (" and so on" if len(fixed) > 3 else "")
    return ConfigError(
        "tokens",
        f"{model.cfg.model_name} has {n_prefix} prefix tokens by the names of its parameters, which "
        f"come first, but of the {n_tokens} at {hook_name!r} "
        + (
            f"{len(fixed)} are no part of an image, at {some}"
            if fixed
            else "all depend on the image"
        ),
        allowed=OTHERWISE,
    )


def _traced_tokens(model: TappedModel, hook_name: str | None, size: int | tuple[int, int]) -> int:
    if hook_name is not None:
        return hook_n_tokens(model, hook_name, size)
    blocks = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    counts = {hook_n_tokens(model, name, size) for name in blocks}
    if len(counts) != 1:
        problem = f"{model.cfg.model_name} has another number of tokens at each of its hook points"
        allowed = "one of them, or the tokens mean_patch"
        raise ConfigError("hook_name", problem, given=hook_name, allowed=allowed)
    return counts.pop()
