"""The peers of an SAE: other SAEs of the evaluation, and their latents of the same images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ...registry.errors import DataError
from ..reporting.series import natural_key
from .bench import Bench, HeldOutActivations, SAELatents, image_latents
from .forward import Forward, ModelSetting
from .sae_folders import SAEFolder

MAX_PEERS = 4
IMAGES_AT_ONCE = 512


def find_peers(sae: SAEFolder, saes: Sequence[SAEFolder]) -> list[tuple[SAEFolder, str]]:
    """The SAEs that `sae` is compared with, at most `MAX_PEERS`, and their relation to it.

    The first relation with any SAE is used (own definition): "seed", the same hook point (and head),
    architecture as trained (`trained_as`) and width; "hook", the same hook point; "layer", the next hook points before and
    after it in its run, or in any run where its own has none; "model", the SAEs of other models or
    tokens, those with the same name of hook point first. Heads of one hook point are never
    compared: they have no common space. An SAE and a control that was trained with
    a `constraint` are never compared.
    """
    others = [o for o in saes if o.id != sae.id and o.constraint == sae.constraint]
    own = ModelSetting.of(sae)
    same_model = [o for o in others if ModelSetting.of(o) == own]
    elsewhere = [o for o in others if ModelSetting.of(o) != own]
    same_hook = [o for o in same_model if o.key == sae.key]
    for relation, found in (
        ("seed", [o for o in same_hook if _kind(o) == _kind(sae)]),
        ("hook", same_hook),
        ("layer", _adjacent(sae, [o for o in same_model if o.run == sae.run])),
        ("layer", _adjacent(sae, same_model)),
        ("model", sorted(elsewhere, key=lambda o: o.key != sae.key)),
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
    """The peers of an SAE; none where no evaluator compares with peers."""

    def held_out(peer: SAEFolder) -> HeldOutActivations:
        own, other = (forwards[ModelSetting.of(each)] for each in (sae, peer))
        if other is not own and not np.array_equal(other.cache.indices, own.cache.indices):
            problem = f"those that could be read for {peer.id} are not those of {sae.id}"
            raise DataError("images", problem, allowed="images that can always be read")
        return other.peers_at(peer.key)

    found = find_peers(sae, saes) if bench.wants("peers") else []
    return [PeerSAE(peer, relation, partial(held_out, peer), bench) for peer, relation in found]


def _kind(sae: SAEFolder) -> tuple[str, int]:
    return sae.trained_as, int(sae.cfg.get("d_sae", 0))


def _adjacent(sae: SAEFolder, others: Sequence[SAEFolder]) -> list[SAEFolder]:
    """The nearest before and after it: of its kind and place in a block, else of its place, else any."""
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


def _pattern(sae: SAEFolder) -> tuple[str, int | None]:
    return re.sub(r"\d+", "*", sae.hook_name), sae.head


class PeerSAE:
    """A saved SAE as the peer of another: see `Peer` of the evaluators.

    Args:
        folder: the saved SAE.
        relation: "seed", "hook", "layer" or "model"; see `find_peers`.
        held_out: makes the activations at its hook point, when they are needed.
        bench: the bench with which the other SAE is measured.
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
        """Whether the decoder rows of the two SAEs are directions of one space."""
        return self.relation != "model"

    @property
    def W_dec(self) -> Tensor | None:
        """(m', d) decoder, None where it has none."""
        return SAELatents(self._folder.load()).W_dec

    def latents(self, index: np.ndarray) -> sparse.csr_array:
        """(n, m') its latents; the last result is kept for equal calls."""
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
                parts.append(sparse.csr_array(z.cpu().numpy()))
        return sparse.csr_array(sparse.vstack(parts, format="csr"))
