"""`LogisticPath`: logistic regression at every strength, some of the path first and the others from there."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.interpolate import PchipInterpolator

from jxfer.solvers import lbfgs
from jxfer.solvers.basis import uncounted_flops
from jxfer.solvers.heads import LinearHeads, as_arrays, flops_of, shape
from jxfer.typing import InputError, Proceed, always

STRENGTHS = tuple(float(f"{value:.3g}") for value in np.logspace(-6, 4, 41))
"""Four per decade; validation chooses, whatever the scale of the features is."""

LOGITS = 5
"""Arrays of the logits' size that one iteration holds at a time."""

STRETCH_FLOPS = 1e11
"""Floating-point operations of the iterations that a program makes before it returns: some two seconds of a few cores,
and more of them than most parts of a path need."""

SLACK = 2.0
"""By how much the gradient on fresh logits may exceed the tolerance that the one of the iterations met."""


@dataclasses.dataclass(frozen=True)
class LogisticPath:
    """Multinomial logistic regression at every strength λ; for the objective see `jxfer.solvers.lbfgs`."""

    strengths: tuple[float, ...] = STRENGTHS
    """λ of λ / 2 ‖W‖² beside the mean cross-entropy: scikit-learn's C is 1 / (N λ), of two classes 2 / (N λ)."""
    map: Any = None
    """From `jxfer.solvers.maps`, folded into the head afterwards; λ is then of the head on the mapped features."""
    tolerance: float = 3e-4
    """Largest norm of the scaled gradient of a solved problem."""
    max_iterations: int = 500
    memory_bytes: int = 2**30
    """That one program may take."""

    def fit(self, features: Any, labels: Any, num_classes: int, *, proceed: Proceed = always) -> LinearHeads:
        """Returns a head per strength; those that did not converge say so.

        Args:
          features: [N D].
          labels: [N], in [0, num_classes).
          num_classes: K.
          proceed: called before every part of the path and, where iterations take long, in between.

        Raises:
          InputError: a strength is not positive.
        """
        check_strengths(self.strengths)
        features, labels = as_arrays(features, labels)
        linear = None if self.map is None else self.map.fit(features)
        mapped = features if linear is None else linear(features)
        basis, data = lbfgs.prepare(mapped, labels, num_classes=num_classes)
        path, places = np.unique(np.asarray(self.strengths, np.float32), return_inverse=True)
        weights, norms, flops = self._solve(data, path, proceed)
        kernels, biases = lbfgs.heads(basis, data, path[places], weights[places])
        kernels, biases = (kernels, biases) if linear is None else linear.fold(kernels, biases)
        return LinearHeads(
            names=tuple(f"strength={strength:g}" for strength in self.strengths),
            kernels=kernels,
            biases=biases,
            gradient_norms=tuple(norms[places].tolist()),
            converged=tuple((norms[places] <= SLACK * self.tolerance).tolist()),
            flops=flops + _prepare_flops(len(labels), mapped.shape[1], num_classes),
        )

    def cost(self, num_examples: int, num_features: int, num_classes: int) -> tuple[float, int]:
        """Returns the floating-point operations of one iteration of the whole path, and the bytes of one program."""
        size = self.num_together(num_examples, num_features, num_classes)
        axes = min(num_examples, num_features)
        num_parts = -(-len(self.strengths) // size)
        num_bytes = size * _problem_bytes(num_examples, num_features, num_classes) + 4 * num_examples * (axes + 1)
        return num_parts * _iteration_flops(num_examples, axes, num_classes, size), num_bytes

    def num_together(self, num_examples: int, num_features: int, num_classes: int) -> int:
        """Returns how many strengths share a program: what memory allows, and about one per decade of the path.

        The parts are of one size so that they share its compilation.
        """
        decades = math.log10(max(self.strengths) / min(self.strengths))
        most = max(1, self.memory_bytes // _problem_bytes(num_examples, num_features, num_classes))
        num_parts = -(-len(self.strengths) // min(most, math.ceil(decades) + 2))
        return -(-len(self.strengths) // num_parts)

    def _solve(self, data: lbfgs.Data, path: np.ndarray, proceed: Proceed) -> tuple[Any, np.ndarray, float]:
        """Solves some strengths spread over the rising path, and from what lies between them the others.

        Returns:
          `Solution.weights` [P K Q] in the order of the path, gradient norms [P], and floating-point operations.
        """
        num_examples, axes, num_classes = data.scores.shape[1], data.scores.shape[0] - 1, len(data.targets)
        together = min(len(path), self.num_together(num_examples, axes, num_classes))
        weights = np.zeros((len(path), num_classes, axes + 1), np.float32)
        norms, solved, num_evaluations = np.zeros(len(path)), np.zeros(len(path), bool), 0
        iteration_flops = _iteration_flops(num_examples, axes, num_classes, together)
        stretch = max(1, int(STRETCH_FLOPS / iteration_flops))
        for part in _parts(len(path), together):
            start = _interpolate(np.log(path[solved]), weights[solved], np.log(path[part]))
            solution = self._solve_part(data, path[part], start, stretch, proceed)
            weights[part], norms[part], solved[part] = solution.weights, solution.gradient_norms, True
            num_evaluations += int(solution.evaluations)
        return weights, norms, num_evaluations * iteration_flops

    def _solve_part(
        self, data: lbfgs.Data, strengths: np.ndarray, start: Any, stretch: int, proceed: Proceed
    ) -> lbfgs.Solution:
        problem = data, strengths, np.float32(self.tolerance)
        ends = [*range(stretch, self.max_iterations, stretch), self.max_iterations]
        proceed()
        solution, search = lbfgs.solve(*problem, start, np.int32(ends[0]))
        for before, end in itertools.pairwise(ends):
            proceed()  # however early all is solved
            if int(solution.evaluations) == before + 1:
                solution, search = lbfgs.resume(*problem, search, np.int32(end))
        if (evaluations := int(solution.evaluations)) <= lbfgs.LONG:
            return solution
        # The logits that the iterations kept up to date carry the rounding of all of them.
        fresh, _ = lbfgs.solve(*problem, solution.weights, np.int32(0))
        return fresh._replace(evaluations=evaluations + 1)


def check_strengths(strengths: tuple[float, ...]) -> None:
    """Refuses strengths that leave a problem without a solution."""
    if not strengths or min(strengths) <= 0:
        raise InputError(f"strengths is {strengths}; give positive numbers, such as (1e-4, 1e-2)")


def _parts(num_strengths: int, size: int) -> list[np.ndarray]:
    """Returns positions in parts of one size, each spread over the path; the last ones are filled up with copies."""
    spread = np.linspace(0, num_strengths - 1, size).round().astype(int)
    others = np.setdiff1d(np.arange(num_strengths), spread)
    others = np.concatenate([others, np.repeat(others[-1:], -len(others) % size)])
    return [spread, *others.reshape(size, -1).T]


def _interpolate(known: np.ndarray, weights: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns what weights [n K Q] at rising places are between them, [m K Q], without overshoot; zeros of none."""
    if len(known) < 2:
        return np.broadcast_to(weights.sum(axis=0), (len(wanted), *weights.shape[1:]))
    return PchipInterpolator(known, weights, axis=0)(wanted).astype(np.float32)


def _problem_bytes(num_examples: int, num_features: int, num_classes: int) -> int:
    weights = (2 * lbfgs.MEMORY + 8) * (min(num_examples, num_features) + 1)
    return 4 * num_classes * (LOGITS * num_examples + weights)


@functools.lru_cache(maxsize=64)
def _prepare_flops(num_examples: int, num_features: int, num_classes: int) -> float:
    data = shape(num_examples, num_features), shape(num_examples, dtype=jnp.int32)
    counted = flops_of(lbfgs.prepare, *data, num_classes=num_classes)
    return counted + uncounted_flops(num_examples, num_features, num_classes)


def _iteration_flops(num_examples: int, axes: int, num_classes: int, size: int) -> float:
    axis = axes + 1
    labels, targets = shape(num_examples, dtype=jnp.int32), shape(num_classes, axis)
    shapes: Any = shape(axis, num_examples), labels, targets, shape(axis)
    start, most = shape(size, num_classes, axis), shape(dtype=jnp.int32)
    return flops_of(lbfgs.solve, lbfgs.Data(*shapes), shape(size), shape(), start, most)
