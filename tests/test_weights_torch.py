"""PyTorch's files without PyTorch, made here by hand: tensors come out of both formats, and no code ever runs."""

import collections
import dataclasses
import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jxfer.typing import InputError
from jxfer.weights.files import open_tensors

MAGIC = 0x1950A86A20F9469CFC6C
TYPES = {"Float": np.float32, "BFloat16": ml_dtypes.bfloat16, "Long": np.int64, "Double": np.float64}


@dataclasses.dataclass(frozen=True)
class Name:
    """What a pickle calls by name, without there being such a thing here."""

    module: str
    name: str

    def __call__(self) -> None:
        """Only there because pickle asks."""


@dataclasses.dataclass(eq=False)
class Storage:
    """A flat run of numbers."""

    array: np.ndarray

    @property
    def type(self) -> Name:
        return Name("torch", f"{next(n for n, dtype in TYPES.items() if self.array.dtype == dtype)}Storage")


@dataclasses.dataclass
class Stored:
    """A tensor that looks into a storage."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __reduce__(self) -> Any:
        rest = (False, collections.OrderedDict())
        return (Name("torch._utils", "_rebuild_tensor_v2"), (self.storage, self.start, self.shape, self.strides, *rest))


class Pickler(pickle._Pickler):
    """Writes names of things that are not here, and storages as PyTorch refers to them."""

    def __init__(self, stream: Any, keys: list[Storage], view: tuple[Any, ...]):
        super().__init__(stream, 2)
        self.keys, self.view = keys, view

    def reducer_override(self, obj: Any) -> Any:
        return obj.name if isinstance(obj, Name) else NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not isinstance(obj, Name):
            return super().save_global(obj, name)
        self.write(f"c{obj.module}\n{obj.name}\n".encode())
        return self.memoize(obj)

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        if obj not in self.keys:
            self.keys.append(obj)
        return ("storage", obj.type, str(self.keys.index(obj)), "cpu", obj.array.size, *self.view)


def pickled(content: Any, view: tuple[Any, ...] = ()) -> tuple[bytes, list[Storage]]:
    stream, keys = io.BytesIO(), []
    Pickler(stream, keys, view).dump(content)
    return stream.getvalue(), keys


def write_zip(file: Path, content: Any) -> None:
    data, storages = pickled(content)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", sys.byteorder)
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage.array.tobytes())
        archive.writestr("archive/version", "3\n")


def write_legacy(file: Path, content: Any) -> None:
    data, storages = pickled(content, (None,))
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(each, 2) for each in (MAGIC, 1001, system)]
    keys = pickle.dumps([str(key) for key in range(len(storages))], 2)
    values = [struct.pack("<q", storage.array.size) + storage.array.tobytes() for storage in storages]
    file.write_bytes(b"".join([*head, data, keys, *values]))


WRITERS = {"zip": write_zip, "legacy": write_legacy}
formats = pytest.mark.parametrize("kind", WRITERS)


def dense(array: Any) -> Stored:
    array = np.asarray(array)
    strides = tuple(stride // array.dtype.itemsize for stride in np.empty(array.shape, array.dtype).strides)
    return Stored(Storage(array.reshape(-1)), 0, array.shape, strides)


def example() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns what a training script saves, and the tensors that are meant."""
    flat = np.arange(12, dtype=np.float32)
    shared = Storage(flat)
    brain = np.asarray([[1.5, -2.0]], ml_dtypes.bfloat16)
    state = collections.OrderedDict(
        {
            "a.weight": Stored(shared, 0, (3, 4), (4, 1)),
            "a.turned": Stored(shared, 0, (4, 3), (1, 4)),
            "a.rows": Stored(shared, 4, (2, 2), (4, 2)),
            "a.brain": dense(brain),
            "a.count": dense(np.asarray(7)),
        }
    )
    grid = flat.reshape(3, 4)
    expected = {"a.weight": grid, "a.turned": grid.T, "a.rows": grid[1:, ::2], "a.brain": brain, "a.count": 7}
    content = {"state_dict": state, "epoch": 3, "best": 0.5, "args": ["x", (1, None)], "optimizer": {"m": dense(flat)}}
    return content, {name: np.asarray(array) for name, array in expected.items()}


@formats
def test_shared_strided_and_nested_tensors_come_out_as_they_are(kind, tmp_path):
    content, expected = example()
    WRITERS[kind](tmp_path / "model.pt", content)
    tensors = open_tensors([tmp_path / "model.pt"])
    assert set(tensors) == set(expected), "the weights, and nothing else that the script saved"
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name].read(), array)
        if array.ndim:
            np.testing.assert_array_equal(tensors[name].read((0, 1)), array[:1])


