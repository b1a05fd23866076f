"""Puts weights into a model: all of them, or a clear error.

`load` makes a model of a checkpoint, `fill` and `load_into` alter one that is there. Of a checkpoint there is never
more in memory than the model and a few rows of one tensor.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jxfer import paths
from jxfer.partition import arrays_of
from jxfer.typing import Arrays, InputError, Path, Rules
from jxfer.weights.convert import Conversion, Resizes, Source, convert
from jxfer.weights.manifest import Manifest
from jxfer.weights.naming import Naming
from jxfer.weights.resize import Grid
from jxfer.weights.tensors import Tensor

Shardings = Mapping[Path, jax.sharding.Sharding] | jax.sharding.Sharding | None
"""Where each leaf, or every one, shall live; None is the default device."""

_SLAB_BYTES = 16 * 2**20
"""How much of a tensor is read at a time."""

_ALIGNMENT = 64
"""Bytes: jax takes an array on the host without copying it where it is aligned like this."""


def load(
    build: Callable[[], nnx.Module],
    tensors: Mapping[str, Tensor],
    namings: Sequence[Naming],
    size: Any,
    *,
    what: str,
    rules: Rules = (),
    resizes: Resizes = (),
    shardings: Shardings = None,
) -> tuple[nnx.Module, Manifest]:
    """Returns a model with a checkpoint's weights, and the record of where each leaf came from.

    The model is never made with random weights: its shapes are found by tracing `build`, and only what the rules
    re-initialise is computed, by a compiled `build` that returns nothing else.

    Args:
      build: makes the model; called under tracing.
      tensors: handles of the checkpoint, from `open_tensors` or `open_published`.
      namings: as `convert` takes them.
      size: the architecture's size.
      what: names the weights in errors and in the manifest.
      rules: what may differ, as `convert` takes them; `leave` is for `fill`.
      resizes: how leaves can be resized.
      shardings: where the leaves shall live; random keys stay on the default device.

    Raises:
      InputError: as `convert`.
    """
    model = nnx.eval_shape(build)
    expected = weights_of(model)
    conversion = convert(tensors, namings, size, expected, rules, what=what, resizes=resizes, grid=_grid(model))
    if conversion.left:
        raise InputError(f"{what}: `{conversion.left[0]}` cannot be left in a new model; use 'reinitialise'")
    arrays = dict(_read_all(conversion, expected, shardings))
    random = [path for path in arrays_of(model) if path not in expected]
    arrays |= _fresh(build, (*conversion.fresh, *random), shardings)
    state = nnx.to_flat_state(nnx.state(model))
    values = [(keys, arrays["/".join(map(str, keys))]) for keys, _ in state]
    return nnx.merge(nnx.graphdef(model), nnx.from_flat_state(values)), conversion.manifest


def read(
    tensors: Mapping[str, Tensor],
    namings: Sequence[Naming],
    size: Any,
    expected: Mapping[Path, Any],
    *,
    what: str,
    rules: Rules = (),
    resizes: Resizes = (),
    grid: Grid | None = None,
    shardings: Shardings = None,
) -> tuple[Arrays, Manifest]:
    """Returns the leaves that a checkpoint has for a model of which only the shapes are known, and the record.

    Leaves that the rules re-initialise are not among them.

    Raises:
      InputError: as `convert`.
    """
    conversion = convert(tensors, namings, size, expected, rules, what=what, resizes=resizes, grid=grid)
    return dict(_read_all(conversion, expected, shardings)), conversion.manifest


def fill(
    model: nnx.Module,
    tensors: Mapping[str, Tensor],
    namings: Sequence[Naming],
    size: Any,
    *,
    what: str,
    rules: Rules = (),
    resizes: Resizes = (),
) -> Manifest:
    """Gives an existing model a checkpoint's weights, in place: all that the rules say, or nothing.

    The rule `leave` keeps what the model has. Leaves stay where they live.

    Raises:
      InputError: as `convert`; nothing has been changed then.
    """
    expected = weights_of(model)
    conversion = convert(tensors, namings, size, expected, rules, what=what, resizes=resizes, grid=_grid(model))
    if conversion.fresh:
        raise InputError(f"{what}: `{conversion.fresh[0]}` of an existing model cannot start anew; use 'leave'")
    shardings = {path: value.sharding for path, value in expected.items() if isinstance(value, jax.Array)}
    _update(model, dict(_read_all(conversion, expected, shardings)))
    return conversion.manifest


def load_into(model: nnx.Module, arrays: Mapping[Path, Any], *, what: str) -> None:
    """Gives every parameter and statistic of a model, in place, the array of its path; random keys stay as they are.

    Args:
      model: the module to fill.
      arrays: path -> array; entries for random keys are not used.
      what: names the weights in errors.

    Raises:
      InputError: a path is missing, surplus, or of another shape; nothing has been changed then.
    """
    expected = weights_of(model)
    random = set(arrays_of(model)) - set(expected)
    given = {path: value for path, value in arrays.items() if path not in random}
    paths.check_same(given, expected, what=what)
    _update(model, {path: jnp.asarray(value, expected[path].dtype) for path, value in given.items()})


def weights_of(model: nnx.Module) -> Arrays:
    """Returns all variables of a model, real or abstract, that weights files hold: all but random keys."""
    random = {"/".join(map(str, keys)) for keys, _ in nnx.to_flat_state(nnx.state(model, nnx.RngState))}
    return {path: value for path, value in arrays_of(model).items() if path not in random}


def _grid(model: nnx.Module) -> Grid | None:
    return getattr(model, "grid", None)


def _update(model: nnx.Module, arrays: Mapping[Path, Any]) -> None:
    keys = {"/".join(map(str, keys)): keys for keys, _ in nnx.to_flat_state(nnx.state(model))}
    nnx.update(model, nnx.from_flat_state([(keys[path], value) for path, value in arrays.items()]))


def _read_all(
    conversion: Conversion, expected: Mapping[Path, Any], shardings: Shardings
) -> Iterator[tuple[Path, jax.Array]]:
    """Yields the leaves that come from the file, the largest first: a copy of it costs least while little is there."""
    largest_first = sorted(conversion.sources.items(), key=lambda entry: -entry[1].tensor.nbytes)
    for path, source in largest_first:
        array = _read(source, expected[path], conversion.grid)
        # Waiting frees the host's copy before the next is read.
        yield path, jax.block_until_ready(jax.device_put(array, _sharding(path, shardings)))


def _read(source: Source, like: Any, grid: Grid | None) -> np.ndarray:
    """Returns one leaf in our layout and of the model's shape and type."""
    dtype = np.dtype(like.dtype)
    if source.resize is not None:
        array = source.rule.layout.to_ours(source.tensor.read(source.rows))
        return source.resize(array, tuple(like.shape), grid=grid).astype(dtype)
    first, last = source.rows or (0, source.tensor.shape[0] if source.tensor.shape else 0)
    axis = _axis_of_rows(source, last - first)
    if axis is None:
        return source.rule.layout.to_ours(source.tensor.read(source.rows)).astype(dtype)
    array = _aligned(source.shape, dtype)
    rows = max(1, _SLAB_BYTES * (last - first) // max(source.tensor.nbytes, 1))
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        part = (*(slice(None) for _ in range(axis)), slice(start - first, stop - first))
        array[part] = source.rule.layout.to_ours(source.tensor.read((start, stop)))
    return array


def _axis_of_rows(source: Source, rows: int) -> int | None:
    """Returns the axis of ours that the rows of their tensor become; None where they do not stay together.

    Asked of the layout by example: with one row and with two, all but that axis must be the same.
    """
    if not rows or source.tensor.nbytes <= _SLAB_BYTES:
        return None
    try:
        one, two = (
            source.rule.layout.to_ours(np.empty((count, *source.tensor.shape[1:]), np.bool_)).shape for count in (1, 2)
        )
    except ValueError:
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if len(differing) != 1 or (one[differing[0]], two[differing[0]]) != (1, 2):
        return None
    return differing[0] if source.shape[differing[0]] == rows else None


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _fresh(build: Callable[[], nnx.Module], wanted: Sequence[Path], shardings: Shardings) -> Arrays:
    """Returns some variables of a newly built model; the compiler drops the computation of all others."""
    if not wanted:
        return {}

    def some() -> Arrays:
        arrays = arrays_of(build())
        return {path: arrays[path] for path in wanted}

    where = {path: _sharding(path, shardings) for path in wanted}
    return jax.jit(some, out_shardings=where)()


def _sharding(path: Path, shardings: Shardings) -> jax.sharding.Sharding | None:
    return shardings.get(path) if isinstance(shardings, Mapping) else shardings
