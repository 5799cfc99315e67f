"""The model's own preprocessing: a PIL image -> float32 (3, H, W), without torchvision.

Image processors of transformers whose steps are the plain ones of Pillow (resize, centre crop,
rescale, normalise) are done here with the same operations in the same order, so that the pixel values
are equal to the bit at about half the cost; any other processor or transform is called as it is.
timm's evaluation transform (timm 1.0, `timm/data/transforms_factory.py`) and open_clip's (3.3,
`open_clip/transform.py`) are done here too.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from ...registry.errors import ConfigError

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULT_CONFIG = {
    "size": {"shortest_edge": 256},
    "resample": 3,
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": IMAGENET_MEAN,
    "image_std": IMAGENET_STD,
}
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
"""Pillow's numbers of the interpolations, by timm's names."""
IN_FLOATING_POINT = {0: "nearest", 2: "bilinear", 3: "bicubic"}
TIMM = "timm"  # image_processor_type of settings that `timm_preprocessing` made
CROP_MODES = ("center", "squash", "border")
OPEN_CLIP_MODES = {"shortest": "center", "squash": "squash", "longest": "border"}
MAX_EDGE = 8192  # pixels of the model's input
PLAIN_STEPS = (
    *("__call__", "preprocess", "process_image", "convert_to_rgb", "_preprocess"),
    *("resize", "center_crop", "rescale", "normalize"),
)


@dataclass(frozen=True)
class PilPreprocess:
    """Resize, centre crop, rescale, normalise.

    Attributes:
        size: (height, width); or one number, the length of the shorter edge; None: as it is.
        crop: (height, width) of the centre crop, padded with black where the image is smaller.
        resample: Pillow's number of the interpolation (0 nearest, 2 bilinear, 3 bicubic).
        rescale: factor on the 0..255 pixel values, None: none.
        mean, std: for each channel, None: no normalisation.
        resize_rescaled: resize after rescaling, in floating point (DINOv3), not on 8-bit pixels.
        timm: margins of the crop are rounded as torchvision does, half to even, not down; and of
            `size` (height, width) the proportions of the image are kept: "cover" covers it,
            "contain" fits into it, "exact" does not keep them.
        fill: 8-bit colour of the padding.

    Raises:
        ConfigError: a value with which there is no image, or one of NaN.
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: int = 2
    rescale: float | None = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize_rescaled: bool = False
    timm: str | None = None
    fill: tuple[int, ...] = (0, 0, 0)

    def __post_init__(self) -> None:
        edges = [*(_edges(self.size)), *_edges(self.crop)]
        numbers = [
            n for n in (self.rescale, *(self.mean or ()), *(self.std or ())) if n is not None
        ]
        for field, fits, allowed in (
            ("size", all(0 < edge <= MAX_EDGE for edge in edges), f"1 to {MAX_EDGE} pixels"),
            (
                "resample",
                self.resample in (IN_FLOATING_POINT if self.resize_rescaled else range(6)),
                "0, 2 or 3; 0 to 5 on 8-bit pixels",
            ),
            ("mean, std, rescale", all(map(math.isfinite, numbers)), "finite numbers"),
            ("std", all(n > 0 for n in self.std or ()), "numbers above 0"),
            ("mean", self.mean is None or len(self.mean) == 3, "one number for each of 3 channels"),
            ("std", self.std is None or len(self.std) == 3, "one number for each of 3 channels"),
            ("rescale", self.rescale is None or self.rescale > 0, "a number above 0"),
        ):
            if not fits:
                given = tuple(getattr(self, name) for name in field.split(", "))
                raise ConfigError(
                    f"image processor: {field}", "not possible", given=given, allowed=allowed
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], image_size: int | None = None) -> PilPreprocess:
        """From the fields of a ``preprocessor_config.json``.

        Raises:
            ConfigError: a size or interpolation that the plain steps do not have.
        """
        try:
            return cls._from_config({**config, **resized(config, image_size)})
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            if isinstance(error, ConfigError):
                raise
            problem = f"its settings cannot be read: {error}"
            raise ConfigError("image processor", problem, allowed="numbers, and sizes") from error

    @classmethod
    def _from_config(cls, config: Mapping[str, Any]) -> PilPreprocess:
        size = _size(config) if config.get("do_resize", True) else None
        crop = None
        if config.get("do_center_crop"):
            crop = _pair(config.get("crop_size") or config.get("size"), "crop_size")
        normalise = config.get("do_normalize", True) and config.get("image_mean") is not None
        kind = str(config.get("image_processor_type", ""))
        in_floating_point = kind.startswith("DINOv3")
        return cls(
            size=size,
            crop=crop,
            resample=_resample(config.get("resample"), in_floating_point),
            rescale=float(_given(config, "rescale_factor", 1 / 255))
            if config.get("do_rescale", True)
            else None,
            mean=_channels(config["image_mean"]) if normalise else None,
            std=_channels(config["image_std"]) if normalise else None,
            resize_rescaled=in_floating_point,
            timm=config["resize_mode"] if kind == TIMM else None,
            fill=tuple(config.get("fill", (0, 0, 0))),
        )

    def __call__(self, image: Image.Image) -> np.ndarray:
        """float32 (3, H, W) of an RGB image."""
        if self.resize_rescaled:
            return self._in_floating_point(image)
        pixels = self.eight_bit(image)
        return np.stack([table[channel] for table, channel in zip(self.tables, pixels)])

    @property
    def ends_with_table(self) -> bool:
        """Whether `tables[c][eight_bit(image)[c]]` is the result for each channel c, to the bit."""
        return not self.resize_rescaled

    def eight_bit(self, image: Image.Image) -> np.ndarray:
        """uint8 (3, H, W): resized and cropped, neither rescaled nor normalised."""
        if self.size is not None:
            height, width = self._target(image.height, image.width)
            image = image.resize((width, height), resample=self.resample)  # type: ignore[arg-type]
        pixels = np.moveaxis(np.asarray(image), -1, 0)
        if self.crop is not None:
            crop = center_crop if self.timm is None else rounded_center_crop
            pixels = crop(pixels, self.crop, self.fill)
        return pixels

    @cached_property
    def tables(self) -> np.ndarray:
        """(3, 256) float32: the final value of each 8-bit value in each channel.

        The arithmetic is that of transformers (rescaled in float64, normalised in float32).
        """
        values = np.tile(np.arange(256, dtype=np.float32), (3, 1))
        if self.rescale is not None:
            values = (values.astype(np.float64) * self.rescale).astype(np.float32)
        return self._normalised(values)

    def _normalised(self, pixels: np.ndarray) -> np.ndarray:
        if self.mean is None or self.std is None:
            return pixels
        shape = (3,) + (1,) * (pixels.ndim - 1)
        mean = np.array(self.mean, dtype=np.float32).reshape(shape)
        return (pixels - mean) / np.array(self.std, dtype=np.float32).reshape(shape)

    def _in_floating_point(self, image: Image.Image) -> np.ndarray:
        """Rescale, resize, crop, normalise: what torchvision does on floating-point images."""
        pixels = torch.from_numpy(np.moveaxis(np.array(image), -1, 0).astype(np.float32))
        if self.rescale is not None:
            pixels = pixels * self.rescale
        if self.size is not None:
            target = self._target(image.height, image.width)
            if target != (image.height, image.width):
                smooth = {"align_corners": False, "antialias": True} if self.resample else {}
                mode = IN_FLOATING_POINT[self.resample]
                pixels = interpolate(pixels[None], size=target, mode=mode, **smooth)[0]
        array = pixels.numpy()
        return self._normalised(center_crop(array, self.crop) if self.crop else array)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            assert self.size is not None
            if self.timm not in ("cover", "contain"):
                return self.size
            ratios = height / self.size[0], width / self.size[1]
            ratio = min(ratios) if self.timm == "cover" else max(ratios)
            return round(height / ratio), round(width / ratio)
        longer = int(self.size * max(height, width) / min(height, width))
        return (longer, self.size) if width <= height else (self.size, longer)

    def describe(self) -> dict[str, Any]:
        """JSON-able: what was done to the pixels."""
        fields = asdict(self)
        if self.timm is None:  # those of 0.1 had no such fields, and are the same
            del fields["timm"], fields["fill"]
        return json.loads(json.dumps(fields))


