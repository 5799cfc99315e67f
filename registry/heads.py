"""One head of a hook point: its columns of the activations (B, T, heads * d_head)."""

from __future__ import annotations

import re
from typing import Any


def head_key(hook_name: str, head: int | None, d_head: int) -> str:
    """The name of one head's activations: ``blocks.0.attn.hook_z[8:16]``; of all heads, the hook point's."""
    return hook_name if head is None else f"{hook_name}[{head * d_head}:{(head + 1) * d_head}]"


def head_name(hook_name: str, head: int | None) -> str:
    """The name of a head for readers, and of an SAE there: ``blocks.0.attn.hook_z.head1``."""
    return hook_name if head is None else f"{hook_name}.head{head}"


def key_of(sae: Any) -> str:
    """`head_key` of what an SAE reads, from its metadata."""
    metadata = sae.cfg.metadata
    return head_key(metadata.hook_name, metadata.hook_head_index, sae.cfg.d_in)


def columns_of(key: str) -> tuple[str, slice]:
    """The hook point of a `head_key`, and the columns there."""
    found = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", key)
    if found is None:
        return key, slice(None)
    return found[1], slice(int(found[2]), int(found[3]))
