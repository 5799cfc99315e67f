"""The evaluation images: which they are, that the SAEs were not trained on them, their activations."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ...hooks.activations.cache import ActivationCache
from ...hooks.activations.extract import model_fingerprint
from ...hooks.images.dataset import ImageDataset
from ...hooks.images.source import ImageSource
from ...hooks.models.intervention import ModelIntervention, Pictures
from ...hooks.models.load import hook_n_tokens, load_vision_model, resolve_hook_name
from ...registry.errors import ConfigError
from ...registry.evaluators.base import Intervention
from ...registry.taxonomies.taxonomy import Taxonomy
from .bench import Images
from .sae_folders import SAEFolder

logger = logging.getLogger(__name__)

HELD_OUT_SPLITS = ("validation", "test")


def held_out_source(saes: Sequence[SAEFolder], **given: Any) -> ImageSource:
    """The evaluation images of all SAEs: what the caller gave, else what the runs' settings say.

    Args:
        given: fields of `ImageSource`; those that are None count as not given.

    Raises:
        ConfigError: the runs have different images, or none, and none are given.
    """
    sources = [ImageSource.of(sae.setting).held_out(sae.setting, **given) for sae in saes]
    trusted = all(source.trust_remote_code for source in sources)
    sources = [replace(source, trust_remote_code=trusted) for source in sources]
    for field in fields(ImageSource):
        name = field.metadata.get("setting", field.name)
        _only([getattr(source, field.name) for source in sources], name)
    if not sources[0].dataset_path:
        raise ConfigError("dataset_path: neither given nor in the run's settings")
    return sources[0]


def load_held_out(source: ImageSource) -> tuple[ImageDataset, ImageSource]:
    """The images, and their source with its split; where it has none, validation or else test."""
    failures: list[str] = []
    for split in [source.split] if source.split else HELD_OUT_SPLITS:
        chosen = replace(source, split=split)
        try:
            return ImageDataset.of(chosen), chosen
        except ConfigError as error:
            if source.split:
                raise
            failures.append(str(error))
    raise ConfigError(
        f"split: {source.dataset} has no split {' or '.join(HELD_OUT_SPLITS)}; name the one "
        f"to evaluate on, or give another dataset_path. ({failures[0]})"
    )


def _only(values: Sequence[Any], name: str) -> Any:
    """The value that all runs share.

    Raises:
        ConfigError: they have different ones.
    """
    distinct = list(dict.fromkeys(map(str, values)))
    if len(distinct) > 1:
        raise ConfigError(
            f"{name}: the runs have different ones ({', '.join(distinct[:5])}); give one for all"
        )
    return values[0]


def check_held_out(
    saes: Sequence[SAEFolder], source: ImageSource, fingerprint: str, *, allow: bool
) -> bool:
    """Whether the images are those of the training, by name or by fingerprint.

    Raises:
        ConfigError: they are, and that is not allowed.
    """
    for sae in saes:
        trained_on = ImageSource.of(sae.setting)
        same_name = trained_on.dataset_path and trained_on.same_images(source)
        if same_name or sae.setting("dataset_fingerprint") == fingerprint:
            message = (
                f"{sae.id} was trained on {trained_on.title}, and these are the images it would be "
                "evaluated on"
            )
            if not allow:
                raise ConfigError(
                    f"split: {message}; choose a held-out one, or allow_train_split=True"
                )
            logger.warning("%s: nothing here is held out.", message)
            return True
    return False


def tree_name(saes: Sequence[SAEFolder], given: str | None) -> str:
    name = given or _only([sae.setting("taxonomy") for sae in saes], "taxonomy")
    if not name:
        raise ConfigError(
            "taxonomy: neither given nor in the run's settings; allowed: a name of `taxolens list "
            "taxonomies`, a folder of nested class folders, or a .csv or .json of parent,child"
        )
    return str(name)


@dataclass(frozen=True)
class ModelSetting:
    """What decides the activations: SAEs that share it share one forward pass."""

    model_name: str
    tokens: str
    image_size: int | None = None
    revision: str | None = None
    attn_implementation: str = "sdpa"
    more: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, sae: SAEFolder) -> ModelSetting:
        more: Mapping[str, Any] = sae.setting("model_from_pretrained_kwargs", {})
        return cls(
            model_name=sae.model_name,
            tokens=sae.tokens,
            image_size=sae.setting("image_size"),
            revision=sae.setting("revision") or sae.setting("model_revision"),
            attn_implementation=sae.setting("attn_implementation", "sdpa"),
            more=tuple(sorted(more.items())),
        )

    def load(self, hook_names: Sequence[str], device: str) -> Any:
        return load_vision_model(
            self.model_name,
            device=device,
            revision=self.revision,
            attn_implementation=self.attn_implementation,
            hook_names=hook_names,
            **dict(self.more),
        )


def activations_of(
    images: ImageDataset,
    hook_names: Sequence[str],
    setting: ModelSetting,
    *,
    folder: Path | None,
    model: Any,
    **build: Any,
) -> ActivationCache:
    """All hook points from one forward pass over the images, with the mean patch token where there
    are patches.

    Args:
        folder: each set of activations has its own folder in it, so that an evaluation that was
            stopped goes on from there; None keeps them as long as the object lives.
        build: more arguments of `ActivationCache.build`.
    """
    n_tokens = [hook_n_tokens(model, name, setting.image_size) for name in hook_names]
    facts = [model_fingerprint(model), images.fingerprint, setting, sorted(hook_names)]
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:8]
    return ActivationCache.build(
        model,
        images,
        hook_names,
        path=None if folder is None else folder / name,
        tokens=setting.tokens,
        mean_patch=min(n_tokens) > model.cfg.n_prefix_tokens,
        image_size=setting.image_size,
        **build,
    )


def last_block(model: Any) -> str | None:
    """The hook point after the model's last block, where there is one of the usual name."""
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    try:
        resolve_hook_name(model, name)
    except ConfigError:
        return None
    return name