@dataclass(frozen=True)
class ProcessorPreprocess:
    """An image processor of transformers, or another callable, called as it is.

    A callable that is no processor, such as a transform of torchvision, takes an image and gives
    (3, H, W).
    """

    processor: Any
    sizes: Mapping[str, Any]

    def __call__(self, image: Image.Image) -> np.ndarray:
        """float32 (3, H, W) of an RGB image."""
        if not hasattr(self.processor, "to_dict"):
            return np.asarray(self.processor(image), dtype=np.float32)
        kind = "pt" if getattr(self.processor, "backend", "pil") == "torchvision" else "np"
        pixels = self.processor(image, return_tensors=kind, **self.sizes)["pixel_values"][0]
        return np.asarray(pixels, dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        """JSON-able: the processor's settings."""
        if not hasattr(self.processor, "to_dict"):
            return {"transform": repr(self.processor)}
        config = {**self.processor.to_dict(), **self.sizes}
        return json.loads(json.dumps(config, sort_keys=True, default=str))


def preprocess_for(
    model: Any, image_size: int | None = None
) -> PilPreprocess | ProcessorPreprocess:
    """The preprocessing of an RGB image for `model`.

    Args:
        model: a vision model. Its `processor`, an image processor of transformers or another
            callable, is used; else its `preprocessor_config`, the fields of a ``preprocessor_config.json``; with neither,
            ImageNet's usual preprocessing at the model's image size, and a warning.
        image_size: height and width of the result; resizing before a crop keeps its proportion to
            it. None: the model's own.

    Raises:
        ConfigError: image_size is not positive, the processor's sizes cannot be read, or they
            cannot be changed to image_size.
    """
    if image_size is not None and image_size < 1:
        allowed = "1 or more, or None for the model's own"
        raise ConfigError("image_size", "too small", given=image_size, allowed=allowed)
    processor = getattr(model, "processor", None)
    settings = getattr(model, "preprocessor_config", None)
    if processor is not None:
        if not hasattr(processor, "to_dict"):
            if image_size is not None:
                problem = "the size that the model's processor gives cannot be changed"
                allowed = "None, or a processor of transformers"
                raise ConfigError("image_size", problem, given=image_size, allowed=allowed)
            return ProcessorPreprocess(processor, {})
        settings = processor.to_dict()
        if not _is_plain(processor, settings):
            return ProcessorPreprocess(processor, resized(settings, image_size))
    if settings:
        return PilPreprocess.from_config(settings, image_size)
    own = getattr(getattr(model, "cfg", None), "image_size", None) or 224
    own = (own, own) if isinstance(own, int) else (int(own[0]), int(own[1]))
    height, width = own if image_size is None else (image_size, image_size)
    logger.warning(
        "the model has no image processor: its images are resized and cropped to %d x %d and "
        "normalised with ImageNet's mean and deviation.",
        height,
        width,
    )
    sizes = resized(DEFAULT_CONFIG, max(height, width))
    crop = {"crop_size": {"height": height, "width": width}}
    return PilPreprocess.from_config({**DEFAULT_CONFIG, **sizes, **crop})


def resized(config: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    """The sizes in a processor's config, changed so that its images come out image_size square."""
    if image_size is None:
        return {}
    square = {"height": image_size, "width": image_size}
    if config.get("image_processor_type") == TIMM:
        return timm_sizes(image_size, image_size, config["crop_pct"], config["crop_mode"])
    if not config.get("do_center_crop"):
        size = config.get("size")
        if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
            # crop_pct: the processor resizes to more than the shortest edge and crops by itself
            crop = {} if "crop_pct" in config else {"do_center_crop": True, "crop_size": square}
            return {"size": {"shortest_edge": image_size}, **crop}
        return {"do_resize": True, "size": square}
    crop_height, _ = _pair(config.get("crop_size") or config.get("size"), "crop_size")
    sizes: dict[str, Any] = {"crop_size": square}
    size = config.get("size")
    if config.get("do_resize", True) and size is not None:
        scale = image_size / crop_height
        if isinstance(size, Mapping):
            sizes["size"] = {key: round(edge * scale) for key, edge in size.items() if edge}
        else:
            sizes["size"] = {"shortest_edge": round(int(size) * scale)}
    return sizes


def timm_preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of timm's evaluation transform for a model, under the names of Hugging Face.

    As `resolve_data_config` and `transforms_imagenet_eval` of timm 1.0.

    Args:
        config: the config of a checkpoint of timm, or its `pretrained_cfg`.

    Raises:
        ConfigError: an interpolation or crop mode that timm does not have.
    """
    settings = config.get("pretrained_cfg") or config
    _, height, width = settings.get("input_size") or (3, 224, 224)
    mode = settings.get("crop_mode") or "center"
    interpolation = settings.get("interpolation") or "bicubic"
    for field, given, allowed in (
        ("crop_mode", mode, CROP_MODES),
        ("interpolation", interpolation, RESAMPLING),
    ):
        if given not in allowed:
            raise ConfigError(f"{field} of timm", "not known", given=given, allowed=list(allowed))
    mean = list(settings.get("mean") or IMAGENET_MEAN)
    return {
        "image_processor_type": TIMM,
        "crop_pct": settings.get("crop_pct") or 0.875,
        "crop_mode": mode,
        "do_resize": True,
        **timm_sizes(height, width, settings.get("crop_pct") or 0.875, mode),
        "resample": RESAMPLING[interpolation],
        "do_center_crop": True,
        "fill": [round(255 * value) for value in mean] if mode == "border" else [0, 0, 0],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": list(settings.get("std") or IMAGENET_STD),
    }


def open_clip_preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of open_clip's evaluation transform, under the names of Hugging Face.

    As `image_transform` of open_clip 3.3.

    Args:
        config: the fields of its `preprocess_cfg`; those that are missing are OpenAI's.

    Raises:
        ConfigError: a resize mode that open_clip does not have.
    """
    mode = config.get("resize_mode") or "shortest"
    if mode not in OPEN_CLIP_MODES:
        allowed = list(OPEN_CLIP_MODES)
        raise ConfigError("resize_mode of open_clip", "not known", given=mode, allowed=allowed)
    height, width = _pair(config.get("size") or 224, "size")
    bilinear = config.get("interpolation") == "bilinear"
    if mode == "shortest" and height != width:  # its transform then leaves the default
        bilinear = False
    settings = timm_preprocessing(
        {
            "input_size": (3, height, width),
            "crop_pct": 1.0,
            "crop_mode": OPEN_CLIP_MODES[mode],
            "interpolation": "bilinear" if bilinear else "bicubic",
            "mean": _channels(config.get("mean") or OPENAI_MEAN),
            "std": _channels(config.get("std") or OPENAI_STD),
        }
    )
    return {**settings, "fill": [config.get("fill_color") or 0] * 3}


def timm_sizes(height: int, width: int, crop_pct: float, crop_mode: str) -> dict[str, Any]:
    """The sizes in the settings of timm for images of (height, width)."""
    scaled = {"height": math.floor(height / crop_pct), "width": math.floor(width / crop_pct)}
    one_edge = crop_mode == "center" and scaled["height"] == scaled["width"]
    return {
        "size": {"shortest_edge": scaled["height"]} if one_edge else scaled,
        "crop_size": {"height": height, "width": width},
        "resize_mode": {"center": "cover", "squash": "exact", "border": "contain"}[crop_mode],
    }


def center_crop(
    pixels: np.ndarray, crop: tuple[int, int], fill: tuple[int, ...] = (0, 0, 0)
) -> np.ndarray:
    """The middle of (C, H, W), padded where it is smaller; odd margins as in transformers."""
    pixels = _padded(pixels, crop, fill, lambda missing: math.ceil(missing / 2))
    top, left = (pixels.shape[1] - crop[0]) // 2, (pixels.shape[2] - crop[1]) // 2
    return pixels[:, top : top + crop[0], left : left + crop[1]]


def rounded_center_crop(
    pixels: np.ndarray, crop: tuple[int, int], fill: tuple[int, ...] = (0, 0, 0)
) -> np.ndarray:
    """(C, H, W), cropped as torchvision and timm do: margins half to even, padding rounded down."""
    pixels = _padded(pixels, crop, fill, lambda missing: missing // 2)
    top, left = round((pixels.shape[1] - crop[0]) / 2), round((pixels.shape[2] - crop[1]) / 2)
    return pixels[:, top : top + crop[0], left : left + crop[1]]


def _padded(
    pixels: np.ndarray, crop: tuple[int, int], fill: tuple[int, ...], before: Callable[[int], int]
) -> np.ndarray:
    height, width = (max(edge, wanted) for edge, wanted in zip(pixels.shape[1:], crop))
    if (height, width) == pixels.shape[1:]:
        return pixels
    padded = np.empty((len(pixels), height, width), dtype=pixels.dtype)
    padded[:] = np.array(fill, dtype=pixels.dtype).reshape(-1, 1, 1)
    top, left = before(height - pixels.shape[1]), before(width - pixels.shape[2])
    padded[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
    return padded


def _is_plain(processor: Any, config: Mapping[str, Any]) -> bool:
    """Whether a processor's steps are those of Pillow's base class, on sizes that are known here."""
    # Worker processes import this module, and must not wait for all of transformers.
    from transformers.image_processing_backends import PilBackend

    own = type(processor)
    size = config.get("size")
    return (
        isinstance(processor, PilBackend)
        and getattr(processor, "backend", None) == "pil"
        and all(getattr(own, step, None) is getattr(PilBackend, step) for step in PLAIN_STEPS)
        and not any(step in vars(processor) for step in PLAIN_STEPS)
        and not config.get("do_pad")
        and (
            not config.get("do_resize", True)
            or (isinstance(size, Mapping) and set(size) in ({"shortest_edge"}, {"height", "width"}))
        )
    )


def _given(config: Mapping[str, Any], field: str, default: Any) -> Any:
    """A field that may be missing or null; 0 is a value."""
    return default if config.get(field) is None else config[field]


def _resample(given: Any, in_floating_point: bool) -> int:
    number = 2 if given is None else int(given)
    known = IN_FLOATING_POINT if in_floating_point else RESAMPLING.values()
    if number not in known:
        allowed = ", ".join(f"{n} ({name})" for name, n in RESAMPLING.items() if n in known)
        raise ConfigError(
            "resample of the image processor", "unknown", given=given, allowed=allowed
        )
    return number


def _size(config: Mapping[str, Any]) -> tuple[int, int] | int:
    size = config.get("size")
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    if isinstance(size, int) and config.get("do_center_crop"):
        return size
    return _pair(size, "size")


def _edges(size: tuple[int, int] | int | None) -> tuple[int, ...]:
    return () if size is None else (size,) if isinstance(size, int) else size


def _pair(size: Any, field: str) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    allowed = "a number, {'height', 'width'} or {'shortest_edge'}"
    raise ConfigError(f"{field} of the image processor", "unknown", given=size, allowed=allowed)


def _channels(values: Any) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(map(float, values))
