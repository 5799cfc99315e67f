"""Vision models of every family, tiny and random: `tiny_model("dinov2")`, `save_tiny(...)`.

Two blocks or stages, 16 or 24 wide, for pictures of 32 pixels in patches of 8; each is built in a
fraction of a second from a config alone. Weights are drawn anew so that nothing is zero or one
(LayerScale, registers, biases) and every part shows in the output.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from taxolens.hooks.models.load import from_module
from torch import nn

IMAGE_SIZE = 32
OTHER_SIZE = 48  # three patches by six, where a model takes any size
PATCH_SIZE = 8

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
MAE = {
    **VIT,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 3,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
DINOV2 = {**VIT, "mlp_ratio": 2}
BEIT = {"use_relative_position_bias": True}
TEXT = {**VIT, "vocab_size": 20, "max_position_embeddings": 8, "num_hidden_layers": 1}
CNN = {"image_size": IMAGE_SIZE, "hidden_sizes": [16, 24], "depths": [1, 2], "num_channels": 3}


def _two_towers(config: type[Any], model: type[Any]) -> Callable[[], nn.Module]:
    return lambda: model(config(vision_config=dict(VIT), text_config=dict(TEXT), projection_dim=12))


def _idefics3_vision() -> nn.Module:
    config = hf.Idefics3Config(vision_config=dict(VIT), text_config=LLAMA)
    return hf.Idefics3Model(config).vision_model


LLAMA = {
    **{"model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
}


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**VIT)),
    "vit_classifier": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT, num_labels=5)),
    "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**VIT)),
    "deit_teacher": lambda: hf.DeiTForImageClassificationWithTeacher(
        hf.DeiTConfig(**VIT, num_labels=5)
    ),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2)),
    "dinov2_swiglu": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2, use_swiglu_ffn=True)),
    "dinov2_classifier": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(**DINOV2, num_labels=5)
    ),
    "dinov2_with_registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=4)
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT, num_register_tokens=4)),
    "dinov3_gated": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT, use_gated_mlp=True)),
    "vit_mae": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**MAE)),
    "vit_mae_both": lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**MAE)),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)),
    "clip_projection": lambda: hf.CLIPVisionModelWithProjection(
        hf.CLIPVisionConfig(**VIT, projection_dim=12)
    ),
    "clip_classifier": _two_towers(hf.CLIPConfig, hf.CLIPForImageClassification),
    "clip_both": _two_towers(hf.CLIPConfig, hf.CLIPModel),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)),
    "siglip_classifier": _two_towers(hf.SiglipConfig, hf.SiglipForImageClassification),
    "siglip_both": _two_towers(hf.SiglipConfig, hf.SiglipModel),
    "beit": lambda: hf.BeitModel(hf.BeitConfig(**VIT, **BEIT)),
    "beit_shared": lambda: hf.BeitModel(
        hf.BeitConfig(
            **VIT,
            use_shared_relative_position_bias=True,
            use_absolute_position_embeddings=True,
            use_mean_pooling=False,
            layer_scale_init_value=0,
        )
    ),
    "beit_classifier": lambda: hf.BeitForImageClassification(
        hf.BeitConfig(**VIT, **BEIT, num_labels=5)
    ),
    "ijepa": lambda: hf.IJepaModel(hf.IJepaConfig(**VIT)),
    "ijepa_classifier": lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**VIT, num_labels=5)),
    "aimv2": lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**VIT, is_native=True)),
    "aimv2_one_size": lambda: hf.Aimv2VisionModel(
        hf.Aimv2VisionConfig(**VIT, is_native=False, use_head=False)
    ),
    "aimv2_both": _two_towers(hf.Aimv2Config, hf.Aimv2Model),
    "internvl": lambda: hf.InternVLVisionModel(
        hf.InternVLVisionConfig(
            **{**VIT, "image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2},
            use_mean_pooling=False,
            use_absolute_position_embeddings=True,
            norm_type="rms_norm",
            use_qk_norm=True,
        )
    ),
    "idefics3": lambda: _idefics3_vision(),
    "resnet": lambda: hf.ResNetModel(hf.ResNetConfig(**CNN, embedding_size=16)),
    "resnet_classifier": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(**CNN, embedding_size=16, num_labels=5)
    ),
    "convnext": lambda: hf.ConvNextModel(hf.ConvNextConfig(**CNN, num_stages=2)),
    "dinov3_convnext": lambda: hf.DINOv3ConvNextModel(
        hf.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 2, 1], image_size=32)
    ),
    "vit_msn": lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**VIT)),
}

# The variants that between them run every line of every family.
BRIDGED = tuple(name for name in BUILDERS if not name.endswith("_both"))[:-5]
WRAPPED = ("resnet", "resnet_classifier", "convnext", "dinov3_convnext", "vit_msn")


def tiny_model(family: str, *, attn_implementation: str = "eager", seed: int = 0) -> Any:
    """A Hugging Face model in evaluation mode, with random weights that `seed` decides."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BUILDERS[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(mean=0.1 * (parameter.ndim == 1), std=0.2)
    if getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation(attn_implementation)
    return model.eval()


@cache
def tapped(family: str, attn_implementation: str = "eager") -> Any:
    """`tiny_model(family)` tapped. Shared by all tests: leave it as it was."""
    return from_module(tiny_model(family, attn_implementation=attn_implementation))


def save_tiny(family: str, folder: str | Path, *, processor: bool = True, seed: int = 0) -> Path:
    """`tiny_model(family)` as a checkpoint folder, with a preprocessor_config.json if asked."""
    folder = Path(folder)
    tiny_model(family, seed=seed).save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing(family)))
    return folder


def preprocessing(family: str) -> dict[str, Any]:
    """A preprocessor_config.json as the family's checkpoints have it."""
    kind = next((k for name, k in PROCESSORS.items() if family.startswith(name)), None)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return {
        "image_processor_type": kind or "ConvNextImageProcessor",
        "do_resize": True,
        "size": size,
        **({"do_center_crop": True, "crop_size": size} if kind in CROPPING else {}),
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


PROCESSORS = {
    "vit": "ViTImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov3": "DINOv3ViTImageProcessorFast",
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "beit": "BeitImageProcessor",
}
CROPPING = ("DeiTImageProcessor", "BitImageProcessor", "CLIPImageProcessor")


def pictures(n: int = 2, size: int | tuple[int, int] = IMAGE_SIZE, seed: int = 1) -> torch.Tensor:
    """Noise (n, 3, size, size)."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
