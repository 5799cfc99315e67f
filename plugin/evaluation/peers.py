"""Which other SAEs of an evaluation one is compared with, and their latents of the same images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..reporting.series import natural_key
from .bench import Bench, HeldOutActivations, SAELatents, image_latents
from .forward import Forward, ModelSetting
from .sae_folders import SAEFolder

MAX_PEERS = 4
IMAGES_AT_ONCE = 512


def find_peers(sae: SAEFolder, saes: Sequence[SAEFolder]) -> list[tuple[SAEFolder, str]]:
    """The SAEs that `sae` is compared with, at most `MAX_PEERS`, and what they share with it.

    Those nearest to it, of one kind (own definition): "seed", the same hook point, architecture and
    width; else "hook", the same hook point; else "layer", the next hook points before and after it
    in its run, or in any run where its own has none; else "model", the SAEs of other models or
    tokens, those of its own hook point's name first.
    """
    others = [other for other in saes if other.id != sae.id]
    same_model = [o for o in others if ModelSetting.of(o) == ModelSetting.of(sae)]
    same_hook = [o for o in same_model if o.hook_name == sae.hook_name]
    for relation, found in (
        ("seed", [o for o in same_hook if _kind(o) == _kind(sae)]),
        ("hook", same_hook),
        ("layer", _adjacent(sae, [o for o in same_model if o.run == sae.run])),
        ("layer", _adjacent(sae, same_model)),
        ("model", sorted(others, key=lambda o: o.hook_name != sae.hook_name)),
    ):
        if found:
            return [(other, relation) for other in found[:MAX_PEERS]]
    return []


def peers_of(
    bench: Bench,
    sae: SAEFolder,
    saes: Sequence[SAEFolder],
    forwards: Mapping[ModelSetting, Forward],
) -> list[PeerSAE]:
    """The other SAEs that one is compared with, where an evaluator wants that."""

    def held_out(peer: SAEFolder) -> HeldOutActivations:
        return forwards[ModelSetting.of(peer)].peers_at(peer.hook_name)

    found = find_peers(sae, saes) if bench.wants("peers") else []
    return [PeerSAE(peer, relation, partial(held_out, peer), bench) for peer, relation in found]


def _kind(sae: SAEFolder) -> tuple[str, int]:
    return str(sae.cfg.get("architecture", "")), int(sae.cfg.get("d_sae", 0))


def _adjacent(sae: SAEFolder, others: Sequence[SAEFolder]) -> list[SAEFolder]:
    """The nearest before and the nearest after it, of its kind and place in the block if it can be."""
    for alike in (
        [o for o in others if _pattern(o) == _pattern(sae) and _kind(o) == _kind(sae)],
        [o for o in others if _pattern(o) == _pattern(sae)],
        others,
    ):
        own = natural_key(sae.hook_name)
        keyed = [(natural_key(other.hook_name), other) for other in alike]
        before = max((k for k in keyed if k[0] < own), key=lambda k: k[0], default=None)
        after = min((k for k in keyed if k[0] > own), key=lambda k: k[0], default=None)
        if found := [k[1] for k in (before, after) if k is not None]:
            return found
    return []


def _pattern(sae: SAEFolder) -> str:
    return re.sub(r"\d+", "*", sae.hook_name)


class PeerSAE:
    """A saved SAE as the peer of another (see `Peer` of the evaluators).

    Args:
        folder: where it is saved.
        relation: what it shares with the SAE that is measured.
        held_out: makes the activations at its hook point, once they are needed.
        bench: with which the SAE is measured that it is compared with.
    """

    def __init__(
        self,
        folder: SAEFolder,
        relation: str,
        held_out: Callable[[], HeldOutActivations],
        bench: Bench,
    ) -> None:
        self.name, self.relation = folder.id, relation
        self._folder, self._make_held_out = folder, held_out
        self._bench = bench
        self._kept: tuple[bytes, sparse.csr_array] | None = None

    @property
    def same_space(self) -> bool:
        return self.relation != "model"

    @property
    def W_dec(self) -> Tensor | None:
        return SAELatents(self._folder.load()).W_dec

    def latents(self, index: np.ndarray) -> sparse.csr_array:
        """(n, m') its latents above 0; kept for the next call, which is likely to be the same."""
        asked = index.tobytes()
        if self._kept is None or self._kept[0] != asked:
            self._kept = asked, self._encode(index)
        return self._kept[1]

    def _encode(self, index: np.ndarray) -> sparse.csr_array:
        source, held_out = SAELatents(self._folder.load(self._bench.device)), self._make_held_out()
        parts = [sparse.csr_array((0, source.d_sae), dtype=np.float32)]
        nothing = torch.zeros(IMAGES_AT_ONCE, dtype=torch.int64)
        with torch.no_grad():
            for start in range(0, len(index), IMAGES_AT_ONCE):
                tokens, *_ = held_out.read(index[start : start + IMAGES_AT_ONCE])
                unknown = nothing[: len(tokens)]
                z = image_latents(
                    source,
                    tokens.to(self._bench.device),
                    aggregate=self._bench.settings.aggregate,
                    labels=unknown,
                    index=unknown,
                )
                parts.append(sparse.csr_array(z.clamp(min=0).cpu().numpy()))
        return sparse.csr_array(sparse.vstack(parts, format="csr"))
