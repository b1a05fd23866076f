"""A head without weights: a bank of training features whose nearest ones vote."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jxfer.config import DataConfig
from jxfer.solvers.neighbours import vote
from jxfer.surgery.head import linear_head


@dataclasses.dataclass(frozen=True)
class NeighbourVotes:
    """Puts an empty bank in place of the head, for `jxfer.solvers.neighbours.NearestNeighbours` to fill."""

    most: int = 50
    """Largest number of neighbours that can vote: that of the solver."""
    num_train: int = 1
    """Rows of the bank; runs and plans put the number of their training examples here."""
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
        del source_classes, data, rngs
        num_features = linear_head(model).in_features
        model.head = Bank(self.num_train, num_features, min(self.most, self.num_train), len(target_classes))


class Setting(nnx.Variable):
    """What belongs to a bank beside its features; it trains as little as they do."""


class Bank(nnx.Module):
    """Training features, their labels, and how they vote; see `jxfer.solvers.neighbours.vote`."""

    def __init__(self, num_examples: int, num_features: int, most: int, num_classes: int):
        self.num_classes = num_classes
        self.bank = nnx.Param(jnp.zeros((num_examples, num_features)))
        self.labels = Setting(jnp.zeros(num_examples, jnp.int32))
        self.ranks = Setting(jnp.zeros(most))
        self.normalise = Setting(jnp.zeros(()))
        self.sharpness = Setting(jnp.zeros(()))

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B K"]:
        """Maps features to logits."""
        settings = (self.labels, self.ranks, self.normalise, self.sharpness)
        arrays: list[jax.Array] = [each.get_value() for each in (self.bank, *settings)]
        return vote(x.astype(jnp.float32), *arrays, num_classes=self.num_classes)
