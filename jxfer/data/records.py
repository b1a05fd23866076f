"""Data sets in the format of TensorFlow Datasets, read without TensorFlow."""

import difflib
import io
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from jxfer.config import DataConfig
from jxfer.data import prepare
from jxfer.data.dataset import MEMORY_BYTES, Dataset, LazySplit, Split, decode_all, usual_splits
from jxfer.data.images import ImageShape, decode
from jxfer.paths import unknown
from jxfer.typing import InputError

NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[^/:]+))?(:(?P<version>\d+\.\d+\.\d+))?")
VERSION = re.compile(r"\d+\.\d+\.\d+")
CHUNK = 1024


def load_records(config: DataConfig) -> Dataset:
    """Loads `tfds:NAME[/CONFIG][:VERSION]` or `tfds:DIR`.

    Raises:
      InputError: the data set is not prepared, is no image classification, holds a damaged image, or has images of
        different sizes and `config.image_size` is not set.
    """
    directory = _find(config.name.removeprefix("tfds:"))
    builder = _builder(directory)
    _check_format(builder, directory)
    image_key, label_key = _keys(builder)
    shape = _input_shape(builder, image_key, config)
    opened = {name: _open_split(builder, name, image_key, label_key, shape) for name in builder.info.splits}
    splits = usual_splits({name: split for name, split in opened.items() if _labelled(split)}, name=config.name)
    input_shape = _first_image(splits["train"], directory).shape
    fits = sum(map(len, splits.values())) * math.prod(input_shape) <= MEMORY_BYTES
    return Dataset(
        name=builder.info.full_name.rsplit("/", 1)[0],
        version=str(builder.version),
        class_names=tuple(builder.info.features[label_key].names),
        splits={name: _load(split, directory) for name, split in splits.items()} if fits else splits,
        input_shape=input_shape,
    )


def _find(name: str) -> Path:
    """Returns the folder of a prepared version; prepares jxfer's own data sets."""
    path = Path(name).expanduser()
    if (path / "dataset_info.json").is_file():
        return path.absolute()
    match = NAME.fullmatch(name)
    if match is None:
        raise InputError(f"no prepared data set at '{path}': it has no dataset_info.json; give the folder of a version")
    if match["name"] in prepare.OWN:
        return prepare.prepare(match["name"], config=match["config"], version=match["version"])
    for root in _data_dirs():
        if found := _newest(root / match["name"] / (match["config"] or ""), match["version"]):
            return found
    if difflib.get_close_matches(match["name"], prepare.OWN, cutoff=0.7):
        raise unknown("data set", match["name"], prepare.OWN)
    raise InputError(_how_to_prepare(name))


def _data_dirs() -> list[Path]:
    own = os.environ.get("TFDS_DATA_DIR")
    return [*([Path(own)] if own else []), Path.home() / "tensorflow_datasets", prepare.cache_dir() / "tfds"]


def _newest(folder: Path, version: str | None) -> Path | None:
    """Returns the highest (or the given) version in `folder`, looking into a sole config if there is one."""
    infos = [*folder.glob("*/dataset_info.json")] or [*folder.glob("*/*/dataset_info.json")]
    infos = [info for info in infos if VERSION.fullmatch(info.parent.name)]
    if len({info.parents[1] for info in infos}) > 1:
        configs = ", ".join(sorted({info.parents[1].name for info in infos}))
        raise InputError(f"data set '{folder.name}' is prepared in several configs; add one to its name: {configs}")
    versions = {tuple(map(int, info.parent.name.split("."))): info.parent for info in infos}
    if version is not None:
        return versions.get(tuple(map(int, version.split("."))))
    return versions[max(versions)] if versions else None


def _how_to_prepare(name: str) -> str:
    looked = ", ".join(f"'{root}'" for root in _data_dirs())
    return (
        f"data set '{name}' is not prepared (looked in {looked}; jxfer's own: {', '.join(prepare.OWN)}). On a machine"
        " with internet: pip install tensorflow tensorflow-datasets array_record importlib_resources && python -c"
        ' "import tensorflow_datasets as tfds;'
        f" tfds.builder('{name}', file_format='array_record').download_and_prepare()\"; then copy"
        " ~/tensorflow_datasets here, or set TFDS_DATA_DIR to where it is"
    )


