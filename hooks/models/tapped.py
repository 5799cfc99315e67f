"""The interface of tapped vision models: `VisionBridge` and `HookedVisionModel`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn


class TappedModel(Protocol):
    """A vision model with named hook points.

    Attributes:
        cfg: sizes, prefix tokens, device and dtype, as in a TransformerLens config.
        family: the name of its `VisionFamily`.
        processor: Hugging Face's image processor, or None.
        preprocessor_config: the checkpoint's preprocessing settings, or None.
        context_level: depth of the hook contexts that are open.
        training: whether it is in training mode.
    """

    cfg: Any
    family: str
    processor: Any
    preprocessor_config: dict[str, Any] | None
    context_level: int
    training: bool

    @property
    def original_model(self) -> nn.Module:
        """The model as its own library made it."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Alias of a hook point -> its canonical name."""
        ...

    @property
    def heads(self) -> Mapping[str, int]:
        """Canonical name -> number of heads, of the hook points that have heads."""
        ...

    @property
    def smallest_image(self) -> tuple[int, int]:
        """(height, width) in pixels of the smallest image that the model is sure to take."""
        ...

    @property
    def attn_implementation(self) -> str:
        """Hugging Face's name of the way that attention is computed."""
        ...

    def points(self) -> Mapping[str, nn.Module]:
        """Canonical name -> the hook point, or the SAE that is spliced in there."""
        ...

    def lean(self) -> AbstractContextManager[None]:
        """Within, modules that no hook listens to run as their own library made them."""
        ...

    def eval(self) -> Any:
        """Put the model into evaluation mode."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Put the model into training mode, or with False into evaluation mode."""
        ...

    def __call__(self, images: Any, /, *, return_type: str | None = ...) -> Any:
        """Run images (B, 3, H, W); with `return_type=None` only the hooks see what comes out."""
        ...
