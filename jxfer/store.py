"""Stored rows on disk: a folder per key, which names all that its rows depend on; locks, and eviction of the unused."""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jxfer import claims, distributed
from jxfer.chunks import SUFFIX, UNFINISHED, Chunk, Layout, open_chunk, write_chunk
from jxfer.claims import Claim, Holder
from jxfer.config import config_hash
from jxfer.data.prepare import cache_dir
from jxfer.typing import InputError

LIMIT = "JXFER_FEATURES_GB"
"""Environment variable: the most that all stored features may take, in 10⁹ bytes."""

DEFAULT_LIMIT_GB = 20.0

Fields = Mapping[str, Any]
"""What rows depend on, by name: values that JSON has."""

_RECORD, _LOCK, _IDENTITY = "key.json", ".lock", ".identity"
_CHECK_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Known:
    """What the record of a key says, and what the key takes."""

    key: str
    fields: Fields
    """Empty where the record is damaged."""
    layout: Layout
    row_flops: float
    """Floating-point operations that computing one row takes."""
    num_bytes: int
    last_used: float
    """In seconds since the epoch."""

    def differences(self, fields: Fields) -> tuple[str, ...]:
        """Returns the names of the fields that have other values."""
        return tuple(name for name in {**self.fields, **fields} if self.fields.get(name) != fields.get(name))


class Store:
    """The rows of one key, which no other process removes while this object lives."""

    def __init__(self, directory: Path, lock: Any, layout: Layout, row_flops: float, note: Callable[[str], None]):
        self.layout, self.row_flops = layout, row_flops
        self._directory, self._lock, self._note = directory, lock, note
        self._places: dict[str, tuple[Chunk, int]] = {}
        self._seen: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Finds the rows that are on disk, those that another process has written meanwhile too."""
        # By time, so that rows computed anew replace damaged ones.
        for path in sorted(set(self._directory.glob(f"*{SUFFIX}")) - self._seen):
            self._open(path)

    def alone(self, waiting: Callable[[Holder], None]) -> contextlib.AbstractContextManager[Claim]:
        """Keeps others, on other machines too, from computing rows of this key; calls `waiting` until they end."""
        return claims.alone(root() / ".claims", self._directory.name, waiting=waiting)

    def lacks(self, names: Sequence[str]) -> list[int]:
        """Returns the indices of the names without a row; of equal names the first."""
        first: dict[str, int] = {}
        for index, name in enumerate(names):
            if name not in self._places:
                first.setdefault(name, index)
        return list(first.values())

    def read(self, names: Sequence[str]) -> tuple[dict[str, np.ndarray], list[int]]:
        """Returns the arrays [N ...] of the rows of names that are all there, and the indices of those damaged.

        The store lacks damaged rows from now on.
        """
        rows = np.zeros((len(names), self.layout.row_bytes), np.uint8)
        damaged: list[int] = []
        for chunk, indices, positions in self._grouped(names):
            rows[indices], good = chunk.read(positions, self.layout.row_bytes)
            if not good.all():
                bad = indices[~good].tolist()
                others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
                self._note(f"features of '{names[bad[0]]}'{others} are damaged in '{chunk.path}'; computing them anew")
                damaged += bad
        for index in damaged:
            self._places.pop(names[index], None)
        return self.layout.decode(rows), damaged

    def check(self, names: Sequence[str]) -> int:
        """Reads all rows without keeping them and returns how many are damaged, which the store then lacks."""
        parts = (names[start : start + _CHECK_ROWS] for start in range(0, len(names), _CHECK_ROWS))
        return sum(len(self.read(part)[1]) for part in parts)

    def add(self, names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes rows as one file."""
        self._open(write_chunk(self._directory, names, self.layout.encode(arrays)))

    def _open(self, path: Path) -> None:
        self._seen.add(path)
        try:
            chunk = open_chunk(path)
        except ValueError as error:
            self._note(f"a file of stored features is damaged and removed: {error}")
            path.unlink(missing_ok=True)
            return
        self._places.update({name: (chunk, position) for position, name in enumerate(chunk.names)})

    def _grouped(self, names: Sequence[str]) -> Iterator[tuple[Chunk, np.ndarray, np.ndarray]]:
        """Yields the files that hold the names, the indices of these, and their positions there."""
        places = [self._places[name] for name in names]
        chunks = {id(chunk): chunk for chunk, _ in places}
        owners = np.array([id(chunk) for chunk, _ in places], np.uint64)
        positions = np.array([position for _, position in places], np.int64)
        for owner, chunk in chunks.items():
            indices = np.flatnonzero(owners == owner)
            yield chunk, indices, positions[indices]


def root() -> Path:
    """Returns the folder of all keys."""
    return cache_dir() / "features"


def open_store(
    fields: Fields, describe: Callable[[], tuple[Layout, float]], *, note: Callable[[str], None] = lambda text: None
) -> Store:
    """Opens the rows of a key, which it makes where they are none yet; all processes must call it.

    Args:
      fields: all that the rows depend on; the key is their hash.
      describe: returns the layout of a row and the floating-point operations of computing one; for a new key alone.
      note: receives what was found damaged, and for a new key which fields are not those of the nearest.

    Raises:
      InputError: the cache cannot be written.
    """
    directory = root() / config_hash(fields)
    known = _known(directory)
    if any(distributed.gather(not known.fields)):
        note_difference(fields, note)
        layout, row_flops = describe()
        known = dataclasses.replace(known, layout=layout, row_flops=row_flops)
    with writing(), _alone():
        directory.mkdir(parents=True, exist_ok=True)
        if _lock(directory / _LOCK, shared=False):  # nobody else is at work here, so this is what killed runs left
            for path in directory.glob(f"*{UNFINISHED}"):
                path.unlink()
        lock = _lock(directory / _LOCK, shared=True)
        if not known.fields or not (directory / _RECORD).exists():
            _write_record(directory, fields, known.layout, known.row_flops)
        os.utime(directory / _LOCK)
    return Store(directory, lock, known.layout, known.row_flops, note)


