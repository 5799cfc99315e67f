"""Any vision model, tapped at its named submodules: CNNs, timm's models, unknown transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import count
from typing import Any, Literal

import torch
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from ...registry.errors import ConfigError
from .evals import EvaluatesImages
from .layout import SEQUENCE, Layout, Probe, decide, not_one_row, other_sizes, unmoved
from .named_hooks import NamedHooks
from .points import leaving_no_trace, noise, taking_images
from .splicing import SplicesAtTokens
from .windows import Cut, WindowOwner, window_owner

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList)
LISTS = (nn.ModuleList, nn.Sequential)
NO_IMAGE_STACK = re.compile(r"(^|[._])(decoder|text)")


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


_counter = count()
Place = tuple[Site, str]  # where a hook point, or the SAE in its place, is an attribute
Side = Literal["entry", "exit"]


OnValue = Callable[["Tap", Side, Tensor], Tensor]


@dataclass
class Tap:
    """A submodule and the hook points that its input and its output pass.

    `owner` is the block around it that cuts images into windows. `layouts` has the layout of the
    tensors there by their number of axes, None where they are windows; `refused` says why an input
    or output has none. Both are known after a probe.
    """

    submodule: nn.Module
    entry: list[Place]
    exit: list[Place]
    owner: WindowOwner | None = None
    layouts: dict[tuple[Side, int], Layout | None] = field(default_factory=dict)
    refused: dict[Side, str] = field(default_factory=dict)

    def listen(self, on_value: OnValue, *, everywhere: bool = False) -> Iterator[Any]:
        """Torch's hooks by which input and output pass `on_value`, where a hook point listens."""
        if everywhere or any(map(_is_listened_to, self.entry)):
            yield self.submodule.register_forward_pre_hook(partial(_on_entry, self, on_value))
        if everywhere or any(map(_is_listened_to, self.exit)):
            yield self.submodule.register_forward_hook(partial(_on_exit, self, on_value))

    def places(self, side: Side) -> list[Place]:
        """Its hook points on one side."""
        return self.entry if side == "entry" else self.exit

    @property
    def all_places(self) -> list[Place]:
        """Its hook points on both sides."""
        return [*self.entry, *self.exit]

    def decide(self, side: Side, own: list[Probe], other: list[Probe]) -> None:
        """Set the layout on one side from the shapes of all its uses at both sizes."""
        others = other if len(other) == len(own) else [None] * len(own)
        for one, second in zip(own, others):
            found = decide(one, second, self.submodule)
            key = side, len(one.shape)
            if isinstance(found, str) and one.cut and one.cut.fits(one.shape, one.images):
                found = None
            if not isinstance(found, str) and self.layouts.setdefault(key, found) != found:
                found = "its uses differ in their layout"
            if isinstance(found, str):
                self.refused[side] = found
        if side in self.refused:
            self.layouts = {key: kept for key, kept in self.layouts.items() if key[0] != side}

    def pass_through(self, side: Side, value: Tensor, n_images: int) -> Tensor:
        """`value` past the hook points as (B, T, d); the very same tensor where nothing changed it."""
        if side in self.refused:
            return value
        for place in filter(_is_listened_to, self.places(side)):
            layout = self._layout(place, side, value, n_images)
            tokens = layout.to_tokens(value)
            version = _version(tokens)
            changed = getattr(*place)(tokens)
            # with gradients on, what follows must depend on the very tensor that a hook saw
            tracked = torch.is_grad_enabled() and tokens.requires_grad
            if changed is not tokens or _version(tokens) != version or tracked:
                value = layout.from_tokens(changed, value)
        return value

    def _layout(self, place: Place, side: Side, value: Tensor, n_images: int) -> Layout | Cut:
        known = (side, value.ndim) in self.layouts
        layout = self.layouts.get((side, value.ndim))
        cut = self.owner.cut if self.owner and known and layout is None else None
        if cut is not None and cut.fits(value.shape, n_images):
            return cut
        if layout is not None and len(value) == n_images:
            return layout
        shape = tuple(value.shape)
        problem = f"the layout of its tensor {shape} is not known"
        if known:
            problem = not_one_row(shape, n_images)
        raise ConfigError(f"hook {_name(place)!r}", problem, allowed="another hook point")


Change = tuple[Tap, Side, Tensor]


def _version(tokens: Tensor) -> int:
    """How often `tokens` (B, T, d) was written to; never the same number in inference mode."""
    return next(_counter) if tokens.is_inference() else tokens._version


