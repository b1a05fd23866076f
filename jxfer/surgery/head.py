"""Heads for other classes: a new linear one, a new MLP, or the rows of the old one that the target needs.

A model's head is its attribute `head`, an `nnx.Linear`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jxfer import paths
from jxfer.config import DataConfig
from jxfer.typing import InputError


@dataclasses.dataclass(frozen=True)
class NewHead:
    """Puts a linear head for the target's classes, zero at the start, in place of the old one.

    Zero because a random head's first gradients distort good features (Kumar et al. 2022, arXiv:2202.10054).
    """

    fresh: ClassVar = ("head/**",)

    def __call__(
        self,
        model: Any,
        *,
        source_classes: Sequence[str],
        target_classes: Sequence[str],
        data: DataConfig,
        rngs: nnx.Rngs,
    ) -> None:
        """Alters the model in place."""
        del source_classes, data
        old = linear_head(model)
        model.head = zero_linear(old.in_features, len(target_classes), old, rngs)


@dataclasses.dataclass(frozen=True)
class MLPHead:
    """Puts a hidden layer with ReLU and a linear output, zero at the start, in place of the old head."""

    hidden_dim: int = 128
    fresh: ClassVar = ("head/**",)

    def __call__(
        self,
        model: Any,
        *,
        source_classes: Sequence[str],
        target_classes: Sequence[str],
        data: DataConfig,
        rngs: nnx.Rngs,
    ) -> None:
        """Alters the model in place."""
        del source_classes, data
        old = linear_head(model)
        model.head = MLP(old.in_features, self.hidden_dim, len(target_classes), like=old, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class KeepRows:
    """Keeps, of the source's head, the outputs for the target's classes, found by name."""

    fresh: ClassVar = ()

    def __call__(
        self,
        model: Any,
        *,
        source_classes: Sequence[str],
        target_classes: Sequence[str],
        data: DataConfig,
        rngs: nnx.Rngs,
    ) -> None:
        """Alters the model in place.

        Raises:
          InputError: the source has no class of a target class's name.
        """
        del data
        if not source_classes:
            raise InputError("the source's weights have no head whose rows could be kept; use a new head")
        for name in target_classes:
            if name not in source_classes:
                near = paths.nearest(name, source_classes)
                raise InputError(f"the source's head has no class `{name}` to keep; nearest: {near}; use a new head")
        rows = jnp.asarray([list(source_classes).index(name) for name in target_classes])
        old = linear_head(model)
        head = zero_linear(old.in_features, len(target_classes), old, rngs)
        head.kernel.set_value(jnp.take(old.kernel.get_value(), rows, axis=1))
        if head.bias is not None and old.bias is not None:
            head.bias.set_value(jnp.take(old.bias.get_value(), rows))
        model.head = head


class MLP(nnx.Module):
    """Linear, ReLU, linear."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, *, like: nnx.Linear, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(in_dim, hidden_dim, dtype=like.dtype, rngs=rngs)
        self.out = zero_linear(hidden_dim, out_dim, like, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features [B D] to logits [B K]."""
        return self.out(nnx.relu(self.hidden(x)))


def linear_head(model: Any) -> nnx.Linear:
    """Returns the model's head.

    Raises:
      InputError: the model has no linear layer named `head`.
    """
    head = getattr(model, "head", None)
    if not isinstance(head, nnx.Linear):
        kind = "no `head`" if head is None else f"a {type(head).__name__} as `head`"
        raise InputError(f"{type(model).__name__} has {kind}; a head surgery needs an nnx.Linear of that name")
    return head


def zero_linear(in_dim: int, out_dim: int, like: nnx.Linear, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a linear layer of zeros that is otherwise like another one."""
    zeros = nnx.initializers.zeros_init()
    return nnx.Linear(in_dim, out_dim, use_bias=like.use_bias, dtype=like.dtype, kernel_init=zeros, rngs=rngs)
