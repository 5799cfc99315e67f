"""The activations of all SAEs of an evaluation: one forward pass per model, made when first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...hooks.activations.cache import ActivationCache
from ...hooks.images.dataset import ImageDataset
from ...registry.taxonomies.taxonomy import Taxonomy
from .bench import Images
from .held_out import Interventions, ModelSetting, activations_of, images_at, last_block
from .sae_folders import SAEFolder


class Forward:
    """What the SAEs of one model have in common: the model, and the images as it sees them.

    Args:
        setting: of the model.
        saes: those that read its activations.
        images: the evaluation set.
        embeds: also keep the class tokens of the last block, which embed the images.
        intervenes: also run the model with its activations edited, where it is asked for that.
        taxonomy: its classes are looked for among the model's outputs.
        batch_size: images in one forward pass.
        override_model: in place of the one that the setting names.
        device: of the model.
        build: more arguments of `activations_of`.
    """

    def __init__(
        self,
        setting: ModelSetting,
        saes: Sequence[SAEFolder],
        images: ImageDataset,
        *,
        embeds: bool,
        intervenes: bool,
        taxonomy: Taxonomy,
        batch_size: int,
        override_model: Any,
        device: str,
        folder: Path,
        **build: Any,
    ) -> None:
        self.setting, self.saes, self.images = setting, saes, images
        self._embeds, self._intervenes, self._taxonomy = embeds, intervenes, taxonomy
        self._override, self._device = override_model, device
        self._batch_size = batch_size
        self._build = {"folder": folder, "batch_size": batch_size, **build}

    @cached_property
    def model(self) -> Any:
        hook_names = list(dict.fromkeys(sae.hook_name for sae in self.saes))
        return self._override or self.setting.load(hook_names, self._device)

    @cached_property
    def _embedder(self) -> str | None:
        return last_block(self.model) if self._embeds else None

    @cached_property
    def cache(self) -> ActivationCache:
        hook_names = [*(sae.hook_name for sae in self.saes), self._embedder]
        wanted = list(dict.fromkeys(name for name in hook_names if name))
        return activations_of(self.images, wanted, self.setting, model=self.model, **self._build)

    @cached_property
    def _interventions(self) -> Interventions | None:
        if not self._intervenes:
            return None
        return Interventions(
            self.model, self.images, self.cache, self.setting, self._taxonomy, self._batch_size
        )

    def images_at(self, hook_name: str) -> Images:
        """The images at a hook point of one of the SAEs."""
        return images_at(self.cache, hook_name, self._embedder, self._interventions)

    def peers_at(self, hook_name: str) -> Images:
        """The same for an SAE that another one is compared with: the model is not run again."""
        return images_at(self.cache, hook_name)

    def release(self) -> None:
        """Forget the model; the activations stay."""
        if "cache" in vars(self):
            for kept in ("model", "_interventions"):
                vars(self).pop(kept, None)


class Forwards:
    """The `Forward` of every model of the SAEs."""

    def __init__(self, saes: Sequence[SAEFolder], images: ImageDataset, **settings: Any) -> None:
        groups: dict[ModelSetting, list[SAEFolder]] = {}
        for sae in saes:
            groups.setdefault(ModelSetting.of(sae), []).append(sae)
        self._all = {s: Forward(s, group, images, **settings) for s, group in groups.items()}

    def __iter__(self) -> Iterator[Forward]:
        """One after the other; the model of each is released when the next one is asked for."""
        for forward in self._all.values():
            yield forward
            forward.release()

    def images_of(self, peer: SAEFolder) -> Images:
        """The images at the hook point of an SAE that another one, maybe of another model, is
        compared with."""
        return self._all[ModelSetting.of(peer)].peers_at(peer.hook_name)