def _on_entry(
    tap: Tap, on_value: OnValue, module: nn.Module, arguments: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Torch's forward pre-hook: the first argument passes the hook points before."""
    if not arguments or not isinstance(arguments[0], Tensor):
        return None
    return (on_value(tap, "entry", arguments[0]), *arguments[1:])


def _on_exit(
    tap: Tap, on_value: OnValue, module: nn.Module, arguments: tuple[Any, ...], output: Any
) -> Any:
    """Torch's forward hook: the hidden state in `output` passes the hook points after."""
    if isinstance(output, Tensor):
        return on_value(tap, "exit", output)
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        output.last_hidden_state = on_value(tap, "exit", hidden)
    elif isinstance(output, (tuple, list)) and output:
        values = [_on_exit(tap, on_value, module, arguments, output[0]), *output[1:]]
        return getattr(output, "_make", type(output))(values)  # named tuples have _make
    return output


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


class HookedVisionModel(EvaluatesImages, NamedHooks, SplicesAtTokens, _SAEMethods):
    """A vision model with the hook points `<submodule>.hook_in` and `<submodule>.hook_out`.

    Feature maps (B, C, H, W) or (B, H, W, C) pass a hook point as tokens (B, H*W, C), heads
    (B, heads, T, d) as (B, T, heads*d), pooled features (B, d) as (B, 1, d). The outermost list of like submodules are the blocks: ResNet's stages, a
    transformer's layers. They also have `blocks.<i>.hook_resid_pre` and `.hook_resid_post`.

    The model itself, `original_model`, is left as it is but for operations in place, which would
    write over activations that a hook keeps.

    Args:
        module: the model; its forward takes images (B, 3, H, W).
        cfg: its sizes and prefix tokens.
        family: the name of its `VisionFamily`.

    Attributes:
        refused: hook point -> why it never fires: its tensors have no row for each image, or
            which of their axes are positions is not known.
        sequence_points: hook points of tensors (B, T, d); others are feature maps, or one vector for
            each image.
        fixed_tokens: number T of tokens of such tensors -> the places of those that are no part of an
            image, where it is known: before attention mixes them, the same for any image.
        tokenizer: None; SAELens's `run_evals` reads it.
    """

    tokenizer = None

    def __init__(self, module: nn.Module, cfg: WrappedConfig, *, family: str = "wrapped") -> None:
        super().__init__()
        self.original_model = module
        self.cfg = cfg
        self.family = family
        self.processor: Any = None
        self.preprocessor_config: dict[str, Any] | None = None
        self.aliases: dict[str, str] = {}
        self.heads: dict[str, int] = {}  # which axes are heads is not known
        self._acts_to_saes: dict[str, Any] = {}
        self._transcoder_output_hooks: dict[str, str] = {}
        self._roots: list[str] = []
        self._taps: list[Tap] = []
        self._probed = False
        self.refused: dict[str, str] = {}
        self.sequence_points: set[str] = set()
        self.fixed_tokens: dict[int, tuple[int, ...] | None] = {}
        parameters = signature(module.forward).parameters
        self._has_flag = "interpolate_pos_encoding" in parameters
        blocks = {name: i for i, name in enumerate(find_blocks(module))}
        named = _block_names_are_free(module, list(blocks))
        cfg.n_layers = len(blocks) if named else 0
        self._block_names = set(blocks)
        self._owners: dict[str, WindowOwner] = {}
        for name, submodule in module.named_modules():
            if (owner := window_owner(submodule)) is not None:
                self._owners[f"{name}."] = owner
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
        images: Any = input if pixel_values is None else pixel_values
        listened_to = any(_is_listened_to(place) for tap in self._taps for place in tap.all_places)
        if listened_to and not self._probed:
            self._probe()

        def passed(tap: Tap, side: Side, value: Tensor) -> Tensor:
            return tap.pass_through(side, value, len(images))

        with self._listening(passed):
            output = self.original_model(images, **{**self._options(images), **options})
        if return_type is None:
            return None
        for name in ("logits", "last_hidden_state"):
            if isinstance(getattr(output, name, None), Tensor):
                return getattr(output, name)
        return output[0] if isinstance(output, tuple) else output

    def run_with_cache(
        self, *arguments: Any, return_cache_object: bool = False, **options: Any
    ) -> Any:
        """The output and a dict of activations. There is no `ActivationCache` object here."""
        return super().run_with_cache(*arguments, **options)

    def get_caching_hooks(self, names_filter: Any = None, *arguments: Any, **options: Any) -> Any:
        """As TransformerLens's, with names that give nothing refused."""
        if isinstance(names_filter, str | list):
            self._check_hooks([names_filter] if isinstance(names_filter, str) else names_filter)
        return super().get_caching_hooks(names_filter, *arguments, **options)

    def add_caching_hooks(self, names_filter: Any = None, *arguments: Any, **options: Any) -> Any:
        """As TransformerLens's, with names that give nothing refused."""
        if isinstance(names_filter, str | list):
            self._check_hooks([names_filter] if isinstance(names_filter, str) else names_filter)
        return super().add_caching_hooks(names_filter, *arguments, **options)

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
        owner = next((o for path, o in self._owners.items() if name.startswith(path)), None)
        self._taps.append(Tap(submodule, entry, exit, owner))

    @contextmanager
    def _listening(self, on_value: OnValue, *, everywhere: bool = False) -> Iterator[None]:
        """Within, the submodules pass `on_value`; those whose hook points have no hooks are left out."""
        handles: list[Any] = []
        try:
            for owner in self._owners.values():
                handles.append(owner.block.register_forward_pre_hook(owner.look, with_kwargs=True))
            for tap in self._taps:
                handles += tap.listen(on_value, everywhere=everywhere)
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _probe(self) -> None:
        """Find the layout of every input and output, from images of two sizes."""
        training = self.training
        changes: list[Change] = []
        self.eval()
        try:
            own, other = self._shapes(2, self.cfg.image_size, changes), {}
            for size in other_sizes(self.cfg.image_size):
                with suppress(Exception):  # many models take one size alone
                    other = self._shapes(3, size)
                    break
        finally:
            self.train(training)
        for number, tap in enumerate(self._taps):
            for side in ("entry", "exit"):
                if (number, side) in own:
                    tap.decide(side, own[number, side], other.get((number, side), []))
            for side, reason in tap.refused.items():
                self.refused |= {_name(place): reason for place in tap.places(side)}
            for (side, rank), layout in tap.layouts.items():
                if rank == 3 and layout == SEQUENCE:
                    self.sequence_points |= {_name(place) for place in tap.places(side)}
        self._find_fixed(changes)
        self._probed = True

    def _find_fixed(self, changes: list[Change]) -> None:
        """Set `fixed_tokens`, from how far tokens differ between two images.

        Places are known of a number of tokens at its first use, if some are fixed there: attention
        mixes the image into all tokens. Where none is, it is known of the input of the first block.
        Tokens that are all fixed may be position embeddings.
        """
        blocks = {id(self.original_model.get_submodule(name)) for name in self._block_names}
        first = next((change for change in changes if id(change[0].submodule) in blocks), None)
        tolerance = 1e-3 if self.cfg.dtype in (torch.float32, torch.float64) else 3e-2
        for change in changes:
            tap, side, differences = change
            if tap.layouts.get((side, 3)) != SEQUENCE:
                continue
            places, n_tokens = unmoved(differences, tolerance), len(differences)
            known = self.fixed_tokens.get(n_tokens)
            whole = known is not None and len(known) == n_tokens
            if n_tokens not in self.fixed_tokens or (whole and len(places) < n_tokens):
                self.fixed_tokens[n_tokens] = places or None
            if change is first and side == "entry" and (places or not known or whole):
                self.fixed_tokens[n_tokens] = places

    def _shapes(
        self, n_images: int, size: tuple[int, int], changes: list[Change] | None = None
    ) -> dict[Any, list[Probe]]:
        """(number of the tap, side) -> the shape of its tensor, at each use.

        `changes` is given how far each of T tokens differs between the first two images.
        """
        shapes: dict[Any, list[Probe]] = {}
        numbers = {id(tap): number for number, tap in enumerate(self._taps)}

        def note(tap: Tap, side: Side, value: Tensor) -> Tensor:
            cut = tap.owner.cut if tap.owner else None
            probe = Probe(n_images, size, tuple(value.shape), cut)
            shapes.setdefault((numbers[id(tap)], side), []).append(probe)
            rows = value.ndim == 3 and len(value) == n_images and value.is_floating_point()
            if changes is not None and rows and value.numel():
                changes.append((tap, side, (value[0] - value[1]).abs().amax(-1)))
            return value

        pictures = noise(self, n_images, size)
        with (
            leaving_no_trace(self),
            self._listening(note, everywhere=True),
            taking_images(self, pictures),
        ):
            self.original_model(pictures, **self._options(pictures))
        return shapes

    def _options(self, images: Any) -> dict[str, Any]:
        """Hugging Face's flag for position embeddings, at another size than the model's own."""
        if not self._has_flag or not isinstance(images, Tensor):
            return {}
        own = tuple(images.shape[-2:]) == tuple(self.cfg.image_size)
        return {} if own else {"interpolate_pos_encoding": True}

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

    "encoder.layer.0", ... of a transformer; "encoder.stages.0", ... of Hugging Face's ResNet. Lists
    of one class belong together where their names differ in numbers alone ("layer1.0", "layer2.0").
    Of several such stacks, the one that holds the most parameters; a decoder's and a text tower's
    only where there is no other.
    """
    stacks: dict[tuple[type[nn.Module], str], list[str]] = {}
    for name, member in _members(module, ""):
        stacks.setdefault((type(member), re.sub(r"\d+", "", name)), []).append(name)
    found = list(stacks.values())
    images = [names for names in found if not NO_IMAGE_STACK.search(names[0])]

    def n_parameters(names: list[str]) -> int:
        return sum(p.numel() for name in names for p in module.get_submodule(name).parameters())

    return max(images or found, key=n_parameters, default=[])


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


def _is_listened_to(place: Place) -> bool:
    point = place[0]._modules[place[1]]
    return not isinstance(point, HookPoint) or bool(point.fwd_hooks or point.bwd_hooks)


def _name(place: Place) -> str:
    return f"{place[0].name}.{place[1]}"
