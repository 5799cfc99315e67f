"""The activations of all SAEs of an evaluation: the images run once through each model, at first use."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...hooks.activations.cache import ActivationCache
from ...hooks.activations.cache_reader import INDEX_FILE, read_index
from ...hooks.activations.extract import Extraction, model_fingerprint
from ...hooks.models.intervention import ModelIntervention, Pictures
from ...hooks.models.load import hook_n_tokens, load_vision_model, resolve_hook_name
from ...hooks.models.tokens import check_tokens
from ...registry.errors import ConfigError, TaxolensError
from ...registry.files import LOCK_FILENAME, UnreadableError, file_digest, reason
from ...registry.hashing import fingerprint
from ...registry.ranks import ALONE, Ranks
from .bench import Bench, HeldOutActivations
from .held_out import MAX_IDS, HeldOut
from .sae_folders import SAEFolder
from .split import Split

logger = logging.getLogger(__name__)

# What an SAE's metadata may pass to `load_vision_model`, beside the fields of `ModelSetting`.
FROM_METADATA = {"dtype": str, "family": str, "random_weights": bool, "seed": int}
CACHE_DIGITS = 8  # of the name of a cache
CACHE_NAME = re.compile(rf"[0-9a-f]{{{CACHE_DIGITS}}}")
MODEL_FILES = (".json", ".safetensors", ".bin", ".pt", ".pth")  # on which its activations depend


@dataclass(frozen=True)
class ModelSetting:
    """The settings that determine activations; SAEs with equal ones share a cache of them.

    Those whose settings differ in `tokens` alone share the model and its forward passes.
    """

    model_name: str
    tokens: str
    image_size: int | None = None
    revision: str | None = None
    attn_implementation: str = "sdpa"
    more: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, sae: SAEFolder) -> ModelSetting:
        """The setting with which an SAE was trained."""
        more: dict[str, Any] = sae.setting("model_from_pretrained_kwargs", {})
        return cls(
            model_name=sae.model_name,
            tokens=sae.tokens,
            image_size=sae.setting("image_size"),
            revision=sae.setting("revision") or sae.setting("model_revision"),
            attn_implementation=sae.setting("attn_implementation", "sdpa"),
            more=tuple((name, _hashable(value)) for name, value in sorted(more.items())),
        )

    def load(
        self, hook_names: Sequence[str], device: str, *, trust_remote_code: bool = False
    ) -> Any:
        """The model, tapped at `hook_names`.

        Raises:
            ConfigError: its folder is not there, or the metadata pass what a file may not decide; see
                also `load_vision_model`.
        """
        folder = Path(self.model_name).expanduser()
        if (folder.is_absolute() or self.model_name.count("/") > 1) and not folder.exists():
            raise ConfigError(
                "model_name",
                "its folder is not there",
                given=self.model_name,
                allowed="--model_name, with the folder where it is now",
            )
        more = dict(self.more)
        if more.pop("trust_remote_code", None) and not trust_remote_code:
            raise ConfigError(
                "trust_remote_code",
                f"the SAE was trained on {self.model_name!r} with code that comes with the model, which a file cannot allow to run",
                given=False,
                allowed="True (--trust_remote_code), if you trust that code",
            )
        for name, value in more.items():
            if type(value) is not FROM_METADATA.get(name):
                raise ConfigError(
                    f"model_from_pretrained_kwargs in the SAE's metadata: {name}",
                    "not possible",
                    given=value,
                    allowed=", ".join(f"{n}: a {t.__name__}" for n, t in FROM_METADATA.items()),
                )
        # Whose files are read is shown before: the SAE's metadata name them, not its user.
        logger.warning("reading the model %s, as the SAE's metadata say", self.model_name)
        return load_vision_model(
            self.model_name,
            device=device,
            revision=self.revision,
            attn_implementation=self.attn_implementation,
            hook_names=hook_names,
            trust_remote_code=trust_remote_code,
            **more,
        )


def weights_of_models(saes: Sequence[SAEFolder], override_model: Any = None) -> dict[str, str]:
    """Id of an SAE -> a digest of the model that its numbers come from; "" for one of a hub, which its name says.

    It is that of the files in the model's folder. A model that is given in its place has its fingerprint,
    unless the SAE records the same one: then it is the model that the SAE names.

    Args:
        saes: name their models.
        override_model: a tapped model in their place.

    Raises:
        ConfigError: a file of a folder cannot be read.
    """
    given = None if override_model is None else model_fingerprint(override_model)
    files = cache(_digest_of_files)  # of this call: the files may change
    return {
        sae.id: files(sae.model_name)
        if given in (None, sae.setting("model_fingerprint"))
        else str(given)
        for sae in saes
    }


def _digest_of_files(model_name: str) -> str:
    folder = Path(model_name).expanduser()
    if not folder.is_dir():
        return ""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILES)
        parts = [part for file in files for part in (file.name, file_digest(file))]
    except (OSError, UnreadableError) as error:
        problem = f"a file of the model cannot be read: {reason(error)}"
        raise ConfigError("model_name", problem, given=str(folder)) from error
    return fingerprint(parts)


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else (repr(value),)


def activations_of(
    held_out: HeldOut,
    hook_names: Sequence[str],
    setting: ModelSetting,
    *,
    folder: Path | None,
    model: Any,
    autocast: bool = False,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> ActivationCache:
    """Activations at all hook points from one forward pass, with mean patch tokens where possible.

    Args:
        held_out: the images.
        hook_names: the hook points.
        setting: which tokens, and the image size.
        folder: each set of activations has a folder of its own in it, from which a stopped
            evaluation goes on; None keeps them as long as the returned object exists.
        model: the tapped model.
        autocast: see `Extraction`.
        progress: show a progress bar.
        ranks: see `ActivationCache.build`.
    """
    name, extraction = _wanted(held_out, hook_names, setting, model, autocast)
    return ActivationCache.build(
        model,
        held_out.images,
        extraction,
        source=held_out.source,
        path=None if folder is None else folder / name,
        progress=progress,
        ranks=ranks,
    )


def _wanted(
    held_out: HeldOut,
    hook_names: Sequence[str],
    setting: ModelSetting,
    model: Any,
    autocast: bool = False,
) -> tuple[str, Extraction]:
    """Which activations are extracted, and the name of their folder."""
    n_tokens = [hook_n_tokens(model, name, setting.image_size) for name in hook_names]
    facts = [model_fingerprint(model), held_out.images.fingerprint, setting, sorted(hook_names)]
    return fingerprint([repr(facts)], digits=CACHE_DIGITS), Extraction(
        hook_names,
        tokens=setting.tokens,
        mean_patch=min(n_tokens) > model.cfg.n_prefix_tokens and _have_patches(model, hook_names),
        image_size=setting.image_size,
        autocast=autocast,
    )


def remove_caches(folder: Path) -> None:
    """Remove the caches that evaluations have made in `folder`, and it where nothing else is in it."""
    with suppress(OSError):  # not there, or not empty
        for place in folder.iterdir():
            if CACHE_NAME.fullmatch(place.name) and _is_cache(place):
                shutil.rmtree(place, ignore_errors=True)
        folder.rmdir()


def _is_cache(folder: Path) -> bool:
    """Whether it is a cache, or what a process that was killed before the first index has left of one."""
    try:
        read_index(folder)
    except TaxolensError:
        names = [place.name for place in folder.rglob("*") if place.is_file()]
        own = (name.endswith(".npy") or name.startswith((".", INDEX_FILE)) for name in names)
        return LOCK_FILENAME in names and all(own)
    return True


def _have_patches(model: Any, hook_names: Sequence[str]) -> bool:
    """Whether it is known at each hook point which of its tokens are patches."""
    try:
        for name in hook_names:
            check_tokens(model, "mean_patch", name)
    except ConfigError:
        return False
    return True


def warn_of_other_weights(model: Any, saes: Sequence[SAEFolder]) -> None:
    """Warn where a model is not the one that SAEs were trained on although it has its name.

    SAEs that do not record the model's fingerprint say nothing.
    """
    recorded = {sae.id: sae.setting("model_fingerprint") for sae in saes}
    if not any(recorded.values()):
        return
    found = model_fingerprint(model)
    others = [id for id, known in recorded.items() if known not in (None, found)]
    if others:
        more = f" and {len(others) - MAX_IDS} more" if len(others) > MAX_IDS else ""
        logger.warning(
            "%s is not the model that %s%s were trained on: its weights or their dtype are others, or "
            "another version of a library has read it. Their numbers are right only on that model.",
            *(saes[0].model_name, ", ".join(others[:MAX_IDS]), more),
        )


def last_block(model: Any) -> str | None:
    """The hook point after the model's last block, None where it has another name."""
    name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    try:
        resolve_hook_name(model, name)
    except ConfigError:
        return None
    return name


