"""Characters drawn from the fonts that matplotlib ships, distorted at random and reduced like the UCI digits.

Every character of every font becomes a signed distance field once. An example is then one random affine map of such a
field, thresholded: moving the threshold makes the stroke thicker or thinner, so no example is drawn by a font engine
and thousands take a second.
"""

import dataclasses
import string
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
SIDE = 32
"""Rows and columns of a rendering before reduction."""
BLOCK = 4
"""Side of the blocks whose pixels are counted: 32x32 binary pixels become 8x8 counts in 0..16."""
LEVELS = BLOCK * BLOCK

# Symbol, maths and fallback fonts are left out; of the rest only those with a plain glyph for every character stay.
FONT_FAMILIES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral")
FIELD_SIDE = 96
MIN_GROWTH = -0.15  # of the stroke width on each side; thinner strokes break
CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How examples vary; chosen so that 8x8 pixel statistics resemble those of scikit-learn's handwritten digits.

    Digits as rendered and as written agree in mean ink (0.31 both), empty blocks (0.48, 0.49), full blocks (0.08,
    0.09), and width of the ink in pixels of 32 (19.2, 19.0).
    """

    rotation: float = 0.1
    """Standard deviation in radians."""
    shear: float = 0.1
    """Standard deviation of the horizontal shift per unit of height."""
    width: tuple[float, float] = (21.5, 2.5)
    """Mean and standard deviation of the width in pixels; vertically a character fills all 32."""
    max_stretch: float = 1.2
    """Largest factor on a character's own width to height, so that an `l` stays narrow."""
    ink: tuple[float, float] = (0.335, 0.03)
    """Mean and standard deviation of the share of inked pixels, reached by thicker or thinner strokes."""
    max_growth: float = 1.0
    """Largest growth of a stroke on each side, as a part of its own width, so that holes stay open."""
    shift: float = 0.5
    """Standard deviation of the horizontal shift in pixels."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fields:
    """Signed distance fields of G glyphs (positive inside) with outline, stroke width and area, in field pixels."""

    distance: Float[np.ndarray, "G S S"]
    outline: Float[np.ndarray, "G P 2"]
    """Points (x, y) from the centre whose convex hull is that of the glyph."""
    stroke: Float[np.ndarray, " G"]
    area: Float[np.ndarray, " G"]


def fonts() -> list[Path]:
    """Returns matplotlib's text fonts that have a glyph for each of `CHARACTERS`, by name."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    paths = sorted((Path(get_data_path()) / "fonts" / "ttf").glob("*.ttf"))
    wanted = set(map(ord, CHARACTERS))
    return [
        path for path in paths if path.stem.startswith(FONT_FAMILIES) and wanted <= set(FT2Font(path).get_charmap())
    ]


def render(
    labels: Int[np.ndarray, " N"], *, seed: int, distortion: Distortion = Distortion()
) -> UInt8[np.ndarray, "N 32 32"]:
    """Renders one character per label as a binary 32x32 bitmap (1 is ink), each in a font and a distortion of its own.

    Args:
      labels: indices into `CHARACTERS`.
      seed: the result is a function of labels, seed, distortion and the installed fonts.
    """
    families = fonts()
    fields = _distance_fields(families)
    rng = np.random.default_rng(seed)
    glyphs = rng.integers(len(families), size=len(labels)) * len(CHARACTERS) + labels
    inverse, offset, radius = _random_maps(rng, fields, glyphs, distortion)
    images = np.empty((len(labels), SIDE, SIDE), np.uint8)
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        images[part] = _sample(fields.distance, glyphs[part], inverse[part], offset[part]) > -radius[part, None, None]
    return images


