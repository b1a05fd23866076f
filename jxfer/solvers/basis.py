"""The principal axes of a set of features: where ridge has a closed form and L-BFGS knows its curvature."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
"""Accelerators would otherwise round the factors of a float32 product, to as few as 8 bits."""

EIGEN_FLOPS = 9
"""Times R³: what a symmetric R × R eigenproblem with its vectors takes (Golub and Van Loan 2013, section 8.3.5).

XLA counts nothing for the library that it calls there.
"""


class Basis(NamedTuple):
    """The eigenbasis of the features' covariance, of R = min(N, D) axes, variances rising."""

    mean: Float[Array, " D"]
    axes: Float[Array, "D R"]
    variances: Float[Array, " R"]


def principal(features: Float[Array, "N D"]) -> tuple[Basis, Float[Array, "N R"]]:
    """Returns the eigenbasis and the centred features in it.

    Where there are fewer examples than features, the axes are those of the examples' own span, which holds every
    solution with a quadratic penalty, so that the eigenproblem is never larger than the data.
    """
    mean = jnp.mean(features, axis=0)
    centred = features - mean
    num_examples, num_features = features.shape
    span = jnp.linalg.qr(centred.T)[0] if num_examples < num_features else None  # [D N]
    spanned = centred if span is None else jnp.matmul(centred, span, precision=HIGHEST)
    covariance = jnp.matmul(spanned.T, spanned, precision=HIGHEST) / num_examples
    variances, vectors = jnp.linalg.eigh(covariance)
    axes = vectors if span is None else jnp.matmul(span, vectors, precision=HIGHEST)
    # Rounding leaves directions without variance at a little below zero.
    return Basis(mean, axes, jnp.maximum(variances, 0.0)), jnp.matmul(spanned, vectors, precision=HIGHEST)


def one_hot(labels: jax.Array, num_classes: int) -> Float[Array, "N K"]:
    """Returns the targets of a regression."""
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
