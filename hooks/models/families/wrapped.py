"""The default family: CNNs, timm's models and vision models of Hugging Face that no family claims."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ....registry.errors import ConfigError
from ...images.preprocess import timm_preprocessing as timm_preprocessing
from ..points import as_pair
from .family import VisionFamily, VisionSource, load_transformers

if TYPE_CHECKING:
    from ..hooked_module import HookedVisionModel

# RADIO's has its class tokens, then its registers.
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls_register_token")
REGISTERS = ("register_tokens", "reg_token", "distillation_token", "dist_token")
POOLING = ("head", "pool", "attn_pool", "decoder")  # whose tokens are not in the blocks
NO_IMAGES = re.compile("text|prompt|decoder")  # in the names of parts of a config
NAFLEX = "spatial_shapes"  # SigLIP 2's argument for the grid of each image's patches
GRIDS = "grid_thw"  # that of towers such as Qwen-VL's


def wrap(module: nn.Module, model_name: str, *, family: str = "wrapped") -> HookedVisionModel:
    """Tap the named submodules of any vision model.

    Prefix tokens are counted by the names of parameters, sizes found in the Hugging Face or timm
    config. Where these tokens are not the first, `check_tokens` refuses to choose among tokens.

    Raises:
        ConfigError: its forward needs more than images.
    """
    # It imports SAELens, which TransformerLens alone, and its users, can do without.
    from ..hooked_module import HookedVisionModel, WrappedConfig

    _check_forward(module, model_name)
    config: Any = getattr(module, "config", None)
    timm_config: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    prefix = {
        name.rpartition(".")[2]: parameter.shape
        for name, parameter in module.named_parameters()
        if not name.startswith(POOLING)
    }
    widths = _field(config, "hidden_sizes") or [
        _field(config, "hidden_dim") or getattr(module, "num_features", 0)
    ]
    n_class = _n_tokens(prefix, CLASS_TOKENS)
    channels, *size = timm_config.get("input_size", (3, 224, 224))
    cfg = WrappedConfig(
        model_name=model_name,
        d_model=_field(config, "hidden_size") or widths[-1],
        n_layers=0,
        image_size=as_pair(_field(config, "image_size") or size),
        n_channels=_field(config, "num_channels") or channels,
        has_class_token=n_class > 0,
        # of several class tokens (Pixio, RADIO) the first is the class token
        n_register_tokens=max(n_class - 1, 0) + _n_tokens(prefix, REGISTERS),
    )
    return HookedVisionModel(module, cfg, family=family)


def _n_tokens(parameters: Mapping[str, Sequence[int]], names: Sequence[str]) -> int:
    """Tokens in the parameters of these names, of shape (d,) or (..., tokens, d)."""
    shapes = [parameters[name] for name in names if name in parameters]
    return sum(shape[-2] if len(shape) > 1 else 1 for shape in shapes)


def _field(config: Any, name: str) -> Any:
    """A field of a config, or of the first of its parts that has it; None where none has."""
    found = (getattr(part, name, None) for part in _parts(config))
    return next((value for value in found if value), None)


def _parts(config: Any) -> Iterator[Any]:
    """A config, and those of its vision model and backbone, outermost first."""
    waiting = [config]
    for part in waiting:
        yield part
        names = [n for n in getattr(part, "sub_configs", ()) if not NO_IMAGES.search(n)]
        names.sort(key=lambda name: "vision" not in name)
        waiting += [getattr(part, name, None) for name in names]


def _check_forward(module: nn.Module, model_name: str) -> None:
    """Refuse a model that cannot be run on images alone."""
    parameters = signature(module.forward).parameters
    others = [*parameters.values()][1:]
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    needed = [p.name for p in others if p.default is p.empty and p.kind not in kinds]
    allowed = "a model that takes images alone, such as the vision part of this one"
    problem = f"{type(module).__name__} needs {', '.join(needed)} beside images (B, C, H, W)"
    if NAFLEX in parameters:
        problem = (
            f"{type(module).__name__} is NaFlex: each image is cut into patches of its own number"
        )
        allowed = "a SigLIP 2 of one image size, such as google/siglip2-base-patch16-224"
    elif GRIDS in parameters:
        problem = f"{type(module).__name__} takes rows of patches of images of any size, no images"
        allowed = "a tower that takes images (B, C, H, W), such as CLIP's, SigLIP's, InternVL's or Qwen-VL's"
    elif not needed:
        return
    raise ConfigError("model_name", problem, given=model_name, allowed=allowed)


def load_wrapped(source: VisionSource) -> nn.Module:
    """A model of transformers, or of timm where the checkpoint's config is timm's (a dict)."""
    return load_timm(source) if isinstance(source.config, dict) else load_transformers(source)


def load_timm(source: VisionSource) -> nn.Module:
    """A model of timm, in evaluation mode.

    Raises:
        ConfigError: timm cannot be imported.
    """
    place = "local-dir" if Path(source.name).is_dir() else "hf-hub"
    revision = f"@{source.revision}" if source.revision else ""
    name = f"{place}:{source.name}{revision}"
    return timm_model(source, name, pretrained=not source.random_weights)


def timm_model(source: VisionSource, name: str, **options: Any) -> nn.Module:
    """`timm.create_model` in evaluation mode, with the attention and the dtype of `source`."""
    try:
        import timm  # type: ignore[import-not-found]  # an extra
    except ImportError as error:
        problem = f"a model of timm, which cannot be imported ({error})"
        allowed = "pip install 'taxolens[timm]'"
        raise ConfigError("model_name", problem, given=source.name, allowed=allowed) from error
    model = timm.create_model(name, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = source.attn_implementation != "eager"
    return model.to(source.dtype).eval()


FAMILY = VisionFamily(
    name="wrapped",
    architectures=(),
    load=load_wrapped,
    description="CNNs, timm, other Hugging Face vision models: hooks on named submodules.",
)
