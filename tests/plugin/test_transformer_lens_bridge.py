"""After `import taxolens`, TransformerLens's and SAELens's own boot functions know our families."""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import EntryPoint
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import taxolens  # noqa: F401  (registers the families)
import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from taxolens.hooks.models.families import FAMILIES, VisionFamily, dinov2
from taxolens.plugin import transformer_lens_bridge
from tiny_models import pictures, save_tiny, tiny_model
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import architectures as kinds

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
BOOTED = (
    "vit",
    "deit_teacher",
    "dinov2",
    "dinov2_swiglu",
    "dinov2_classifier",
    "dinov2_with_registers",
    "dinov3",
    "clip",
    "clip_both",
    "clip_classifier",
    "siglip",
    "siglip_both",
    "siglip_classifier",
)


@pytest.mark.parametrize(
    ("variant", "boot"), zip(BOOTED, cycle([TransformerBridge, SAETransformerBridge]))
)
def test_boot_transformers(variant: str, boot: Any, tmp_path: Path) -> None:
    bridge = boot.boot_transformers(str(save_tiny(variant, tmp_path)), device="cpu")
    assert type(bridge) is boot
    plain = tiny_model(variant)
    plain = plain.vision_model if variant.endswith("_both") else plain
    with torch.no_grad():
        expected = plain(pictures(), output_hidden_states=True)
        output, cache = bridge.run_with_cache(pictures(), names_filter=["blocks.1.hook_out"])
    assert torch.equal(cache["blocks.1.hook_out"], expected.hidden_states[2])
    final = expected.logits if hasattr(expected, "logits") else expected.last_hidden_state
    assert torch.equal(output, final)
    assert bridge.cfg.d_model == 16 and bridge.cfg.n_layers == 2


def test_registering_again_changes_nothing() -> None:
    before = (
        dict(SUPPORTED_ARCHITECTURES),
        dict(ArchitectureAdapterFactory._adapters),
        set(kinds.VISION_ARCHITECTURES),
        set(kinds.VISION_CLASSIFICATION_ARCHITECTURES),
        set(kinds.VISION_MODEL_ARCHITECTURES),
    )
    for family in FAMILIES:
        transformer_lens_bridge.add_family(family)
    assert before == (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory._adapters,
        kinds.VISION_ARCHITECTURES,
        kinds.VISION_CLASSIFICATION_ARCHITECTURES,
        kinds.VISION_MODEL_ARCHITECTURES,
    )


def test_architectures_of_transformer_lens_keep_its_adapters() -> None:
    assert SUPPORTED_ARCHITECTURES["ViTModel"].__module__.startswith("transformer_lens.")
    assert SUPPORTED_ARCHITECTURES["Dinov2Model"] is dinov2.Dinov2Adapter


def test_architectures_are_loaded_by_the_right_auto_class() -> None:
    assert "Dinov2Model" in kinds.VISION_MODEL_ARCHITECTURES
    assert "Dinov2ForImageClassification" in kinds.VISION_CLASSIFICATION_ARCHITECTURES
    assert kinds.classify_architecture("SiglipVisionModel") == "vision"


def entry_points() -> dict[str, str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["entry-points"][transformer_lens_bridge.ENTRY_POINT_GROUP]


def test_every_adapter_has_its_entry_points() -> None:
    """All that TransformerLens has not itself; each value leads to the family's adapter."""
    expected = {
        name: family.adapter
        for family in FAMILIES
        for name in family.architectures
        if family.adapter and not SUPPORTED_ARCHITECTURES[name].__module__.startswith("transformer")
    }
    loaded = {}
    for name, value in entry_points().items():
        module, _, attribute = value.partition(":")
        loaded[name] = getattr(importlib.import_module(module), attribute)
    assert loaded == expected


@pytest.mark.parametrize("announced", [True, False])
def test_discovery_and_registration_do_not_collide(
    announced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the entry point is installed or not: an adapter, and no warning of an override."""
    value = f"{__name__}:Adapter" if announced else "elsewhere:Adapter"
    point = EntryPoint("TestModel", value, transformer_lens_bridge.ENTRY_POINT_GROUP)
    adapters: dict[str, Any] = {}
    monkeypatch.setattr(ArchitectureAdapterFactory, "_adapters", adapters)
    monkeypatch.setattr(transformer_lens_bridge, "entry_points", lambda group: [point])
    monkeypatch.setitem(SUPPORTED_ARCHITECTURES, "Other", object)  # restores the dict afterwards
    monkeypatch.delitem(SUPPORTED_ARCHITECTURES, "Other")
    adapter = type("Adapter", (dinov2.Dinov2Adapter,), {"__module__": __name__})
    family = VisionFamily(name="test", architectures=("TestModel",), adapter=adapter)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            transformer_lens_bridge.add_family(family)
        assert SUPPORTED_ARCHITECTURES["TestModel"] is adapter
        assert adapters == ({} if announced else {"TestModel": adapter})
    finally:
        SUPPORTED_ARCHITECTURES.pop("TestModel", None)
        kinds.VISION_ARCHITECTURES.discard("TestModel")
        kinds.VISION_MODEL_ARCHITECTURES.discard("TestModel")
