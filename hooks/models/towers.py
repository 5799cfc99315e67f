"""Vision towers inside models that write text: LLaVA, PaliGemma, InternVL, Idefics3, SmolVLM and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

PLACES = ("vision_tower", "vision_model", "visual")
ROWS = "merge_size"  # a setting of Qwen-VL's processors, which make rows of patches
# Settings by which a processor cuts an image into several, each of which the tower takes.
TILES = ("do_image_splitting", "crop_to_patches", "image_grid_pinpoints", "do_pan_and_scan")


def tower_of(model: nn.Module) -> nn.Module | None:
    """The vision tower of a model that also takes text (`input_ids`); None of any other model."""
    base: Any = getattr(model, "model", model)
    if not hasattr(base, "language_model") and not hasattr(base, "text_model"):
        return None
    found = (getattr(base, place, None) for place in PLACES)
    return next((tower for tower in found if isinstance(tower, nn.Module)), None)


def cuts(settings: Mapping[str, Any] | None) -> str | None:
    """What an image processor of these settings makes of an image, where that is no picture; None where it is."""
    settings = settings or {}
    # Some have a largest number of pieces and a switch, which is in TILES; Llama 4's have no switch.
    pieces = "max_patches" in settings and "crop_to_patches" not in settings
    if pieces or any(settings.get(name) for name in TILES):
        return "cuts an image into several"
    return "makes patches of images of any size" if ROWS in settings else None


def without_tiles(settings: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The settings of a processor, for one picture of `size` (height, width) of the whole image."""
    kept = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")
    square = {"height": size[0], "width": size[1]}
    return {"size": square, **{name: settings[name] for name in kept if name in settings}}
