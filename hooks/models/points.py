"""Hook points by name: which exist, which fire, in which order, and how wide they are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from ...registry.errors import ConfigError, UnknownNameError
from ...registry.names import did_you_mean, nearest
from .rows import rows_of
from .tapped import TappedModel

SAMPLED = 4096
PLAIN = (int, float, str, tuple, type(None), Tensor)
MAX_ALTERNATIVES = 10_000
MAX_PATTERN = 1000
EAGER_ONLY = "hook_pattern"
SPLIT_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z")  # the names by which SAELens knows heads


@dataclass
class Firing:
    """A hook point in one forward pass: position in the order, number of calls, token shape."""

    order: int
    times: int
    shape: tuple[int, ...]


def resolve_hook_name(model: TappedModel, name: str) -> str:
    """The canonical name of the hook point `name`, an alias or canonical already.

    Raises:
        UnknownNameError: there is none; the nearest names are listed.
        ConfigError: it is there but never fires, such as attention patterns under sdpa; or the
            model draws random numbers: two passes of the same images differ.
    """
    canonical = model.aliases.get(name, name)
    if canonical in firings(model):
        return canonical
    if canonical not in model.points():
        raise UnknownNameError(unknown_hook(model, name))
    if canonical not in firings(model, again=True):  # a set_use_... may have been called since
        raise _never_fires(model, name)
    return canonical


def expand_hook_names(model: TappedModel, patterns: Sequence[str]) -> list[str]:
    """The hook names that match `patterns`, in the order in which they fire.

    A pattern is a name, or has wildcards (`*`, `?`, `[...]`) that match one part between dots,
    `**` for any number of parts, or has alternatives in braces: ``blocks.*.hook_resid_post``,
    ``blocks.{0,3,11}.hook_resid_post``, ``**.hook_out``. Names keep the spelling of their pattern:
    an alias stays an alias. Hook points that never fire are left out of a wildcard's matches,
    unless nothing else matches.

    Raises:
        UnknownNameError: a pattern matches nothing; the nearest names are listed.
        ConfigError: all that it matches never fires, or `patterns` is empty.
    """
    if isinstance(patterns, str) or not patterns:
        allowed = "a list of one or more names"
        raise ConfigError("hook_names", "not a list, or empty", given=patterns, allowed=allowed)
    names: dict[str, None] = {}
    for pattern in patterns:
        names.update(dict.fromkeys(_matches(model, pattern)))
    fired = firings(model)
    # several aliases of one point keep the order in which they were asked for
    return sorted(names, key=lambda name: fired[resolve_hook_name(model, name)].order)


def hook_d_in(
    model: TappedModel,
    hook_name: str,
    image_size: int | tuple[int, int] | None = None,
    *,
    head: int | None = None,
) -> int:
    """The width d of the activations (B, T, d) at `hook_name`, by one small forward pass.

    Args:
        model: a vision model.
        hook_name: the hook point.
        image_size: in pixels; matters only where the width depends on it (attention patterns).
        head: None for all heads, joined; else the width is that of this head.

    Raises:
        UnknownNameError, ConfigError: as `resolve_hook_name`; or there is no such head.
    """
    name = resolve_hook_name(model, hook_name)
    width = firings(model, image_size)[name].shape[-1]
    if head is None:
        return width
    n_heads = model.heads.get(name)
    if n_heads is None or not hook_name.endswith(SPLIT_HEADS):
        problem = f"{hook_name!r} of {model.cfg.model_name} has no heads"
        where = f", or a hook point named {', '.join(SPLIT_HEADS)}" if model.heads else ""
        raise ConfigError("hook_head_index", problem, given=head, allowed=f"none{where}")
    if type(head) is not int or not 0 <= head < n_heads:
        problem = f"{hook_name!r} has {n_heads} heads"
        raise ConfigError("hook_head_index", problem, given=head, allowed=f"0 to {n_heads - 1}")
    return width // n_heads


def hook_n_tokens(
    model: TappedModel, hook_name: str, image_size: int | tuple[int, int] | None = None
) -> int:
    """The number T of tokens of the activations (B, T, d) at `hook_name`, prefix tokens included."""
    name = resolve_hook_name(model, hook_name)
    return firings(model, image_size or model.cfg.image_size)[name].shape[1]


def as_tokens(activation: Tensor, point: nn.Module | None = None) -> Tensor:
    """(B, T, heads, d_head) -> (B, T, heads * d_head), (B, d) -> (B, 1, d), others as they are."""
    if activation.ndim == 2:
        return activation.unsqueeze(1)
    conversion = getattr(point, "hook_conversion", None)
    if activation.ndim == 4 and getattr(conversion, "splits_attention_heads", False):
        return activation.flatten(2)
    return activation


@contextmanager
def taps(model: TappedModel, names: Sequence[str], tap: Any) -> Iterator[None]:
    """Call `tap(name, activation (B, T, d))` whenever one of the hook points `names` fires.

    The forward pass is not changed: what `tap` returns has no effect.
    """
    points = model.points()
    model.context_level += 1
    level, handles = model.context_level, []
    try:
        for name in names:
            point = points[name]
            if isinstance(point, HookPoint):
                point.add_hook(_observer(name, point, tap), level=level)  # type: ignore[arg-type]
            else:  # an SAE is spliced in: what it puts out
                handles.append(point.register_forward_hook(_module_observer(name, point, tap)))
        yield
    finally:
        for name in names:
            point = points[name]
            if isinstance(point, HookPoint):
                point.remove_hooks(dir="fwd", level=level)
        for handle in handles:
            handle.remove()
        model.context_level -= 1


def _observer(name: str, point: nn.Module, tap: Any) -> Any:
    def observe(activation: Any, hook: Any) -> None:
        if isinstance(activation, Tensor):
            tap(name, as_tokens(activation, point))

    return observe


def _module_observer(name: str, point: nn.Module, tap: Any) -> Any:
    def observe(module: Any, arguments: Any, activation: Tensor) -> None:
        rows = rows_of(point)
        tap(name, as_tokens(activation if rows is None else rows.fold(activation), point))

    return observe


def firings(
    model: TappedModel, image_size: int | tuple[int, int] | None = None, *, again: bool = False
) -> dict[str, Firing]:
    """Canonical name -> what fires in a forward pass of images of noise; kept with the model.

    Raises:
        ConfigError: the model cannot be run on images of this size.
    """
    size = as_pair(image_size) if image_size is not None else model.smallest_image
    check_image_size(model, size)
    kept: dict[tuple[int, int], dict[str, Firing]] = model.__dict__.setdefault("_fired", {})
    if again or size not in kept:
        try:
            kept[size] = _trace(model, size, twice=not kept)
        except (RuntimeError, ValueError, MemoryError) as error:
            if isinstance(error, ConfigError):
                raise
            problem = f"{model.cfg.model_name} cannot be run on such images: {error}"
            allowed = "a size that the model takes, such as its own"
            raise ConfigError("image_size", problem, given=size, allowed=allowed) from error
    return kept[size]


def check_image_size(model: TappedModel, size: tuple[int, int]) -> None:
    """Whether a model takes images of (height, width) pixels.

    Raises:
        ConfigError: they are smaller than a patch, or of another size than the only one.
    """
    patch = getattr(model.cfg, "patch_size", None)
    if patch is not None and min(size) < patch:
        problem = f"smaller than a patch of {model.cfg.model_name}"
        raise ConfigError("image_size", problem, given=size, allowed=f"{patch} pixels or more")
    only = getattr(model, "only_size", None)
    if only is not None and size != only:
        raise other_size(size, only)


def other_size(given: tuple[int, int], only: tuple[int, int]) -> ConfigError:
    """The error of a model whose positions Hugging Face does not interpolate."""
    problem = "the model's learned positions are those of one size, and cannot be interpolated"
    allowed = f"{only[0]} x {only[1]} pixels, which a processor of the model can make"
    return ConfigError("image_size", problem, given=given, allowed=allowed)


def check_images(model: TappedModel, images: Any) -> None:
    """Whether a model takes a batch of images (B, C, H, W).

    Raises:
        ConfigError: they have another number of channels, or are smaller than a patch.
    """
    channels = getattr(model.cfg, "n_channels", None)
    if not isinstance(images, Tensor) or images.ndim != 4 or channels is None:
        return
    if images.shape[1] != channels:
        raise ConfigError(
            "pixel_values",
            f"{model.cfg.model_name} takes images of {channels} channel(s)",
            given=tuple(images.shape),
            allowed="another model, or from_module(model, processor=...) with one that makes them",
        )
    check_image_size(model, (images.shape[2], images.shape[3]))


def noise(model: TappedModel, n_images: int, size: tuple[int, int]) -> Tensor:
    """Pictures (n, C, H, W) of the same noise each time, as the model takes them."""
    cfg = model.cfg
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(n_images, getattr(cfg, "n_channels", 3), *size, generator=generator)
    return picture.to(device=cfg.device, dtype=cfg.dtype)


@contextmanager
def leaving_no_trace(model: TappedModel) -> Iterator[None]:
    """Within, a forward pass moves no generator of torch, and no attribute of a submodule for good.

    Swin's layers, for example, keep the smallest window that they ever used.
    """
    device = torch.device(str(model.cfg.device))
    devices = [device.index or 0] if device.type == "cuda" else []
    before = [
        (
            module,
            {k: v for k, v in vars(module).items() if isinstance(v, PLAIN)},
            {**module._buffers},
        )
        for module in model.original_model.modules()
    ]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, attributes, buffers in before:
            vars(module).update(attributes)
            module._buffers.update(buffers)


@torch.no_grad()
def _trace(model: TappedModel, size: tuple[int, int], *, twice: bool) -> dict[str, Firing]:
    """The hook points that fire in a forward pass; `twice` runs the same images once more, and one alone.

    Raises:
        ConfigError: the two passes differ, or an image alone gives something else than in a batch.
    """
    pictures = noise(model, 4 if max(size) <= 128 else 1 + twice, size)
    training = model.training
    model.eval()
    try:
        with leaving_no_trace(model):
            fired, values = _pass(model, pictures)
            again = _pass(model, pictures)[1] if twice else values
            alone = _pass(model, pictures[:1])[1] if twice else {}
    finally:
        model.train(training)
    tolerance = 1e-3 if model.cfg.dtype in (torch.float32, torch.float64) else 3e-2
    for name, value in values.items():
        other = again.get(name)
        if other is None or other.shape != value.shape or _differ(value, other, tolerance):
            raise ConfigError(
                "model_name",
                f"it draws random numbers in evaluation mode: two passes of the same images differ at {name!r}",
                given=model.cfg.model_name,
                allowed="a model whose passes agree (a masked autoencoder with mask_ratio 0 and no shuffling)",
            )
        one = alone.get(name)
        by_image = one is not None and (len(value), len(one)) == (len(pictures), 1)
        if one is not None and by_image and _differ(value[:1], one, tolerance):
            raise ConfigError(
                "model_name",
                f"what it gives for an image depends on the others of its batch, first at {name!r}",
                given=model.cfg.model_name,
                allowed="a model that treats each image alone (BatchNorm with running statistics)",
            )
    return fired


def _pass(model: TappedModel, pictures: Tensor) -> tuple[dict[str, Firing], dict[str, Tensor]]:
    """What fires; and up to `SAMPLED` numbers of each image of each activation, and of the logits."""
    fired: dict[str, Firing] = {}
    values: dict[str, Tensor] = {}

    def keep(name: str, activation: Tensor) -> None:
        by_image = activation.ndim > 1 and len(activation) == len(pictures)
        rows = activation.flatten(1) if by_image else activation.reshape(1, -1)
        values.pop(
            name, None
        )  # the order is that of the last use: a probe of the layout comes first
        values[name] = rows[:, :: max(1, rows.shape[1] // SAMPLED)].double().cpu()

    def keep_output(module: nn.Module, arguments: Any, output: Any) -> None:
        logits = getattr(output, "logits", output)
        if isinstance(logits, Tensor):
            keep("its output", logits)

    def note(name: str, activation: Tensor) -> None:
        if name in fired:
            fired[name].times += 1
            fired[name].shape = tuple(activation.shape)
        else:
            fired[name] = Firing(len(fired), 1, tuple(activation.shape))
        keep(name, activation)

    handle = model.original_model.register_forward_hook(keep_output)
    try:
        with taps(model, list(model.points()), note), taking_images(model, pictures):
            model(pictures, return_type=None)
    finally:
        handle.remove()
    return fired, values


@contextmanager
def taking_images(model: TappedModel, pictures: Tensor) -> Iterator[None]:
    """Within, an error of the model is one of the model that was chosen.

    Raises:
        ConfigError: the model cannot be run on such pictures.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        problem = f"it cannot be run on images {tuple(pictures.shape)}"
        raise ConfigError(
            "model_name",
            f"{problem}: {type(error).__name__}: {reason[0]}",
            given=model.cfg.model_name,
            allowed="a model that takes images (B, C, H, W) alone, and an image_size that it takes",
        ) from error


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    finite = one.isfinite() & other.isfinite()
    one, other = one[finite], other[finite]
    return float((one - other).norm()) > tolerance * float(one.norm())


