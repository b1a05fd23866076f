"""Reads PyTorch's files without PyTorch and without running what a pickle says: only tensors come out.

A pickle is a program. The unpickler here knows a handful of names, all of which stand for tensors and plain values;
any other name is refused before anything is called. Both formats are read: the zip archive, and the consecutive
pickles that PyTorch wrote before 1.6.
"""

import collections
import dataclasses
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jxfer.typing import InputError
from jxfer.weights.tensors import Rows, Tensor, damaged, read_at, rows_of_file

_MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of the old format."""

_DTYPES = {
    "Double": np.float64,
    "Float": np.float32,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "ComplexFloat": np.complex64,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "Untyped": np.uint8,
}
_NAMED_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "complex64": np.complex64,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Under which keys training scripts keep the weights beside what else they save."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A flat run of elements in the file, which tensors look into."""

    key: str
    dtype: np.dtype
    offset: int = 0
    """Elements before it: the old format knows storages that are views of others."""


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it."""

    storage: _Storage
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a storage's bytes lie in the file."""

    offset: int
    nbytes: int


def open_torch(file: Path) -> dict[str, Tensor]:
    """Returns handles of the tensors of a `.pt`, `.pth`, `.bin` or `.th` file.

    Tensors in nested dicts are named by their keys with dots between. Where the file is a dict with weights under
    `state_dict`, `model_state_dict` or `model`, these are meant and the rest of the file is not.

    Raises:
      InputError: the file is truncated or damaged, holds no tensor, or names anything but tensors and plain values.
    """
    reader = _read_zip if zipfile.is_zipfile(file) else _read_consecutive
    try:
        content, places = reader(file)
        views = _named_views(file, content)
        return {name: _tensor(file, name, view, places) for name, view in views.items()}
    except InputError:
        raise
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise damaged(file, "it is not a whole PyTorch file") from error


class _TensorUnpickler(pickle._Unpickler):
    """Knows the names in `_KNOWN` and nothing else.

    It is Python's own because the one in C reserves as much memory as a damaged file asks for.
    """

    def __init__(self, stream: io.BufferedIOBase, file: Path):
        super().__init__(stream, encoding="utf-8")
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        """Returns our stand-in for a name.

        Raises:
          InputError: the name is none of those that tensors need.
        """
        if (known := _KNOWN.get(f"{module}.{name}")) is None:
            full = f"{module}.{name}".encode("unicode_escape").decode()
            raise InputError(
                f"'{self._file}' is refused: its pickle calls `{full}`, which is not a tensor; "
                "save the tensors alone, as safetensors or torch.save(model.state_dict(), ...)"
            )
        return known

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns the storage of `("storage", type, key, location, count[, view])`."""
        kind, dtype, key, _, _, *rest = pid
        if kind != "storage" or not isinstance(dtype, _DType):
            raise ValueError(f"unknown reference {kind}")
        if rest and rest[0] is not None:
            return _Storage(str(key), dtype.dtype, int(rest[0][1]))
        return _Storage(str(key), dtype.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class _DType:
    """Stands for `torch.FloatStorage`, `torch.float32` and the like; has slots so that no pickle can alter it."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True, slots=True)
class _Function:
    """Stands for a function; has slots so that no pickle can alter it."""

    fn: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)


class _Ignored:
    """Stands for a value that is no tensor and that nobody needs, such as a NumPy scalar beside the weights."""

    def __init__(self, *args: Any) -> None:
        del args

    def __setstate__(self, state: Any) -> None:
        del state


def _rebuild(storage: Any, start: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any) -> _View:
    del rest
    return _View(storage, storage.dtype, start, tuple(shape), tuple(strides))


def _rebuild_typed(
    storage: Any,
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    grad: Any,
    hooks: Any,
    dtype: _DType,
    *_: Any,
) -> _View:
    return _View(storage, dtype.dtype, start, tuple(shape), tuple(strides))


def _rebuild_parameter(view: _View, *rest: Any) -> _View:
    del rest
    return view


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": collections.OrderedDict,
    "builtins.set": set,
    "__builtin__.set": set,
    "torch.Size": tuple,
    "torch.device": _Ignored,
    "torch._utils._rebuild_tensor": _Function(_rebuild),
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild),
    "torch._utils._rebuild_tensor_v3": _Function(_rebuild_typed),
    "torch._utils._rebuild_parameter": _Function(_rebuild_parameter),
    "numpy.dtype": _Ignored,
    "numpy.core.multiarray.scalar": _Ignored,
    "numpy._core.multiarray.scalar": _Ignored,
    "_codecs.encode": _Ignored,
    "torch.storage.UntypedStorage": _DType(np.dtype(np.uint8)),
    **{f"torch.{name}Storage": _DType(np.dtype(dtype)) for name, dtype in _DTYPES.items()},
    **{f"torch.{name}": _DType(np.dtype(dtype)) for name, dtype in _NAMED_DTYPES.items()},
}

