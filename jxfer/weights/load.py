"""Puts a flat dict of arrays into a model: all of it, or a clear error."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jxfer import paths
from jxfer.partition import arrays_of
from jxfer.typing import Path


def load_into(model: nnx.Module, arrays: Mapping[Path, Any], *, what: str) -> None:
    """Gives every parameter and statistic of a model, in place, the array of its path; random keys stay as they are.

    Args:
      model: the module to fill.
      arrays: path -> array; entries for random keys are not used.
      what: names the weights in errors.

    Raises:
      InputError: a path is missing, surplus, or of another shape; nothing has been changed then.
    """
    variables = nnx.to_flat_state(nnx.state(model))
    targets = {"/".join(map(str, keys)): keys for keys, variable in variables if not isinstance(variable, nnx.RngState)}
    values = arrays_of(model)
    random = set(values) - set(targets)
    given = {path: value for path, value in arrays.items() if path not in random}
    paths.check_same(given, {path: values[path] for path in targets}, what=what)
    loaded = [(keys, jnp.asarray(given[path], values[path].dtype)) for path, keys in targets.items()]
    nnx.update(model, nnx.from_flat_state(loaded))
