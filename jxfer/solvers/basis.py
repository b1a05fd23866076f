"""The principal axes of a set of features: where ridge has a closed form and L-BFGS knows its curvature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
"""Accelerators would otherwise round the factors of a float32 product, to as few as 8 bits."""

BLOCK = 2000
"""Examples: 4 MB of 512 features."""


class Basis(NamedTuple):
    """The eigenbasis of the features' covariance, of R = min(N, D) axes, variances rising."""

    mean: Float[Array, " D"]
    axes: Float[Array, "D R"]
    variances: Float[Array, " R"]

    def heads(
        self, weights: Float[Array, "P K R"], intercepts: Float[Array, "*P K"]
    ) -> tuple[Float[Array, "P D K"], Float[Array, "P K"]]:
        """Returns the kernels and biases that say of features what weights and intercepts say of their scores."""
        kernels = jnp.matmul(weights, self.axes.T, precision=HIGHEST)  # [P K D]
        return kernels.swapaxes(1, 2), intercepts - jnp.matmul(kernels, self.mean, precision=HIGHEST)


def principal(features: Float[Array, "N D"]) -> Basis:
    """Returns the eigenbasis of features.

    Where there are fewer examples than features, the axes are those of the examples' own span, which holds every
    solution with a quadratic penalty, so that the eigenproblem is never larger than the data.
    """
    basis, _ = principal_with_targets(features, jnp.zeros((len(features), 0)))
    return basis


def principal_with_targets(
    features: Float[Array, "N D"], targets: Float[Array, "N K"]
) -> tuple[Basis, Float[Array, "K R"]]:
    """Returns the eigenbasis of features, and the covariances of targets with the features in that basis."""
    mean, shares = jnp.mean(features, axis=0), jnp.mean(targets, axis=0)
    num_examples, num_features = features.shape
    if num_examples < num_features:
        span = jnp.linalg.qr((features - mean).T)[0]  # [D N]
        spanned = jnp.matmul(features - mean, span, precision=HIGHEST)
        sums = _sum_products(spanned, targets, jnp.zeros(num_examples), shares)
    else:
        span, sums = None, _sum_products(features, targets, mean, shares)
    size = min(num_examples, num_features)
    covariances = sums / num_examples
    variances, vectors = jnp.linalg.eigh(covariances[:size])
    axes = vectors if span is None else jnp.matmul(span, vectors, precision=HIGHEST)
    # Rounding leaves directions without variance at a little below zero.
    basis = Basis(mean, axes, jnp.maximum(variances, 0.0))
    return basis, jnp.matmul(covariances[size:], vectors, precision=HIGHEST)


def uncounted_flops(num_examples: int, num_features: int, num_targets: int) -> float:
    """Returns the operations of `principal_with_targets` that XLA does not count.

    They are those of the library that solves the eigenproblem, 9 R³ with its vectors (Golub and Van Loan 2013, section
    8.3.5), and of all blocks of examples but the one that stands for the loop.
    """
    size = min(num_examples, num_features)
    num_blocks = num_examples // BLOCK
    return 9.0 * size**3 + max(num_blocks - 1, 0) * 2.0 * BLOCK * (size + num_targets) * size


def _sum_products(
    features: Float[Array, "N R"], targets: Float[Array, "N K"], mean: Float[Array, " R"], shares: Float[Array, " K"]
) -> Float[Array, "R+K R"]:
    """Returns the products of the centred features with themselves, and of the targets with them, over the examples.

    In blocks that fit into a cache, so that a CPU reads the features once.
    """

    def products(features: Any, targets: Any) -> Any:
        centred = features - mean
        columns = jnp.concatenate([centred, targets - shares], axis=1)
        return jnp.matmul(columns.T, centred, precision=HIGHEST)

    def add(block: Any, sums: Any) -> Any:
        rows = (jax.lax.dynamic_slice_in_dim(array, block * BLOCK, BLOCK) for array in (features, targets))
        return sums + products(*rows)

    num_blocks, num_left = divmod(len(features), BLOCK)
    sums = products(features[len(features) - num_left :], targets[len(features) - num_left :])
    return jax.lax.fori_loop(0, num_blocks, add, sums) if num_blocks else sums


def one_hot(labels: jax.Array, num_classes: int) -> Float[Array, "N K"]:
    """Returns the targets of a regression."""
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
