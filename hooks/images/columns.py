"""The columns of a dataset: those of images and labels, and their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from PIL import Image

from ...registry.errors import ConfigError, DataError

LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "target", "category"),
    *("synset", "wnid", "fine_label", "cls", "y"),
)


def find_image_column(features: Mapping[str, Any], given: str | None) -> str:
    """The column of images: `given`, else the only one, else "image" among several.

    A column counts when it is declared as images, or holds a struct of bytes and path, or holds
    bytes. A column of paths has to be named.

    Raises:
        ConfigError: none or several; the message lists the columns.
    """
    if given is not None:
        _check_column("image_column", given, features)
        return given
    found = [name for name, feature in features.items() if _holds_images(feature)]
    if len(found) == 1 or "image" in found:
        return "image" if "image" in found else found[0]
    problem = (
        f"several columns hold images ({', '.join(found)})" if found else "no column holds images"
    )
    raise ConfigError("image_column", problem, given=None, allowed=f"one of {_listed(features)}")


def find_label_column(
    features: Mapping[str, Any], given: str | None, image_column: str
) -> str | None:
    """The column of labels; None when there is none.

    `given`; else "label", or the only one, among the columns declared as classes; else the same
    among the columns of integers or text with a usual name (`LABEL_COLUMNS`).

    Raises:
        ConfigError: several, or `given` does not exist; the message lists the columns.
    """
    if given is not None:
        _check_column("label_column", given, features)
        feature = features[given]
        if not (isinstance(feature, datasets.ClassLabel) or _holds_scalars(feature)):
            allowed = "a column that holds one whole number or text an image"
            raise ConfigError("label_column", f"holds {feature}", given=given, allowed=allowed)
        return given
    others = {key: feature for key, feature in features.items() if key != image_column}
    declared = [k for k, feature in others.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [k for k in LABEL_COLUMNS if k in others and _holds_scalars(others[k])]
    found = declared or usual
    if len(found) > 1 and "label" not in found:
        problem = f"several columns hold labels ({', '.join(found)})"
        allowed = f"one of {_listed(features)}"
        raise ConfigError("label_column", problem, given=None, allowed=allowed)
    return "label" if "label" in found else next(iter(found), None)


def declared_names(feature: Any) -> list[str]:
    """The class names that a column's type declares; empty where it declares none."""
    return list(feature.names or ()) if isinstance(feature, datasets.ClassLabel) else []


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and "binary" in feature.dtype


def _holds_scalars(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in (
        *("string", "large_string", "bool"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )


def _check_column(field: str, given: str, features: Mapping[str, Any]) -> None:
    if given not in features:
        allowed = f"one of {_listed(features)}"
        raise ConfigError(field, "no such column", given=given, allowed=allowed)


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())


def _kind(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def undecoded(data: Dataset | IterableDataset, column: str) -> Dataset | IterableDataset:
    """`data` with the images in `column` as bytes and path."""
    wanted = datasets.Image(decode=False)
    if data.features is None:  # a stream that declares nothing: convert one example at a time
        return data.map(lambda example: {column: _as_struct(example[column], wanted)})
    return data if data.features[column] == wanted else data.cast_column(column, wanted)


def _as_struct(value: Any, feature: datasets.Image) -> Any:
    return value if value is None else feature.encode_example(value)


def features_of(data: Dataset | IterableDataset, name: str) -> Mapping[str, Any]:
    """The columns of `data` and their types, from its first example where it declares none."""
    if data.features is not None:
        return data.features
    try:
        example = next(iter(data))
    except StopIteration:
        raise DataError(name, "no images") from None
    return {key: _feature_of(value) for key, value in example.items()}


def _feature_of(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return datasets.Image()
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        return datasets.Image()
    if isinstance(value, bool | int | str | bytes):
        dtype = {bool: "bool", int: "int64", str: "string", bytes: "binary"}[type(value)]
        return datasets.Value(dtype)
    return value
