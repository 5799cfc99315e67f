"""Bytes of one image -> an RGB image, whatever the file format and colour mode.

- Images are turned upright by their EXIF orientation.
- Transparency (alpha channels, transparent palette entries) is composited onto white, as the
  image processors of transformers do.
- 16-bit grey is scaled to 8 bits (65535 becomes 255) rather than clipped; so is 32-bit integer
  grey, whose values are taken to be 16-bit ones. Floating-point grey is read as [0, 1] when no
  value is above 1 and as [0, 255] otherwise.
- PostScript is refused: Pillow reads it through an external program.
- HEIC, as phones write it, is read where pillow-heif is installed (the extra `heic`); its own rotation counts, not EXIF's.
- CMYK, YCbCr, HSV, grey, palette and bilevel images are converted by Pillow; colour profiles are
  ignored, as vision models' own training pipelines do. Of an animation the first frame is taken.
"""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
from PIL import Image, ImageOps

from ...registry.files import MAX_IMAGE_PIXELS

MAX_ASPECT = 200  # of the sides; resizing the shorter one would make the other enormous
HEIC_EXTRA = "pip install 'taxolens[heic]'"
with suppress(ImportError):
    import pillow_heif  # type: ignore[import-not-found]  # an extra

    pillow_heif.register_heif_opener(thumbnails=False)
Image.init()
FORMATS = [name for name in Image.ID if name != "EPS"]


def decode_rgb(
    data: bytes, max_pixels: int = MAX_IMAGE_PIXELS, jpeg_edge: int | None = None
) -> Image.Image:
    """The image encoded in `data`, upright and of mode RGB.

    Args:
        data: the content of a file.
        max_pixels: a larger image is refused.
        jpeg_edge: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, whichever is the smallest that
            leaves both edges this long; None: at its own size.

    Raises:
        ValueError: the bytes are no image, are truncated or damaged, or the image is too large or
            too narrow; the message says which.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ValueError(f"{width} x {height} pixels exceed max_image_pixels={max_pixels}")
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise ValueError(f"{width} x {height}: sides of more than {MAX_ASPECT}:1")
            if jpeg_edge is not None:
                image.draft(None, (jpeg_edge, jpeg_edge))  # Pillow has it for JPEG alone
            image.load()
            return _to_rgb(_upright(image))
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = str(error).split(" <_io.BytesIO", 1)[0] or type(error).__name__
        raise ValueError(reason) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF does not mean damaged pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64) / 257.0
        return _from_grey(grey)
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        return _from_grey(grey * 255.0 if grey.max() <= 1.0 else grey)
    if image.mode == "La":
        image = image.convert("LA")
    if "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_grey(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)).convert("RGB")