class SharedModel:
    """A model, and the forwards of the kinds of tokens that SAEs read from it.

    Args:
        held_out: the evaluation set.
        bench: decides whether the images are embedded by the last block and whether the model is
            run with its activations edited, and on which device.
        folder: folder of the activations.
        override_model: in place of the one that the settings name.
        ranks: the processes that make the activations together.

    Attributes:
        forwards: setting -> its forward; of one model and one image size.
        due: those of the settings whose activations will be needed.
    """

    def __init__(
        self,
        held_out: HeldOut,
        bench: Bench,
        folder: Path,
        override_model: Any = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.held_out, self.bench = held_out, bench
        self._folder, self._override, self._ranks = folder, override_model, ranks
        self.forwards: dict[ModelSetting, Forward] = {}
        self.due: set[ModelSetting] = set()
        self._caches: dict[ModelSetting, ActivationCache] = {}

    @cached_property
    def model(self) -> Any:
        """The tapped model."""
        if self._override is not None:
            return self._override
        hook_names = [name for forward in self.forwards.values() for name in forward.hook_names]
        trust = self.bench.settings.trust_remote_code
        model = next(iter(self.forwards)).load(
            list(dict.fromkeys(hook_names)), self.bench.device, trust_remote_code=trust
        )
        if self._ranks.is_first:
            saes = [sae for forward in self.forwards.values() for sae in forward.saes]
            warn_of_other_weights(model, saes)
        return model

    @cached_property
    def embedder(self) -> str | None:
        """The hook point after the last block, where an evaluator wants an embedding."""
        return last_block(self.model) if self.bench.wants("embedding") else None

    def cache(self, setting: ModelSetting) -> ActivationCache:
        """The activations of one setting; those of all settings that are due come from the same forward passes."""
        if setting not in self._caches:
            wanted = {}
            for each, forward in self.forwards.items():
                if each == setting or each in self.due - self._caches.keys():
                    names = [*forward.hook_names, *([self.embedder] if self.embedder else [])]
                    names = list(dict.fromkeys(names))
                    wanted[each] = _wanted(self.held_out, names, each, self.model)
            caches = ActivationCache.build_together(
                self.model,
                self.held_out.images,
                {self._folder / name: extraction for name, extraction in wanted.values()},
                source=self.held_out.source,
                progress=self.bench.settings.progress,
                ranks=self._ranks,
            )
            self._caches |= zip(wanted, caches, strict=True)
        return self._caches[setting]

    def release(self, setting: ModelSetting) -> None:
        """Drop the model when no setting is due any more; the activations stay."""
        self.due.discard(setting)
        if not self.due and self._caches:
            vars(self).pop("model", None)


class Forward:
    """The activations of the held-out images of one setting, made at first use.

    Args:
        setting: of the model, and its tokens.
        saes: the SAEs that read them.
        shared: the model, with the activations of other tokens.
    """

    def __init__(
        self, setting: ModelSetting, saes: Sequence[SAEFolder], shared: SharedModel
    ) -> None:
        self.setting, self.saes, self._shared = setting, saes, shared
        self._bench, self.held_out = shared.bench, shared.held_out
        self.hook_names = list(dict.fromkeys(sae.hook_name for sae in saes))

    @property
    def model(self) -> Any:
        """The tapped model."""
        return self._shared.model

    @cached_property
    def cache(self) -> ActivationCache:
        """The activations at the hook points of the SAEs and after the last block."""
        return self._shared.cache(self.setting)

    @cached_property
    def split(self) -> Split:
        """The split of the images that could be read."""
        n_classes = len(self._bench.taxonomy.classes)
        return Split.halves(np.asarray(self.cache.labels), n_classes, self._bench.settings.seed)

    @cached_property
    def _pictures(self) -> Pictures:
        images, size = self.held_out.images, self.setting.image_size
        return Pictures.of(self.model, images, self.cache.indices, size)

    def at(self, key: str) -> HeldOutActivations:
        """The held-out activations that one of the SAEs reads, by its `key`.

        The embedding is the class token of the last block (the mean patch token where the cache has
        other tokens). At that block itself there is none: it would not be independent.
        """
        cache, embedder, embedding = self.cache, self._shared.embedder, None
        if embedder is not None and embedder != key:
            tokens = cache.activations(embedder)
            embedding = tokens[:, 0] if tokens.shape[1] == 1 else cache.mean_patch(embedder)
        held_out = replace(self.peers_at(key), embedding=embedding)
        if not self._bench.wants("intervention"):
            return held_out
        try:
            intervene = ModelIntervention(
                self.model,
                self._pictures,
                key,
                self.setting.tokens,
                taxonomy=self._bench.taxonomy,
                batch_size=self.held_out.source.batch_size,
            )
        except ConfigError as error:
            logger.warning("no interventions at %s: %s", key, error)
            return replace(held_out, no_intervention=str(error))
        return replace(held_out, intervene=intervene, no_intervention="")

    def peers_at(self, key: str) -> HeldOutActivations:
        """The same for a peer of another SAE: without embedding and interventions."""
        cache = self.cache
        return HeldOutActivations(cache.activations(key), self.split, cache.mean_patch(key))

    def release(self) -> None:
        """Drop the images kept, and the model after the last of its forwards; the activations stay."""
        vars(self).pop("_pictures", None)
        self._shared.release(self.setting)


def forwards_of(
    saes: Sequence[SAEFolder],
    held_out: HeldOut,
    bench: Bench,
    folder: Path,
    override_model: Any = None,
    ranks: Ranks = ALONE,
    *,
    due: Collection[str],
) -> dict[ModelSetting, Forward]:
    """One `Forward` for every setting of the SAEs; those of one model follow each other.

    Args:
        saes: the SAEs.
        held_out: see `SharedModel`.
        bench: see `SharedModel`.
        folder: see `SharedModel`.
        override_model: see `SharedModel`.
        ranks: see `SharedModel`.
        due: the ids of those that will be measured. The others may be needed as peers.
    """
    groups: dict[Any, dict[ModelSetting, list[SAEFolder]]] = {}
    for sae in saes:
        setting = ModelSetting.of(sae)
        model = replace(setting, tokens="") if override_model is None else setting.image_size
        groups.setdefault(model, {}).setdefault(setting, []).append(sae)
    forwards: dict[ModelSetting, Forward] = {}
    for group in groups.values():
        shared = SharedModel(held_out, bench, folder, override_model, ranks)
        shared.forwards |= {s: Forward(s, own, shared) for s, own in group.items()}
        shared.due |= {s for s, own in group.items() if any(sae.id in due for sae in own)}
        forwards |= shared.forwards
    return forwards
