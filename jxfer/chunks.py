"""One file of stored rows: an ArrayRecord of named rows, each with its checksum; the last record lists the names."""

import dataclasses
import functools
import json
import math
import os
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

SUFFIX, UNFINISHED = ".array_record", ".unfinished"

_CHECKSUM_BYTES = 4
_READ_ROWS = 4096  # at a time, so that reading a file needs little beside what is returned


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a row holds: the name, shape and dtype of each of its arrays, in order."""

    arrays: tuple[tuple[str, tuple[int, ...], str], ...]

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> "Layout":
        """Returns the layout of the rows of arrays [N ...], real or abstract."""
        return cls(tuple((name, tuple(value.shape[1:]), str(value.dtype)) for name, value in arrays.items()))

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for _, shape, dtype in self.arrays)

    def encode(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the bytes of the rows, [N row_bytes] uint8."""
        parts = [
            np.ascontiguousarray(arrays[name], jnp.dtype(dtype)).reshape(len(arrays[name]), -1).view(np.uint8)
            for name, _, dtype in self.arrays
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def decode(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays [N ...] that `encode` made rows of."""
        arrays, start = {}, 0
        for name, shape, dtype in self.arrays:
            size = math.prod(shape) * jnp.dtype(dtype).itemsize
            part = np.ascontiguousarray(rows[:, start : start + size])
            arrays[name] = part.view(jnp.dtype(dtype)).reshape(len(rows), *shape)
            start += size
        return arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """A file of rows, open for reading at random; `names` are those of its rows, in order."""

    path: Path
    names: tuple[str, ...]
    reader: Any

    def read(self, positions: np.ndarray, row_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows at `positions` [M] as [M row_bytes] uint8, and whether each is as it was written, [M]."""
        rows, good = np.zeros((len(positions), row_bytes), np.uint8), np.zeros(len(positions), bool)
        for start in range(0, len(positions), _READ_ROWS):
            part = positions[start : start + _READ_ROWS]
            for index, record in enumerate(self._records(part), start=start):
                if len(record) == row_bytes + _CHECKSUM_BYTES and _intact(self.names[positions[index]], record):
                    rows[index], good[index] = np.frombuffer(record, np.uint8, row_bytes), True
        return rows, good

    def _records(self, positions: np.ndarray) -> list[bytes]:
        """Returns records, empty where ArrayRecord itself finds one damaged, which makes it refuse the whole lot."""
        try:
            return self.reader.read(positions.tolist())
        except RuntimeError:
            return [self._record(int(position)) for position in positions]

    def _record(self, position: int) -> bytes:
        try:
            return self.reader.read([position])[0]
        except RuntimeError:
            return b""


def write_chunk(directory: Path, names: Sequence[str], rows: np.ndarray) -> Path:
    """Writes rows [N row_bytes] uint8 into a new file, whole or not at all, and returns its path.

    Names of files sort by the time of writing; those of two processes differ.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = directory / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{SUFFIX}"
    temporary = path.with_suffix(UNFINISHED)
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # each row can be read, and damaged, alone
    for name, row in zip(names, rows, strict=True):
        content = row.tobytes()
        writer.write(content + _checksum(name, content))
    writer.write(json.dumps(list(names)).encode())
    writer.close()
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)
    return path


@functools.lru_cache(maxsize=512)
def open_chunk(path: Path) -> Chunk:
    """Opens a file for reading; files are never rewritten, so that one stays open for the process.

    Raises:
      ValueError: its list of names is damaged, and with it all rows.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        num_rows = reader.num_records() - 1
        names = tuple(json.loads(reader.read([num_rows])[0])) if num_rows >= 0 else ()
    except RuntimeError as error:
        raise ValueError(f"'{path}': {error}") from error
    if len(names) != num_rows:
        raise ValueError(f"'{path}' lists {len(names)} names for {num_rows} rows")
    return Chunk(path, names, reader)


def _intact(name: str, record: bytes) -> bool:
    return _checksum(name, memoryview(record)[:-_CHECKSUM_BYTES]) == record[-_CHECKSUM_BYTES:]


def _checksum(name: str, content: bytes | memoryview) -> bytes:
    # The name counts, so that a row can never be taken for another example's.
    return zlib.crc32(content, zlib.crc32(name.encode(errors="surrogateescape"))).to_bytes(_CHECKSUM_BYTES)
