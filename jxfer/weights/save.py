"""Weights in the field's names and layouts, out to safetensors files."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jxfer import paths
from jxfer.typing import InputError, Path
from jxfer.weights.naming import Naming, Rule


def export_tensors(arrays: Mapping[Path, Any], naming: Naming, size: Any) -> dict[str, np.ndarray]:
    """Returns a model's parameters and statistics under the names and in the layouts of a publisher.

    Args:
      arrays: path -> array; without random keys.
      naming: whose names.
      size: the architecture's size, which decides the rules.

    Raises:
      InputError: no rule names a path, or a path is missing that shares a tensor with one that is there.
    """
    rules = naming.rules(size)
    tensors: dict[str, np.ndarray] = {}
    for path in arrays:
        rule, name = _rule_for(path, rules, naming.name)
        if name not in tensors:
            tensors[name] = _join(rule, name, arrays)
    return tensors


def _rule_for(path: Path, rules: tuple[Rule, ...], naming: str) -> tuple[Rule, str]:
    for rule in rules:
        if (name := rule.theirs_of(path)) is not None:
            return rule, name
    known = [ours for rule in rules for ours in rule.paths]
    raise InputError(f"{naming} has no name for `{path}`; nearest: {paths.nearest(path, known)}")


def _join(rule: Rule, name: str, arrays: Mapping[Path, Any]) -> np.ndarray:
    ours = rule.ours_of(name) or ()
    for path in ours:
        if path not in arrays:
            raise InputError(f"`{name}` needs `{path}`, which is not given; nearest: {paths.nearest(path, arrays)}")
    parts = [rule.layout.to_theirs(np.asarray(arrays[path])) for path in ours]
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
