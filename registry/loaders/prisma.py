"""ViT-Prisma: weights with a config.json, pickles of both, and the older `autoencoder` pickles.

Sources: `vit_prisma/sae/sae.py` (`encode`, `decode`, `load_from_pretrained`,
`load_from_pretrained_legacy_saelens_v2`), `config.py`, `transcoder.py`. b_dec is subtracted from the
normalised input. A config without `normalize_activations` means ``layer_norm``, its default.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError
from .parts.checkpoint import Checkpoint, take_tensors, tensors_of
from .parts.convert import Converted, make_loader
from .parts.facts import Facts, shown
from .parts.safe_pickle import fields_of

MARKS = ("layer_subtype", "hook_point_layer")
STANDARD = ("W_enc", "W_dec", "b_enc", "b_dec")
GATED = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    content = checkpoint.content
    if not isinstance(content, dict):
        return None
    if "autoencoder" in content and "config" in content:
        return "a pickle of config and autoencoder"
    if "state_dict" in content and any(mark in fields_of(content.get("cfg")) for mark in MARKS):
        return "a pickle of cfg, with layer_subtype, and state_dict"
    if "W_enc" in content and any(mark in checkpoint.config for mark in MARKS):
        return "config.json with layer_subtype beside W_enc"
    return None


def convert(checkpoint: Checkpoint, facts: Facts) -> Converted:
    """The file as config and weights of a SAELens SAE."""
    content = fields_of(checkpoint.content)
    legacy = "autoencoder" in content
    if legacy:
        cfg = fields_of(content.get("config"))
        found = tensors_of(fields_of(content["autoencoder"]).get("state_dict"))
    elif "state_dict" in content:  # its own cfg counts for more than config.json, as upstream
        cfg, found = fields_of(content.get("cfg")), tensors_of(content["state_dict"])
    else:
        cfg, found = checkpoint.config, tensors_of(content)
    is_transcoder = bool(cfg.get("is_transcoder")) or "b_dec_out" in found
    kind = "transcoder" if is_transcoder else str(cfg.get("architecture") or "standard")
    needed = {"standard": STANDARD, "gated": GATED, "transcoder": (*STANDARD, "b_dec_out")}
    if kind not in needed:
        raise ConfigError("architecture", "not read", given=shown(kind), allowed=", ".join(needed))
    optional = {"gated": ("b_enc",), "transcoder": ("W_skip",)}.get(kind, ())
    tensors = take_tensors(checkpoint, found, needed[kind], optional, f"a {kind} SAE of Prisma")
    if kind == "gated":
        tensors.pop("b_enc", None)  # stored, and used by nothing
    default = {"activation_fn_str": "relu"} if legacy else {}
    activation = facts.ask(
        "activation",
        {**default, **cfg}.get("activation_fn_str"),
        default="relu",
        why="relu or topk",
    )
    normalize = facts.ask(
        "normalize_activations", cfg.get("normalize_activations", "layer_norm" if cfg else None)
    )
    settings: dict[str, Any] = {"normalize_activations": normalize, "apply_b_dec_to_input": True}
    if activation == "topk":
        settings["k"] = facts.ask(
            "k", fields_of(cfg.get("activation_fn_kwargs")).get("k"), default=1
        )
    facts.settle()
    architecture = {("standard", "relu"): "standard", ("standard", "topk"): "topk",
                    ("gated", "relu"): "gated"}.get((kind, activation))  # fmt: skip
    if kind == "transcoder":
        architecture = _transcoder(tensors, settings, activation)
    elif architecture is None:
        raise ConfigError(
            "activation",
            f"SAELens has no {kind} SAE with it",
            given=activation,
            allowed="relu" if kind == "gated" else "relu, topk",
        )
    metadata = {
        "model_name": cfg.get("model_name"),
        "hook_name": _hook(cfg, legacy, "hook_point_layer", "layer_subtype"),
        "tokens": _tokens(cfg),
        "hook_head_index": cfg.get("hook_point_head_index"),
        "dataset_path": cfg.get("dataset_path"),
        "context_size": cfg.get("context_size"),
        "image_size": cfg.get("image_size"),
    }
    if kind == "transcoder":
        metadata["hook_name_out"] = _hook(cfg, False, "out_hook_point_layer", "layer_out_subtype")
    return Converted(
        architecture,
        f"{'legacy, ' if legacy else ''}{kind}, {activation}, {normalize}",
        tensors,
        settings,
        metadata,
    )


def _transcoder(tensors: dict[str, Any], settings: dict[str, Any], activation: str) -> str:
    """SAELens's transcoders have ReLU, take the input as it is, and undo no normalisation."""
    if activation != "relu" or settings["normalize_activations"] != "none":
        raise ConfigError(
            "transcoder",
            "SAELens's have ReLU, and undo no normalisation of the activations",
            given=f"{activation}, {settings['normalize_activations']}",
            allowed="relu, none",
        )
    b_dec, tensors["b_dec"] = tensors.pop("b_dec"), tensors.pop("b_dec_out")
    shift = b_dec.to(torch.float64) @ tensors["W_enc"].to(torch.float64)
    tensors["b_enc"] = tensors["b_enc"].to(torch.float64) - shift
    settings["apply_b_dec_to_input"] = False
    return "skip_transcoder" if "W_skip" in tensors else "transcoder"


def _hook(cfg: dict[str, Any], legacy: bool, layer: str, subtype: str) -> str | None:
    named = cfg.get("hook_point")
    if legacy and isinstance(named, str):
        return named
    block, part = cfg.get(layer), cfg.get(subtype)
    return f"blocks.{block}.{part}" if isinstance(block, int) and isinstance(part, str) else None


def _tokens(cfg: dict[str, Any]) -> str | None:
    if cfg.get("cls_token_only"):
        return "class"
    if cfg.get("use_patches_only"):
        return "patch"
    return "all" if "cls_token_only" in cfg else None


PRISMA = make_loader(
    "prisma",
    recognises,
    convert,
    ("activation", "k", "normalize_activations"),
    "W_enc, W_dec, b_enc, b_dec beside a config.json with layer_subtype, or a pickle of cfg and "
    "state_dict, or of config and autoencoder (.pt, .pkl, .pkl.gz)",
)
