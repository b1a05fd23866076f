"""What a data set is: named splits with stable example ids and random access."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np

from jxfer.data.stall import reading
from jxfer.data.threads import in_threads
from jxfer.typing import HostBatch, Input, InputError

SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
"""What data sets call their splits -> what we call them."""

AnySplit = TypeVar("AnySplit", bound="Split")

MEMORY_BYTES = 2 * 1024**3
"""Data sets whose decoded examples need at most this much are read into memory once."""

DECODE_CHUNK = 256  # examples per task of a thread; one by one, small ones cost more to hand over than to decode


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
        """Returns the examples at `indices` [B] in that order, as `label` and their input or `features`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySplit:
    """A split in memory: `arrays` holds `image` [N H W C] uint8, `text` [N L] int32, `audio` [N T] int16 or `features`
    [N ...]."""

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
    """A split whose examples are decoded when they are read; `example_at(i)` returns [H W C] uint8 or [T] int16."""

    ids: np.ndarray
    labels: np.ndarray
    example_at: Callable[[int], np.ndarray]
    input: Input = "image"
    where: str = ""
    """The folder or file that the ids are relative to, for messages."""
    remedy: str = "mend or remove it"

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: np.ndarray) -> HostBatch:
        """Decodes the examples at `indices`; raises InputError naming the one that cannot be read."""
        return {self.input: np.stack([self._example(int(i)) for i in indices]), "label": self.labels[indices]}

    def name(self, index: int) -> str:
        """Returns what messages call an example."""
        return f"example '{self.ids[index]}'" + (f" of '{self.where}'" if self.where else "")

    def _example(self, index: int) -> np.ndarray:
        name = self.name(index)
        try:
            with reading(name):
                return self.example_at(index)
        except OSError as error:
            raise InputError(f"{name} cannot be read: {error}; {self.remedy}") from error


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
class Joined:
    """The examples of several splits, one split after the other."""

    splits: tuple[Split, ...]

    @property
    def ids(self) -> np.ndarray:
        """Ids of all examples, [N] str."""
        return np.concatenate([split.ids for split in self.splits])

    @property
    def labels(self) -> np.ndarray:
        """Labels of all examples, [N] int32."""
        return np.concatenate([split.labels for split in self.splits])

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def read(self, indices: np.ndarray) -> HostBatch:
        """Reads from each split what is its own."""
        parts, places, start = [], [], 0
        for split in self.splits:
            own = np.flatnonzero((indices >= start) & (indices < start + len(split)))
            if len(own):
                parts.append(split.read(indices[own] - start))
                places.append(own)
            start += len(split)
        order = np.argsort(np.concatenate(places))
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


@dataclasses.dataclass(frozen=True, eq=False)
class Views:
    """Examples that `base` holds in several augmented views, view after view; epoch e trains on view e mod `views`.

    An index beyond the number of examples reads a later view, as `batches` does.
    """

    base: Split
    views: int

    @property
    def ids(self) -> np.ndarray:
        """Ids of the examples, [N] str."""
        return self.base.ids[: len(self)]

    @property
    def labels(self) -> np.ndarray:
        """Labels of the examples, [N] int32."""
        return self.base.labels[: len(self)]

    def __len__(self) -> int:
        return len(self.base) // self.views

    def read(self, indices: np.ndarray) -> HostBatch:
        """Reads from the base."""
        return self.base.read(indices)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A task: its classes and its splits (`train`, and `validation` and `test` where the data set has them)."""

    name: str
    version: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    input_shape: tuple[int, ...]
    skipped: tuple[str, ...] = ()
    """Files that could not be read, as paths inside the data set."""
    sample_rate: int | None = None
    """Samples per second of its sounds; None where it holds none."""
    input: Input = "image"


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
    """Reads a split into memory, in threads; returns it without the examples that raise OSError, and their indices."""

    def attempt(indices: np.ndarray) -> list[np.ndarray | None]:
        return [_example_or_none(split, int(index)) for index in indices]

    def what(indices: np.ndarray) -> str:
        return f"{len(indices)} of {len(split)} examples, which are read into memory,"

    chunks = np.array_split(np.arange(len(split)), max(1, len(split) // DECODE_CHUNK))
    examples = [example for part in in_threads(attempt, chunks, what) for example in part]
    good = np.array([example is not None for example in examples], bool)
    arrays: dict[str, np.ndarray] = {split.input: np.array([example for example in examples if example is not None])}
    return ArraySplit(split.ids[good], split.labels[good], arrays), [int(i) for i in np.flatnonzero(~good)]


def _example_or_none(split: LazySplit, index: int) -> np.ndarray | None:
    try:
        with reading(split.name(index)):
            return split.example_at(index)
    except OSError:
        return None
