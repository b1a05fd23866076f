"""What namings share: the rules of one layer, and the named size that a published one is nearest to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jxfer.typing import Path
from jxfer.weights.naming import CONV, LINEAR, Rule


def linear(theirs: str, ours: Path, *, use_bias: bool = True, optional: bool = False) -> tuple[Rule, ...]:
    """Returns the rules of PyTorch's linear layer."""
    kernel = Rule(f"{theirs}.weight", f"{ours}/kernel", LINEAR, optional=optional)
    return (kernel, Rule(f"{theirs}.bias", f"{ours}/bias", optional=optional)) if use_bias else (kernel,)


def conv(theirs: str, ours: Path) -> tuple[Rule, ...]:
    """Returns the rules of PyTorch's convolution with a bias."""
    return (Rule(f"{theirs}.weight", f"{ours}/kernel", CONV), Rule(f"{theirs}.bias", f"{ours}/bias"))


def norm(theirs: str, ours: Path) -> tuple[Rule, ...]:
    """Returns the rules of PyTorch's layer norm."""
    return (Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias"))


def nearest(size: Any, named: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the named size with the fewest fields unlike those of `size`, and what those are in `size`."""
    fields = {field.name: getattr(size, field.name) for field in dataclasses.fields(size)}
    differing = {
        name: {field: value for field, value in fields.items() if getattr(other, field) != value}
        for name, other in named.items()
    }
    name = min(differing, key=lambda name: len(differing[name]))
    return name, differing[name]


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the class names of a transformers config in the order of the head, empty where it has none."""
    labels = config.get("id2label") or {}
    return tuple(labels[index] for index in sorted(labels, key=int))


def labels(classes: tuple[str, ...]) -> dict[str, Any]:
    """Returns class names as a transformers config has them."""
    return {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }
