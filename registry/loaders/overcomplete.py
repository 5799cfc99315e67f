"""overcomplete (KempnerInstitute): pickled modules or their state dicts.

Sources: `overcomplete/sae/` (`dictionary.py`, `archetypal_dictionary.py`, `modules.py`, `topk_sae.py`,
`batchtopk_sae.py`, `jump_sae.py`, `mp_sae.py`, `rasae.py`). No bias is subtracted from the input or
added to the output. A state dict has neither the class, nor k, nor the normalisation of the
dictionary's rows, nor BatchTopK's threshold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .parts.checkpoint import Checkpoint, as_number, tensors_of
from .parts.convert import Converted, make_loader
from .parts.facts import Facts
from .parts.safe_pickle import Global, Record, fields_of

BN_EPS = 1e-5
NORM_EPS = 1e-8
DICTIONARY = ("dictionary._weights", "dictionary.W")
LINEAR = "encoder.final_block.0."
BATCH_NORM = "encoder.final_block.1."
TOPK, BATCH_TOPK, JUMP = ("TopKSAE", "RATopKSAE"), ("BatchTopKSAE",), ("JumpSAE", "RAJumpSAE")
PURSUIT = ("MpSAE",)
ENCODERS = ("MLPEncoder", "TieableEncoder")
NORMS = (
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
)


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    content = checkpoint.content
    if isinstance(content, Record) and content.kind.startswith("overcomplete."):
        return f"a pickled {content.kind[:80]}"
    if isinstance(content, dict) and any(name in content for name in DICTIONARY):
        return "a state dict with dictionary._weights or dictionary.W"
    return None


def convert(checkpoint: Checkpoint, facts: Facts) -> Converted:
    """The file as config and weights of a SAELens SAE."""
    found, content = tensors_of(checkpoint.content), checkpoint.content
    if not isinstance(content, Record):
        return convert_state(checkpoint, facts, found, _kind(found), {})
    kind = content.kind.rpartition(".")[2]
    if kind in (*TOPK, *BATCH_TOPK, *JUMP):
        _check_encoder(fields_of(content.fields.get("_modules")))
    converted = convert_state(checkpoint, facts, found, kind, content.fields)
    converted.form += ", module"
    return converted


def _check_encoder(modules: dict[str, Any]) -> None:
    """Check that the classes of a module's encoder compute what `_encoder` reads from its tensors.

    Raises:
        ConfigError: an encoder of the user (`encoder_module`), another normalisation, or one that is
            tied to another dictionary than the SAE's own.
    """
    encoder = modules.get("encoder")
    kind = encoder.kind if isinstance(encoder, Record) else "none"
    if kind.partition(".")[0] != "overcomplete" or kind.rpartition(".")[2] not in ENCODERS:
        raise ConfigError(
            "encoder",
            "a class whose latents cannot be told from its tensors",
            given=kind[:80],
            allowed=f"overcomplete's {' or '.join(ENCODERS)}",
        )
    children = fields_of(fields_of(encoder).get("_modules"))
    blocks = fields_of(fields_of(children.get("final_block")).get("_modules"))
    norm = blocks.get("1")
    if isinstance(norm, Record) and norm.kind not in NORMS:
        problem, given = "SAELens has no such normalisation over the latents", norm.kind[:80]
        raise ConfigError("encoder", problem, given=given, allowed="none or BatchNorm1d")
    tied = children.get("tied_to")
    if isinstance(tied, Record) and tied is not modules.get("dictionary"):
        problem = "it is tied to another dictionary than the SAE's own"
        raise ConfigError("encoder", problem, given=tied.kind[:80], allowed="the SAE's own")


def convert_state(
    checkpoint: Checkpoint,
    facts: Facts,
    found: dict[str, Tensor],
    kind: str | None,
    held: dict[str, Any],
) -> Converted:
    """The SAE of a state dict.

    Args:
        found: its tensors; those that are used are taken out.
        kind: the class over there, None where the file does not show it.
        held: what else is known of it, by the names of the class's attributes.
    """
    kind = facts.ask("sae_class", kind)
    family = next((f for f in (TOPK, BATCH_TOPK, JUMP, PURSUIT) if kind in f), ())
    if kind and not family:
        raise ConfigError(
            "sae_class",
            "SAELens has no class that gives its latents",
            given=kind[:80],
            allowed=", ".join((*TOPK, *BATCH_TOPK, *JUMP, *PURSUIT)),
        )
    k = top_k = None
    threshold = 0.0
    if kind in TOPK or kind in PURSUIT:
        k = facts.ask("k", held.get("k", held.get("top_k")), default=1)
    elif kind in BATCH_TOPK:
        threshold = facts.ask("threshold", as_number(held.get("running_threshold")), default=0.0)
        top_k = facts.may("top_k", held.get("top_k"))
    rows = held.get("dictionary_normalization")
    decoder = _dictionary(checkpoint, facts, found, _modules(held, "dictionary"), rows)
    facts.settle()
    tensors = {"W_dec": decoder}
    settings: dict[str, Any] = {}
    notes = []
    if kind in PURSUIT:
        notes = ["a row that no atom correlates with positively has no latents here"]
        settings = {
            "max_iterations": k,
            "residual_threshold": 0.0,
            "stop_on_duplicate_support": False,
        }
    else:
        tensors["W_enc"], tensors["b_enc"] = _encoder(
            checkpoint, found, decoder, _modules(held, "encoder")
        )
    if kind in TOPK:
        settings["k"] = k
    elif kind in JUMP:
        tensors["threshold"] = _just_below(found.pop("thresholds").to(torch.float64).exp())
    elif kind in BATCH_TOPK:
        tensors["threshold"] = _just_below(torch.full((decoder.shape[0],), threshold))
    if found:
        raise ConfigError(
            str(checkpoint),
            f"it has tensors that {kind} with a linear encoder, or mlp_bn_1, has not",
            given=", ".join(sorted(found))[:200],
            allowed="the tensors of such an encoder",
        )
    architecture = {TOPK: "topk", PURSUIT: "matching_pursuit"}.get(family, "jumprelu")
    return Converted(
        architecture,
        str(kind),
        tensors,
        settings,
        {} if top_k is None else {"batch_top_k": top_k},
        notes,
    )


def _kind(found: dict[str, Tensor]) -> str | None:
    """The class, where the tensors show it."""
    archetypal = "dictionary.W" in found
    if "thresholds" in found:
        return "RAJumpSAE" if archetypal else "JumpSAE"
    if "Q" in found:
        return "QSAE"
    return "RATopKSAE" if archetypal else None


def _modules(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return fields_of(fields_of(fields.get("_modules")).get(name))


def _just_below(threshold: Tensor) -> Tensor:
    """SAELens keeps what is above the threshold, overcomplete what reaches it."""
    return torch.nextafter(threshold.to(torch.float32), torch.tensor(-torch.inf))


def _dictionary(
    checkpoint: Checkpoint,
    facts: Facts,
    found: dict[str, Tensor],
    layer: dict[str, Any],
    known: Any,
) -> Tensor:
    """The decoder (d_sae, d_in), as `get_dictionary` gives it in evaluation mode."""
    prefix = "dictionary."
    # Before e1d80cb there was none; archetypal dictionaries have always had one.
    if prefix + "W" not in found:
        found.setdefault(prefix + "multiplier", torch.tensor(0.0))
    gain = _taken(checkpoint, found, prefix + "multiplier").exp()
    if prefix + "W" in found:
        facts.may("dictionary_normalization", "convex")
        delta = facts.ask("delta", as_number(layer.get("delta")), default=1.0)
        weights, points, relax = (
            _taken(checkpoint, found, prefix + name) for name in ("W", "C", "Relax")
        )
        weights = weights.relu()
        weights = weights / (weights.sum(dim=-1, keepdim=True) + NORM_EPS)
        relax = relax * (delta / relax.norm(dim=-1, keepdim=True)).clamp(max=1)
        atoms = weights @ points + relax
    elif prefix + "_weights" in found:
        function = layer.get("normalization")
        if isinstance(function, Global):
            known = function.name.rpartition(".")[2].removeprefix("normalize_")
        rows = facts.ask("dictionary_normalization", known, default="l2", why="l2 is its default")
        atoms = _normalized(found.pop(prefix + "_weights").to(torch.float64), rows)
    else:
        raise CheckpointError(str(checkpoint), "dictionary._weights is not in it")
    fused = layer.get("_fused_dictionary")
    if layer.get("training") is False and isinstance(fused, Tensor):
        return fused.to(torch.float64)
    return atoms * gain


def _normalized(weights: Tensor, rows: str) -> Tensor:
    power = {"l2": 2.0, "max_l2": 2.0, "l1": 1.0, "max_l1": 1.0}.get(rows)
    if rows == "identity":
        return weights
    if power is None:
        raise ConfigError(
            "dictionary_normalization",
            "unknown",
            given=rows,
            allowed="l2, max_l2, l1, max_l1, identity",
        )
    norms = weights.norm(p=power, dim=1, keepdim=True)
    return weights / (norms.max() if rows.startswith("max") else norms + NORM_EPS)


def _encoder(
    checkpoint: Checkpoint, found: dict[str, Tensor], decoder: Tensor, module: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """W_enc (d_in, d_sae) and b_enc (d_sae), batch normalisation folded in."""
    for name in [name for name in found if name.startswith("encoder.tied_to.")]:
        del found[name]
    if not any(name.startswith("encoder.final_block") for name in found):  # tied or untied matrix
        weight = found.pop("encoder.weight", decoder).to(torch.float64)
        bias = found.pop("encoder.bias", torch.zeros(weight.shape[0])).to(torch.float64)
        return weight.T, bias
    activation = module.get("_modules", {}).get("final_activation")
    kind = activation.kind if isinstance(activation, Record) else "torch.nn.modules.activation.ReLU"
    if not kind.endswith(".ReLU"):
        raise ConfigError("encoder", "its last activation", given=kind[:80], allowed="ReLU")
    weight, bias = (_taken(checkpoint, found, LINEAR + name) for name in ("weight", "bias"))
    if BATCH_NORM + "running_var" in found:
        blocks = fields_of(_modules(module, "final_block").get("_modules"))
        eps = as_number(fields_of(blocks.get("1")).get("eps"))
        mean, variance, gain, shift = (
            _taken(checkpoint, found, BATCH_NORM + name)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        found.pop(BATCH_NORM + "num_batches_tracked", None)
        gain = gain / (variance + (BN_EPS if eps is None else eps)).sqrt()
        weight, bias = weight * gain[:, None], (bias - mean) * gain + shift
    elif BATCH_NORM + "weight" in found:
        raise ConfigError(
            "encoder",
            "SAELens has no layer normalisation over the latents (mlp_ln)",
            allowed="linear, mlp_bn_1, tied and untied encoders",
        )
    return weight.T, bias


def _taken(checkpoint: Checkpoint, found: dict[str, Tensor], name: str) -> Tensor:
    """A tensor in its own shape, in float64, taken out of `found`. Raises CheckpointError where it is not there."""
    if name not in found:
        raise CheckpointError(str(checkpoint), f"{name} is not in it")
    return found.pop(name).to(torch.float64)


OVERCOMPLETE = make_loader(
    "overcomplete",
    recognises,
    convert,
    ("sae_class", "k", "threshold", "top_k", "dictionary_normalization", "delta"),
    "a state dict with dictionary._weights or dictionary.W, or a pickled overcomplete module",
)
