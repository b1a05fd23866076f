"""`LogisticPath`: logistic regression at every strength, in as few programs as memory allows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jxfer.solvers import lbfgs
from jxfer.solvers.basis import EIGEN_FLOPS
from jxfer.solvers.heads import LinearHeads, as_arrays, flops_of, shape
from jxfer.typing import InputError

STRENGTHS = tuple(float(f"{value:.3g}") for value in np.logspace(-6, 4, 41))
"""Four per decade; validation chooses, whatever the scale of the features is."""

LOGITS = 5
"""Arrays of the logits' size that one iteration holds at a time."""

SLACK = 2.0
"""By how much the gradient on fresh logits may exceed the tolerance that the one of the iterations met."""


@dataclasses.dataclass(frozen=True)
class LogisticPath:
    """Multinomial logistic regression at every strength λ; for the objective see `jxfer.solvers.lbfgs`."""

    strengths: tuple[float, ...] = STRENGTHS
    """λ of λ / 2 ‖W‖² beside the mean cross-entropy: scikit-learn's C is 1 / (N λ), of two classes 2 / (N λ)."""
    map: Any = None
    """From `jxfer.solvers.maps`, folded into the head afterwards; λ is then of the head on the mapped features."""
    tolerance: float = 1e-3
    """Largest norm of the scaled gradient of a solved problem."""
    max_iterations: int = 500
    memory_bytes: int = 2**30
    """Above which the path is split."""

    def fit(self, features: Any, labels: Any, num_classes: int) -> LinearHeads:
        """Returns a head per strength; those that did not converge say so.

        Args:
          features: [N D].
          labels: [N], in [0, num_classes).
          num_classes: K.

        Raises:
          InputError: a strength is not positive.
        """
        check_strengths(self.strengths)
        features, labels = as_arrays(features, labels)
        linear = None if self.map is None else self.map.fit(features)
        mapped = features if linear is None else linear(features)
        sizes = len(labels), mapped.shape[1], num_classes
        together = self.num_together(*sizes)
        parts = [self._solve(mapped, labels, part, num_classes) for part in _parts(self.strengths, together)]
        count = len(self.strengths)
        kernels = jnp.concatenate([part.kernels for part in parts])[:count]
        biases = jnp.concatenate([part.biases for part in parts])[:count]
        kernels, biases = (kernels, biases) if linear is None else linear.fold(kernels, biases)
        norms = np.concatenate([part.gradient_norms for part in parts])[:count].tolist()
        return LinearHeads(
            names=tuple(f"strength={strength:g}" for strength in self.strengths),
            kernels=kernels,
            biases=biases,
            gradient_norms=tuple(norms),
            converged=tuple(norm <= SLACK * self.tolerance for norm in norms),
            flops=sum(self._flops(*sizes, together, int(part.iterations)) for part in parts),
        )

    def cost(self, num_examples: int, num_features: int, num_classes: int) -> tuple[float, int]:
        """Returns the floating-point operations of one iteration of the whole path, and the bytes of one program."""
        size = self.num_together(num_examples, num_features, num_classes)
        iteration = _iteration_flops(num_examples, min(num_examples, num_features), num_classes, size)
        num_parts = -(-len(self.strengths) // size)
        return num_parts * iteration, size * _problem_bytes(num_examples, num_features, num_classes)

    def num_together(self, num_examples: int, num_features: int, num_classes: int) -> int:
        """Returns how many strengths share a program, parts being of one size so that they share its compilation."""
        most = max(1, self.memory_bytes // _problem_bytes(num_examples, num_features, num_classes))
        num_parts = -(-len(self.strengths) // most)
        return -(-len(self.strengths) // num_parts)

    def _solve(self, features: Any, labels: Any, strengths: tuple[float, ...], num_classes: int) -> lbfgs.Solution:
        return lbfgs.solve(
            features,
            labels,
            jnp.asarray(strengths, jnp.float32),
            jnp.float32(self.tolerance),
            num_classes=num_classes,
            max_iterations=self.max_iterations,
        )

    def _flops(self, num_examples: int, num_features: int, num_classes: int, size: int, iterations: int) -> float:
        axes = min(num_examples, num_features)
        whole = flops_of(
            lbfgs.solve,
            shape(num_examples, num_features),
            shape(num_examples, dtype=jnp.int32),
            shape(size),
            shape(),
            num_classes=num_classes,
            max_iterations=self.max_iterations,
        )
        repeated = (iterations - 1) * _iteration_flops(num_examples, axes, num_classes, size)
        return whole + repeated + EIGEN_FLOPS * axes**3


def check_strengths(strengths: tuple[float, ...]) -> None:
    """Refuses strengths that leave a problem without a solution."""
    if not strengths or min(strengths) <= 0:
        raise InputError(f"strengths is {strengths}; give positive numbers, such as (1e-4, 1e-2)")


def _parts(strengths: tuple[float, ...], size: int) -> list[tuple[float, ...]]:
    """Returns the path in parts of one size, the last filled up with copies."""
    filled = strengths + strengths[-1:] * (-len(strengths) % size)
    return [filled[start : start + size] for start in range(0, len(filled), size)]


def _problem_bytes(num_examples: int, num_features: int, num_classes: int) -> int:
    weights = (2 * lbfgs.MEMORY + 8) * (min(num_examples, num_features) + 1)
    return 4 * num_classes * (LOGITS * num_examples + weights)


def _iteration_flops(num_examples: int, axes: int, num_classes: int, size: int) -> float:
    def begin(scores: Any, variances: Any, labels: Any, strengths: Any) -> tuple[lbfgs.Problem, lbfgs.Search]:
        problem = lbfgs.pose(scores, variances, labels, strengths, num_classes)
        return problem, lbfgs.begin(problem)

    data = shape(num_examples, axes), shape(axes), shape(num_examples, dtype=jnp.int32), shape(size)
    return flops_of(lbfgs.advance, *jax.eval_shape(begin, *data), shape())
