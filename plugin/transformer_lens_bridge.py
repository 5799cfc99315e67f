"""Registration of the model families in TransformerLens, for its own `boot_transformers`.

TransformerLens is imported inside the function, which is called at the end of its own import.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..hooks.models.families import VisionFamily

ENTRY_POINT_GROUP = "transformer_lens.architectures"


def add_family(family: VisionFamily) -> None:
    """Register the family's adapter under each of its architectures; further calls do nothing.

    - An architecture that TransformerLens has itself (ViT, DeiT) keeps TransformerLens's adapter.
    - One that an installed entry point declares with this same adapter is left to TransformerLens
      to discover: registered twice, it would warn of an override.
    - The factory alone is not enough: `boot_transformers` looks architectures up in
      `SUPPORTED_ARCHITECTURES`, and how to load them in the sets of vision architectures.
    """
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )
    from transformer_lens.utilities import architectures as kinds

    adapter = family.adapter
    if adapter is None:
        return
    announced = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    for name in family.architectures:
        if name in SUPPORTED_ARCHITECTURES:
            continue
        if announced.get(name) != f"{adapter.__module__}:{adapter.__qualname__}":
            ArchitectureAdapterFactory.register_adapter(name, adapter)
        SUPPORTED_ARCHITECTURES[name] = adapter
        kinds.VISION_ARCHITECTURES.add(name)
        if "ForImageClassification" in name:
            kinds.VISION_CLASSIFICATION_ARCHITECTURES.add(name)
        else:
            kinds.VISION_MODEL_ARCHITECTURES.add(name)
