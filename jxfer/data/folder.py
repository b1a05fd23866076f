"""A folder of images as a data set: sub-folder = class, with split folders around them if there are any."""

import dataclasses
import hashlib
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jxfer.config import DataConfig
from jxfer.data.dataset import MEMORY_BYTES, Dataset, LazySplit, Split, decode_all, usual_splits
from jxfer.data.images import ImageShape, decode, read_header
from jxfer.typing import InputError

log = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": ("train", "training", "training_set"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "test_set", "testing"),
}
"""Split -> what its folder may be called, in any case."""

CONTENT_BYTES = 256 * 1024**2
"""Folders of at most this size are told apart by what their files hold; reading larger ones would take too long."""


@dataclasses.dataclass(frozen=True)
class File:
    """One image in a class folder; `name` is its path inside the data set, with slashes."""

    split: str
    class_name: str
    name: str
    size: tuple[int, int]
    """Height and width."""
    channels: int


def load_folder(config: DataConfig) -> Dataset:
    """Loads `folder:PATH`.

    A file that is no readable image is left out, logged as a warning and listed in `skipped`.

    Raises:
      InputError: the folder is missing, empty or laid out differently, has one class or a class without a readable
        image, or its images differ in size and `config.image_size` is not set.
    """
    root = Path(config.name.removeprefix("folder:")).expanduser().absolute()
    if not root.is_dir():
        raise InputError(f"no folder '{root}'; data.name is folder:PATH with a sub-folder of images for each class")
    files, unreadable = _scan(root)
    _check_left(root, {file.name for file in files}, unreadable)
    _check_layout(root, files)
    class_names = _class_names(root, files)
    shape = _common_shape(root, files, config)
    height, width = (shape.size, shape.size) if shape.size else files[0].size
    image_shape = (height, width, shape.channels)

    opened = {
        name: _open_split(root, [file for file in files if file.split == name], class_names, shape)
        for name in dict.fromkeys(file.split for file in files)
    }
    splits: dict[str, Split] = dict(opened)
    if len(files) * math.prod(image_shape) <= MEMORY_BYTES:
        splits, damaged = _decode_splits(opened)
        unreadable += damaged
        _check_left(root, {str(name) for split in splits.values() for name in split.ids}, unreadable)
    if unreadable:
        log.warning("%d files in '%s' are no readable images: %s", len(unreadable), root, ", ".join(unreadable))
    splits = usual_splits(splits, name=config.name)
    return Dataset(root.name, _version(root, files), class_names, splits, image_shape, tuple(unreadable))


