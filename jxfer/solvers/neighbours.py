"""k nearest neighbours: the training features are kept as a bank and vote on each new example."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jxfer.solvers.basis import HIGHEST
from jxfer.solvers.heads import as_arrays, flops_of, shape
from jxfer.typing import Arrays, InputError, Proceed, always

ROWS = 256
"""Examples compared with the bank at a time."""


@dataclasses.dataclass(frozen=True)
class NearestNeighbours:
    """Logits are the logarithms of vote shares among the k nearest training examples, for every k."""

    counts: tuple[int, ...] = (1, 3, 5, 10, 20, 50)
    """k, of which those above the number of training examples are left out."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    sharpness: float = 0.0
    """s of the weight exp(-s d² / 2) of a vote at distance d; 0 counts all alike. Under `cosine`, features have unit
    length, so that it is exp(s · cosine), as with a temperature of 1 / s (Wu et al. 2018, arXiv:1805.01978, eq. 7)."""

    def fit(self, features: Any, labels: Any, num_classes: int, *, proceed: Proceed = always) -> "NeighbourHeads":
        """Returns a head per k, all on one bank, from features [N D] and labels [N].

        They call `proceed` with every block of examples they are asked for: the comparing is what takes long here.

        Raises:
          InputError: there are fewer examples than the smallest k.
        """
        features, labels = as_arrays(features, labels)
        counts = tuple(count for count in self.counts if count <= len(features))
        if not counts:
            raise InputError(f"counts is {self.counts}, but there are {len(features)} training examples; take fewer")
        normalise = self.metric == "cosine"
        bank = unit(features) if normalise else features
        most = min(max(self.counts), len(features))
        return NeighbourHeads(counts, most, bank, labels, num_classes, float(normalise), self.sharpness, proceed)

    def cost(self, num_examples: int, num_features: int, num_classes: int) -> tuple[float, int]:
        """Returns what comparing one example with the bank takes, since there is nothing to solve, and its bytes."""
        count = min(max(self.counts), num_examples)
        arguments = shape(1, num_features), shape(num_examples, num_features), shape(num_examples, dtype=jnp.int32)
        scalars = shape(count), shape(), shape()
        flops = flops_of(_vote, *arguments, *scalars, num_classes=num_classes)
        return flops, 4 * num_examples * (num_features + ROWS + 1)


@dataclasses.dataclass(frozen=True, eq=False)
class NeighbourHeads:
    """A bank of examples, asked by each k."""

    counts: tuple[int, ...]
    most: int
    """Length of the ranks, the same for every k."""
    bank: Float[Array, "N D"]
    labels: Int[Array, " N"]
    num_classes: int
    normalise: float
    sharpness: float
    proceed: Proceed = always
    flops: float = 0.0
    """Keeping examples takes none; asking them does."""

    @property
    def names(self) -> tuple[str, ...]:
        """The settings."""
        return tuple(f"k={count}" for count in self.counts)

    @property
    def gradient_norms(self) -> tuple[float, ...]:
        """There is nothing to converge."""
        return (0.0,) * len(self.counts)

    @property
    def converged(self) -> tuple[bool, ...]:
        """There is nothing to converge."""
        return (True,) * len(self.counts)

    def logits(self, features: Float[Array, "M D"], index: int) -> Float[Array, "M K"]:
        """Returns what the head of one k says."""
        arrays = self.arrays(index)
        settings = arrays["ranks"], arrays["normalise"], arrays["sharpness"]
        blocks: list[jax.Array] = []
        for start in range(0, len(features), ROWS):
            jax.block_until_ready(blocks[-2:-1])  # else the host would ask for all of them before the first is there
            self.proceed()
            part = features[start : start + ROWS]
            blocks.append(_vote(part, self.bank, self.labels, *settings, num_classes=self.num_classes))
        return jnp.concatenate(blocks)

    def arrays(self, index: int) -> Arrays:
        """Returns `bank` [N D], `labels` [N], `ranks` [largest k], and the scalars `normalise` and `sharpness`."""
        return {
            "bank": self.bank,
            "labels": self.labels,
            "ranks": (jnp.arange(self.most) < self.counts[index]).astype(jnp.float32),
            "normalise": jnp.float32(self.normalise),
            "sharpness": jnp.float32(self.sharpness),
        }


def vote(
    features: Float[Array, "B D"],
    bank: Float[Array, "N D"],
    labels: Int[Array, " N"],
    ranks: Float[Array, " R"],
    normalise: Float[Array, ""],
    sharpness: Float[Array, ""],
    *,
    num_classes: int,
) -> Float[Array, "B K"]:
    """Returns the logarithms of the shares of the votes of the k nearest, with one vote spread over all classes.

    Args:
      features: of the examples to classify.
      bank: the training features, of unit length already where they are to be.
      labels: of the bank.
      ranks: 1 for the k nearest, then 0: no more than R can vote.
      normalise: 1 to compare directions, 0 to compare the features as they are.
      sharpness: of the weights by distance.
      num_classes: K.
    """
    features = jnp.where(normalise > 0, unit(features), features)
    products = jnp.matmul(features, bank.T, precision=HIGHEST)
    # -d² / 2, without the part that is the same for the whole bank.
    scores, nearest = jax.lax.top_k(products - jnp.sum(jnp.square(bank), axis=1) / 2, len(ranks))
    weights = ranks * jnp.exp(sharpness * (scores - scores[:, :1]))
    weights *= jnp.sum(ranks) / jnp.sum(weights, axis=1, keepdims=True)
    votes = jnp.einsum("bk,bkc->bc", weights, jax.nn.one_hot(labels[nearest], num_classes))
    return jnp.log((votes + 1 / num_classes) / (jnp.sum(ranks) + 1))


def unit(features: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Returns features of length 1; zeros stay zeros."""
    return features * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(features), axis=1, keepdims=True), 1e-24))


_vote = functools.partial(jax.jit, static_argnames="num_classes")(vote)
