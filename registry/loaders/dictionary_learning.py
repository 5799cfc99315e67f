"""dictionary_learning (saprmarks): trainer_N/{config.json, ae.pt, checkpoints/ae_STEP.pt}.

Sources: `dictionary_learning/dictionary.py`, `trainers/*.py` (`encode`, `scale_biases`,
`from_pretrained`), `training.py`. A finished file wants raw activations: the factor that trained it
is in its biases. An interrupted ae.pt has not: its biases and threshold are multiplied here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .parts.checkpoint import Checkpoint, as_number, read_json, take_tensors, tensors_of
from .parts.convert import Converted, make_loader
from .parts.facts import Facts, shown
from .parts.safe_pickle import fields_of

LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
NAMES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**LINEAR, "bias": "b_dec"},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": "b_dec"},
    "AutoEncoderTopK": {**LINEAR, "b_dec": "b_dec"},
    "BatchTopKSAE": {**LINEAR, "b_dec": "b_dec"},
    "MatryoshkaBatchTopKSAE": {n: n for n in ("W_enc", "b_enc", "W_dec", "b_dec")},
    "JumpReluAutoEncoder": {n: n for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")},
    "GatedAutoEncoder": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
        "r_mag": "r_mag",
    },
}
BUFFERS = ("k", "threshold", "group_sizes")
THRESHOLDED = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
SCALED = ("b_enc", "b_dec", "b_gate", "b_mag", "threshold")
KINDS = {
    "AutoEncoderTopK": "topk",
    "GatedAutoEncoder": "gated",
    **dict.fromkeys(("AutoEncoder", "AutoEncoderNew"), "standard"),
    **dict.fromkeys((*THRESHOLDED, "JumpReluAutoEncoder"), "jumprelu"),
}


def parts(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """The state dict, with tensors in its own shapes, the trainer's config, and a factor.

    The factor is the norm of an interrupted run, None for a finished one.
    """
    content = fields_of(checkpoint.content)
    folder = checkpoint.folder
    config = checkpoint.config
    if not config and folder.name == "checkpoints":
        config = read_json(folder.parent / "config.json")
    if isinstance(content.get("ae"), dict):
        return (
            tensors_of(content["ae"]),
            fields_of(content.get("config")),
            content.get("norm_factor", 1.0),
        )
    return tensors_of(content), fields_of(config.get("trainer")), None


def kind_of(found: dict[str, Tensor]) -> str | None:
    """The class, where the names of the tensors show it."""
    if "group_sizes" in found:
        return "MatryoshkaBatchTopKSAE"
    shown = {
        "gate_bias": "GatedAutoEncoder",
        "bias": "AutoEncoder",
        "decoder.bias": "AutoEncoderNew",
    }
    for name, kind in shown.items():
        if name in found:
            return kind
    threshold = found.get("threshold")
    if "W_enc" in found and threshold is not None and threshold.ndim == 1:
        return "JumpReluAutoEncoder"
    return None


def is_of_a_trainer(checkpoint: Checkpoint) -> str | None:
    """By what the file is one of this library, or of sae-for-vlm, which is built on it."""
    found, trainer, interrupted = parts(checkpoint)
    if interrupted is not None and "dict_class" in trainer:
        return "an interrupted run of a trainer"
    if "dict_class" in trainer and {"encoder.weight", "W_enc"} & set(found):
        return f"config.json with the trainer's dict_class {shown(trainer['dict_class'])}"
    if not checkpoint.config and ({"encoder.weight", "decoder.weight"} <= set(found)):
        return "encoder.weight and decoder.weight"
    jump = kind_of(found) in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")
    return "W_enc and threshold" if jump and not checkpoint.config else None


def is_of_sae_for_vlm(checkpoint: Checkpoint) -> bool:
    """Its trainers know neither the layer nor the model: both are empty."""
    _, trainer, _ = parts(checkpoint)
    return trainer.get("layer") == "" and trainer.get("lm_name") == ""


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    return None if is_of_sae_for_vlm(checkpoint) else is_of_a_trainer(checkpoint)


def convert(checkpoint: Checkpoint, facts: Facts) -> Converted:
    """The file as config and weights of a SAELens SAE."""
    found, trainer, factor = parts(checkpoint)
    said = trainer.get("dict_class")
    said = said.replace("Matroyshka", "Matryoshka") if isinstance(said, str) else None
    kind = facts.ask("sae_class", said or kind_of(found), default="AutoEncoder")
    facts.settle()
    if kind not in NAMES:
        raise ConfigError("sae_class", "none of theirs", given=kind, allowed=", ".join(NAMES))
    names = NAMES[kind]
    take_tensors(checkpoint, found, names, BUFFERS, kind)
    tensors = {
        ours: found[name].T if name.endswith(".weight") else found[name]
        for name, ours in names.items()
    }
    settings: dict[str, Any] = {
        "apply_b_dec_to_input": kind not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    }
    notes = []
    stored, configured = as_number(found.get("k")), as_number(trainer.get("k"))
    if kind == "AutoEncoderTopK":
        if stored is not None and configured is not None and stored != configured:
            notes.append(_other_k(checkpoint, facts, trainer, stored, configured))
        settings["k"] = facts.ask("k", stored if stored is not None else configured, default=1)
    if kind in THRESHOLDED:
        threshold = facts.ask("threshold", as_number(found.get("threshold")), default=0.0)
        tensors["threshold"] = torch.full((tensors["W_dec"].shape[0],), max(threshold, 0.0))
        if threshold < 0:
            notes.append(
                "its threshold was never set (-1): every positive latent is kept, as there"
            )
    facts.settle()
    if factor is not None:
        factor = as_number(factor)
        if factor is None or factor <= 0:
            raise CheckpointError(str(checkpoint), "norm_factor is no positive number")
        tensors.update({n: tensors[n] * factor for n in SCALED if n in tensors})
        notes.append(
            f"an interrupted run: biases and threshold multiplied by norm_factor {factor:.6g}"
        )
    if kind == "AutoEncoder":
        _normalise_decoder(tensors)
    metadata = {
        "model_name": trainer.get("lm_name"),
        "layer": trainer.get("layer"),
        "submodule_name": trainer.get("submodule_name"),
        "batch_top_k": (stored or configured) if kind in THRESHOLDED else None,
        "matryoshka_group_sizes": found["group_sizes"].tolist() if "group_sizes" in found else None,
        "step": fields_of(checkpoint.content).get("step"),
    }
    return Converted(
        KINDS[kind],
        f"{kind}{', interrupted' if factor is not None else ''}",
        tensors,
        settings,
        metadata,
        notes,
    )


def _other_k(
    checkpoint: Checkpoint, facts: Facts, trainer: dict[str, Any], stored: float, configured: float
) -> str:
    """A note on a k that is not config.json's: `encode` takes the file's, which training may anneal.

    Raises:
        ConfigError: nothing says that it was annealed, and the user does not say that it is right.
    """
    is_annealed = checkpoint.folder.name == "checkpoints" or bool(trainer.get("k_anneal_steps"))
    if not is_annealed and facts.given.get("k") is None:
        raise ConfigError(
            "k",
            f"config.json and {checkpoint} differ",
            given=configured,
            allowed=f"{stored:g}, given as `k`, where the file is right",
        )
    why = "it was annealed in training" if is_annealed else "as given"
    return f"k is the file's, {stored:g}, where config.json says {configured:g}: {why}"


def _normalise_decoder(tensors: dict[str, Tensor]) -> None:
    """Rows of unit length, the norms into the encoder, as `AutoEncoder.from_pretrained` does."""
    norms = tensors["W_dec"].to(torch.float64).norm(dim=1)
    if torch.allclose(norms.float(), torch.ones_like(norms, dtype=torch.float32)):
        return
    norms = torch.where(norms > 0, norms, 1.0)
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]
    tensors["W_enc"] = tensors["W_enc"] * norms
    tensors["b_enc"] = tensors["b_enc"] * norms


DICTIONARY_LEARNING = make_loader(
    "dictionary_learning",
    recognises,
    convert,
    ("sae_class", "k", "threshold"),
    "ae.pt beside a config.json with trainer and dict_class; encoder.weight and decoder.weight; or "
    "an interrupted {step, ae, optimizer, config, norm_factor}",
)
