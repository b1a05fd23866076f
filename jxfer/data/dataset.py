"""What a data set is: named splits with stable example ids and random access."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from jxfer.typing import HostBatch, InputError

SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
"""What data sets call their splits -> what we call them."""

AnySplit = TypeVar("AnySplit", bound="Split")

MEMORY_BYTES = 2 * 1024**3
"""Data sets whose decoded images need at most this much are read into memory once."""

DECODE_CHUNK = 256  # images per task of a thread; one by one, small images cost more to hand over than to decode


@runtime_checkable
class Split(Protocol):
    """Examples with random access."""

    @property
    def ids(self) -> np.ndarray:
        """Names of the examples that are the same on every machine, [N] str."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """Indices of their classes, [N] int32."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> HostBatch:
        """Returns the examples at `indices` [B] in that order, as `label` and `image` or `features`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySplit:
    """A split in memory: `arrays` holds `image` [N H W C] uint8 or `features` [N ...]."""

    ids: np.ndarray
    labels: np.ndarray
    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> HostBatch:
        """Copies the examples at `indices`."""
        return {**{name: array[indices] for name, array in self.arrays.items()}, "label": self.labels[indices]}


@dataclasses.dataclass(frozen=True, eq=False)
class LazySplit:
    """A split whose images are decoded when they are read; `image_at(i)` returns [H W C] uint8."""

    ids: np.ndarray
    labels: np.ndarray
    image_at: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> HostBatch:
        """Decodes the images at `indices`; raises InputError naming the example that cannot be read."""
        return {"image": np.stack([self._image(int(i)) for i in indices]), "label": self.labels[indices]}

    def _image(self, index: int) -> np.ndarray:
        try:
            return self.image_at(index)
        except OSError as error:
            raise InputError(f"example '{self.ids[index]}' cannot be read: {error}; mend or remove it") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of a split, in the order of `indices` [M]."""

    base: Split
    indices: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        """Ids of the selected examples, [M] str."""
        return self.base.ids[self.indices]

    @property
    def labels(self) -> np.ndarray:
        """Labels of the selected examples, [M] int32."""
        return self.base.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: np.ndarray) -> HostBatch:
        """Reads from the base."""
        return self.base.read(self.indices[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A task: its classes and its splits (`train`, and `validation` and `test` where the data set has them)."""

    name: str
    version: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    image_shape: tuple[int, int, int]
    skipped: tuple[str, ...] = ()
    """Files that could not be read, as paths inside the data set."""


def usual_splits(splits: Mapping[str, AnySplit], *, name: str) -> dict[str, AnySplit]:
    """Keeps `train`, `validation` and `test` under these names; a held-out split that is alone is the test split.

    Raises:
      InputError: there are several splits and none is for training.
    """
    if len(splits) == 1:
        return {"train": next(iter(splits.values()))}
    usual = {SPLIT_NAMES[key]: split for key, split in splits.items() if key in SPLIT_NAMES}
    if "train" not in usual:
        raise InputError(f"data set '{name}' has no split 'train', only {', '.join(splits)}")
    if "validation" in usual and "test" not in usual:
        usual["test"] = usual.pop("validation")
    return usual


def decode_all(split: LazySplit) -> tuple[ArraySplit, list[int]]:
    """Reads a split into memory, in threads; returns it without the images that raise OSError, and their indices."""

    def attempt(indices: np.ndarray) -> list[np.ndarray | None]:
        return [_image_or_none(split, int(index)) for index in indices]

    chunks = np.array_split(np.arange(len(split)), max(1, len(split) // DECODE_CHUNK))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = [image for chunk in pool.map(attempt, chunks) for image in chunk]
    good = np.array([image is not None for image in images], bool)
    arrays = {"image": np.array([image for image in images if image is not None])}
    return ArraySplit(split.ids[good], split.labels[good], arrays), [int(i) for i in np.flatnonzero(~good)]


def _image_or_none(split: LazySplit, index: int) -> np.ndarray | None:
    try:
        return split.image_at(index)
    except OSError:
        return None
