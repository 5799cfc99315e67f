"""The embedded demo data: drawn pictures with a known class tree, and a small vision transformer.

The pictures are drawn by `examples/demo_assets/draw_pictures.py`. The model has the architecture of
DINOv2 and none of its weights: `examples/demo_assets/train_model.py` trained it from scratch, on
drawn pictures, to classify the leaf classes. Both scripts can be rerun.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def _path(name: str) -> Path:
    """The path of a file: setuptools installs packages unzipped, and the libraries read files."""
    return Path(str(files(__name__).joinpath(name)))


def model_path() -> Path:
    """Folder of the model: `config.json`, `model.safetensors`, `preprocessor_config.json`, `metrics.json`."""
    return _path("model")


def dataset_path() -> Path:
    """Folder of `train.parquet` and `validation.parquet`, columns `image` and `label` (`ClassLabel`)."""
    return _path("pictures")


def taxonomy_path() -> Path:
    """JSON file of the class tree, four levels below the root; its classes are in label order."""
    return _path("taxonomy.json")
