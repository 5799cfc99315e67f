"""Activations of all images at many hook points, computed in one pass and kept on disk.

docs/formats/activations.md defines the files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...registry.files import only_writer
from ..images.dataset import ImageDataset
from ..images.loader import ImageLoader
from ..images.preprocess import preprocess_for
from ..images.source import ImageSource
from ..models.dtypes import ACTIVATION_DTYPES, torch_dtype
from ..models.tapped import TappedModel
from .cache_reader import CacheReader
from .cache_writer import CacheWriter, matching_index
from .extract import Extraction, TokenExtractor, model_fingerprint


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
        **settings: Any,
    ) -> ActivationCache:
        """Run all images through the model once and store the activations.

        A folder that holds the same activations already is used as it is, an unfinished one is
        finished. It may hold more hook points than asked for.

        Args:
            model: a vision model.
            images: the dataset.
            hook_names: hook points, or all that is wanted as an `Extraction`.
            source: how the images are decoded.
            path: the folder; None: a temporary one, deleted with the object.
            progress: show a progress bar.
            settings: fields of `Extraction` (tokens, mean_patch, image_size, dtype, autocast), and
                of `ImageSource` (batch_size, num_workers, max_corrupt_share), by name.

        Raises:
            ConfigError: the folder holds other activations (the message says what differs), or
                another process is writing there.
            DataError: too many corrupt images, activations that are not finite, or a full disk;
                what is done stays, and the next call goes on from there.
        """
        temporary = None
        if path is None:
            temporary = tempfile.TemporaryDirectory(prefix="taxolens-activations-")
            path = temporary.name
        wanted, source = Extraction.of(hook_names, source, settings)
        preprocess = preprocess_for(model, wanted.image_size)
        stored = torch_dtype(wanted.dtype, ACTIVATION_DTYPES)
        facts = {
            "model": model_fingerprint(model),
            "model_name": str(getattr(model.cfg, "model_name", "")),
            "images": images.fingerprint,
            "preprocessing": preprocess.describe(),
            "hook_names": list(wanted.hook_names),
            "tokens": wanted.tokens,
            "mean_patch": wanted.mean_patch and wanted.tokens != "mean_patch",
            "dtype": str(stored).removeprefix("torch."),
            "autocast": wanted.autocast,
        }
        extractor = _extractor(model, facts, stored)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder, f"cache {folder}"):
            index = matching_index(folder, facts)
            if index is None or not index["complete"]:
                if index is not None:  # unfinished, perhaps with more hook points
                    extractor = _extractor(model, index["facts"], stored)
                on_gpu = extractor.device.type == "cuda"
                loader = ImageLoader(images, preprocess, pin_memory=on_gpu, **source.decoding)
                with CacheWriter(folder, loader, facts, index) as writer:
                    writer.fill(extractor, progress)
        cache = cls(folder)
        cache._temporary = temporary
        return cache


def _extractor(model: TappedModel, facts: dict[str, Any], dtype: torch.dtype) -> TokenExtractor:
    tokens = [facts["tokens"], *(["mean_patch"] if facts["mean_patch"] else [])]
    return TokenExtractor(
        model, facts["hook_names"], tokens, dtype=dtype, autocast=facts["autocast"]
    )
