"""Reads weights files of the world's formats: safetensors, npz, Keras h5, ONNX initialisers and PyTorch pickles."""

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jxfer.typing import InputError
from jxfer.weights.tensors import Rows, Tensor, damaged, rows_of_file
from jxfer.weights.torch_files import open_torch

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

# What damaged archives raise besides: unknown flags, ways of compression and versions, headers that are no Python.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError, KeyError, TypeError, SyntaxError)


def open_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Returns handles of all tensors of one or several files (the shards of one checkpoint), by name.

    Raises:
      InputError: a file is missing, of no known format, truncated or damaged, or holds more than tensors; or two files
        hold a tensor of the same name.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _open_file(Path(file)).items():
            if name in tensors:
                raise InputError(f"'{file}' and '{tensors[name].file}' both hold `{name}`; give the files of one model")
            if not name.isprintable():
                raise damaged(file, f"it holds a tensor of the name {name!a}")
            tensors[name] = tensor
    return tensors


def is_weights_file(file: Path) -> bool:
    """Tells by its suffix whether a file is of a format that `open_tensors` reads."""
    return file.suffix in _FORMATS


def _open_file(file: Path) -> dict[str, Tensor]:
    if not is_weights_file(file):
        raise InputError(f"'{file}' is of no known format of weights; known: {', '.join(_FORMATS)}")
    if not file.is_file():
        raise InputError(f"'{file}' does not exist; give a file of weights")
    try:
        return _FORMATS[file.suffix](file)
    except OSError as error:
        raise InputError(f"cannot read '{file}': {error}".splitlines()[0]) from error


def _open_safetensors(file: Path) -> dict[str, Tensor]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise damaged(file, "it ends within its header")
        header = _json(file, stream.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    try:
        tensors = {name: _safetensor(file, start, name, entry) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(file, "its header is not that of a safetensors file") from error
    if start + end > size:
        raise damaged(file, f"it has {size:,} bytes and needs {start + end:,}")
    return tensors


def _safetensor(file: Path, start: int, name: str, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise InputError(f"'{file}': `{name}` is of type {entry['dtype']}; known: {', '.join(_SAFETENSORS_DTYPES)}")
    dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
    shape = tuple(int(length) for length in entry["shape"])
    first, last = entry["data_offsets"]
    if min(*shape, first, 0) < 0 or last - first != math.prod(shape) * dtype.itemsize:
        raise damaged(file, f"`{name}` has {last - first:,} bytes, which its shape {shape} does not need")
    return Tensor(name, shape, dtype, file, rows_of_file(file, start + first, dtype, shape))


def _json(file: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise damaged(file, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise damaged(file, "its header is not that of a safetensors file")
    return header


def _open_npz(file: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.namelist() if member.endswith(".npy")]
            tensors = [_npy(file, archive, member) for member in members]
    except InputError:
        raise
    except _ZIP_ERRORS as error:
        raise damaged(file, "it is not a whole npz archive") from error
    return {tensor.name: tensor for tensor in tensors}


def _npy(file: Path, archive: zipfile.ZipFile, member: str) -> Tensor:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    name = member.removesuffix(".npy")
    # NumPy writes bfloat16 as two bytes of no type.
    own = np.dtype(ml_dtypes.bfloat16) if dtype == np.dtype("V2") else dtype
    if own.hasobject or (own.kind not in "fiubc" and own != ml_dtypes.bfloat16):
        raise InputError(f"'{file}': `{name}` is of type {dtype}, which is no tensor; keep only arrays of numbers")

    def rows(rows: Rows | None) -> np.ndarray:
        try:
            with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False).view(own)
        except _ZIP_ERRORS as error:
            raise damaged(file, f"`{name}` cannot be read") from error
        return array if rows is None else array[slice(*rows)]

    return Tensor(name, shape, own, file, rows)


def _open_h5(file: Path) -> dict[str, Tensor]:
    h5py = _import("h5py", file)
    tensors: dict[str, Tensor] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.dtype.kind in "fiub":
            tensors[name] = Tensor(name, node.shape, node.dtype, file, _h5_rows(file, name))

    try:
        with h5py.File(file, "r") as archive:
            archive.visititems(visit)
    except (OSError, RuntimeError, KeyError) as error:
        raise damaged(file, "it is not a whole HDF5 file") from error
    return tensors


def _h5_rows(file: Path, name: str) -> Callable[[Rows | None], np.ndarray]:
    h5py = _import("h5py", file)

    def rows(rows: Rows | None) -> np.ndarray:
        try:
            with h5py.File(file, "r") as archive:
                return np.asarray(archive[name][()] if rows is None else archive[name][slice(*rows)])
        except (OSError, RuntimeError, KeyError) as error:
            raise damaged(file, f"`{name}` cannot be read") from error

    return rows


def _open_onnx(file: Path) -> dict[str, Tensor]:
    onnx = _import("onnx", file)
    try:
        graph = onnx.load(file, load_external_data=False).graph
        tensors = {str(proto.name): _onnx_tensor(file, proto) for proto in graph.initializer}
    except Exception as error:  # protobuf has exceptions of its own, which differ between its implementations
        raise damaged(file, "it is not an ONNX model") from error
    if not tensors:
        raise damaged(file, "it holds no initialisers")
    return tensors


def _onnx_tensor(file: Path, proto: Any) -> Tensor:
    onnx = _import("onnx", file)

    def rows(rows: Rows | None) -> np.ndarray:
        try:
            array = onnx.numpy_helper.to_array(proto, base_dir=str(file.parent))
        except Exception as error:  # values in a file of their own raise what that file's checks raise
            raise damaged(file, f"`{proto.name}` cannot be read") from error
        return array if rows is None else array[slice(*rows)]

    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(proto.data_type))
    return Tensor(str(proto.name), tuple(proto.dims), dtype, file, rows)


def _import(package: str, file: Path) -> Any:
    """Returns an optional package.

    Raises:
      InputError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"reading '{file}' needs the package {package}; pip install {package}") from error


_FORMATS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _open_safetensors,
    ".npz": _open_npz,
    ".h5": _open_h5,
    ".hdf5": _open_h5,
    ".onnx": _open_onnx,
    ".pt": open_torch,
    ".pth": open_torch,
    ".th": open_torch,
    ".bin": open_torch,
}