class Interventions:
    """Runs a model with its activations edited, at one hook point of a cache after another."""

    def __init__(
        self,
        model: Any,
        images: ImageDataset,
        cache: ActivationCache,
        setting: ModelSetting,
        taxonomy: Taxonomy,
        batch_size: int,
    ) -> None:
        self._model, self._taxonomy, self._batch_size = model, taxonomy, batch_size
        self._tokens = setting.tokens
        self._pictures = Pictures.of(model, images, cache.indices, setting.image_size)

    def at(self, hook_name: str) -> tuple[Intervention | None, str]:
        """The intervention there; None, and why, where the model cannot be run so."""
        try:
            intervene = ModelIntervention(
                self._model,
                self._pictures,
                hook_name,
                self._tokens,
                taxonomy=self._taxonomy,
                batch_size=self._batch_size,
            )
        except ConfigError as error:
            logger.warning("no interventions at %s: %s", hook_name, error)
            return None, str(error)
        return intervene, ""


def images_at(
    cache: ActivationCache,
    hook_name: str,
    embedder: str | None = None,
    interventions: Interventions | None = None,
) -> Images:
    """The images at a hook point.

    Args:
        embedder: the hook point whose class token (mean patch token where the cache is of other
            tokens) embeds the images; without effect for itself: it would not be independent.
        interventions: where an evaluator asks for them.
    """
    embedding = None
    if embedder is not None and embedder != hook_name:
        tokens = cache.activations(embedder)
        embedding = tokens[:, 0] if tokens.shape[1] == 1 else cache.mean_patch(embedder)
    images = Images(cache.activations(hook_name), cache.mean_patch(hook_name), embedding)
    if interventions is None:
        return images
    intervene, reason = interventions.at(hook_name)
    return replace(images, intervene=intervene, no_intervention=reason)