@formats
def test_tensors_in_nested_dicts_and_lists_are_named_by_their_keys(kind, tmp_path):
    WRITERS[kind](tmp_path / "model.pth", {"net": {"w": dense(np.ones(2))}, "more": [dense(np.zeros(3))]})
    assert set(open_tensors([tmp_path / "model.pth"])) == {"net.w", "more.0"}


class Bomb:
    """Makes a file when it is unpickled as pickles usually are."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> Any:
        return (os.system, (f"touch '{self.file}'",))


@formats
@pytest.mark.parametrize("where", ["beside the tensors", "instead of them", "in a tensor's hooks"])
def test_a_pickle_with_code_in_it_is_refused_by_name_and_nothing_runs(kind, where, tmp_path):
    trace = tmp_path / "ran"
    bomb = Bomb(trace)
    hidden = Stored(Storage(np.ones(2, np.float32)), 0, (2,), (1,))
    contents = {
        "beside the tensors": {"w": dense(np.ones(2)), "x": bomb},
        "instead of them": bomb,
        "in a tensor's hooks": {"w": type("", (), {"__reduce__": lambda _: (*hidden.__reduce__(), bomb)})()},
    }
    WRITERS[kind](tmp_path / "model.pt", contents[where])
    with pytest.raises(InputError, match=r"model\.pt' is refused: its pickle calls `\w+\.system`, which") as error:
        open_tensors([tmp_path / "model.pt"])
    assert len(str(error.value).splitlines()) == 1
    assert not trace.exists()
    assert os.system(f"touch '{trace}'") == 0
    assert trace.exists(), "the code would have left its trace"


@formats
@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "builtins.getattr", "numpy.load", "torch.load", "collections.OrderedDict.__init__", "mine.Net"],
)
def test_no_name_is_known_but_those_of_tensors(kind, name, tmp_path):
    module, _, attribute = name.rpartition(".")
    WRITERS[kind](tmp_path / "model.pt", {"w": dense(np.ones(2)), "x": Name(module, attribute)})
    with pytest.raises(InputError, match=f"its pickle calls `{name}`"):
        open_tensors([tmp_path / "model.pt"])


def test_code_before_the_tensors_of_an_old_file_is_refused_too(tmp_path):
    for place in range(3):
        parts = [pickle.dumps(each, 2) for each in (MAGIC, 1001, {"little_endian": True})]
        parts[place] = pickle.dumps(Bomb(tmp_path / "ran"))
        (tmp_path / "model.th").write_bytes(b"".join(parts))
        with pytest.raises(InputError, match="system"):
            open_tensors([tmp_path / "model.th"])
    assert not (tmp_path / "ran").exists()


@formats
def test_a_truncated_file_is_refused_in_one_line(kind, tmp_path):
    file = tmp_path / "model.pt"
    WRITERS[kind](file, example()[0])
    whole = file.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 60).astype(int):
        file.write_bytes(whole[:length])
        # Of an old file it may be a name that is cut off, and such a name is not known.
        with pytest.raises(InputError, match=r"truncated or damaged|is refused") as error:
            open_tensors([file])
        assert len(str(error.value).splitlines()) == 1


@formats
def test_whatever_byte_is_wrong_nothing_but_an_input_error_comes_out(kind, tmp_path):
    file = tmp_path / "model.pt"
    WRITERS[kind](file, example()[0])
    whole = bytearray(file.read_bytes())
    rng, messages = np.random.default_rng(1), []
    for place in rng.choice(len(whole), min(len(whole), 250), replace=False):
        wrong = whole.copy()
        wrong[place] ^= int(rng.integers(1, 256))
        file.write_bytes(wrong)
        try:
            for tensor in open_tensors([file]).values():
                tensor.read()
        except InputError as error:
            messages.append(str(error))
    assert messages
    assert all(len(message.splitlines()) == 1 for message in messages)


@formats
@pytest.mark.parametrize(
    ("start", "shape", "strides"), [(10, (4,), (1,)), (0, (13,), (1,)), (0, (2, 2), (20, 1)), (4, (2,), (-1,))]
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(kind, start, shape, strides, tmp_path):
    storage = Storage(np.arange(12, dtype=np.float32))
    WRITERS[kind](tmp_path / "model.pt", {"w": Stored(storage, start, shape, strides)})
    with pytest.raises(InputError, match="`w` reaches beyond its storage"):
        open_tensors([tmp_path / "model.pt"])


@formats
def test_a_file_without_tensors_says_so(kind, tmp_path):
    WRITERS[kind](tmp_path / "model.pt", {"epoch": 3})
    with pytest.raises(InputError, match="holds no tensors; give a file of weights"):
        open_tensors([tmp_path / "model.pt"])


def test_archives_and_pickles_that_are_not_pytorchs_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(InputError, match=r"is a zip archive without `data\.pkl`"):
        open_tensors([tmp_path / "model.pt"])
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(InputError, match="is a pickle, but no PyTorch file"):
        open_tensors([tmp_path / "model.pt"])
