"""Linear maps of the features before a head: centring, scaling, PCA, SVD, whitening, and their folding into the head.

A head on mapped features is a head on the features themselves: x ↦ ((x - shift) @ matrix) @ kernel + bias is linear.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jxfer.solvers.basis import HIGHEST, principal
from jxfer.typing import InputError


class LinearMap(NamedTuple):
    """Features [D] to (features - shift) @ matrix, [R]."""

    shift: Float[Array, " D"]
    matrix: Float[Array, "D R"]

    def __call__(self, features: Float[Array, "N D"]) -> Float[Array, "N R"]:
        """Returns the mapped features."""
        return jnp.matmul(features - self.shift, self.matrix, precision=HIGHEST)

    def fold(
        self, kernels: Float[Array, "P R K"], biases: Float[Array, "P K"]
    ) -> tuple[Float[Array, "P D K"], Float[Array, "P K"]]:
        """Returns the heads on the features as they are that say the same as these on the mapped ones."""
        folded = jnp.einsum("dr,prk->pdk", self.matrix, kernels, precision=HIGHEST)
        return folded, biases - jnp.einsum("d,pdk->pk", self.shift, folded, precision=HIGHEST)


@dataclasses.dataclass(frozen=True)
class Centre:
    """Subtracts the mean."""

    def fit(self, features: Float[Array, "N D"]) -> LinearMap:
        """Returns the map for these features."""
        return LinearMap(jnp.mean(features, axis=0), jnp.eye(features.shape[1]))


@dataclasses.dataclass(frozen=True)
class Standardise:
    """Subtracts the mean and divides by the standard deviation, each feature for itself."""

    epsilon: float = 1e-6
    """Added to the variances, times their mean, for features that never change."""

    def fit(self, features: Float[Array, "N D"]) -> LinearMap:
        """Returns the map for these features."""
        variances = jnp.var(features, axis=0)
        scales = jax.lax.rsqrt(variances + self.epsilon * _positive_mean(variances))
        return LinearMap(jnp.mean(features, axis=0), jnp.diag(scales))


@dataclasses.dataclass(frozen=True)
class PCA:
    """The coordinates along the axes of largest variance, largest first."""

    num_components: int

    def fit(self, features: Float[Array, "N D"]) -> LinearMap:
        """Returns the map for these features."""
        basis = principal(features)
        return LinearMap(basis.mean, _largest(basis.axes, self.num_components))


@dataclasses.dataclass(frozen=True)
class SVD:
    """The coordinates along the right singular vectors of the features without centring, largest first."""

    num_components: int

    def fit(self, features: Float[Array, "N D"]) -> LinearMap:
        """Returns the map for these features."""
        _, _, vectors = jnp.linalg.svd(features, full_matrices=False)
        return LinearMap(jnp.zeros(features.shape[1]), _largest(vectors.T[:, ::-1], self.num_components))


@dataclasses.dataclass(frozen=True)
class Whiten:
    """PCA, then every coordinate scaled to unit variance."""

    num_components: int | None = None
    """None keeps all there are."""
    epsilon: float = 1e-3
    """Added to the variances, times their mean, so that axes that hold nothing but noise are not blown up."""

    def fit(self, features: Float[Array, "N D"]) -> LinearMap:
        """Returns the map for these features."""
        basis = principal(features)
        scales = jax.lax.rsqrt(basis.variances + self.epsilon * _positive_mean(basis.variances))
        axes = basis.axes * scales
        return LinearMap(
            basis.mean, axes[:, ::-1] if self.num_components is None else _largest(axes, self.num_components)
        )


def _largest(axes: Float[Array, "D R"], num_components: int) -> Float[Array, "D r"]:
    if num_components > axes.shape[1]:
        raise InputError(f"num_components is {num_components}, but the features span only {axes.shape[1]}; take fewer")
    return axes[:, ::-1][:, :num_components]


def _positive_mean(variances: Float[Array, " R"]) -> Float[Array, ""]:
    return jnp.maximum(jnp.mean(variances), jnp.finfo(jnp.float32).tiny)
