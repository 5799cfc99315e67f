"""Loading of vision models by name, with hook points."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto import image_processing_auto

from ...registry.errors import CheckpointError, ConfigError, TaxolensError
from ...registry.files import UnreadableError, check_regular, read_json_object, reason
from ...registry.names import as_setting
from ...registry.packaged import packaged
from ...registry.table import VISION_MODELS
from .bridge import VisionBridge
from .dtypes import torch_dtype
from .families import VisionFamily, VisionSource, open_clip
from .families.wrapped import timm_preprocessing, wrap
from .forward import run_to_hooks
from .hooked_module import HookedVisionModel
from .points import (
    EAGER_ONLY,
    expand_hook_names,
    hook_d_in,
    hook_n_tokens,
    no_attention_pattern,
    resolve_hook_name,
)
from .towers import cuts, tower_of, without_tiles

__all__ = [
    "VisionModel",
    "check_device",
    "expand_hook_names",
    "from_module",
    "hook_d_in",
    "hook_n_tokens",
    "load_vision_model",
    "resolve_hook_name",
    "run_to_hooks",
]

logger = logging.getLogger(__name__)

VisionModel: TypeAlias = VisionBridge | HookedVisionModel

ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")
MODEL_NAMES = (
    "a folder with a config.json, or a name on the Hugging Face hub such as facebook/dinov2-base"
)
OPEN_CLIP_NAMES = (
    "open-clip:OWNER/NAME or hf-hub:OWNER/NAME of a repository with an open_clip_config.json; with pip "
    "install 'taxolens[open-clip]' also open-clip:ARCHITECTURE/TAG"
)
BY_CLASS = ("wrapped", "open_clip")  # families whose loaded module may be one of another
MASKED = ("ForPreTraining", "ForMaskedImageModeling")
# Largest numbers in a config, by a part of their name.
MOST = {"layers": 1000, "depth": 1000, "blocks": 1000, "stages": 1000, "labels": 10**6, "": 10**8}
ALL_CONFIGS = (
    " for this kind of AutoModel"  # before some hundred names in a message of transformers
)
# Processors that need torchvision, and whose steps `preprocess_for` does with Pillow.
OWN_STEPS = ("DINOv3ViTImageProcessor", "Tipsv2ImageProcessor", "Tipsv2DptImageProcessor")
TORCHVISION = "" if find_spec("torchvision") else "pip install torchvision, or "
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_vision_model(
    name_or_folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    attn_implementation: str = "sdpa",
    family: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    hook_names: Sequence[str] | None = None,
    random_weights: bool = False,
    seed: int = 0,
    whole: bool = False,
) -> VisionModel:
    """Load a vision model and tap it; of a model that writes text, its vision tower.

    Args:
        name_or_folder: a name on the Hugging Face hub, or a folder with a config.json; of OpenCLIP
            see `docs/models.md`; "demo:model", the packaged one.
        device: of the model.
        dtype: of the model: float32, float16, bfloat16 or float64.
        attn_implementation: "sdpa" is faster; attention patterns exist with "eager" alone.
        family: a registered family, where the checkpoint's config does not identify it.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint. Never by default.
        hook_names: hook points, or patterns, that will be wanted: checked before this returns, and
            as far as possible before any weights are read.
        random_weights: build the same architecture untrained, as a control.
        seed: of the random weights.
        whole: keep the model that the vision tower is a part of, as `model.whole`. Hooks and SAEs of
            the tower then act in `model.whole.generate(...)` and in its forward pass.

    Returns:
        A `VisionBridge` for the transformer families, a `HookedVisionModel` for everything else,
        in evaluation mode. `model.processor` is Hugging Face's image processor (PIL backend), or
        None where there is none, or taxolens does the steps of one that needs torchvision;
        `model.preprocessor_config` has the checkpoint's settings either way.

    Raises:
        ConfigError: an argument is wrong, or there is no such model; the message names it. Or the
            image processor cannot be loaded, and its steps are not known.
        UnknownNameError: no such family or hook point.
        CheckpointError: the weights are damaged, or not those of the config.
    """
    name = packaged(str(name_or_folder))
    _check_choice("attn_implementation", attn_implementation, ATTENTION)
    given_dtype = torch_dtype(dtype)
    _check_attention(hook_names or (), attn_implementation)
    if not 0 <= seed < 2**63:
        raise ConfigError("seed", "not possible", given=seed, allowed="0 to 2**63 - 1")
    if family is not None:
        VISION_MODELS[family]
    config = _read_config(name, revision, trust_remote_code)
    place = name.removeprefix(open_clip.HUB_PREFIX)
    chosen = VISION_MODELS[family] if family is not None else find_family(config)
    source = VisionSource(
        name=place,
        config=config,
        dtype=given_dtype,
        attn_implementation=attn_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
        random_weights=random_weights,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = _load(chosen, source)
        by_class = chosen.name in BY_CLASS and family != "wrapped"
        own = None if by_class else chosen.name
        model = from_module(module, family=own, model_name=name)
        found = _read_preprocessing(place, config, revision, trust_remote_code)
        _set_preprocessing(model, *found)
    except TaxolensError:
        raise
    except Exception as error:  # of an odd config transformers raises nearly anything
        problem = f"cannot be built from its config: {error or type(error).__name__}"
        raise ConfigError("model_name", problem, given=name, allowed=MODEL_NAMES) from error
    model.to(device)
    if whole:
        _keep_whole(model, module.to(device))
    if hook_names:
        expand_hook_names(model, hook_names)
    return model


def from_module(
    hf_model: nn.Module,
    *,
    processor: Any = None,
    family: str | None = None,
    model_name: str | None = None,
) -> VisionModel:
    """Tap a model that is already built. Its modules are replaced by tapped ones, in place.

    Args:
        hf_model: a vision model; of a model with a text tower too (CLIP), the vision tower is
            taken, so of one that writes text (LLaVA), of a masked autoencoder the encoder. ViT-MAE is
            then unmasked. A `TransformerBridge` becomes a `VisionBridge`.
        processor: its image processor, of any backend, or any callable that makes (3, H, W) of an
            image; kept as `model.processor`. None takes timm's settings of a model of timm.
        family: a registered family; None finds it by the model's class or config.
        model_name: what messages and metadata call it; None takes its config's name.

    Raises:
        ConfigError: the model is tapped already, or is not of that family.
    """
    if isinstance(hf_model, HookedVisionModel):
        return hf_model
    if isinstance(hf_model, TransformerBridge):
        return _adopt(hf_model, processor)
    if (tower := tower_of(hf_model)) is not None:
        hf_model = tower
    elif type(hf_model).__name__.endswith(MASKED) and hasattr(hf_model, "decoder"):
        hf_model = hf_model.base_model  # type: ignore[assignment]
    if any(isinstance(module, GeneralizedComponent) for module in hf_model.modules()):
        problem = f"{type(hf_model).__name__} is tapped already"
        raise ConfigError("hf_model", problem, allowed="the model that from_module gave")
    config: Any = getattr(hf_model, "config", None)
    chosen = VISION_MODELS[family] if family is not None else find_family(config, hf_model)
    name = model_name or getattr(config, "_name_or_path", "") or type(hf_model).__name__
    if chosen.adapter is None:
        model: VisionModel = wrap(hf_model, name, family=chosen.name)
    else:
        if chosen.claims is not None and not chosen.claims(hf_model):
            raise _not_built_like(hf_model, chosen.name)
        if chosen.prepare is not None:
            hf_model = chosen.prepare(hf_model) or hf_model
        model = _bridge(hf_model, chosen, name)
    processor = getattr(processor, "image_processor", processor)  # of one for text too
    _set_preprocessing(model, processor, _settings(processor))
    timms = getattr(hf_model, "pretrained_cfg", None)
    if processor is None and isinstance(timms, dict):
        model.preprocessor_config = timm_preprocessing(timms)
    return model


def find_family(config: Any, hf_model: nn.Module | None = None) -> VisionFamily:
    """The family that claims the model, its class, its config's architectures or its model type.

    In this order; the last registered of several. "wrapped" where none does.
    """
    families = list(VISION_MODELS.values())[::-1]
    for family in families:
        if hf_model is not None and family.claims is not None and family.claims(hf_model):
            return family
    named = [type(hf_model).__name__] if hf_model is not None else []
    architectures = getattr(config, "architectures", None)
    named += architectures if isinstance(architectures, list) else []
    for architecture in named:
        for family in families:
            if architecture in family.architectures:
                return family
    model_type = getattr(config, "model_type", None)
    matching = (family for family in families if model_type in family.model_types)
    return next(matching, None) or VISION_MODELS["wrapped"]


def _bridge(hf_model: nn.Module, family: VisionFamily, name: str) -> VisionBridge:
    config: Any = hf_model.config
    dtype = next(hf_model.parameters()).dtype
    cfg = build_bridge_config_from_hf(config, type(hf_model).__name__, name, dtype)
    cfg.device = str(next(hf_model.parameters()).device)
    assert family.adapter is not None
    adapter = family.adapter(cfg)
    try:
        adapter.prepare_model(hf_model)
        model = VisionBridge(hf_model, adapter)
    except ConfigError:  # a ValueError that says what to do
        raise
    except (AttributeError, ValueError) as error:
        kind = type(hf_model).__name__
        if kind in family.architectures:
            needed = next(r for r in requires("taxolens") or () if r.startswith("transformers"))
            raise ConfigError(
                "family",
                f"{family.name!r} does not fit how transformers builds {kind} ({error}); given transformers {transformers.__version__}",
                allowed=f"the {needed} that taxolens requires, or family='wrapped'",
            ) from error
        raise _not_built_like(hf_model, family.name, f" ({error})") from error
    model.family = family.name
    return model


def _not_built_like(hf_model: nn.Module, family: str, why: str = "") -> ConfigError:
    problem = f"{type(hf_model).__name__} is not built like one{why}"
    allowed = "a family that fits, or 'wrapped' for any model"
    return ConfigError("family", problem, given=family, allowed=allowed)


def _adopt(bridge: TransformerBridge, processor: Any) -> VisionBridge:
    cfg: Any = bridge.cfg
    hf_model = bridge.original_model
    if not getattr(cfg, "is_visual_model", False):
        given, allowed = cfg.model_name, "a vision model"
        raise ConfigError("hf_model", "not a vision model", given=given, allowed=allowed)
    family = find_family(hf_model.config, hf_model)
    if not hasattr(cfg, "n_prefix_tokens") and family.adapter is not None:
        # TransformerLens's own adapter (ViT, DeiT) does not count prefix tokens
        ours: Any = family.adapter(cfg)
        ours.describe(hf_model)
    model = VisionBridge.adopt(bridge)
    model.family = family.name
    if processor is not None:
        model.processor = getattr(processor, "image_processor", processor)
    model.preprocessor_config = _settings(model.processor)
    return model


def _set_preprocessing(model: VisionModel, processor: Any, settings: dict[str, Any] | None) -> None:
    """Set both; of a processor that makes no picture of an image, settings that make one in its place."""
    # a processor fills in what its file leaves out
    if what := cuts(_settings(processor) or settings):
        height, width = model.cfg.image_size
        warnings.warn(
            f"the image processor of {model.cfg.model_name!r} {what}: here each image is "
            f"one picture, resized to {height} x {width}.",
            stacklevel=3,
        )
        settings = without_tiles(_settings(processor) or settings or {}, (height, width))
        processor = None
    model.processor, model.preprocessor_config = processor, settings


def _keep_whole(model: VisionModel, module: nn.Module) -> None:
    """Set `model.whole`.

    Raises:
        ConfigError: there is no larger model, or hooks of the tower would not act in it.
    """
    allowed = "whole=False"
    if any(module is part for part in model.original_model.modules()):
        problem = f"{type(module).__name__} is no part of a larger model"
        raise ConfigError("whole", problem, given=True, allowed=allowed)
    if not isinstance(model, VisionBridge):
        problem = f"hooks of a {model.family!r} tower act in its own forward pass alone"
        raise ConfigError(
            "whole", problem, given=True, allowed=f"{allowed}, or a tower of a family"
        )
    model.keep_whole(module)


def _load(family: VisionFamily, source: VisionSource) -> nn.Module:
    try:
        return family.load(source)
    except TaxolensError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).partition(ALL_CONFIGS)[0]
        raise ConfigError("model_name", f"cannot be loaded: {reason}", given=source.name) from error
    except (
        SafetensorError,
        RuntimeError,
    ) as error:  # damaged, or of other sizes than in its config
        problem = f"the weights cannot be read: {error}"
        raise CheckpointError("model_name", problem, given=source.name) from error


def _read_config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The Hugging Face config, timm's as a dict, or open_clip's."""
    if name.startswith((open_clip.PREFIX, open_clip.HUB_PREFIX)):
        if (found := _read_open_clip(name, revision)) is not None:
            return found
        if name.startswith(open_clip.PREFIX):
            problem = "no such checkpoint of open_clip"
            raise ConfigError("model_name", problem, given=name, allowed=OPEN_CLIP_NAMES)
        name = name.removeprefix(open_clip.HUB_PREFIX)
    folder = Path(name)
    if name and os.path.isdir(name):
        if revision is not None:
            raise ConfigError(
                "revision",
                f"the model is a folder, {name}",
                given=revision,
                allowed="a name on the hub",
            )
        if _read_local(folder, "config.json") is None:
            if (found := _read_open_clip(name, revision)) is not None:
                return found
            problem = "the folder has no config.json"
            raise ConfigError("model_name", problem, given=name, allowed=MODEL_NAMES)
    elif not HUB_NAME.fullmatch(name) or os.path.exists(name):
        raise ConfigError(
            "model_name", "not a folder, and not a name on the hub", given=name, allowed=MODEL_NAMES
        )
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        raw, _ = transformers.PreTrainedConfig.get_config_dict(name, **options)
        _check_sizes(raw)
        if raw.get("model_type", "timm_wrapper") == "timm_wrapper" and "architecture" in raw:
            return raw
        return transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:  # of an odd config transformers raises nearly anything
        if isinstance(error, OSError) and (found := _read_open_clip(name, revision)) is not None:
            return found
        problem = f"its config cannot be read: {error or type(error).__name__}"
        raise ConfigError("model_name", problem, given=name, allowed=MODEL_NAMES) from error