def block_counts(images: UInt8[np.ndarray, "N H W"]) -> UInt8[np.ndarray, "N h w"]:
    """Counts the ink of each 4x4 block, the preprocessing of the UCI digits; values are 0..16."""
    num, height, width = images.shape
    blocks = images.reshape(num, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return blocks.sum(axis=(2, 4), dtype=np.uint8)


def counts_to_pixels(counts: np.ndarray) -> np.ndarray:
    """Maps counts in 0..16 to uint8 so that dividing by 255 gives [0, 1]; `round(pixels * 16 / 255)` is the inverse."""
    return np.round(counts * (255 / LEVELS)).astype(np.uint8)


def _distance_fields(paths: list[Path]) -> Fields:
    from scipy.ndimage import distance_transform_edt

    bitmaps = np.stack([_draw(path, character) for path in paths for character in CHARACTERS])
    distance = np.stack([distance_transform_edt(b) - distance_transform_edt(~b) for b in bitmaps]).astype(np.float32)
    # In a stroke of constant width the mean distance to the edge is a quarter of the width.
    inside = np.maximum(distance, 0)
    area = bitmaps.sum((1, 2), dtype=np.float64)
    stroke = 4 * inside.sum((1, 2)) / area
    return Fields(distance, np.stack([_row_ends(bitmap) for bitmap in bitmaps]), stroke, area)


def _draw(path: Path, character: str) -> np.ndarray:
    """Draws one character in the middle of a field, with a margin for thicker strokes, as [S S] bool."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("L", (FIELD_SIDE, FIELD_SIDE))
    font = ImageFont.truetype(str(path), size=FIELD_SIDE * 5 // 8)
    middle = FIELD_SIDE // 2
    left, top, right, bottom = font.getbbox(character)
    ImageDraw.Draw(canvas).text((middle - (left + right) / 2, middle - (top + bottom) / 2), character, 255, font)
    return np.asarray(canvas) > 127


def _row_ends(bitmap: np.ndarray) -> np.ndarray:
    """Returns the left and right end of the ink of each row as [2S 2] offsets (x, y) from the centre."""
    rows = np.arange(FIELD_SIDE)
    inked = bitmap.any(axis=1)
    left, right = bitmap.argmax(axis=1), FIELD_SIDE - 1 - bitmap[:, ::-1].argmax(axis=1)
    points = np.concatenate([np.stack([left, rows], 1)[inked], np.stack([right, rows], 1)[inked]])
    padded = np.resize(points, (2 * FIELD_SIDE, 2))  # repeats points: the hull stays the same
    return padded - (FIELD_SIDE - 1) / 2


def _random_maps(
    rng: np.random.Generator, fields: Fields, glyphs: np.ndarray, distortion: Distortion
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws, per example, the map from output pixels to field pixels (x = inverse @ pixel + offset) and the growth."""
    num = len(glyphs)
    angle, shear = rng.normal(0, distortion.rotation, num), rng.normal(0, distortion.shear, num)
    cos, sin, one, zero = np.cos(angle), np.sin(angle), np.ones(num), np.zeros(num)
    rotate = np.moveaxis(np.array([[cos, -sin], [sin, cos]]), 2, 0)
    forward = rotate @ np.moveaxis(np.array([[one, shear], [zero, one]]), 2, 0)  # [N 2 2]

    low, high = _extent(forward, fields.outline[glyphs], zero)
    box = high - low
    width = np.minimum(rng.normal(*distortion.width, num), distortion.max_stretch * SIDE * box[:, 0] / box[:, 1])
    wanted = rng.normal(*distortion.ink, num) * SIDE / width  # share of the glyph's box
    # A stroke of width s grown by r on each side covers 1 + 2r/s times its area.
    share = fields.area[glyphs] / box.prod(axis=1)
    stroke = fields.stroke[glyphs]
    radius = np.clip((wanted / share - 1) / 2, MIN_GROWTH, distortion.max_growth) * stroke

    low, high = _extent(forward, fields.outline[glyphs], radius)
    scale = np.stack([width, np.full(num, SIDE)], axis=1) / (high - low)
    inverse = np.linalg.inv(scale[:, :, None] * forward)
    middle = np.stack([SIDE / 2 + rng.normal(0, distortion.shift, num), np.full(num, SIDE / 2)], axis=1)
    origin = scale * (low + high) / 2 - middle  # pixel + origin = scale * forward @ point
    return inverse, np.einsum("nij,nj->ni", inverse, origin), radius.astype(np.float32)


def _extent(forward: np.ndarray, outline: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the corners [N 2] of the bounding boxes of the glyphs, grown by `radius` and then mapped by `forward`."""
    mapped = np.einsum("nij,npj->npi", forward, outline)
    growth = (0.5 + radius)[:, None] * np.linalg.norm(forward, axis=2)
    return mapped.min(axis=1) - growth, mapped.max(axis=1) + growth


def _sample(distance: np.ndarray, glyphs: np.ndarray, inverse: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Reads each glyph's field at the output pixels, to the nearest field pixel, as [N 32 32]."""
    centres = np.arange(SIDE) + 0.5
    pixels = np.stack(np.meshgrid(centres, centres), axis=-1)  # [32 32 2] of (x, y)
    points = np.einsum("nij,hwj->nhwi", inverse, pixels) + offset[:, None, None] + (FIELD_SIDE - 1) / 2
    x, y = np.moveaxis(np.clip(np.rint(points), 0, FIELD_SIDE - 1).astype(np.int32), -1, 0)
    return distance[glyphs[:, None, None], y, x]
