"""MSAE (WolodjaZ/MSAE): tensors and the data's normalisation in a file, all else in its name.

Sources: `sae.py` (`load_model`, `SAE.encode`, `SAE.decode`), `train.py` (the name). The SAE sees
``(x - mean_center) * scaling_factor``. Latents are the sparse ones that `encode` returns first;
upstream's `forward` decodes all positive latents instead.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from .parts.checkpoint import Checkpoint, as_number, as_tensor, take_tensors, tensors_of
from .parts.convert import Converted, make_loader
from .parts.facts import Facts

FILE_NAME = re.compile(
    r"(?P<latents>\d+)_(?P<inputs>\d+)_(?P<activation>[A-Za-z]+(_\d+)*)(_(?P<weights>UW|RW))?_"
    r"(?P<tied>True|False)_(?P<normalize>True|False)_(?P<soft_cap>\d+(\.\d+)?)(_(?P<data>.*))?\.pth?"
)
NAMES = {"encoder": "W_enc", "decoder": "W_dec", "latent_bias": "b_enc", "pre_bias": "b_dec"}
COUNTER = "latents_activation_frequency"
LOG_THRESHOLD = "activation.log_threshold"


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    content = checkpoint.content
    model = content.get("model") if isinstance(content, dict) else None
    if isinstance(model, dict) and {"pre_bias", "encoder", "latent_bias"} <= set(model):
        return "model with pre_bias, encoder and latent_bias"
    return None


def convert(checkpoint: Checkpoint, facts: Facts) -> Converted:
    """The file as config and weights of a SAELens SAE."""
    content = checkpoint.content
    found = tensors_of(content["model"])
    found.pop(COUNTER, None)
    name = FILE_NAME.fullmatch(checkpoint.path.name)
    said: dict[str, Any] = name.groupdict() if name else {}
    activation = facts.ask(
        "activation", said.get("activation"), default="ReLU", why="ReLU, TopKReLU_64"
    )
    normalize = facts.ask("normalize", _flag(said.get("normalize")), default=False)
    soft_cap = facts.ask("soft_cap", float(said["soft_cap"]) if said else None, default=0.0)
    factor = as_number(content.get("scaling_factor"))
    mean = facts.ask("mean", _mean(content.get("mean_center")), default=0.0)
    scale = facts.ask(
        "scale", 1 / factor if factor else None, default=1.0, why="1 / scaling_factor"
    )
    kind, *numbers = activation.split("_")
    k = None
    if "TopK" in kind:
        k = facts.ask(
            "k", int(numbers[0]) if numbers and numbers[0].isdecimal() else None, default=1
        )
    facts.settle()
    _refuse(kind, normalize, soft_cap)
    log_threshold = found.pop(LOG_THRESHOLD, None)
    if (kind == "JumpReLU") != (log_threshold is not None):
        is_there = "is not in it" if log_threshold is None else "is in it"
        raise CheckpointError(str(checkpoint), f"{LOG_THRESHOLD} {is_there}", given=activation)
    found.setdefault("decoder", found["encoder"].T)
    found = take_tensors(checkpoint, found, NAMES, of="MSAE")
    tensors = {ours: found[theirs] for theirs, ours in NAMES.items()}
    shape = (int(said["inputs"]), int(said["latents"])) if said else tuple(tensors["W_enc"].shape)
    if tuple(tensors["W_enc"].shape) != shape:
        raise CheckpointError(
            f"{checkpoint}: encoder",
            "not of the shape in the file's name",
            given=tuple(tensors["W_enc"].shape),
            allowed=str(shape),
        )
    settings: dict[str, Any] = {"apply_b_dec_to_input": True}
    notes = []
    if log_threshold is not None:
        tensors["threshold"] = log_threshold.to(torch.float64).exp()
    if k is not None:
        settings["k"] = k
        notes.append("latents are the k that encode keeps; upstream's forward decodes all of them")
        if kind == "TopK":
            notes.append("its TopK has no ReLU: negative latents among the k are zero here")
    metadata = {"matryoshka_weights": said.get("weights"), "source_dataset": said.get("data")}
    architecture = {"ReLU": "standard", "JumpReLU": "jumprelu"}.get(kind, "topk")
    return Converted(
        architecture,
        f"{activation}{'' if 'decoder' in tensors_of(content['model']) else ', tied'}",
        tensors,
        settings,
        metadata,
        notes,
        mean,
        scale,
    )


def _flag(text: str | None) -> bool | None:
    return None if text is None else text == "True"


def _mean(value: Any) -> Any:
    """A float64 tensor (d_in), a number, or None."""
    tensor = as_tensor(value)
    if tensor is None or tensor.numel() == 1:
        return None if tensor is None else float(tensor)
    return tensor.to(torch.float64).flatten()


def _refuse(kind: str, normalize: bool, soft_cap: float) -> None:
    if soft_cap > 0:
        raise ConfigError(
            "soft_cap", "SAELens has no tanh over the latents", given=soft_cap, allowed="0"
        )
    if normalize:
        raise ConfigError(
            "normalize",
            "SAELens cannot normalise each row after mean and scale",
            given=True,
            allowed="false",
        )
    if kind not in ("ReLU", "JumpReLU", "TopK", "TopKReLU"):
        why = "it keeps the largest of a whole batch" if "Batch" in kind else "SAELens has none"
        raise ConfigError(
            "activation", why, given=kind[:40], allowed="ReLU, JumpReLU, TopK_N, TopKReLU_N"
        )


MSAE = make_loader(
    "msae",
    recognises,
    convert,
    ("activation", "k", "normalize", "soft_cap"),
    "model with pre_bias, encoder and latent_bias, beside mean_center and scaling_factor",
)