def _read_open_clip(name: str, revision: str | None) -> open_clip.OpenClipConfig | None:
    """The config of a checkpoint of open_clip; None where there is none.

    Raises:
        ConfigError: it is damaged, or too large to be built.
    """
    try:
        found = open_clip.read_config(name, revision)
        _check_sizes(found.model if found else None)
    except (UnreadableError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        problem = f"its config cannot be read: {open_clip.CONFIG}: {error}"
        raise ConfigError("model_name", problem, given=name, allowed=OPEN_CLIP_NAMES) from error
    return found


def _read_local(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a model folder; None where there is no such file.

    Raises:
        ConfigError: it cannot be read, or something in the folder is not a regular file.
    """
    try:
        check_regular(folder)
        return read_json_object(folder / name)
    except FileNotFoundError:
        return None
    except (OSError, UnreadableError) as error:
        problem = f"its config cannot be read: {name}: {reason(error)}"
        raise ConfigError("model_name", problem, given=str(folder), allowed=MODEL_NAMES) from None


def _check_sizes(config: Any) -> None:
    """Refuse what takes hours or all memory to build, before it is built. Raises ValueError."""
    waiting = [("config.json", config)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(name), item) for name, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key, item) for item in value]
        most = next((most for part, most in MOST.items() if part in key), MOST[""])
        if isinstance(value, (int, float)) and value > most:
            raise ValueError(f"{key} is {value}, and at most {most:,} is allowed")


def _read_preprocessing(
    name: str, config: Any, revision: str | None, trust_remote_code: bool
) -> tuple[Any, dict[str, Any] | None]:
    """The image processor and its settings, each None where there is none."""
    if isinstance(config, dict):
        return None, timm_preprocessing(config)
    if isinstance(config, open_clip.OpenClipConfig):
        return None, open_clip.preprocessing(config)
    if os.path.isdir(name):
        _read_local(Path(name), "preprocessor_config.json")  # an error where it is damaged
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name, **options)
    except OSError:
        warnings.warn(
            f"{name!r} has no preprocessor_config.json: model.processor is None, and images are "
            "preprocessed by defaults.",
            stacklevel=3,
        )
        return None, None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            name, backend="pil", trust_remote_code=trust_remote_code, **options
        )
    except (ImportError, OSError, ValueError) as error:
        kind = _processor_type(settings, config)
        if kind and kind.removesuffix("Fast") not in OWN_STEPS and not cuts(settings):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                "model_name",
                f"its image processor, {kind}, cannot be loaded, and its steps are not known here: {reason}",
                given=name,
                allowed=f"{TORCHVISION}from_module(model, processor=...) with a processor or transform",
            ) from error
        return None, {**settings, "image_processor_type": kind} if kind else settings
    return processor, settings


def _processor_type(settings: dict[str, Any], config: Any) -> str:
    """The class of the image processor, by its settings or the type of the model; "" where unknown."""
    by_model: dict[str, Any] = vars(image_processing_auto)["IMAGE_PROCESSOR_MAPPING_NAMES"]
    known = by_model.get(getattr(config, "model_type", ""))
    own = known.get("torchvision") if isinstance(known, dict) else None
    return str(settings.get("image_processor_type") or own or "")


def _settings(processor: Any) -> dict[str, Any] | None:
    return processor.to_dict() if hasattr(processor, "to_dict") else None


def check_device(field: str, value: str | None) -> None:
    """Check that torch can use a device here. Raises ConfigError."""
    try:
        torch.empty(1, device=value)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            field,
            f"torch cannot use it here: {reason}",
            given=value,
            allowed=f"a device of this machine, such as {as_setting(field, 'cpu')}",
        ) from error


def device_here(field: str, wanted: str) -> str:
    """A device as wanted where torch can use it here; else "mps" or "cpu", with a warning."""
    try:
        check_device(field, wanted)
    except ConfigError as error:
        found = "mps" if torch.backends.mps.is_available() else "cpu"
        logger.warning("%s %r is used in place of %r.", error, found, wanted)
        return found
    return wanted


def _check_attention(hook_names: Sequence[str], attn_implementation: str) -> None:
    wanting = [name for name in hook_names if name.endswith(EAGER_ONLY)]
    if wanting and attn_implementation != "eager":
        raise no_attention_pattern(wanting[0], attn_implementation)


def _check_choice(field: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ConfigError(field, "not known", given=given, allowed=", ".join(allowed))
