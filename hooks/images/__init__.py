"""Images: which they are, how they are read, decoded and preprocessed."""

from typing import TYPE_CHECKING

from ...registry.lazy import lazy_names

if TYPE_CHECKING:
    from .dataset import ImageDataset, RawImage, load_images
    from .loader import ImageBatch, ImageLoader

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "dataset": [
            *("ImageDataset", "ImageReader", "RawImage", "load_images", "read_bytes", "decode_raw"),
            *("source_of", "find_image_column", "find_label_column", "LABEL_COLUMNS"),
        ],
        "loader": ["ImageBatch", "ImageLoader"],
    },
)
