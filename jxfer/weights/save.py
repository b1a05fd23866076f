"""Weights in the field's names and layouts, out to safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jxfer import paths
from jxfer.typing import InputError
from jxfer.typing import Path as ParameterPath
from jxfer.weights.naming import Naming, Rule


def export_tensors(arrays: Mapping[ParameterPath, Any], naming: Naming, size: Any) -> dict[str, np.ndarray]:
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


def write_safetensors(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], *, max_shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Writes tensors, each file whole or not at all, in several with an index where they are large; returns the files.

    Args:
      file: such as `model.safetensors`; shards are `model-00001-of-00003.safetensors`.
      tensors: name -> array.
      metadata: kept in the header, such as `{"format": "pt"}`, which transformers asks for.
      max_shard_bytes: largest size of a shard, unless a single tensor is larger.
    """
    shards: list[dict[str, np.ndarray]] = [{}]
    sizes = [0]
    for name, array in tensors.items():
        if shards[-1] and sizes[-1] + array.nbytes > max_shard_bytes:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = array
        sizes[-1] += array.nbytes
    if len(shards) == 1:
        return [_write(file, shards[0], metadata)]
    names = [f"{file.stem}-{i:05d}-of-{len(shards):05d}{file.suffix}" for i in range(1, len(shards) + 1)]
    files = [_write(file.with_name(name), shard, metadata) for name, shard in zip(names, shards, strict=True)]
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": places}, indent=2) + "\n")
    return [*files, index]


def _write(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Path:
    from safetensors.numpy import save_file

    temporary = file.with_name(f"{file.name}.tmp")
    save_file(dict(tensors), str(temporary), metadata=dict(metadata))
    temporary.replace(file)
    return file


def _rule_for(path: ParameterPath, rules: tuple[Rule, ...], naming: str) -> tuple[Rule, str]:
    for rule in rules:
        if (name := rule.theirs_of(path)) is not None:
            return rule, name
    known = [ours for rule in rules for ours in rule.paths]
    raise InputError(f"{naming} has no name for `{path}`; nearest: {paths.nearest(path, known)}")


def _join(rule: Rule, name: str, arrays: Mapping[ParameterPath, Any]) -> np.ndarray:
    ours = rule.ours_of(name) or ()
    for path in ours:
        if path not in arrays:
            raise InputError(f"`{name}` needs `{path}`, which is not given; nearest: {paths.nearest(path, arrays)}")
    parts = [rule.layout.to_theirs(np.asarray(arrays[path])) for path in ours]
    return np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