def _scan(root: Path) -> tuple[list[File], list[str]]:
    """Returns the images of all class folders in order of their paths, and the names of files that are none."""
    paths = [
        (split, class_folder.name, path)
        for split, folder in _split_folders(root).items()
        for class_folder in _visible(folder)
        if class_folder.is_dir()
        for path in _files_below(class_folder)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        headers = list(pool.map(_header, (path for _, _, path in paths)))
    files, unreadable = [], []
    for (split, class_name, path), header in zip(paths, headers, strict=True):
        name = path.relative_to(root).as_posix()
        if header is None:
            unreadable.append(name)
        else:
            files.append(File(split, class_name, name, header[:2], header[2]))
    return files, unreadable


def _split_folders(root: Path) -> dict[str, Path]:
    """Returns the folder of each split that there is; without split folders all is for training."""
    splits: dict[str, Path] = {}
    strays = []
    for folder in (path for path in _visible(root) if path.is_dir()):
        split = next((split for split, names in SPLIT_FOLDERS.items() if folder.name.lower() in names), None)
        if split is None:
            strays.append(folder)
        elif split in splits:
            raise InputError(f"two folders for one split: '{splits[split]}' and '{folder.name}' are {split}; keep one")
        else:
            splits[split] = folder
    if not splits:
        return {"train": root}
    if "train" not in splits:
        held_out = next(iter(splits.values()))
        raise InputError(f"'{held_out}' is named like a split, but there is no folder 'train' beside it; rename one")
    if strays:
        raise InputError(f"'{strays[0]}' stands beside '{splits['train'].name}' and is no split; move it away")
    return splits


def _check_layout(root: Path, files: list[File]) -> None:
    """Refuses what looks like classes one level too deep: no top-level folder holds an image directly."""
    if files and all(file.name.count("/") > 1 for file in files) and _split_folders(root) == {"train": root}:
        raise InputError(
            f"no folder in '{root}' holds images directly, the first is '{files[0].name}';"
            " expected CLASS/IMAGE or train/CLASS/IMAGE: give the folder that holds the class or split folders"
        )


def _check_left(root: Path, good: set[str], unreadable: list[str]) -> None:
    """Refuses a class folder that has files of which none is a readable image."""
    depth = 1 if _split_folders(root) == {"train": root} else 2

    def class_folder(name: str) -> str:
        return "/".join(name.split("/")[:depth])

    empty = {class_folder(name) for name in unreadable} - {class_folder(name) for name in good}
    if empty:
        folder = min(empty)
        bad = [name for name in unreadable if class_folder(name) == folder]
        raise InputError(
            f"no image is left in '{root / folder}': files that could not be read: {len(bad)}, one is '{bad[0]}';"
            " mend or replace them, or remove the folder"
        )


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _files_below(folder: Path) -> list[Path]:
    return [file for path in _visible(folder) for file in (_files_below(path) if path.is_dir() else [path])]


def _header(path: Path) -> tuple[int, int, int] | None:
    try:
        return read_header(path)
    except OSError:
        return None


def _class_names(root: Path, files: list[File]) -> tuple[str, ...]:
    """Returns the classes of the training split; there must be two, and those of the other splits among them."""
    classes = sorted({file.class_name for file in files if file.split == "train"})
    if not classes:
        raise InputError(f"no images in '{root}'; put them into a sub-folder for each class")
    if len(classes) == 1:
        raise InputError(f"'{root}' has images of one class only, '{classes[0]}'; classification needs at least two")
    for file in files:
        if file.class_name not in classes:
            raise InputError(f"class '{file.class_name}' has no training images, but there is '{root / file.name}'")
    return tuple(classes)


def _common_shape(root: Path, files: list[File], config: DataConfig) -> ImageShape:
    """Decides size and channels: those of the config, else the size all images share, and colour if any has it."""
    first = files[0]
    for file in files:
        if config.image_size is None and file.size != first.size:
            sizes = ", ".join(f"'{each.name}' is {each.size[1]}x{each.size[0]}" for each in (first, file))
            raise InputError(f"images in '{root}' differ in size: {sizes}; set data.image_size to resize them all")
    return ImageShape(config.image_size, config.channels or max(file.channels for file in files))


def _open_split(root: Path, files: list[File], class_names: tuple[str, ...], shape: ImageShape) -> LazySplit:
    ids = np.array([file.name for file in files])
    labels = np.array([class_names.index(file.class_name) for file in files], np.int32)
    return LazySplit(ids, labels, lambda index: decode(root / files[index].name, shape))


def _decode_splits(opened: dict[str, LazySplit]) -> tuple[dict[str, Split], list[str]]:
    """Reads all splits into memory; returns them without the damaged images, and the names of these."""
    splits: dict[str, Split] = {}
    damaged = []
    for name, split in opened.items():
        splits[name], bad = decode_all(split)
        damaged += [str(split.ids[index]) for index in bad]
    return splits, damaged


def _version(root: Path, files: list[File]) -> str:
    """Returns a hash over the names, lengths and contents of the files, by which a changed folder is noticed.

    In folders of more than `CONTENT_BYTES` only names and lengths count: a file replaced by one of equal length is
    not noticed there.
    """
    sizes = [(root / file.name).stat().st_size for file in files]
    with_contents = sum(sizes) <= CONTENT_BYTES
    digest = hashlib.blake2b(digest_size=8)
    for file, size in zip(files, sizes, strict=True):
        digest.update(f"{file.name}\n{size}\n".encode(errors="surrogateescape"))  # Linux allows names that are no UTF-8
        if with_contents:
            digest.update((root / file.name).read_bytes())
    return digest.hexdigest()