_Read = tuple[Any, Mapping[str, _Place]]
"""The unpickled content, and the place of each storage."""


def _read_zip(file: Path) -> _Read:
    with zipfile.ZipFile(file) as archive, open(file, "rb") as stream:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(
                f"'{file}' is a zip archive without `data.pkl`, so no PyTorch file; give a file of weights"
            )
        folder = pickles[0].removesuffix("data.pkl")
        content = _TensorUnpickler(io.BytesIO(archive.read(pickles[0])), file).load()
        byte_order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in members else b"little"
        places = {
            name.removeprefix(f"{folder}data/"): _place(stream, member)
            for name, member in members.items()
            if name.startswith(f"{folder}data/")
        }
    if byte_order != b"little":
        raise _foreign_order(file)
    return content, places


def _place(stream: io.BufferedIOBase, member: zipfile.ZipInfo) -> _Place:
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError("PyTorch compresses nothing")
    # The local header repeats the name and has an extra field of its own length, which aligns the data.
    stream.seek(member.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    return _Place(member.header_offset + 30 + name_length + extra_length, member.file_size)


def _read_consecutive(file: Path) -> _Read:
    with open(file, "rb") as stream:

        def load() -> Any:
            return _TensorUnpickler(stream, file).load()

        if load() != _MAGIC:
            raise InputError(f"'{file}' is a pickle, but no PyTorch file; give a file that torch.save wrote")
        load()  # version of the format
        if not load()["little_endian"]:
            raise _foreign_order(file)
        storages: dict[str, _Storage] = {}
        unpickler = _Recording(stream, file, storages)
        content = unpickler.load()
        places = {}
        size = file.stat().st_size
        for key in load():
            itemsize = storages[key].dtype.itemsize
            nbytes = struct.unpack("<q", stream.read(8))[0] * itemsize
            places[key] = _Place(stream.tell(), nbytes)
            if stream.tell() + nbytes > size:
                raise damaged(file, f"it has {size:,} bytes and needs at least {stream.tell() + nbytes:,}")
            stream.seek(nbytes, io.SEEK_CUR)
    return content, places


def _foreign_order(file: Path) -> InputError:
    return InputError(f"'{file}' was written by a big-endian machine; write it again as safetensors there")


class _Recording(_TensorUnpickler):
    """Also notes the storages it meets, whose types the old format gives nowhere else."""

    def __init__(self, stream: io.BufferedIOBase, file: Path, storages: dict[str, _Storage]):
        super().__init__(stream, file)
        self._storages = storages

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns and notes the storage."""
        storage = super().persistent_load(pid)
        self._storages[storage.key] = storage
        return storage


def _named_views(file: Path, content: Any) -> dict[str, _View]:
    while isinstance(content, dict):
        inner = (content[key] for key in _WRAPPERS if isinstance(content.get(key), dict))
        wrapped = next((value for value in inner if _flat(value)), None)
        if wrapped is None:
            break
        content = wrapped
    found = _flat(content)
    views = dict(found)
    if not views:
        raise InputError(f"'{file}' holds no tensors; give a file of weights, such as torch.save(model.state_dict())")
    if len(views) < len(found):
        raise InputError(f"'{file}' holds two tensors of one name; save model.state_dict() alone")
    return views


def _flat(content: Any, name: str = "") -> list[tuple[str, _View]]:
    if isinstance(content, _View):
        return [(name or "tensor", content)]
    items: Any = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list | tuple):
        items = enumerate(content)
    return [pair for key, value in items for pair in _flat(value, f"{name}.{key}" if name else str(key))]


def _tensor(file: Path, name: str, view: _View, places: Mapping[str, _Place]) -> Tensor:
    place = places[view.storage.key]
    dtype = view.dtype
    start = view.storage.offset + view.start
    count = _span(view) if math.prod(view.shape) else 0
    if min(start, *view.shape, *view.strides, 0) < 0 or (start + count) * dtype.itemsize > place.nbytes:
        raise damaged(file, f"`{name}` reaches beyond its storage")
    offset = place.offset + start * dtype.itemsize
    dense = view.strides == _dense(view.shape) or math.prod(view.shape) <= 1
    rows = rows_of_file(file, offset, dtype, view.shape) if dense else _strided(file, offset, dtype, view, count)
    return Tensor(name, view.shape, view.dtype, file, rows)


def _strided(file: Path, offset: int, dtype: np.dtype, view: _View, count: int) -> Callable[[Rows | None], np.ndarray]:
    def rows(rows: Rows | None) -> np.ndarray:
        flat = read_at(file, offset, dtype, count * dtype.itemsize)
        strides = [stride * dtype.itemsize for stride in view.strides]
        array = np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False)
        return array if rows is None else array[slice(*rows)]

    return rows


def _span(view: _View) -> int:
    """Returns how many elements lie from a tensor's first to its last."""
    return 1 + sum((length - 1) * stride for length, stride in zip(view.shape, view.strides, strict=True))


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