def _matches(model: TappedModel, pattern: str) -> list[str]:
    found: list[str] = []
    for choice in _alternatives(pattern):
        if not any(sign in choice for sign in "*?["):
            resolve_hook_name(model, choice)
            found.append(choice)
            continue
        # canonical names first, so that an alias is listed only under its own spelling
        points = model.points()
        matching = [name for name in (*points, *model.aliases) if _glob(name, choice)]
        if not matching:
            raise UnknownNameError(unknown_hook(model, choice))
        fired = firings(model)
        firing = [name for name in matching if model.aliases.get(name, name) in fired]
        if not firing:
            resolve_hook_name(model, matching[0])
        found += firing
    return found


def _alternatives(pattern: str) -> list[str]:
    """The alternatives of a pattern: "a.{1,2}.b" -> ["a.1.b", "a.2.b"].

    Raises:
        ConfigError: there are more than `MAX_ALTERNATIVES`, or the pattern is too long.
    """
    if len(pattern) <= MAX_PATTERN:
        found = list(islice(_braces(pattern), MAX_ALTERNATIVES + 1))
        if len(found) <= MAX_ALTERNATIVES:
            return found
    raise ConfigError(
        "hook_names",
        "too long, or too many alternatives in braces",
        given=pattern[:80],
        allowed=f"{MAX_PATTERN} characters, {MAX_ALTERNATIVES:,} alternatives",
    )


