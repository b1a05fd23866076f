"""What loading did: for every leaf of the model where it comes from, for every tensor of the file what became of it."""

import collections
import dataclasses
import json
import math
import typing
from collections.abc import Iterable
from typing import Any, Literal

from jxfer.typing import Path

LeafStatus = Literal["loaded", "transposed", "resized", "re-initialised", "left alone"]
TensorStatus = Literal["used", "unused", "ignored"]

FROM_FILE: tuple[LeafStatus, ...] = ("loaded", "transposed", "resized")
"""What can become of a leaf that has its values from the file."""

_ORDER: tuple[str, ...] = (*typing.get_args(LeafStatus), *typing.get_args(TensorStatus))


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """One parameter or statistic of the model; `tensor` names where its values come from, None where from no file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    status: LeafStatus
    tensor: str | None = None


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """One tensor of the file; `paths` are the leaves that it went into."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    status: TensorStatus
    paths: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The record of one loading; prints in a few lines, and `to_json` is full."""

    what: str
    """Names the weights."""
    naming: str
    """Whose names the file uses."""
    leaves: tuple[LeafRecord, ...]
    tensors: tuple[TensorRecord, ...]

    @property
    def coverage(self) -> float:
        """Share of the model's bytes, statistics included, that come from the file."""
        return _share((leaf.nbytes, leaf.status in FROM_FILE) for leaf in self.leaves)

    @property
    def used(self) -> float:
        """Share of the file's bytes, without what the naming ignores, that went into the model."""
        counted = [tensor for tensor in self.tensors if tensor.status != "ignored"]
        return _share((tensor.nbytes, tensor.status == "used") for tensor in counted)

    def paths(self, status: LeafStatus) -> tuple[Path, ...]:
        """Returns the leaves of one status."""
        return tuple(leaf.path for leaf in self.leaves if leaf.status == status)

    def to_json(self) -> dict[str, Any]:
        """Returns everything, ready for JSON."""
        summary = {"coverage": self.coverage, "used": self.used}
        return json.loads(json.dumps(summary | dataclasses.asdict(self)))

    def __str__(self) -> str:
        lines = [
            f"{self.what} ({self.naming} names)",
            _line("model", [(leaf.status, leaf.nbytes) for leaf in self.leaves], self.coverage, "from the file"),
            _line("file", [(tensor.status, tensor.nbytes) for tensor in self.tensors], self.used, "used"),
        ]
        for status in ("resized", "re-initialised", "left alone"):
            if found := self.paths(status):
                lines.append(f"  {status}: {_some(found)}")
        if unused := [tensor.name for tensor in self.tensors if tensor.status == "unused"]:
            lines.append(f"  unused: {_some(unused)}")
        return "\n".join(lines)


def _line(of: str, entries: list[tuple[str, int]], share: float, verb: str) -> str:
    counts = collections.Counter(status for status, _ in entries)
    each = ", ".join(f"{counts[status]} {status}" for status in _ORDER if counts[status])
    percent = math.floor(1000 * share) / 10  # 100 % means all of it
    return f"  {of}: {each}; {percent:g} % of {sum(size for _, size in entries):,} bytes {verb}"


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _share(entries: Iterable[tuple[int, bool]]) -> float:
    entries = list(entries)
    total = sum(size for size, _ in entries)
    return sum(size for size, counts in entries if counts) / total if total else 1.0
