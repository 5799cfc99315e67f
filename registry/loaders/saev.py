"""saev (OSU-NLP-Group/saev, samuelstevens/saev): a line of JSON, then torch.save's bytes.

Sources: saev's `nn/modeling.py` at the commits of each schema. The encoder saw ``x - b_dec`` until
commit e7ca004 (2025-07-31); schema 1 was written before and after it. `BatchTopK` took the largest
of a whole batch, at inference too, up to commit 2fe190b (2025-08-07), within schema 2; then k of
each row; from 2025-11-16, within schema 4, what exceeds a threshold that the file holds.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from .parts.checkpoint import Checkpoint, as_number, take_tensors, tensors_of
from .parts.convert import Converted, make_loader
from .parts.facts import Facts, shown

SCHEMAS = (1, 2, 3, 4, 5)
BATCH_COUPLED_COMMITS = ("8d38c23", "9ecf55b", "4ddfb89", "afb8679", "89cb76f", "2fe190b")
WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")
THRESHOLD = "activation.threshold"
NEGATIVE = (
    "saev's TopK has no ReLU: a row with fewer than k positive latents keeps negative ones there, "
    "and zeros here"
)


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    header = checkpoint.header or {}
    if "schema" in header and "cfg" in header:
        return f"its first line is JSON with schema {shown(header['schema'])}"
    if "d_vit" in header:
        return "its first line is JSON with d_vit and no schema"
    return None


def convert(checkpoint: Checkpoint, facts: Facts) -> Converted:
    """The file as config and weights of a SAELens SAE."""
    header = checkpoint.header
    if header is None:
        raise CheckpointError(str(checkpoint), "its first line is no JSON, as saev writes it")
    schema = header.get("schema")
    if "schema" in header and schema not in SCHEMAS:
        raise ConfigError("schema", "unknown", given=shown(schema), allowed="none, 1, 2, 3, 4, 5")
    cfg = header.get("cfg") if schema else header
    kind, params = _activation(schema, header, cfg if isinstance(cfg, dict) else {})
    found = tensors_of(checkpoint.content)
    tensors = take_tensors(checkpoint, found, WEIGHTS, [THRESHOLD], "saev's SAE")
    threshold = as_number(tensors.pop(THRESHOLD, None))
    subtract = facts.ask(
        "subtract_b_dec",
        {None: True, 1: None}.get(schema, False),
        default=False,
        why=f"saev dropped it in commit e7ca004 of 2025-07-31, this file's is {shown(header.get('commit'))}",
    )
    d_sae = tensors["W_dec"].shape[0]
    settings: dict[str, Any] = {"apply_b_dec_to_input": subtract}
    notes = []
    if kind == "Relu":
        architecture = "standard"
    elif kind == "TopK" or (
        kind == "BatchTopK" and threshold is None and _is_per_row(schema, params)
    ):
        architecture = "topk"
        settings["k"] = facts.ask("k", params.get("top_k"), default=1)
        notes.append(NEGATIVE)
        if kind == "BatchTopK" and str(header.get("commit")).startswith(BATCH_COUPLED_COMMITS):
            raise _coupled(checkpoint)
        if kind == "BatchTopK":
            notes.append("BatchTopK of its commit keeps k of each row at inference")
    elif kind == "BatchTopK" and threshold is not None:
        architecture = "jumprelu"
        tensors["threshold"] = torch.full((d_sae,), max(threshold, 0.0))
    elif kind == "BatchTopK" and schema == 1:
        raise _coupled(checkpoint)
    else:
        raise ConfigError(
            "activation",
            "BatchTopK without its threshold" if kind == "BatchTopK" else "unknown",
            given=shown(kind),
            allowed="Relu, TopK, BatchTopK",
        )
    if "mean" not in facts.given:
        notes.append(
            "saev's files do not say whether the activations were centred and scaled in training: "
            "give mean and scale where they were"
        )
    return Converted(
        architecture,
        f"{f'schema {schema}' if schema else 'without schema'}, {kind}",
        tensors,
        settings,
        {"source_commit": header.get("commit"), "source_version": header.get("lib")},
        notes,
    )


def _activation(
    schema: Any, header: dict[str, Any], cfg: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The activation's class name and its parameters; schema 1 has two ways to say it."""
    if schema is None:
        return "Relu", {}
    activation = cfg.get("activation")
    if schema == 1 and not isinstance(activation, dict):
        return header.get("cls"), cfg
    activation = activation if isinstance(activation, dict) else {}
    params = activation.get("params")
    return activation.get("cls"), params if isinstance(params, dict) else {}


def _is_per_row(schema: Any, params: dict[str, Any]) -> bool:
    """Whether BatchTopK is of the time before its threshold, which came with a momentum."""
    return schema in (2, 3, 4) and "momentum" not in params


def _coupled(checkpoint: Checkpoint) -> ConfigError:
    return ConfigError(
        f"{checkpoint}: activation",
        "BatchTopK of that commit keeps the largest latents of a whole batch at inference, so that a "
        "row's latents depend on the other rows, and SAELens has no such class",
        given="BatchTopK",
        allowed="Relu, TopK, BatchTopK of later commits",
    )


SAEV = make_loader(
    "saev",
    recognises,
    convert,
    ("k", "subtract_b_dec"),
    "a first line of JSON with schema or d_vit, then torch.save's bytes",
)
