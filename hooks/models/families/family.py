"""A model family as a plugin registers it: the checkpoints it claims, their loader and adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformer_lens.model_bridge import ArchitectureAdapter


@dataclass(frozen=True)
class VisionSource:
    """The arguments of a family's loader.

    `config` is the Hugging Face config of the checkpoint (a dict for timm's). With
    `random_weights` the loader builds the architecture and reads no weights; the caller has seeded
    the generator.
    """

    name: str
    config: Any
    dtype: torch.dtype = torch.float32
    attn_implementation: str = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False
    random_weights: bool = False


def load_transformers(source: VisionSource) -> nn.Module:
    """The model class that the checkpoint names, with its weights, in evaluation mode.

    Weights that the checkpoint lacks (often an unused pooler) are random, as they are in
    transformers; a warning names them.
    """
    model_class = _model_class(source)
    attention = source.attn_implementation
    if attention != "eager" and not getattr(model_class, "_supports_sdpa", True):
        attention = "eager"
    try:
        return _loaded(model_class, source, attention)
    except ValueError as error:  # a backbone inside it has eager attention alone
        if attention == "eager" or "does not support an attention implementation" not in str(error):
            raise
    return _loaded(model_class, source, None)  # transformers chooses, for each part of the model


def _loaded(model_class: Any, source: VisionSource, attention: str | None) -> nn.Module:
    if source.random_weights:
        return _untrained(model_class, source, attention)
    options: dict[str, Any] = {"weights_only": True}
    if model_class is transformers.AutoModel:  # which asks on the terminal where it is not told
        options["trust_remote_code"] = source.trust_remote_code
    if source.revision is not None:
        options["revision"] = source.revision
    with _quiet_transformers():
        model, report = model_class.from_pretrained(
            source.name,
            config=source.config,
            dtype=source.dtype,
            attn_implementation=attention,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(report["missing_keys"]):
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if missing[4:] else "")
        warnings.warn(f"{source.name!r} has no weights for {shown}: they are random.", stacklevel=3)
    return model.eval()


def _model_class(source: VisionSource) -> Any:
    named = getattr(source.config, "architectures", None)
    found = (
        getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    )
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and not source.trust_remote_code else transformers.AutoModel


def _untrained(model_class: Any, source: VisionSource, attention: str | None) -> nn.Module:
    if model_class is transformers.AutoModel:
        model = model_class.from_config(
            source.config,
            dtype=source.dtype,
            attn_implementation=attention,
            trust_remote_code=source.trust_remote_code,
        )
    else:
        model = model_class._from_config(
            source.config, dtype=source.dtype, attn_implementation=attention
        )
    return model.eval()


class _quiet_transformers:
    """Silence the list of unused keys when half a checkpoint (CLIP's vision tower) is loaded."""

    def __enter__(self) -> None:
        self.verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()

    def __exit__(self, *exception: object) -> None:
        transformers.logging.set_verbosity(self.verbosity)


@dataclass(frozen=True)
class VisionFamily:
    """One family of vision models.

    Args:
        name: what `load_vision_model(family=...)` and `taxolens list models` call it.
        architectures: the Hugging Face class names of a config's `architectures` that it claims.
        model_types: the configs' `model_type`s that it claims where no architecture is named.
        adapter: the TransformerLens adapter (usually a `VisionAdapter` with a `Layout`); None taps
            the model's named submodules instead (`HookedVisionModel`).
        load: `VisionSource` -> a `torch.nn.Module` in evaluation mode.
        claims: whether a built model is one of the family, where no config of Hugging Face tells.
        prepare: what is done to such a model before it is tapped, in place; it gets a `config`. What it
            returns, where that is a module, is tapped in its place.
        description: one line for people.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    adapter: type[ArchitectureAdapter] | None = None
    load: Callable[[VisionSource], nn.Module] = load_transformers
    claims: Callable[[nn.Module], bool] | None = None
    prepare: Callable[[nn.Module], nn.Module | None] | None = None
    description: str = ""
