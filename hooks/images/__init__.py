"""Images: selection, reading, decoding and preprocessing."""

from typing import TYPE_CHECKING

from ...registry.lazy import lazy_names

if TYPE_CHECKING:
    from .dataset import ImageDataset, load_images
    from .loader import ImageBatch, ImageLoader
    from .raw import RawImage
    from .source import ImageSource

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "columns": ["LABEL_COLUMNS", "find_image_column", "find_label_column"],
        "dataset": ["ImageDataset", "load_images"],
        "loader": ["ImageBatch", "ImageLoader"],
        "raw": ["ImageReader", "RawImage", "decode_raw", "read_bytes", "source_of"],
        "source": ["ImageSource"],
    },
)
