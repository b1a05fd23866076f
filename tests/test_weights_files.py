"""Weights files of every format but PyTorch's: what comes out of whole ones, and what is said of damaged ones."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jxfer.origins import weights_files
from jxfer.typing import InputError
from jxfer.weights.files import is_weights_file, open_tensors
from jxfer.weights.save import write_safetensors

RNG = np.random.default_rng(0)
ARRAYS: dict[str, np.ndarray] = {
    "embed.weight": RNG.normal(size=(4, 3)).astype(np.float32),
    "block.0.half": RNG.normal(size=(2, 1, 3)).astype(np.float16),
    "block.0.brain": RNG.normal(size=(5,)).astype(ml_dtypes.bfloat16),
    "scalar": np.asarray(1.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "counts": np.arange(6, dtype=np.int64).reshape(3, 2),
    "mask": np.asarray([True, False]),
}


def write_npz(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(file, **arrays)


def write_zipped_npz(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez_compressed(file, **arrays)


def write_h5(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes groups as Keras does, with the words that it keeps beside the weights."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w") as archive:
        archive.attrs["keras_version"] = "1.2.2"
        for name, array in arrays.items():
            if array.dtype != ml_dtypes.bfloat16:
                archive.create_dataset(name.replace(".", "/"), data=array)
        archive.create_dataset("words", data=[b"not", b"numbers"])


def write_onnx(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    onnx = pytest.importorskip("onnx")
    initialisers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([node], "graph", *([each] for each in value), initializer=initialisers)
    onnx.save(onnx.helper.make_model(graph), file)


def write_plain(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    write_safetensors(file, arrays, {"format": "pt"})


WRITERS: dict[str, tuple[str, Callable[[Path, Mapping[str, np.ndarray]], None]]] = {
    "safetensors": ("model.safetensors", write_plain),
    "npz": ("model.npz", write_npz),
    "compressed npz": ("model.npz", write_zipped_npz),
    "h5": ("model.h5", write_h5),
    "onnx": ("model.onnx", write_onnx),
}
formats = pytest.mark.parametrize("kind", WRITERS)


def written(kind: str, folder: Path) -> Path:
    name, write = WRITERS[kind]
    write(folder / name, ARRAYS)
    return folder / name


def expected_of(kind: str) -> dict[str, np.ndarray]:
    if kind != "h5":
        return ARRAYS
    return {n.replace(".", "/"): array for n, array in ARRAYS.items() if array.dtype != ml_dtypes.bfloat16}


def assert_equal(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def read_whole(file: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors([file]).items()}


@formats
def test_a_file_gives_back_every_tensor_to_the_bit(kind, tmp_path):
    file = written(kind, tmp_path)
    tensors = open_tensors([file])
    expected = expected_of(kind)
    assert set(tensors) == set(expected)
    for name, array in expected.items():
        assert (tensors[name].shape, tensors[name].dtype, tensors[name].nbytes) == (
            array.shape,
            array.dtype,
            array.nbytes,
        )
        assert_equal(tensors[name].read(), array)


@formats
def test_some_rows_of_a_tensor_are_those_rows_of_the_whole(kind, tmp_path):
    tensors = open_tensors([written(kind, tmp_path)])
    for name, array in expected_of(kind).items():
        if array.ndim and len(array) > 1:
            assert_equal(tensors[name].read((1, len(array))), array[1:])
            assert_equal(tensors[name].read((1, 1)), array[1:1])


def test_written_safetensors_are_read_by_their_own_library(tmp_path):
    from safetensors.numpy import load_file

    loaded = load_file(written("safetensors", tmp_path))
    assert set(loaded) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert_equal(loaded[name], array)


def one_line_of(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert len(text.splitlines()) == 1
    return text


@formats
def test_a_truncated_file_is_refused_in_one_line(kind, tmp_path):
    file = written(kind, tmp_path)
    whole = file.read_bytes()
    # The end of an ONNX file says only which operators the graph is made of.
    longest = len(whole) - (16 if kind == "onnx" else 1)
    for length in [*np.linspace(0, longest, 40).astype(int)]:
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated or damaged") as error:
            read_whole(file)
        assert str(file) in one_line_of(error)


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "h5"])  # libhdf5 does not promise to survive
def test_whatever_byte_is_wrong_nothing_but_an_input_error_comes_out(kind, tmp_path):
    file = written(kind, tmp_path)
    whole = bytearray(file.read_bytes())
    rng, messages = np.random.default_rng(1), []
    for place in rng.choice(len(whole), min(len(whole), 150), replace=False):
        wrong = whole.copy()
        wrong[place] ^= int(rng.integers(1, 256))
        file.write_bytes(wrong)
        try:
            read_whole(file)
        except InputError as error:
            messages.append(str(error))
    assert messages
    assert all(len(message.splitlines()) == 1 for message in messages)


def test_what_is_no_weights_file_is_named_with_the_formats_that_are_known(tmp_path):
    assert is_weights_file(tmp_path / "model.safetensors")
    assert not is_weights_file(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match=r"model\.gguf' is of no known format of weights; known: \.safetensors, \.npz"):
        open_tensors([tmp_path / "model.gguf"])
    with pytest.raises(InputError, match=r"model\.npz' does not exist"):
        open_tensors([tmp_path / "model.npz"])


def test_an_npz_of_objects_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "model.npz", weight=np.ones(2), extra=np.asarray([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="`extra` is of type object, which is no tensor"):
        open_tensors([tmp_path / "model.npz"])


def test_a_type_of_numbers_that_is_not_known_is_named(tmp_path):
    header = json.dumps({"weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(InputError, match="`weight` is of type F4; known: F64, F32"):
        open_tensors([tmp_path / "model.safetensors"])


def test_shards_are_read_as_one_and_a_missing_one_is_named(tmp_path):
    files = write_safetensors(tmp_path / "model.safetensors", ARRAYS, {}, max_shard_bytes=45)
    assert [file.name for file in files[:2]] == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert files[-1].name == "model.safetensors.index.json"
    for origin in (f"file:{tmp_path}", f"file:{files[-1]}"):
        tensors = open_tensors(weights_files(origin))
        assert set(tensors) == set(ARRAYS)
        for name, array in ARRAYS.items():
            assert_equal(tensors[name].read(), array)
    total = json.loads(files[-1].read_text())["metadata"]["total_size"]
    assert total == sum(array.nbytes for array in ARRAYS.values())
    files[2].unlink()
    with pytest.raises(InputError, match=r"shard '.*model-00003-of-00004\.safetensors' is missing, one of 4 that"):
        weights_files(f"file:{tmp_path}")


def test_two_files_that_hold_the_same_tensor_are_not_one_model(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        write_safetensors(file, {"weight": np.ones(2, np.float32)}, {})
    with pytest.raises(InputError, match=r"b\.safetensors' and '.*a\.safetensors' both hold `weight`"):
        open_tensors(files)


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    import safetensors.numpy

    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"weight": np.ones(2, np.float32)}, {})
    old = file.read_bytes()

    def full(tensors, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(file, {"weight": np.zeros(2, np.float32)}, {})
    assert file.read_bytes() == old
