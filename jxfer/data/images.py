"""From image files to uint8 arrays of one shape, through Pillow."""

import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import UInt8

from jxfer.config import DataConfig
from jxfer.typing import InputError

if TYPE_CHECKING:
    from PIL import Image

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")
EXIF_ORIENTATION = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)
RESAMPLING = {"bilinear": 2, "bicubic": 3}
"""Our name -> Pillow's number."""


@dataclasses.dataclass(frozen=True)
class ImageShape:
    """The side of the images to be (None keeps their own), their channels, and how they are resized and cropped."""

    size: int | None
    channels: int
    crop_fraction: float = 1.0
    """Share of the resized short side that the crop of the middle keeps: 224 / 256 resizes to 256 and crops 224."""
    resample: Literal["bilinear", "bicubic"] = "bilinear"

    @classmethod
    def of(cls, config: DataConfig, *, channels: int) -> "ImageShape":
        """Returns what a config asks for; `channels` are those of the data set."""
        return cls(
            config.image_size, config.channels or channels, config.crop_fraction or 1.0, config.resample or "bilinear"
        )

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise InputError(f"data.channels is {self.channels}; choose 1 (grey) or 3 (colour)")
        if self.size is not None and self.size < 1:
            raise InputError(f"data.image_size is {self.size}; it must be at least 1 pixel")
        if self.size is None and self.crop_fraction != 1:
            raise InputError(f"data.crop_fraction is {self.crop_fraction:g}, but data.image_size is not set; set both")


def encode_png(pixels: UInt8[np.ndarray, "H W"]) -> bytes:
    """Returns a greyscale PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def read_header(file: Path | io.BytesIO) -> tuple[int, int, int]:
    """Returns height, width and channels (1 or 3) without decoding the pixels; raises OSError if unreadable."""
    with _open(file) as image:
        height, width = image.height, image.width
        if image.getexif().get(EXIF_ORIENTATION, 1) in QUARTER_TURNS:
            height, width = width, height
        return height, width, 1 if image.mode in GREY_MODES else 3


def decode(file: Path | io.BytesIO, shape: ImageShape) -> UInt8[np.ndarray, "H W C"]:
    """Decodes one image, upright as its EXIF data say; the short side is resized and the middle cropped.

    Raises:
      OSError: the file is missing, damaged or no image.
    """
    from PIL import ImageOps

    with _open(file) as image:
        try:
            ImageOps.exif_transpose(image, in_place=True)
        except (ValueError, SyntaxError) as error:
            raise OSError(str(error)) from error
        converted = _to_8_bits(image).convert("L" if shape.channels == 1 else "RGB")
    if shape.size is not None:
        converted = _resize_and_crop(converted, shape.size, shape)
    return np.asarray(converted).reshape(converted.height, converted.width, shape.channels)


def _open(file: Path | io.BytesIO) -> "Image.Image":
    from PIL import Image

    try:
        return Image.open(file)
    except (
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # what damaged headers raise besides OSError
        raise OSError(str(error)) from error


def _to_8_bits(image: "Image.Image") -> "Image.Image":
    """Scales 16-bit grey values; Pillow's own conversion would cut them off at 255."""
    if image.mode not in ("I", "I;16", "I;16B"):
        return image
    from PIL import Image

    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))


def _resize_and_crop(image: "Image.Image", size: int, shape: ImageShape) -> "Image.Image":
    """Rounds as torchvision's `Resize` and `CenterCrop` do, so that published weights see the pixels they know."""
    short = round(size / shape.crop_fraction)
    if short != min(image.size):
        width, height = (int(short * side / min(image.size)) for side in image.size)
        # Pillow averages over the source pixels, whichever the filter.
        image = image.resize((width, height), resample=RESAMPLING[shape.resample])
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))
