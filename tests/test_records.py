"""TFDS data sets: our own ones prepared without TensorFlow, other people's found on disk, and what is said if not."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jxfer.config import DataConfig
from jxfer.data import Subset, batches, load_dataset, names
from jxfer.data import dataset as dataset_module
from jxfer.data.prepare import cache_dir
from jxfer.data.records import _record, load_records
from jxfer.typing import InputError


@pytest.fixture(scope="module")
def digits():
    return load_dataset(DataConfig())


@pytest.fixture
def digits_folder(digits, tmp_path):
    return shutil.copytree(cache_dir() / "tfds" / "jxfer_digits" / "1.0.0", tmp_path / "sets" / "mine" / "1.0.0")


def test_the_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    split, reference = digits.splits["train"], load_digits()
    assert digits.input_shape == (8, 8, 1)
    assert digits.class_names == tuple("0123456789")
    assert list(digits.splits) == ["train"]
    counts = np.round(split.arrays["image"][..., 0] * (16 / 255)).astype(int)
    found = sorted((label, *image.ravel()) for label, image in zip(split.labels.tolist(), counts, strict=True))
    wanted = sorted(
        (label, *image.ravel()) for label, image in zip(reference.target, reference.images.astype(int), strict=True)
    )
    assert found == wanted


def test_ids_are_unique_and_labels_int32(digits):
    split = digits.splits["train"]
    assert len(set(split.ids)) == len(split) == 1797
    assert split.ids[0] == "train/0000000"
    assert split.labels.dtype == np.int32


def test_reading_needs_no_tensorflow_and_imports_none(digits):
    code = (
        "import sys; from jxfer.config import DataConfig; from jxfer import data;"
        "split = data.load_dataset(DataConfig()).splits['train'];"
        "next(data.batches(split, batch_size=4, seed=0));"
        "assert not {'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prepared_folder_is_read_by_its_path(digits, digits_folder):
    again = load_dataset(DataConfig(name=f"tfds:{digits_folder}"))
    assert (again.splits["train"].arrays["image"] == digits.splits["train"].arrays["image"]).all()
    assert again.version == "1.0.0"


@pytest.mark.parametrize("name", ["tfds:mine", "tfds:mine:1.0.0"])
def test_a_prepared_set_is_found_in_the_data_dir(digits_folder, monkeypatch, name):
    monkeypatch.setenv("TFDS_DATA_DIR", str(digits_folder.parents[1]))
    assert len(load_dataset(DataConfig(name=name)).splits["train"]) == 1797


def test_several_configs_have_to_be_told_apart(digits_folder, monkeypatch):
    root = digits_folder.parent
    for config in ("a", "b"):
        shutil.copytree(digits_folder, root / config / "1.0.0")
    shutil.rmtree(digits_folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(root.parent))
    assert len(load_dataset(DataConfig(name="tfds:mine/b")).splits["train"]) == 1797
    with pytest.raises(InputError, match=r"several configs; add one to its name: a, b"):
        load_dataset(DataConfig(name="tfds:mine"))


def test_what_does_not_fit_in_memory_is_read_on_demand(digits, monkeypatch):
    monkeypatch.setattr("jxfer.data.records.MEMORY_BYTES", 0)
    split = load_records(DataConfig()).splits["train"]
    assert isinstance(split, dataset_module.LazySplit)
    indices = np.array([5, 0, 1796])
    wanted = digits.splits["train"].read(indices)
    assert all((split.read(indices)[name] == wanted[name]).all() for name in wanted)


def test_images_are_resized_and_coloured_on_reading():
    dataset = load_dataset(DataConfig(image_size=16, channels=3))
    assert dataset.input_shape == (16, 16, 3)
    assert dataset.splits["train"].read(np.arange(2))["image"].shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "tfds:cifar10",
            r"'cifar10' is not prepared.*pip install tensorflow tensorflow-datasets array_record.*TFDS_DATA_DIR",
        ),
        ("tfds:jxfer_digits:9.9.9", "no version 9.9.9; this jxfer makes 1.0.0"),
        ("tfds:jxfer_glyphs/9x9", "no config '9x9'; its configs: 8x8, 32x32"),
        ("tfds:jxfer_digit", "unknown data set `jxfer_digit`; nearest: `jxfer_digits`"),
        ("tfds:/no/such/folder", "no prepared data set at '/no/such/folder'"),
        ("mnist", "unknown data set 'mnist'; choose one of: tfds:jxfer_digits"),
    ],
)
def test_a_set_that_is_not_there_is_one_line_with_the_way_out(name, message):
    with pytest.raises(InputError, match=message) as caught:
        load_dataset(DataConfig(name=name))
    assert "\n" not in str(caught.value)


def _truncate(folder):
    file = next(folder.glob("*array_record*"))
    file.write_bytes(file.read_bytes()[:50000])


def _flip_bytes(folder):
    file = next(folder.glob("*array_record*"))
    content = file.read_bytes()
    file.write_bytes(content[:40000] + bytes(400) + content[40400:])


DAMAGE = {
    "records cut off": _truncate,
    "bytes flipped": _flip_bytes,
    "records missing": lambda folder: next(folder.glob("*array_record*")).unlink(),
    "description cut off": lambda folder: (folder / "dataset_info.json").write_text("{"),
    "features missing": lambda folder: (folder / "features.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_set_is_one_line_naming_the_folder(digits_folder, damage):
    DAMAGE[damage](digits_folder)
    with pytest.raises(InputError, match=r"mine/1.0.0' is damaged.*prepare it again") as caught:
        load_dataset(DataConfig(name=f"tfds:{digits_folder}"))
    assert "\n" not in str(caught.value)


def test_of_a_damaged_set_of_our_own_the_folder_to_delete_is_named(digits, tmp_path, monkeypatch):
    folder = tmp_path / "tfds" / "jxfer_digits" / "1.0.0"
    shutil.copytree(cache_dir() / "tfds" / "jxfer_digits" / "1.0.0", folder)
    _truncate(folder)
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=rf"is damaged .*; delete '{folder}' and it is prepared again"):
        load_dataset(DataConfig())
    shutil.rmtree(folder)
    assert len(load_dataset(DataConfig()).splits["train"]) == 1797


@pytest.mark.parametrize("num_good", [0, 1])
def test_a_damaged_image_is_named(digits_folder, monkeypatch, num_good):
    calls = []

    def decode_the_first_only(file, shape):
        calls.append(file)
        if len(calls) > num_good:
            raise OSError("cut off")
        return np.zeros((8, 8, 1), np.uint8)

    monkeypatch.setattr("jxfer.data.records.decode", decode_the_first_only)
    with pytest.raises(InputError, match=r"mine/1.0.0' is damaged \(the image of example train/0000000 cannot be read"):
        load_dataset(DataConfig(name=f"tfds:{digits_folder}"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_the_damaged_record_is_named_with_its_file(digits_folder, damage):
    (file,) = digits_folder.glob("*array_record*")
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"\(record \d+ of '{file.name}': .+\); prepare it again$") as caught:
        load_dataset(DataConfig(name=f"tfds:{digits_folder}"))
    assert "\n" not in str(caught.value)


def test_a_record_damaged_while_a_run_reads_is_named_too(digits_folder, monkeypatch):
    monkeypatch.setattr("jxfer.data.records.MEMORY_BYTES", 0)
    split = load_dataset(DataConfig(name=f"tfds:{digits_folder}")).splits["train"]
    (file,) = digits_folder.glob("*array_record*")
    os.truncate(file, 100_000)
    name = f"example 'train/0001700' of '{digits_folder}' cannot be read: record 1700 of '{file.name}'"
    with pytest.raises(InputError, match=rf"^{re.escape(name)}.+; prepare it again"):
        next(batches(Subset(split, np.array([1700])), batch_size=1, seed=0))


def test_records_are_counted_file_by_file():
    files = SimpleNamespace(filenames=["a", "b", "c"], shard_lengths=[3, 0, 2])
    builder = SimpleNamespace(info=SimpleNamespace(splits={"train": files}))
    named = [_record(builder, "train", index) for index in (0, 2, 3, 4)]
    assert named == ["record 0 of 'a'", "record 2 of 'a'", "record 0 of 'c'", "record 1 of 'c'"]


def test_a_format_that_needs_tensorflow_is_refused_with_the_conversion(digits_folder):
    info = json.loads((digits_folder / "dataset_info.json").read_text())
    (digits_folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(InputError, match=r"stored as tfrecord, which needs TensorFlow.*convert_format"):
        load_dataset(DataConfig(name=f"tfds:{digits_folder}"))


def test_names_lists_our_own_first():
    assert names()[:2] == ("tfds:jxfer_digits", "tfds:jxfer_glyphs")
