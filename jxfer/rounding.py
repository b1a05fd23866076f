"""Frozen parameters in fewer bits: rounded once when their phase starts, held so, expanded inside the step.

What a phase trains on, measures, stores features of and saves is the rounded model. Rounding what is rounded changes no
bit, and expanding is exact, so that wherever the two happen there is one function.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jxfer import distributed
from jxfer.config import FrozenDType
from jxfer.partition import Partition
from jxfer.sharding import put
from jxfer.typing import Arrays, InputError, Path, PyTree

_SCALE_BITS = 16
"""Significant bits of a step, so that its products with int8 need no more than the 24 of float32 and are exact."""

_SMALLEST_STEP = 2.0**-100
"""Of channels that are zero or nearly; products with it are still normal numbers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """A float32 parameter in fewer bits; it stands where an array by path does and becomes one by `expand`."""

    values: PyTree
    """bfloat16, or int8 in [-127, 127], in the parameter's shape."""
    scale: PyTree = None
    """Of int8: the step of each channel, float32, with 1 in place of the other dimensions; None of bfloat16."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return tuple(self.values.shape)

    def expand(self) -> jax.Array:
        """Returns the parameter in float32."""
        values = self.values.astype(jnp.float32)
        return values if self.scale is None else values * self.scale


def hold(params: Mapping[Path, Any], dtype: FrozenDType) -> dict[Path, Any]:
    """Returns the parameters with kernels and embeddings in fewer bits, rounded to nearest.

    int8 is symmetric: a channel, which is an output of a kernel or a row of an `embedding`, has the step of its largest
    absolute value / 127, rounded up to 16 significant bits, so that no value moves by more than half a step. Vectors
    (biases, norms) and what is not float32 stay; so does what is being traced, which has no values yet.

    Args:
      params: arrays by path, or `jax.ShapeDtypeStruct`s.
      dtype: `float32` changes nothing.

    Raises:
      InputError: a parameter has values that are not finite.
    """
    return {path: _hold(path, value, dtype) if _fewer(value, dtype) else value for path, value in params.items()}


def expand(params: Mapping[Path, Any]) -> Arrays:
    """Returns the parameters as arrays; the inverse of `hold`, up to its rounding."""
    return {path: value.expand() if isinstance(value, Held) else value for path, value in params.items()}


def rounded(path: Path, value: Any, dtype: FrozenDType) -> Any:
    """Returns a parameter, on the host, with the values that `hold` leaves it."""
    if not _fewer(value, dtype):
        return value
    held = _hold(path, value, dtype)
    values = held.values.astype(np.float32)
    return values if held.scale is None else values * held.scale


def round_frozen(arrays: Mapping[Path, Any], partition: Partition, dtype: FrozenDType) -> Arrays:
    """Returns the variables of a model with its frozen parameters rounded."""
    frozen = {leaf.path for leaf in partition.leaves if leaf.kind == "parameter" and not leaf.moves}

    def new(path: Path, value: Any) -> Any:
        after = rounded(path, value, dtype) if path in frozen else value
        if after is value or not isinstance(value, jax.Array):
            return after
        # What is bound to no device must stay so, to be used with what lies on several.
        return put(after, value.sharding) if value.committed else jnp.asarray(after)

    return {path: new(path, value) for path, value in arrays.items()}


def held_bytes(partition: Partition, dtype: FrozenDType) -> int:
    """Returns the bytes of a partition's frozen parameters."""
    frozen = [leaf for leaf in partition.leaves if leaf.kind == "parameter" and not leaf.moves]
    shapes = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in frozen}
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(hold(shapes, dtype)))


def _fewer(value: Any, dtype: FrozenDType) -> bool:
    if dtype == "float32" or isinstance(value, Held | jax.core.Tracer):
        return False
    return len(value.shape) > 1 and value.dtype == np.float32


def _hold(path: Path, value: Any, dtype: FrozenDType) -> Held:
    """Holds a parameter as NumPy arrays, or as shapes where it is one; not on a device, so that all round alike."""
    channel = 0 if path.rpartition("/")[2] == "embedding" else len(value.shape) - 1
    others = tuple(axis for axis in range(len(value.shape)) if axis != channel)
    if isinstance(value, jax.ShapeDtypeStruct):
        scale = tuple(1 if axis in others else size for axis, size in enumerate(value.shape))
        values = jax.ShapeDtypeStruct(value.shape, jnp.dtype(dtype))
        return Held(values, jax.ShapeDtypeStruct(scale, jnp.float32) if dtype == "int8" else None)
    array = np.asarray(distributed.fetch(value))
    largest = np.max(np.abs(array), axis=others, keepdims=True, initial=0.0)
    if not np.isfinite(largest).all():
        raise InputError(f"frozen parameter `{path}` has values that are not finite; look at where it comes from")
    if dtype == "bfloat16":
        return Held(array.astype(jnp.bfloat16))
    step = _step(largest)
    return Held(np.rint(array / step).astype(np.int8), step)


def _step(largest: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(np.maximum(largest.astype(np.float64) / 127, _SMALLEST_STEP))
    return np.ldexp(np.ceil(np.ldexp(mantissa, _SCALE_BITS)), exponent - _SCALE_BITS).astype(np.float32)
