"""Ridge regression on one-hot targets for a whole path of penalties by one eigendecomposition."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jxfer.solvers.basis import one_hot, principal_with_targets, uncounted_flops
from jxfer.solvers.heads import LinearHeads, as_arrays, closed_form, flops_of, shape
from jxfer.solvers.logistic import STRENGTHS, check_strengths
from jxfer.typing import Proceed, always


@dataclasses.dataclass(frozen=True)
class RidgePath:
    """Minimises the mean of ‖x W + b - y‖² / 2 plus λ / 2 ‖W‖² at every strength λ, intercept unpenalised.

    That is scikit-learn's `Ridge(alpha=N λ)`. The outputs estimate the classes' probabilities: the largest one is the
    prediction, but as logits they are timid, so that a cross-entropy says little of them.
    """

    strengths: tuple[float, ...] = STRENGTHS
    map: Any = None
    """From `jxfer.solvers.maps`, folded into the head afterwards; λ is then of the head on the mapped features."""

    def fit(self, features: Any, labels: Any, num_classes: int, *, proceed: Proceed = always) -> LinearHeads:
        """Returns a head per strength, from features [N D] and labels [N]; `proceed` is called before the one program.

        Raises:
          InputError: a strength is not positive.
        """
        check_strengths(self.strengths)
        features, labels = as_arrays(features, labels)
        linear = None if self.map is None else self.map.fit(features)
        mapped = features if linear is None else linear(features)
        strengths = jnp.asarray(self.strengths, jnp.float32)
        proceed()
        kernels, biases = solve(mapped, labels, strengths, num_classes=num_classes)
        kernels, biases = (kernels, biases) if linear is None else linear.fold(kernels, biases)
        flops, _ = self.cost(len(labels), mapped.shape[1], num_classes)
        return closed_form(tuple(f"strength={strength:g}" for strength in self.strengths), kernels, biases, flops)

    def cost(self, num_examples: int, num_features: int, num_classes: int) -> tuple[float, int]:
        """Returns the floating-point operations of the whole path and the bytes of its arrays."""
        data = shape(num_examples, num_features), shape(num_examples, dtype=jnp.int32), shape(len(self.strengths))
        axes = min(num_examples, num_features)
        flops = flops_of(solve, *data, num_classes=num_classes)
        flops += uncounted_flops(num_examples, num_features, num_classes)
        num_weights = len(self.strengths) * (axes + num_features) * num_classes
        return flops, 4 * (2 * num_examples * axes + axes * num_features + num_weights)


@functools.partial(jax.jit, static_argnames="num_classes")
def solve(
    features: Float[Array, "N D"], labels: Int[Array, " N"], strengths: Float[Array, " P"], *, num_classes: int
) -> tuple[Float[Array, "P D K"], Float[Array, "P K"]]:
    """Returns kernels and biases: in the eigenbasis the problems are one division per axis and strength."""
    targets = one_hot(labels, num_classes)
    basis, covariances = principal_with_targets(features, targets)
    weights = covariances / (basis.variances + strengths[:, None, None])  # [P K R]
    return basis.heads(weights, jnp.mean(targets, axis=0))
