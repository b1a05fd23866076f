"""How the world names and lays out an architecture's weights, as data that reads in both directions.

A rule says which tensor of a file is which parameter here, and how its axes lie:
`Rule("layer{n}.{i}.conv1.weight", "layer{n}/{i}/conv1/kernel", CONV)`. Fields in braces stand for the same digits on
both sides. Loading reads rules from left to right, exporting from right to left.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jxfer.typing import Path


@runtime_checkable
class Layout(Protocol):
    """How an array is laid out in the file and here; each direction undoes the other."""

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Returns the array as our parameter."""
        ...

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Returns our parameter as the file has it."""
        ...


@dataclasses.dataclass(frozen=True)
class Same:
    """The same on both sides."""

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Returns the array."""
        return array

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Returns the array."""
        return array


@dataclasses.dataclass(frozen=True)
class Axes:
    """Another order of the axes: axis i of ours is axis `order[i]` of theirs."""

    order: tuple[int, ...]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Moves the axes."""
        return np.transpose(array, self.order)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Moves the axes back."""
        return np.transpose(array, np.argsort(self.order))


CONV = Axes((2, 3, 1, 0))
"""A convolution's kernel: output, input, rows, columns in PyTorch; rows, columns, input, output here."""

LINEAR = Axes((1, 0))
"""A linear layer's kernel: output, input in PyTorch; input, output here."""


@dataclasses.dataclass(frozen=True)
class Squeezed:
    """Theirs has leading axes of size 1 that ours has not."""

    count: int = 1

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Drops the leading axes."""
        return array.reshape(array.shape[self.count :])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Puts the leading axes back."""
        return array.reshape((1,) * self.count + array.shape)


@dataclasses.dataclass(frozen=True)
class FlatLinear:
    """A linear layer on a flattened image: PyTorch flattens channels, rows, columns; here rows, columns, channels."""

    rows: int
    columns: int

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """Maps [out, C·H·W] to [H·W·C, out]."""
        out = array.shape[0]
        return array.reshape(out, -1, self.rows, self.columns).transpose(2, 3, 1, 0).reshape(-1, out)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Maps [H·W·C, out] to [out, C·H·W]."""
        out = array.shape[1]
        return array.reshape(self.rows, self.columns, -1, out).transpose(3, 2, 0, 1).reshape(out, -1)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One or several tensors of one pattern: `theirs` is the name in the file, `ours` the path here."""

    theirs: str
    ours: Path | tuple[Path, ...]
    """Several where their tensor is ours stacked along its first axis, such as query, key and value in one."""
    layout: Layout = Same()
    optional: bool = False
    """Whether a file may lack it; the parameter is then as for a parameter that no rule names: re-initialised by rule
    of the user, or an error."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Our paths, one or several."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def ours_of(self, name: str) -> tuple[Path, ...] | None:
        """Returns our paths for a tensor's name, None where the rule is not for it."""
        fields = _fields(self.theirs, name)
        return None if fields is None else tuple(path.format(**fields) for path in self.paths)

    def theirs_of(self, path: Path) -> str | None:
        """Returns the tensor's name for one of our paths, None where the rule is not for it."""
        found = (_fields(ours, path) for ours in self.paths)
        fields = next((fields for fields in found if fields is not None), None)
        return None if fields is None else self.theirs.format(**fields)


@dataclasses.dataclass(frozen=True)
class Naming:
    """One way in which an architecture is published."""

    name: str
    """Whose names they are: `torchvision`, `timm`, `transformers`, `keras`."""
    rules: Callable[[Any], tuple[Rule, ...]]
    """The architecture's size -> the rules of all its tensors, head included."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that hold nothing a model needs, such as `**.num_batches_tracked` (`*` crosses dots)."""
    prefixes: tuple[str, ...] = ()
    """What some publishers put before every name, such as `module.`."""
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `DataConfig` that weights of this naming were trained with, where the files do not say."""
    read_config: Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]] | None] = lambda config: None
    """A published `config.json` -> the named size it is nearest to and the fields that differ; None: not of this
    architecture."""
    write_config: Callable[[Any, tuple[str, ...], tuple[int, ...]], dict[str, Any]] | None = None
    """Size, class names and input shape -> `config.json`; None where the field has no such file."""


def _fields(template: str, text: str) -> dict[str, str] | None:
    found = _compiled(template).fullmatch(text)
    return None if found is None else found.groupdict()


@functools.lru_cache(maxsize=4096)
def _compiled(template: str) -> re.Pattern[str]:
    """Turns `layer{n}.{i}.weight` into a pattern; a field is digits, and the same text wherever its name returns."""
    seen: set[str] = set()
    parts = re.split(r"\{(\w+)\}", template)
    for index in range(1, len(parts), 2):
        name = parts[index]
        parts[index] = f"(?P={name})" if name in seen else rf"(?P<{name}>\d+)"
        seen.add(name)
    parts[::2] = [re.escape(text) for text in parts[::2]]
    return re.compile("".join(parts))
