"""Extraction of the chosen tokens at the chosen hook points, in one forward pass."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...registry.errors import ConfigError, DataError
from ...registry.hashing import fingerprint
from ...registry.heads import columns_of
from ..images.loader import ImageBatch
from ..images.source import DECODING, ImageSource
from ..models.forward import captured
from ..models.tapped import TappedModel
from ..models.tokens import check_tokens, tokens_of

# Fields of configs of transformers on which no activation depends, or the weights' own dtype.
NO_FUNCTION = (
    *("architectures", "auto_map", "name_or_path", "transformers_version", "dtype", "torch_dtype"),
    *("attn_implementation", "id2label", "label2id", "num_labels", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
)
# Settings that parts do not print, of a model without a config.
PART_NUMBERS = (
    *("num_heads", "scale", "eps", "window_size", "shift_size"),
    *("temperature", "rotate_half", "global_pool"),
)
# Settings of parts on which no activation depends.
NO_SETTINGS = ("training", "fused_attn", "grad_checkpointing", "gradient_checkpointing")
TAPS = ("taxolens.", "transformer_lens.", "sae_lens.")  # what is around the parts of a tapped model


@dataclass(frozen=True)
class Extraction:
    """Which activations of each image are extracted, and in which precision.

    Attributes:
        hook_names: hook points, or a `head_key` for one head; all read from one forward pass.
        tokens: one of `TOKEN_CHOICES`.
        mean_patch: keep the mean over the patches too, from the same forward pass; of a cache alone.
        image_size: height and width in pixels of the model's input; None: the model's own.
        dtype: "float32", "float16" or "bfloat16", which a cache stores as float32.
        autocast: run the model in bfloat16 where that is safe.
    """

    hook_names: Sequence[str]
    tokens: str = "class"
    mean_patch: bool = False
    image_size: int | None = None
    dtype: str | torch.dtype = "float32"
    autocast: bool = False

    @classmethod
    def of(
        cls, hooks: Sequence[str] | Extraction, source: ImageSource | None, settings: dict[str, Any]
    ) -> tuple[Extraction, ImageSource]:
        """Both values, with those of their fields that `settings` name replaced.

        Raises:
            TypeError: a setting that neither has.
        """
        extraction = hooks if isinstance(hooks, Extraction) else cls(list(hooks))
        own = {name: settings.pop(name) for name in {*settings} & cls.__dataclass_fields__.keys()}
        if unknown := sorted(settings.keys() - DECODING):
            raise TypeError(f"{unknown[0]}: no such argument")
        return replace(extraction, **own), replace(source or ImageSource(), **settings)


class TokenExtractor:
    """One forward pass for all hook points; the tokens chosen, finite and in `dtype`.

    Args:
        model: a vision model (see `hooks/models/load.py`); put into evaluation mode.
        hook_names: hook points, in the names under which activations come back; a `head_key`
            stands for one head.
        tokens: one of `TOKEN_CHOICES`; with more than one the choices are joined along the tokens,
            in this order.
        dtype: of the activations given back.
        autocast: run the forward pass in bfloat16 where that is safe.
    """

    def __init__(
        self,
        model: TappedModel,
        hook_names: Sequence[str],
        tokens: Sequence[str],
        *,
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
    ) -> None:
        if not hook_names or len(set(hook_names)) < len(hook_names):
            allowed = "one or more, each of them once"
            raise ConfigError("hook_names", "none, or one twice", given=hook_names, allowed=allowed)
        self._columns = {name: columns_of(name) for name in hook_names}
        for choice in tokens:
            for name, _ in self._columns.values():
                check_tokens(model, choice, name)
        self.model = model.eval()
        self.hook_names = list(hook_names)
        self.tokens = tuple(tokens)
        self.dtype = dtype
        self.device = torch.device(str(model.cfg.device))
        self.autocast = autocast

    def __call__(self, batch: ImageBatch) -> dict[str, Tensor]:
        """{hook name: (b, k, d) on the model's device}, k tokens per image, the same at each hook.

        Raises:
            DataError: an activation is NaN or infinite; hook point and image are named.
            ConfigError: the hook points differ in their number of tokens.
        """
        return extract([self], batch)[0]

    def _finished(self, found: dict[str, Tensor], batch: ImageBatch) -> dict[str, Tensor]:
        """What `__call__` gives, of the tokens chosen at each hook point."""
        activations = {
            key: found[name][..., columns].to(self.dtype)
            for key, (name, columns) in self._columns.items()
        }
        counts = {name: tensor.shape[1] for name, tensor in activations.items()}
        if len(set(counts.values())) > 1:
            raise ConfigError(
                "hook_names",
                f"with tokens={'+'.join(self.tokens)!r} they have different numbers of tokens",
                given=counts,
                allowed="hook points with the same number, or the tokens mean_patch",
            )
        self._check_finite(activations, batch)
        return activations

    def _select(self, activation: Tensor) -> Tensor:
        if activation.ndim != 3:
            shape, allowed = tuple(activation.shape), "hook points of (images, tokens, width)"
            raise ConfigError(
                "hook_names", "activations of no tokens", given=shape, allowed=allowed
            )
        chosen = [tokens_of(self.model, activation, choice) for choice in self.tokens]
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=1)

    def _check_finite(self, activations: dict[str, Tensor], batch: ImageBatch) -> None:
        # one number to wait for, however many hook points there are
        if torch.stack([torch.isfinite(a).all() for a in activations.values()]).all():
            return
        for name, tensor in activations.items():
            bad = ~torch.isfinite(tensor).flatten(1).all(dim=1)
            if bad.any():
                first = int(bad.nonzero()[0])
                raise DataError(
                    f"hook point {name!r}",
                    f"its activations are NaN or infinite (in {self.dtype}) for image "
                    f"{int(batch.indices[first])} ({batch.sources[first]}) and "
                    f"{int(bad.sum()) - 1} more of the {len(bad)} images of its batch",
                )


@torch.no_grad()  # not inference mode: the trainer saves what comes out for its backward pass
def extract(extractors: Sequence[TokenExtractor], batch: ImageBatch) -> list[dict[str, Tensor]]:
    """What each extractor gives for a batch, {hook name: (b, k, d)}, all from one forward pass.

    Args:
        extractors: of one model, with one value of `autocast`.
        batch: the images.

    Raises:
        DataError, ConfigError: as `TokenExtractor.__call__`.
    """
    first = extractors[0]
    context: Any = contextlib.nullcontext()
    if first.autocast:
        context = torch.autocast(first.device.type, dtype=torch.bfloat16)
    wanted = {
        (place, name): (name, extractor._select)
        for place, extractor in enumerate(extractors)
        for name, _ in extractor._columns.values()
    }
    pixels = batch.on(first.device)
    with context:
        found = captured(first.model, pixels, wanted)
    return [
        extractor._finished({name: found[at, name] for at, name in found if at == place}, batch)
        for place, extractor in enumerate(extractors)
    ]


def model_fingerprint(model: TappedModel) -> str:
    """16 hex digits that depend on every weight and on the config, the same on any device.

    Weights are summed as whole numbers, eight bytes each, modulo 2**64: exact in any order. Of the
    config all fields count but those of `NO_FUNCTION`; of a model without one of transformers, such as
    timm's, the classes of its parts and their printed settings.
    """
    facts = [str(getattr(model, "family", "")), *_function(model.original_model)]
    for name, tensor in sorted(model.original_model.state_dict().items()):
        flat = tensor.detach().contiguous().flatten()
        data = flat.view(torch.uint8)
        if data.storage_offset() % 8:
            data = data.clone()
        whole = len(data) // 8 * 8
        words = data[:whole].view(torch.int64)
        some = [*words[:: max(1, len(words) // 16)][:16].tolist(), *data[whole:].tolist()]
        facts.append(repr((name, (*tensor.shape,), str(tensor.dtype), int(words.sum()), some)))
    return fingerprint(facts)


def _function(module: Any) -> list[str]:
    """What a model computes with its weights; nothing of what is no module of torch."""
    kind = type(module).__name__
    config = _config(module)
    if config is not None and isinstance(module, PreTrainedModel):
        return [kind, config]
    if not isinstance(module, nn.Module):
        return [] if config is None else [kind, config]
    parts = [part for part in module.modules() if not type(part).__module__.startswith(TAPS)]
    if config is None:
        return [kind, repr([(type(p).__name__, p.extra_repr(), _numbers(p)) for p in parts])]
    # a config that taxolens made for TransformerLens has sizes alone
    own = [_config(part) for part in parts if isinstance(part, PreTrainedModel)]
    built = [(type(p).__name__, p.extra_repr(), _settings(p)) for p in parts]
    return [kind, config, repr(own), repr(built)]


def _config(module: Any) -> str | None:
    """The fields of a module's config that count; None of a module that has none."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        return None
    fields = _counting(config.to_dict())
    return json.dumps(fields, sort_keys=True, default=lambda value: type(value).__name__)


def _numbers(part: nn.Module) -> dict[str, Any]:
    found = {name: vars(part).get(name) for name in PART_NUMBERS}
    return {
        name: value for name, value in found.items() if isinstance(value, int | float | tuple | str)
    }


def _settings(part: nn.Module) -> dict[str, Any]:
    """The numbers and names that a part keeps as plain attributes, such as timm's `global_pool`."""
    return {
        name: value
        for name, value in sorted(vars(part).items())
        if not name.startswith("_") and name not in NO_SETTINGS and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, int | float | str)


def _counting(config: Any) -> Any:
    """The fields of a config, in dicts and lists, that count."""
    if isinstance(config, list | tuple):
        return [_counting(item) for item in config]
    if not isinstance(config, dict):
        return config
    return {
        str(name): _counting(value)
        for name, value in config.items()
        if value is not None and not str(name).startswith("_") and name not in NO_FUNCTION
    }
