"""Any vision model, tapped at its named submodules: CNNs, timm's models, unknown transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from ...registry.errors import ConfigError
from .splicing import SplicesAtTokens

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList)
LISTS = (nn.ModuleList, nn.Sequential)


@dataclass
class WrappedConfig:
    """The part of a TransformerLens config that makes sense for any vision model."""

    model_name: str
    d_model: int
    n_layers: int
    image_size: tuple[int, int]
    n_channels: int = 3
    patch_size: int | None = None
    has_class_token: bool = False
    n_register_tokens: int = 0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    is_visual_model: bool = True

    @property
    def n_prefix_tokens(self) -> int:
        """The class token and the registers."""
        return int(self.has_class_token) + self.n_register_tokens


class Site(nn.Module):
    """The hook points of one submodule, and the sites of those inside it."""

    def __getitem__(self, part: int | str) -> nn.Module:
        return self._modules[str(part)]  # type: ignore[return-value]


Place = tuple[Site, str]  # where a hook point, or the SAE in its place, is an attribute


@dataclass(frozen=True)
class Tap:
    """A submodule and the hook points that its input and its output pass."""

    submodule: nn.Module
    entry: list[Place]
    exit: list[Place]
    channels_last: bool

    def on_entry(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Torch's forward pre-hook: the first argument passes the hook points before."""
        if not arguments or not isinstance(arguments[0], Tensor):
            return None
        return (self._pass(self.entry, arguments[0]), *arguments[1:])

    def on_exit(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        """Torch's forward hook: the hidden state in `output` passes the hook points after."""
        if isinstance(output, Tensor):
            return self._pass(self.exit, output)
        hidden = getattr(output, "last_hidden_state", None)
        if isinstance(hidden, Tensor):
            output.last_hidden_state = self._pass(self.exit, hidden)
        elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            values = [self._pass(self.exit, output[0]), *output[1:]]
            return getattr(output, "_make", type(output))(values)  # named tuples have _make
        return output

    def _pass(self, places: list[Place], value: Tensor) -> Tensor:
        """`value` past the hook points; the very same tensor where nothing changed it."""
        for place in filter(_is_listened_to, places):
            tokens = _to_tokens(value, self.channels_last)
            if tokens is None:
                return value
            changed = getattr(*place)(tokens)
            # with gradients on, what follows must depend on the very tensor that a hook saw
            if changed is not tokens or (torch.is_grad_enabled() and tokens.requires_grad):
                value = _from_tokens(changed, value, self.channels_last)
        return value


class _SAEMethods(HookedRootModule):
    # These methods of SAELens need of their class no more than `hook_dict` and `setup`: borrowed,
    # they stay SAELens's own.
    add_sae: Any = HookedSAETransformer.add_sae
    acts_to_saes: Any = HookedSAETransformer.acts_to_saes
    _reset_sae: Any = HookedSAETransformer._reset_sae
    reset_saes: Any = HookedSAETransformer.reset_saes
    saes: Any = HookedSAETransformer.saes
    run_with_saes: Any = HookedSAETransformer.run_with_saes
    run_with_cache_with_saes: Any = HookedSAETransformer.run_with_cache_with_saes
    run_with_hooks_with_saes: Any = HookedSAETransformer.run_with_hooks_with_saes


class HookedVisionModel(SplicesAtTokens, _SAEMethods):
    """A vision model with the hook points `<submodule>.hook_in` and `<submodule>.hook_out`.

    Feature maps (B, C, H, W) pass a hook point as tokens (B, H*W, C), pooled features (B, d) as
    (B, 1, d). The outermost list of like submodules are the blocks: ResNet's stages, a
    transformer's layers. They also have `blocks.<i>.hook_resid_pre` and `.hook_resid_post`.

    The model itself, `original_model`, is left as it is but for operations in place, which would
    write over activations that a hook keeps.

    Args:
        module: the model; its forward takes images (B, 3, H, W).
        cfg: its sizes and prefix tokens.
        family: the name of its `VisionFamily`.
    """

    def __init__(self, module: nn.Module, cfg: WrappedConfig, *, family: str = "wrapped") -> None:
        super().__init__()
        self.original_model = module
        self.cfg = cfg
        self.family = family
        self.processor: Any = None
        self.preprocessor_config: dict[str, Any] | None = None
        self.aliases: dict[str, str] = {}
        self._acts_to_saes: dict[str, Any] = {}
        self._transcoder_output_hooks: dict[str, str] = {}
        self._roots: list[str] = []
        self._taps: list[Tap] = []
        blocks = {name: i for i, name in enumerate(find_blocks(module))}
        named = _block_names_are_free(module, list(blocks))
        cfg.n_layers = len(blocks) if named else 0
        for name, submodule in module.named_modules():
            if hasattr(submodule, "inplace"):
                submodule.inplace = False  # type: ignore[assignment]
            if name and not isinstance(submodule, CONTAINERS):
                self._tap(name, submodule, blocks.get(name) if named else None)
        self.train(module.training)
        self._read_device()
        self.setup()

    @property
    def smallest_image(self) -> tuple[int, int]:
        """(height, width) in pixels of the smallest image that the model is sure to take."""
        return self.cfg.image_size

    @property
    def attn_implementation(self) -> str:
        """Hugging Face's name of the way that attention is computed."""
        return (
            getattr(getattr(self.original_model, "config", None), "_attn_implementation", None)
            or "eager"
        )

    def setup(self) -> None:
        """Name the hook points; after a change of them again."""
        self.mod_dict, self.hook_dict = {}, {}
        for root in self._roots:
            for name, module in self.get_submodule(root).named_modules(prefix=root):
                module.name = name  # type: ignore[assignment]
                self.mod_dict[name] = module
                if isinstance(module, HookPoint):
                    self.hook_dict[name] = module

    def points(self) -> dict[str, nn.Module]:
        """Canonical name -> the hook point, or the SAE that is spliced in there."""
        return {
            name: module
            for name, module in self.mod_dict.items()
            if name.rpartition(".")[2].startswith("hook_") and ".hook_sae_" not in name
        }

    def lean(self) -> AbstractContextManager[None]:
        """As `VisionBridge.lean`; here it is always so."""
        return nullcontext()

    def forward(
        self,
        input: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        return_type: str | None = "logits",
        **options: Any,
    ) -> Any:
        """Images (B, 3, H, W) -> logits, or the last hidden state of a model without a head.

        With `return_type` None: nothing, for the sake of the hooks.
        """
        with self._listening():
            output = self.original_model(input if pixel_values is None else pixel_values, **options)
        if return_type is None:
            return None
        for field in ("logits", "last_hidden_state"):
            if isinstance(getattr(output, field, None), Tensor):
                return getattr(output, field)
        return output[0] if isinstance(output, tuple) else output

    def run_with_cache(
        self, *arguments: Any, return_cache_object: bool = False, **options: Any
    ) -> Any:
        """The output and a dict of activations. There is no `ActivationCache` object here."""
        return super().run_with_cache(*arguments, **options)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HookedVisionModel:
        super()._apply(fn, recurse)
        self._read_device()
        return self

    def _read_device(self) -> None:
        parameter = next(self.original_model.parameters(), None)
        if parameter is not None:
            self.cfg.device, self.cfg.dtype = str(parameter.device), parameter.dtype

    def _tap(self, name: str, submodule: nn.Module, block: int | None) -> None:
        entry, exit = [(self._site(name), "hook_in")], [(self._site(name), "hook_out")]
        if block is not None:
            entry.append((self._site(f"blocks.{block}"), "hook_resid_pre"))
            exit.append((self._site(f"blocks.{block}"), "hook_resid_post"))
        for site, point in (*entry, *exit):
            setattr(site, point, HookPoint())
        channels_last = _channels_last(self.original_model, submodule)
        self._taps.append(Tap(submodule, entry, exit, channels_last))

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Within, the submodules pass their hook points; those without hooks are left out."""
        handles = []
        try:
            for tap in self._taps:
                if any(map(_is_listened_to, tap.entry)):
                    handles.append(tap.submodule.register_forward_pre_hook(tap.on_entry))
                if any(map(_is_listened_to, tap.exit)):
                    handles.append(tap.submodule.register_forward_hook(tap.on_exit))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _site(self, name: str) -> Site:
        root, *parts = name.split(".")
        if root not in self._roots:
            if hasattr(self, root):
                problem = f"its submodule {root!r} has a name of the hooked model"
                given, allowed = self.cfg.model_name, "a model without such a submodule"
                raise ConfigError("model_name", problem, given=given, allowed=allowed)
            self._roots.append(root)
            self.add_module(root, Site())
        site: Any = self._modules[root]
        for part in parts:
            if part not in site._modules:
                site.add_module(part, Site())
            site = site._modules[part]
        return site


def find_blocks(module: nn.Module) -> list[str]:
    """The names of the outermost lists' members, where these are of one class and not torch's own.

    "encoder.layer.0", ... of a transformer; "encoder.stages.0", ... of Hugging Face's ResNet. Of
    several such classes, the one that holds the most parameters.
    """
    kinds: dict[type[nn.Module], list[str]] = {}
    for name, member in _members(module, ""):
        kinds.setdefault(type(member), []).append(name)

    def n_parameters(names: list[str]) -> int:
        return sum(p.numel() for name in names for p in module.get_submodule(name).parameters())

    return max(kinds.values(), key=n_parameters, default=[])


def _members(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}."
        members = dict(child.named_children()) if isinstance(child, LISTS) else {}
        kinds = {type(member) for member in members.values()}
        if len(kinds) == 1 and not kinds.pop().__module__.startswith("torch.nn"):
            yield from ((path + number, member) for number, member in members.items())
        else:
            yield from _members(child, path)


def _block_names_are_free(module: nn.Module, blocks: list[str]) -> bool:
    """Whether "blocks.0" can mean the first block: not where the model calls another part so."""
    return not hasattr(module, "blocks") or blocks == [f"blocks.{i}" for i in range(len(blocks))]


def _channels_last(model: nn.Module, submodule: nn.Module) -> bool:
    """Whether the submodule's feature maps are (B, H, W, C), as timm's Swin has them."""
    return isinstance(submodule, (nn.Linear, nn.LayerNorm)) or (
        getattr(model, "output_fmt", "NCHW") == "NHWC" and not isinstance(submodule, nn.Conv2d)
    )


def _is_listened_to(place: Place) -> bool:
    point = place[0]._modules[place[1]]
    return not isinstance(point, HookPoint) or bool(point.fwd_hooks or point.bwd_hooks)


def _to_tokens(value: Tensor, channels_last: bool) -> Tensor | None:
    """A copy of `value` as (B, T, d); a copy, since models add to their feature maps in place."""
    if value.ndim == 4:
        flat = value.flatten(1, 2) if channels_last else value.flatten(2).transpose(1, 2)
        return flat.clone(memory_format=torch.contiguous_format)
    if value.ndim == 3:
        return value.clone()
    return value.unsqueeze(1).clone() if value.ndim == 2 else None


def _from_tokens(tokens: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    if like.ndim != 4 or channels_last:
        return tokens.reshape(like.shape)
    image = tokens.transpose(1, 2).reshape(like.shape)
    layout = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return image.contiguous(memory_format=layout)
