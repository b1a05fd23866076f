"""Decoding: channels, depth, orientation, resizing and cropping."""

import io

import numpy as np
import pytest
from PIL import Image

from jxfer.config import DataConfig
from jxfer.data.images import ImageShape, decode, encode_png, read_header
from jxfer.typing import InputError


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "png", **options)
    return io.BytesIO(buffer.getvalue())


def test_a_png_comes_back_unchanged():
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert (decode(io.BytesIO(encode_png(pixels)), ImageShape(None, 1))[..., 0] == pixels).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_becomes_grey_or_colour(mode, channels):
    image = png(Image.new(mode, (5, 4)))
    assert decode(image, ImageShape(None, channels)).shape == (4, 5, channels)
    assert read_header(image)[:2] == (4, 5)


def test_sixteen_bits_are_scaled_not_cut_off():
    image = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert decode(png(image), ImageShape(None, 1)).ravel().tolist() == [0, 128, 255]


def test_photographs_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = png(Image.new("RGB", (8, 4)), exif=exif)
    assert read_header(image) == (8, 4, 3)
    assert decode(image, ImageShape(None, 3)).shape == (8, 4, 3)


def test_the_short_side_is_resized_and_the_middle_cropped():
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 255
    assert (decode(png(Image.fromarray(pixels)), ImageShape(10, 1)) == 255).all()
    assert decode(png(Image.fromarray(pixels)), ImageShape(5, 1)).shape == (5, 5, 1)
    assert decode(png(Image.new("L", (3, 1000))), ImageShape(7, 1)).shape == (7, 7, 1)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_image_raises_oserror(content):
    with pytest.raises(OSError, match="image"):
        decode(io.BytesIO(content), ImageShape(None, 1))
    with pytest.raises(OSError, match="image"):
        read_header(io.BytesIO(content))


def test_other_channels_and_sizes_are_refused():
    with pytest.raises(InputError, match=r"data.channels is 4"):
        ImageShape(None, 4)
    with pytest.raises(InputError, match=r"data.image_size is 0"):
        ImageShape(0, 3)


@pytest.mark.parametrize(("size", "crop_fraction", "short"), [(8, 0.8, 10), (7, 0.875, 8), (6, 1.0, 6)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_a_crop_fraction_resizes_to_more_and_crops_the_middle(size, crop_fraction, short, resample):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 47), np.uint8))
    whole = image.resize((int(short * 47 / 31), short), Image.Resampling[resample.upper()])
    left, top = round((whole.width - size) / 2), round((whole.height - size) / 2)  # as in torchvision
    expected = np.asarray(whole)[top : top + size, left : left + size]
    found = decode(
        png(image),
        ImageShape.of(DataConfig(image_size=size, crop_fraction=crop_fraction, resample=resample), channels=1),
    )
    np.testing.assert_array_equal(found[..., 0], expected)


def test_a_crop_fraction_needs_a_size():
    with pytest.raises(InputError, match=r"data.crop_fraction is 0.8, but data.image_size is not set"):
        ImageShape(None, 3, crop_fraction=0.8)
