"""The embedded demo data: drawn pictures with a known class tree, and a small vision transformer.

The pictures are drawn by `examples/demo_assets/draw_pictures.py`. The model has the architecture of
DINOv2 and none of its weights: `examples/demo_assets/train_model.py` trained it from scratch, on
drawn pictures, to classify the leaf classes. Both scripts can be rerun.
"""

from __future__ import annotations

from pathlib import Path

from ...registry.packaged import PACKAGED


def model_path() -> Path:
    """Folder of the model: `config.json`, `model.safetensors`, `preprocessor_config.json`, `metrics.json`."""
    return PACKAGED["demo:model"]


def dataset_path() -> Path:
    """Folder of `train.parquet` and `validation.parquet`, columns `image` and `label` (`ClassLabel`)."""
    return PACKAGED["demo:pictures"]


def taxonomy_path() -> Path:
    """JSON file of the class tree, four levels below the root; its classes are in label order."""
    return PACKAGED["demo:tree"]
