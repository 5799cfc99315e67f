"""PatchSAE, ConceptScope and HugoFry's CLIP SAEs: one trainer, copied twice.

Sources: `sae_training/{config,sparse_autoencoder,hooked_vit,utils}.py` of HugoFry's
mats_sae_training_for_ViTs, of patchsae and of ConceptScope. The output of block `block_layer` of a
Hugging Face CLIP's vision encoder; b_dec is subtracted from the input.
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .parts.checkpoint import Checkpoint, take_tensors, tensors_of
from .parts.convert import Converted, make_loader
from .parts.facts import Facts
from .parts.safe_pickle import fields_of

WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")
TOKENS = {
    True: "class",
    False: "all",
    None: "all",
    "include": "all",
    "exclude": "patch",
    "only": "class",
}
BLOCKS = {
    "openai/clip-vit-base-patch16": 12,
    "openai/clip-vit-base-patch32": 12,
    "openai/clip-vit-large-patch14": 24,
    "openai/clip-vit-large-patch14-336": 24,
}
"""Blocks of the vision encoder, from each model's config.json: what a negative block counts from."""


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    content = checkpoint.content
    if not isinstance(content, dict) or "state_dict" not in content:
        return {}
    return fields_of(content.get("cfg", content.get("config")))


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    cfg = _config(checkpoint)
    if "block_layer" in cfg and "module_name" in cfg:
        return "a pickle of cfg, with block_layer and module_name, and state_dict"
    return None


def convert(checkpoint: Checkpoint, facts: Facts) -> Converted:
    """The file as config and weights of a SAELens SAE."""
    cfg = _config(checkpoint)
    if cfg.get("gated_sae"):
        raise ConfigError(
            "gated_sae", "upstream has no forward for it", given=True, allowed="false"
        )
    found = tensors_of(fields_of(checkpoint.content).get("state_dict"))
    model, block, part = (cfg.get(name) for name in ("model_name", "block_layer", "module_name"))
    token = cfg.get("class_token")
    metadata = {
        "model_name": model,
        "hook_name": _hook(model, block, part),
        "tokens": TOKENS.get(token) if isinstance(token, (bool, str, type(None))) else None,
        "block_layer": block,
        "dataset_path": cfg.get("dataset_path"),
    }
    return Converted(
        "standard",
        "ReLU",
        take_tensors(checkpoint, found, WEIGHTS),
        {"apply_b_dec_to_input": True},
        metadata,
    )


def _hook(model: Any, block: Any, part: Any) -> str | None:
    """The hook point, None where the model's number of blocks is needed and not known."""
    if not isinstance(block, int) or part != "resid":
        return None
    if block < 0:
        if not isinstance(model, str) or model not in BLOCKS:
            return None
        block += BLOCKS[model]
    return f"blocks.{block}.hook_resid_post"


PATCHSAE = make_loader(
    "patchsae",
    recognises,
    convert,
    (),
    "a pickle of cfg or config, with block_layer and module_name, and state_dict",
)