def _braces(pattern: str) -> Iterator[str]:
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        yield pattern
        return
    before, after = pattern[: group.start()], pattern[group.end() :]
    for choice in group[1].split(","):
        yield from _braces(before + choice.strip() + after)


def _glob(name: str, pattern: str) -> bool:
    parts = name.split(".")
    matched = {0}  # how many parts the pieces so far can stand for
    for piece in pattern.split("."):
        if piece == "**" and matched:
            matched = set(range(min(matched), len(parts) + 1))
        else:
            matched = {n + 1 for n in matched if n < len(parts) and fnmatchcase(parts[n], piece)}
    return len(parts) in matched


def unknown_hook(model: TappedModel, name: str) -> str:
    """The message about a hook point that does not exist, with the nearest names."""
    known = [*model.points(), *model.aliases]
    # The nearest name is most often that of another block: with numbers out of the way it is found.
    plain = {re.sub(r"\d+", "0", known_name): known_name for known_name in reversed(known)}
    near = nearest(name, known, cutoff=0.6) or [
        plain[match] for match in nearest(re.sub(r"\d+|\*", "0", name), plain, cutoff=0.4)
    ]
    hint = f" ({did_you_mean(near)})" if near else ""
    blocks = f"blocks 0 to {model.cfg.n_layers - 1}" if model.cfg.n_layers else "no list of blocks"
    return (
        f"hook_names: not known{hint}; given {name!r}; allowed: names and patterns of "
        f"{model.cfg.model_name} ({model.family}), which has {blocks}; `*` stands for one part of a "
        "name between dots, `**` for any number of them."
    )


