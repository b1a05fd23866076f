"""A tensor of a weights file as a lazy handle: its name, shape and type are known, its values read when asked for."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jxfer.typing import InputError

Rows = tuple[int, int]
"""First (inclusive) and last (exclusive) index along a tensor's first axis."""

ReadRows = Callable[[Rows | None], np.ndarray]
"""Returns some rows of a tensor, or with None all of it."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file. Handles hold no values, so that a whole checkpoint can be looked at for nothing."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    """Where the values lie; for tensors that are in memory already, what to call them in messages."""
    rows: ReadRows = dataclasses.field(repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: Rows | None = None) -> np.ndarray:
        """Returns its values, or those of some rows; each call reads the file again and keeps nothing.

        Raises:
          InputError: the file ends before the values do, or cannot be read.
        """
        return self.rows(rows)


def in_memory(arrays: Mapping[str, Any], *, what: str = "memory") -> dict[str, Tensor]:
    """Returns handles of arrays that are in memory already; `what` stands for their file."""
    return {name: _of_array(name, np.asarray(array), what) for name, array in arrays.items()}


def rows_of_file(file: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> ReadRows:
    """Returns a reader of a tensor that lies in C order at `offset` bytes of a file.

    It reads instead of mapping: pages of a mapped file would count as this process's memory until it is closed.
    """
    row_size = math.prod(shape[1:]) * dtype.itemsize

    def read(rows: Rows | None) -> np.ndarray:
        first, last = rows or (0, shape[0] if shape else 1)
        wanted = (last - first, *shape[1:]) if shape else ()
        return read_at(file, offset + first * row_size, dtype, (last - first) * row_size).reshape(wanted)

    return read


def read_at(file: Path, offset: int, dtype: np.dtype, nbytes: int) -> np.ndarray:
    """Returns `nbytes` at an offset of a file as a flat array.

    Raises:
      InputError: the file is shorter than that, or cannot be read.
    """
    buffer = np.empty(nbytes, np.uint8)
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(offset)
            done = 0
            while done < nbytes and (count := stream.readinto(buffer[done:].data)):
                done += count
    except OSError as error:
        raise InputError(f"cannot read '{file}': {error.strerror}") from error
    if done < nbytes:
        raise damaged(file, f"it ends {nbytes - done:,} bytes early")
    return buffer.view(dtype)


def damaged(file: Path, detail: str) -> InputError:
    """Returns the error for a file that is not what it should be."""
    return InputError(f"'{file}' is truncated or damaged: {detail}; fetch or write it again")


def _of_array(name: str, array: np.ndarray, what: str) -> Tensor:
    def rows(rows: Rows | None) -> np.ndarray:
        return array if rows is None else array[slice(*rows)]

    return Tensor(name, array.shape, array.dtype, Path(what), rows)
