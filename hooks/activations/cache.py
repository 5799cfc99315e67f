"""Activations of all images at many hook points, computed in one pass and kept on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..images.dataset import ImageDataset
from ..images.loader import ImageLoader
from ..images.preprocess import preprocess_for
from ..models.tapped import TappedModel
from .cache_reader import CacheReader
from .cache_writer import CacheWriter, matching_index, only_writer
from .extract import TokenExtractor, model_fingerprint, torch_dtype


class ActivationCache(CacheReader):
    """A `CacheReader` that can be built.

    `build` can be killed at any time and goes on where it was; `open` reads a finished or unfinished
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
        hook_names: Sequence[str],
        *,
        path: str | Path | None = None,
        tokens: str = "class",
        mean_patch: bool = False,
        batch_size: int = 32,
        num_workers: int = 0,
        image_size: int | None = None,
        dtype: str | torch.dtype = "float32",
        autocast: bool = False,
        max_corrupt_share: float = 0.01,
        progress: bool = True,
    ) -> ActivationCache:
        """Run all images through the model once and keep what is asked for.

        A folder that holds the same activations already is used as it is, an unfinished one is
        finished. Hook points beyond those asked for do no harm.

        Args:
            path: the folder; None: a temporary one that goes with the object.
            tokens: one of `TOKEN_CHOICES`.
            mean_patch: keep the mean over the patches too, from the same forward pass.
            batch_size: images per forward pass.
            dtype: "float32", "float16", or "bfloat16", which is stored as float32.
            image_size, num_workers, autocast, max_corrupt_share: as for `ActivationStream`.
            progress: show a progress bar.

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
        preprocess = preprocess_for(model, image_size)
        stored = torch_dtype(dtype)
        facts = {
            "model": model_fingerprint(model),
            "model_name": str(getattr(model.cfg, "model_name", "")),
            "images": images.fingerprint,
            "preprocessing": preprocess.describe(),
            "hook_names": list(hook_names),
            "tokens": tokens,
            "mean_patch": mean_patch and tokens != "mean_patch",
            "dtype": str(stored).removeprefix("torch."),
            "autocast": autocast,
        }
        extractor = _extractor(model, facts, stored)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            index = matching_index(folder, facts)
            if index is not None and index["complete"]:
                return cls._opened(folder, temporary)
            if index is not None:  # unfinished, perhaps with more hook points
                extractor = _extractor(model, index["facts"], stored)
            loader = ImageLoader(
                images,
                preprocess,
                batch_size=batch_size,
                num_workers=num_workers,
                max_corrupt_share=max_corrupt_share,
                pin_memory=extractor.device.type == "cuda",
            )
            with CacheWriter(folder, loader, facts, index) as writer:
                writer.fill(extractor, progress)
        return cls._opened(folder, temporary)

    @classmethod
    def _opened(
        cls, folder: Path, temporary: tempfile.TemporaryDirectory[str] | None
    ) -> ActivationCache:
        cache = cls(folder)
        cache._temporary = temporary
        return cache


def _extractor(model: TappedModel, facts: dict[str, Any], dtype: torch.dtype) -> TokenExtractor:
    tokens = [facts["tokens"], *(["mean_patch"] if facts["mean_patch"] else [])]
    return TokenExtractor(
        model, facts["hook_names"], tokens, dtype=dtype, autocast=facts["autocast"]
    )