def _never_fires(model: TappedModel, name: str) -> ConfigError:
    if name.endswith(EAGER_ONLY) and model.attn_implementation != "eager":
        return no_attention_pattern(name, model.attn_implementation)
    if name.endswith("hook_attn_scores"):
        problem = "never fires: the scores before the softmax are not given"
        return ConfigError(f"hook {name!r}", problem, allowed="hook_pattern, with eager attention")
    refused = getattr(model, "refused", {}).get(model.aliases.get(name, name))
    if refused is not None:
        problem, allowed = refused, "a hook point of tokens of images"
    elif name.endswith("hook_mlp_in"):
        problem, allowed = "it is off", "model.set_use_hook_mlp_in(True) before"
    else:
        problem = f"never fires in a forward pass of {model.cfg.model_name}"
        allowed = "a hook point that fires"
    return ConfigError(f"hook {name!r}", problem, allowed=allowed)


def no_attention_pattern(name: str, given: str) -> ConfigError:
    """The error where a hook point needs attention patterns, which only "eager" attention has."""
    problem = f"the hook {name!r} needs attention patterns, which only eager attention forms"
    return ConfigError("attn_implementation", problem, given=given, allowed="eager")


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """224 -> (224, 224); [224, 192] -> (224, 192): (height, width) in pixels."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
