"""What tests of models share: published weights into a module by their naming, and a module's weights out again."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from jxfer.partition import arrays_of
from jxfer.weights.load import load_into
from jxfer.weights.naming import Naming
from jxfer.weights.save import export_tensors


def fill(model: Any, naming: Naming, size: Any, state_dict: Mapping[str, Any]) -> Any:
    """Puts every tensor of a state dict (of torch or NumPy) into the module, which it returns.

    Fails where a tensor has no place, or a parameter or statistic no tensor.
    """
    arrays = {}
    for name, tensor in state_dict.items():
        if _ignored(name, naming):
            continue
        array = np.asarray(tensor.detach().numpy() if hasattr(tensor, "detach") else tensor)
        rule, ours = next(
            ((rule, found) for rule in naming.rules(size) if (found := rule.ours_of(name)) is not None), (None, ())
        )
        assert rule is not None, f"{naming.name} has no rule for `{name}`"
        for path, part in zip(ours, np.split(array, len(ours)) if len(ours) > 1 else [array], strict=True):
            arrays[path] = rule.layout.to_ours(part)
    load_into(model, arrays, what=naming.name)
    return model


def exported(model: Any, naming: Naming, size: Any) -> dict[str, np.ndarray]:
    """Returns the module's parameters and statistics as the publisher names and lays them out."""
    random = {"/".join(map(str, keys)) for keys, _ in nnx.to_flat_state(nnx.state(model, nnx.RngState))}
    weights = {path: value for path, value in arrays_of(model).items() if path not in random}
    return export_tensors(weights, naming, size)


def _ignored(name: str, naming: Naming) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in naming.ignored)