def is_writer() -> bool:
    """Tells whether this process writes for those that share its cache: their first does; all must call it."""
    if distributed.count() == 1:
        return True
    with writing():
        identities = distributed.gather(_identity())
    return identities.index(identities[distributed.index()]) == distributed.index()


def note_difference(fields: Fields, note: Callable[[str], None]) -> None:
    """Notes which fields keep the nearest key of the same data set, model and boundary from being used."""
    same = [known for known in list_keys() if not {"data", "model", "boundary"} & set(known.differences(fields))]
    nearest = min(same, key=lambda known: (len(known.differences(fields)), -known.last_used), default=None)
    if nearest is not None:
        changed = [
            f"{name} was {nearest.fields.get(name)}, is {fields.get(name)}" for name in nearest.differences(fields)
        ]
        note(
            f"features before `{fields['boundary']}` of '{fields['data']}' are computed anew; those stored under "
            f"{nearest.key} do not serve: {'; '.join(changed)}"
        )


def make_room(num_bytes: int) -> None:
    """Removes the least recently used keys that no run uses until `num_bytes` more are within the limit.

    Raises:
      InputError: they are not, whatever is removed.
    """
    limit, every = limit_bytes(), list_keys()
    excess = sum(known.num_bytes for known in every) + num_bytes - limit
    for known in sorted(every, key=lambda known: known.last_used):
        if excess <= 0:
            return
        if remove(known.key):
            excess -= known.num_bytes
    if excess > 0:
        raise InputError(
            f"{num_bytes / 1e9:.3g} GB of features are to be stored, {excess / 1e9:.3g} GB more than {LIMIT}="
            f"{limit / 1e9:g} leaves; raise it, or set features=off"
        )


def limit_bytes() -> float:
    """Returns the most that all stored features may take.

    Raises:
      InputError: the environment says something that is no positive number.
    """
    text = os.environ.get(LIMIT, str(DEFAULT_LIMIT_GB))
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text) * 1e9
    raise InputError(f"{LIMIT} is a positive number of 10⁹ bytes, not `{text}`")


def list_keys() -> list[Known]:
    """Returns what is stored, the most recently used first."""
    folders = [path for path in root().glob("*") if (path / _LOCK).exists()]
    return sorted((_known(folder) for folder in folders), key=lambda known: -known.last_used)


def names_of(key: str) -> set[str]:
    """Returns the names of the rows of a key."""
    found: set[str] = set()
    for path in (root() / key).glob(f"*{SUFFIX}"):
        with contextlib.suppress(ValueError):
            found.update(open_chunk(path).names)
    return found


def remove(key: str) -> bool:
    """Removes a key unless a run uses it, and tells whether it did."""
    directory = root() / key
    with writing(), _alone():
        if directory.exists() and _lock(directory / _LOCK, shared=False) is None:
            return False
        shutil.rmtree(directory, ignore_errors=True)
    return True


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turns what the file system refuses into what the user can do about it."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to the cache: {error}; set JXFER_CACHE to a folder of yours, or features=off"
        ) from error


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Keeps opening and removing keys apart, in all processes."""
    root().mkdir(parents=True, exist_ok=True)
    with (root() / _LOCK).open("a") as file:
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _identity() -> str:
    """Returns what processes that share a cache have in common: what a file holds that the first of them makes."""
    root().mkdir(parents=True, exist_ok=True)
    file, temporary = root() / _IDENTITY, root() / f"{uuid.uuid4().hex}{UNFINISHED}"
    if not file.exists():
        temporary.write_text(uuid.uuid4().hex)
        try:
            os.link(temporary, file)  # atomic, also over a network, where a rename would replace another's
        except FileExistsError:
            pass
        except OSError:  # a file system without links; then each machine counts as having its own
            return platform.node()
        finally:
            temporary.unlink()
    return file.read_text()


class _Held:
    """A lock that ends with this object, at the latest with the process."""

    def __init__(self, descriptor: int):
        weakref.finalize(self, os.close, descriptor)


def _lock(path: Path, *, shared: bool) -> _Held | None:
    """Locks a file; returns None where it is to be exclusive and somebody holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    held = _Held(descriptor)
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
    return held


def _known(directory: Path) -> Known:
    size, last_used = 0, 0.0
    for path in directory.glob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            size += path.stat().st_size
            last_used = max(last_used, path.stat().st_mtime)
    try:
        record = json.loads((directory / _RECORD).read_text())
        arrays = tuple((name, tuple(shape), dtype) for name, shape, dtype in record["arrays"])
        return Known(directory.name, record["fields"], Layout(arrays), record["row_flops"], size, last_used)
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged and then written anew when it is used
        return Known(directory.name, {}, Layout(()), 0.0, size, last_used)


def _write_record(directory: Path, fields: Fields, layout: Layout, row_flops: float) -> None:
    record = {"fields": dict(fields), "arrays": layout.arrays, "row_flops": row_flops}
    temporary = directory / f"{uuid.uuid4().hex}{UNFINISHED}"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(directory / _RECORD)