def _builder(directory: Path) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # of kinds that belong to protobuf, TFDS and Python
        raise _damaged(directory, error) from error


def _damaged(directory: Path, error: Exception) -> InputError:
    return InputError(f"data set in '{directory}' is damaged ({_first_line(error)}); {_remedy(directory)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _damaged_image(split: LazySplit, index: int, directory: Path) -> InputError:
    return _damaged(directory, OSError(f"the image of example {split.ids[index]} cannot be read"))


def _remedy(directory: Path) -> str:
    own = any(directory.is_relative_to(prepare.cache_dir() / "tfds" / name) for name in prepare.OWN)
    return f"delete '{directory}' and it is prepared again" if own else "prepare it again"


def _check_format(builder: Any, directory: Path) -> None:
    found = builder.info.file_format.value
    if found != "array_record":
        raise InputError(
            f"data set in '{directory}' is stored as {found}, which needs TensorFlow; where that is installed run"
            f" tfds convert_format --dataset_dir={directory} --out_file_format=array_record --out_path=NEW_DIR"
        )


def _keys(builder: Any) -> tuple[str, str]:
    """Returns the names of the image and of the label feature."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    wanted = builder.info.supervised_keys or (*images, *labels)
    if len(wanted) != 2 or wanted[0] not in images or wanted[1] not in labels:
        raise InputError(
            f"data set '{builder.name}' is no image classification: its features are {', '.join(features)}"
        )
    return wanted


def _input_shape(builder: Any, image_key: str, config: DataConfig) -> ImageShape:
    height, width, channels = builder.info.features[image_key].shape
    if config.image_size is None and None in (height, width):
        raise InputError(f"data set '{config.name}' has images of different sizes; set data.image_size")
    return ImageShape.of(config, channels=1 if channels == 1 else 3)


def _open_split(builder: Any, name: str, image_key: str, label_key: str, shape: ImageShape) -> LazySplit:
    """Opens a split without decoding images; every record is read once for its label, `CHUNK` at a time."""
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split=name, decoders={image_key: tfds.decode.SkipDecoding()})
    directory = Path(builder.data_dir)

    def read(indices: range) -> list[Any]:
        try:
            return source.__getitems__(indices)
        except (
            Exception
        ) as error:  # ArrayRecord's for a missing file and a wrong checksum, protobuf's, TFDS's, Python's
            if len(indices) == 1:
                raise OSError(f"{_record(builder, name, indices[0])}: {_first_line(error)}") from error
            return [record for index in indices for record in read(range(index, index + 1))]

    try:
        chunks = [read(range(start, min(start + CHUNK, len(source)))) for start in range(0, len(source), CHUNK)]
    except OSError as error:
        raise _damaged(directory, error) from error
    labels = [record[label_key] for records in chunks for record in records]
    ids = np.array([f"{name}/{index:07d}" for index in range(len(labels))])

    def image_at(index: int) -> np.ndarray:
        (record,) = read(range(index, index + 1))
        try:
            return decode(io.BytesIO(record[image_key]), shape)
        except OSError as error:
            raise OSError(f"{_record(builder, name, index)} holds no image that can be decoded ({error})") from error

    split_labels = np.array(labels, np.int32)
    return LazySplit(ids, split_labels, image_at, where=str(directory), remedy=_remedy(directory))


def _record(builder: Any, split: str, index: int) -> str:
    """Names a record of a split: its number in its file, from 0 on."""
    info = builder.info.splits[split]
    for file, count in zip(info.filenames, info.shard_lengths, strict=True):
        if index < count:
            return f"record {index} of '{file}'"
        index -= count
    return f"record {index} of split {split}"


def _labelled(split: LazySplit) -> bool:
    """Whether every example has a class; test splits of public contests often mark theirs with -1."""
    return len(split) > 0 and bool((split.labels >= 0).all())


def _first_image(split: LazySplit, directory: Path) -> np.ndarray:
    try:
        return split.example_at(0)
    except OSError as error:
        raise _damaged_image(split, 0, directory) from error


def _load(split: LazySplit, directory: Path) -> Split:
    loaded, bad = decode_all(split)
    if bad:
        raise _damaged_image(split, bad[0], directory)
    return loaded
