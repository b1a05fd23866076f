"""Weights for another resolution, patch size or number of channels: pure functions of arrays.

A names module says which of its leaves can be resized and how: `RESIZES = (("embed/position", Positions(prefix=1)),)`.
"""

import dataclasses
import math
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from jxfer.typing import InputError

Shape = tuple[int, ...]
Grid = tuple[int, int]
"""Rows and columns of patches."""


@runtime_checkable
class Resize(Protocol):
    """A frozen dataclass that fits a leaf, in our layout, to another shape."""

    def __call__(self, array: np.ndarray, shape: Shape, *, grid: Grid | None = None) -> np.ndarray:
        """Returns the array with the given shape.

        Args:
          array: the leaf as it was trained.
          shape: what the model needs.
          grid: the model's rows and columns of patches; None where they are equally many.

        Raises:
          InputError: this cannot make the one shape of the other.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Positions:
    """Position embeddings [..., prefix + rows · columns, D] to another grid, bicubic; prefix tokens stay as they are.

    Without antialiasing, as transformers has it for ViT and DINOv2; timm filters before it shrinks (`antialias`).
    """

    prefix: int = 0
    """Tokens before the patches, such as the class token."""
    grid: Grid | None = None
    """Rows and columns they were trained for; None where they are equally many."""
    antialias: bool = False

    def __call__(self, array: np.ndarray, shape: Shape, *, grid: Grid | None = None) -> np.ndarray:
        """Returns [..., prefix + new rows · new columns, D]."""
        if array.ndim != len(shape) or array.shape[-1] != shape[-1] or array.shape[:-2] != shape[:-2]:
            raise _misfit("position embeddings", array.shape, shape)
        old = self.grid or _square(array.shape[-2] - self.prefix)
        new = grid or _square(shape[-2] - self.prefix)
        for (rows, columns), tokens in ((old, array.shape[-2]), (new, shape[-2])):
            if rows * columns + self.prefix != tokens:
                raise InputError(
                    f"{tokens} position embeddings are not {self.prefix} and a grid of {rows}×{columns} patches; "
                    "give the grid"
                )
        front, patches = array[..., : self.prefix, :], array[..., self.prefix :, :]
        image = patches.reshape(*array.shape[:-2], *old, shape[-1])
        image = resample(image, new[0], axis=-3, antialias=self.antialias)
        image = resample(image, new[1], axis=-2, antialias=self.antialias)
        return np.concatenate([front, image.reshape(*shape[:-2], -1, shape[-1]).astype(array.dtype)], axis=-2)


@dataclasses.dataclass(frozen=True)
class InputChannels:
    """The first convolution's kernel [rows, columns, channels, out] for other numbers of channels (as timm does).

    To one channel: the sum, so that a grey image gives what it gave as three equal channels. To more: the channels
    repeated in turn and rescaled, so that equal channels give the same again.
    """

    def __call__(self, array: np.ndarray, shape: Shape, *, grid: Grid | None = None) -> np.ndarray:
        """Returns [rows, columns, new channels, out]."""
        del grid
        if array.ndim != 4 or (*array.shape[:2], array.shape[3]) != (*shape[:2], *shape[3:]):
            raise _misfit("the kernel", array.shape, shape)
        old, new = array.shape[2], shape[2]
        if new == 1:
            return array.sum(axis=2, keepdims=True)
        return (array[:, :, np.arange(new) % old] * np.asarray(old / new, array.dtype)).astype(array.dtype)


@dataclasses.dataclass(frozen=True)
class PatchKernel:
    """A patch embedding's kernel [rows, columns, channels, out] for another patch size, then for other channels.

    The new kernel w' gives for every patch x, resized bilinearly by B to the new size, what w gave for x: it solves
    Bᵀw' = w with the pseudo-inverse (Beyer et al. 2023, arXiv:2212.08013, section 3.4).
    """

    def __call__(self, array: np.ndarray, shape: Shape, *, grid: Grid | None = None) -> np.ndarray:
        """Returns [new rows, new columns, new channels, out]."""
        if array.ndim != 4 or array.shape[3:] != shape[3:]:
            raise _misfit("the patch kernel", array.shape, shape)
        if array.shape[:2] != shape[:2]:
            # Bᵀ of an image is the product of those of its sides, and so is its pseudo-inverse.
            rows, columns = (
                np.linalg.pinv(_bilinear(old, new).T) for old, new in zip(array.shape[:2], shape[:2], strict=True)
            )
            array = np.einsum("Rr,Cc,rcio->RCio", rows, columns, array.astype(np.float64)).astype(array.dtype)
        return array if array.shape == shape else InputChannels()(array, shape, grid=grid)


def resample(
    array: Float[np.ndarray, "..."], size: int, *, axis: int, antialias: bool = False
) -> Float[np.ndarray, "..."]:
    """Returns the array with one axis resampled to `size` by cubic convolution, in float64 at least.

    As PyTorch's `interpolate(mode="bicubic", align_corners=False)`: Keys' kernel with a = -0.75, or with `antialias`
    a = -0.5 widened by the scale where the axis shrinks; edges are repeated, with `antialias` left out.
    """
    weights = _cubic(array.shape[axis], size, antialias)
    return np.moveaxis(np.tensordot(weights, array.astype(np.float64), axes=(1, axis)), 0, axis)


def _cubic(old: int, new: int, antialias: bool) -> Float[np.ndarray, "new old"]:
    scale = old / new
    width = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(new) + 0.5) * scale - 0.5
    reach = math.ceil(2 * width) + 1
    taps = np.floor(centres)[:, None].astype(int) + np.arange(-reach, reach + 1)
    weights = _keys((taps - centres[:, None]) / width, -0.5 if antialias else -0.75)
    if antialias:
        weights[(taps < 0) | (taps >= old)] = 0
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1)), weights)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _keys(x: Float[np.ndarray, "new taps"], a: float) -> Float[np.ndarray, "new taps"]:
    """Returns the cubic convolution kernel (Keys 1981, equation 4 with his -1/2 as `a`)."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _bilinear(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix that resizes one side of a patch bilinearly, without antialiasing, as FlexiViT does."""
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0.0, 1 - np.abs(centres[:, None] - np.arange(old)))


def _square(patches: int) -> Grid:
    side = math.isqrt(max(patches, 0))
    if side * side != patches:
        raise InputError(f"{patches} patches are no square; give the grid of rows and columns")
    return side, side


def _misfit(what: str, old: Shape, new: Shape) -> InputError:
    return InputError(
        f"{what} of shape {old} cannot be resized to {new}; only grid, patch size and channels may differ"
    )
