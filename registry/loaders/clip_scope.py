"""CLIP-Scope (lewington/CLIP-ViT-L-scope): BLOCK_resid/TOKENS.pt.

Sources: `clipscope/sae.py` (`TopKSAE`), the uploader `pull_to_hf.py` of Lewington-pitsos/vitsae. No
encoder bias; `pre_b` is subtracted from the input and added to the output.
"""

from __future__ import annotations

import re

from .parts.checkpoint import Checkpoint, as_number, take_tensors, tensors_of
from .parts.convert import Converted, make_loader
from .parts.facts import Facts

MODEL = "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
NAMES = {"enc": "W_enc", "dec": "W_dec", "pre_b": "b_dec"}


def recognises(checkpoint: Checkpoint) -> str | None:
    """Why the file is of this library; None where it is not."""
    content = checkpoint.content
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if isinstance(state, dict) and set(NAMES) <= set(state):
        return "model_state_dict with pre_b, enc and dec"
    return None


def convert(checkpoint: Checkpoint, facts: Facts) -> Converted:
    """The file as config and weights of a SAELens SAE."""
    content = checkpoint.content
    found = take_tensors(checkpoint, tensors_of(content["model_state_dict"]), NAMES)
    block = re.fullmatch(r"(\d+)_resid", checkpoint.folders[0])
    return Converted(
        "topk",
        "TopK",
        {ours: found[theirs] for theirs, ours in NAMES.items()},
        {
            "k": facts.ask("k", as_number(content.get("k")), default=1),
            "apply_b_dec_to_input": True,
        },
        {"model_name": MODEL, "hook_name": f"blocks.{block[1]}.hook_resid_post" if block else None},
        ["clipscope's TopK has no ReLU: negative latents among the k are zero here"],
    )


CLIP_SCOPE = make_loader(
    "clip_scope", recognises, convert, ("k",), "model_state_dict with pre_b, enc and dec"
)
