"""Activations of all images at many hook points, computed in one pass and kept on disk.

docs/formats/activations.md defines the files.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from ...registry.errors import ConfigError, DataError, TaxolensError
from ...registry.files import only_writer
from ...registry.heads import columns_of
from ...registry.ranks import Ranks
from ..images.dataset import ImageDataset
from ..images.loader import ImageLoader
from ..images.preprocess import preprocess_for
from ..images.source import ImageSource
from ..models.dtypes import ACTIVATION_DTYPES, torch_dtype
from ..models.tapped import TappedModel
from .cache_reader import INDEX_FILE, CacheReader
from .extract import Extraction, TokenExtractor, model_fingerprint
from .filling import Filling, Plan, Target, check_limits

logger = logging.getLogger(__name__)

T = TypeVar("T")
SETTLE_SECONDS = 60.0  # a client of NFS keeps what it knows of a folder as long, by default


class ActivationCache(CacheReader):
    """A `CacheReader` that can be built.

    `build` can be killed at any time, and the next call goes on from there; `open` reads a finished or unfinished
    cache.
    """

    _temporary: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def open(cls, path: str | Path) -> ActivationCache:
        """Read the cache in the folder `path`.

        Raises:
            ConfigError: there is none.
            DataError: it is damaged.
        """
        return cls(path)

    @classmethod
    def build(
        cls,
        model: TappedModel,
        images: ImageDataset,
        hook_names: Sequence[str] | Extraction,
        *,
        source: ImageSource | None = None,
        path: str | Path | None = None,
        progress: bool = True,
        ranks: Ranks | None = None,
        **settings: Any,
    ) -> ActivationCache:
        """Run all images through the model once and store the activations.

        A folder that holds the same activations already is used as it is, an unfinished one is
        finished. It may hold more hook points than asked for.

        In a job of several processes each of them makes this call. They share the images, and the call returns
        the same cache on each, equal to the bit to that of one process. One that finishes an unfinished cache need
        not have as many as the one that began it.

        Args:
            model: a vision model.
            images: the dataset.
            hook_names: hook points, or all that is wanted as an `Extraction`. Of a hook point with
                heads, all heads are stored.
            source: how the images are decoded.
            path: the folder; None: a temporary one, deleted with the object.
            progress: show a progress bar; of several processes rank 0 shows the images of all.
            ranks: the processes that share the work; None: those of torchrun's job; `Ranks()`: this one alone.
            settings: fields of `Extraction` (tokens, mean_patch, image_size, dtype, autocast), and
                of `ImageSource` (batch_size, num_workers, max_corrupt_share), by name.

        Raises:
            ConfigError: the folder holds other activations (the message says what differs), or lacks images
                that max_image_pixels and remote_images admit now, or another process is writing
                there, or the ranks have not the same model and images.
            DataError: too many corrupt images, in a finished folder too, activations that are not finite, or a full disk;
                what is done stays, and the next call goes on from there.
            LostRankError: another rank has failed; the message has its error.
        """
        ranks = Ranks.here() if ranks is None else ranks
        temporary = None
        if path is None and ranks.size > 1:
            problem = "several processes need one folder that all of them can read"
            raise ConfigError("path", problem, given=None, allowed="a folder")
        if path is None:
            temporary = tempfile.TemporaryDirectory(prefix="taxolens-activations-")
            path = temporary.name
        wanted, source = Extraction.of(hook_names, source, settings)
        (cache,) = cls.build_together(
            model, images, {path: wanted}, source=source, progress=progress, ranks=ranks
        )
        cache._temporary = temporary
        return cache

    @classmethod
    def build_together(
        cls,
        model: TappedModel,
        images: ImageDataset,
        wanted: Mapping[str | Path, Extraction],
        *,
        source: ImageSource,
        progress: bool = True,
        ranks: Ranks | None = None,
    ) -> list[ActivationCache]:
        """As `build` of each folder, equal to the bit, with one run of all images through the model.

        Folders of which one was finished, or committed, before a kill and the other was not are
        filled one after the other.

        Args:
            model: a vision model.
            images: the dataset.
            wanted: folder -> what is stored in it; with one image size and one value of `autocast`.
            source: as in `build`.
            progress: as in `build`.
            ranks: as in `build`.

        Raises:
            ConfigError, DataError, LostRankError: as `build`.
        """
        ranks = Ranks.here() if ranks is None else ranks
        (image_size, _), *others = {(each.image_size, each.autocast) for each in wanted.values()}
        assert not others
        preprocess = preprocess_for(model, image_size)
        common = {
            "model": model_fingerprint(model),
            "model_name": str(getattr(model.cfg, "model_name", "")),
            "images": images.fingerprint,
            "preprocessing": preprocess.describe(),
        }
        if images.limits.jpeg_edge is not None:
            common["jpeg_edge"] = images.limits.jpeg_edge
        facts = {Path(path): {**common, **_facts(each)} for path, each in wanted.items()}
        extractors = {folder: _extractor(model, each) for folder, each in facts.items()}
        reused: set[Path] = set()
        targets: list[Target] = []
        with ranks.joined(), ExitStack() as held:
            for folder, each in facts.items():
                _check_alike(ranks, each)
                plan = None
                if ranks.is_first:
                    held.enter_context(only_writer(folder, f"cache {folder}"))
                    size = source.batch_size
                    plan = Plan.of(folder, each, images, batch_size=size, n_ranks=ranks.size)
                plan = ranks.from_first(plan)
                assert plan is not None
                if plan.index is not None:
                    _settled(ranks, lambda folder=folder: _shared_index(folder))
                if plan.is_complete:
                    reused.add(folder)
                    continue
                extractor = extractors[folder]
                if plan.index is not None:  # unfinished, perhaps with more hook points
                    each = plan.index["facts"]
                    extractor = _extractor(model, each)
                targets.append(Target(folder, plan, each, extractor))
            while targets:
                together = [t for t in targets if t.plan.is_as_far(targets[0].plan)]
                targets = [t for t in targets if t not in together]
                loader = ImageLoader(
                    images,
                    preprocess,
                    pin_memory=together[0].extractor.device.type == "cuda",
                    n_ranks=ranks.size,
                    **source.decoding,
                )
                Filling(together, loader, ranks).run(progress)
            caches = [
                _settled(ranks, lambda folder=folder: cls._finished(folder)) for folder in facts
            ]
            for cache in caches:
                check_limits(cache.path, cache.failures, images.limits)
                loader = ImageLoader(images, preprocess, **{**source.decoding, "num_workers": 0})
                loader.failures, loader.n_failed = cache.failures, len(cache.failures)
                loader.n_processed = cache.n_seen
                loader.check_share()
                if cache.failures and cache.path in reused and ranks.is_first:
                    shown = loader.shown_failures(5)
                    left_out = f"{len(cache.failures)} corrupt image(s) are left out"
                    logger.warning("cache %s: %s: %s", cache.path, left_out, shown)
            return caches

    @classmethod
    def _finished(cls, folder: Path) -> ActivationCache:
        cache = cls(folder)
        if not cache.complete:
            raise DataError(f"cache {folder}", "not complete", allowed="the same call again")
        return cache


def _check_alike(ranks: Ranks, facts: dict[str, Any]) -> None:
    """Check that every rank computes the same activations. Raises ConfigError."""
    for rank, there in enumerate(ranks.gather(facts)):
        differing = [n for n in facts if n != "model_name" and there[n] != facts[n]]
        if differing:
            raise ConfigError(
                differing[0],
                f"rank {rank} has another one than rank {ranks.rank}",
                given=there[differing[0]],
                allowed="the same model, images and settings on every rank",
            )


def _settled(ranks: Ranks, read: Callable[[], T]) -> T:
    """What `read` gives; on a network disk a rank may for a while not see what another one has written."""
    until = time.monotonic() + (SETTLE_SECONDS if ranks.size > 1 else 0.0)
    while True:
        try:
            return read()
        except TaxolensError:
            if time.monotonic() >= until:
                raise
        time.sleep(1.0)


def _shared_index(folder: Path) -> None:
    """Check that this rank sees what rank 0 has written. Raises ConfigError."""
    if not (folder / INDEX_FILE).exists():
        problem = "this process does not see what rank 0 has written there"
        raise ConfigError(f"cache {folder}", problem, allowed="a folder that all ranks share")


def _facts(wanted: Extraction) -> dict[str, Any]:
    """What an extraction adds to the facts of a cache."""
    stored = torch_dtype(wanted.dtype, ACTIVATION_DTYPES)
    return {
        "hook_names": list(dict.fromkeys(columns_of(name)[0] for name in wanted.hook_names)),
        "tokens": wanted.tokens,
        "mean_patch": wanted.mean_patch and wanted.tokens != "mean_patch",
        "dtype": str(stored).removeprefix("torch."),
        "autocast": wanted.autocast,
    }


def _extractor(model: TappedModel, facts: dict[str, Any]) -> TokenExtractor:
    tokens = [facts["tokens"], *(["mean_patch"] if facts["mean_patch"] else [])]
    dtype = torch_dtype(facts["dtype"], ACTIVATION_DTYPES)
    return TokenExtractor(
        model, facts["hook_names"], tokens, dtype=dtype, autocast=facts["autocast"]
    )
