"""Multinomial logistic regression for a whole path of penalties as one batched program.

Each strength λ has the problem: minimise over W [D K] and b [K] the mean over the examples of the cross-entropy in nats
plus λ / 2 ‖W‖². It is that of scikit-learn's `LogisticRegression(C=1 / (N λ))`, intercept unpenalised; for two classes,
where that has one logit instead of two, of `C=2 / (N λ)`.

The P problems share every pass over the data: their logits lie side by side as [N K P], so each iteration of L-BFGS is
two large matrix products. In the eigenbasis of the covariance, with eigenvalues e, the Hessian is at most e / 2 + λ in
the order of matrices (Böhning 1992, "Multinomial logistic regression algorithm"), so weights times sqrt(e / 4 + λ) make
it nearly the identity for every λ, however ill-conditioned the features are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxfer.solvers.basis import HIGHEST, one_hot, principal

MEMORY = 8
"""Pairs of steps and gradient differences that L-BFGS remembers."""

ROUNDING = 1e-6
"""Relative rise of a float32 loss that may be rounding."""


class Problem(NamedTuple):
    """Data of all problems, in the eigenbasis with a column of ones for the intercept: Q = R + 1."""

    scores: Float[Array, "N Q"]
    labels: Int[Array, " N"]
    targets: Float[Array, "Q K"]
    """Mean over the examples of their scores times their one-hot labels."""
    penalties: Float[Array, "Q P"]
    """λ, and 0 for the intercept."""
    scales: Float[Array, "Q P"]
    """sqrt(e / 4 + λ): what L-BFGS moves in is the weights times this."""


class Search(NamedTuple):
    """Where the P problems are; `weights` and everything like it is [Q K P], scaled."""

    weights: Float[Array, "Q K P"]
    logits: Float[Array, "N K P"]
    losses: Float[Array, " P"]
    gradients: Float[Array, "Q K P"]
    steps: Float[Array, "M Q K P"]
    differences: Float[Array, "M Q K P"]
    curvatures: Float[Array, "M P"]
    """1 / (step · difference), 0 where there is none; iteration i has its pair in slot i modulo M."""
    cautious: Bool[Array, " P"]
    """Whether the last step was refused, so that the next one must be one that cannot fail."""
    iteration: Int[Array, ""]


class Solution(NamedTuple):
    """Heads on the features as they were given."""

    kernels: Float[Array, "P D K"]
    biases: Float[Array, "P K"]
    gradient_norms: Float[Array, " P"]
    iterations: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("num_classes", "max_iterations"))
def solve(
    features: Float[Array, "N D"],
    labels: Int[Array, " N"],
    strengths: Float[Array, " P"],
    tolerance: Float[Array, ""],
    *,
    num_classes: int,
    max_iterations: int,
) -> Solution:
    """Solves all problems, each until the norm of its scaled gradient is at most `tolerance`.

    Half the square of that norm is about what the loss still lies above its minimum. It is measured at the end on
    logits computed afresh, since those kept up to date by the iterations carry their rounding.
    """
    basis, scores = principal(features)
    problem = pose(scores, basis.variances, labels, strengths, num_classes)
    search = jax.lax.while_loop(
        lambda search: (search.iteration < max_iterations) & jnp.any(_norms(search.gradients) > tolerance),
        lambda search: advance(problem, search, tolerance),
        begin(problem),
    )
    _, gradients = _evaluate(problem, search.weights, _logits(problem, search.weights))
    weights = search.weights / problem.scales[:, None]
    kernels = jnp.einsum("dr,rkp->pdk", basis.axes, weights[:-1], precision=HIGHEST)
    biases = weights[-1].T - jnp.einsum("d,pdk->pk", basis.mean, kernels, precision=HIGHEST)
    return Solution(kernels, biases, _norms(gradients), search.iteration)


def pose(
    scores: Float[Array, "N R"],
    variances: Float[Array, " R"],
    labels: Int[Array, " N"],
    strengths: Float[Array, " P"],
    num_classes: int,
) -> Problem:
    """Adds the intercept, a feature without penalty, and sums up what the labels contribute to every gradient."""
    num_examples = scores.shape[0]
    scores = jnp.concatenate([scores, jnp.ones((num_examples, 1))], axis=1)
    targets = jnp.matmul(scores.T, one_hot(labels, num_classes), precision=HIGHEST) / num_examples
    penalties = jnp.concatenate(
        [jnp.broadcast_to(strengths, (len(variances), len(strengths))), jnp.zeros_like(strengths)[None]]
    )
    curvature = jnp.concatenate([variances, jnp.ones(1)]) / 4
    return Problem(scores, labels, targets, penalties, jnp.sqrt(curvature[:, None] + penalties))


def begin(problem: Problem) -> Search:
    """Returns the search at zero weights, where all classes are equally likely."""
    (num_examples, size), num_classes = problem.scores.shape, problem.targets.shape[1]
    num_problems = problem.penalties.shape[1]
    zeros = jnp.zeros((size, num_classes, num_problems))
    expected = jnp.mean(problem.scores, axis=0)[:, None] / num_classes
    return Search(
        weights=zeros,
        logits=jnp.zeros((num_examples, num_classes, num_problems)),
        losses=jnp.full(num_problems, jnp.log(num_classes)),
        gradients=(expected - problem.targets)[..., None] / problem.scales[:, None],
        steps=jnp.zeros((MEMORY, *zeros.shape)),
        differences=jnp.zeros((MEMORY, *zeros.shape)),
        curvatures=jnp.zeros((MEMORY, num_problems)),
        cautious=jnp.zeros(num_problems, bool),
        iteration=jnp.zeros((), jnp.int32),
    )


def advance(problem: Problem, search: Search, tolerance: Float[Array, ""]) -> Search:
    """Makes one iteration of every problem that is not solved yet.

    A step that raises the loss is refused. The next one then goes half a unit down the scaled gradient, where the bound
    on the Hessian promises that it falls.
    """
    steepest = -search.gradients
    directions = jnp.where(search.cautious, steepest, _quasi_newton(search))
    slopes = _logits(problem, directions)
    lengths = jnp.where(search.cautious, 0.5, _lengths(problem, search, directions, slopes))
    lengths = jnp.where(_norms(search.gradients) > tolerance, lengths, 0.0)
    weights = search.weights + lengths * directions
    losses, gradients = _evaluate(problem, weights, search.logits + lengths * slopes)
    refused = ~(losses <= search.losses + ROUNDING * jnp.abs(search.losses))
    taken = jnp.where(refused, 0.0, lengths)
    gradients = jnp.where(refused, search.gradients, gradients)
    return _remember(search, taken * directions, gradients - search.gradients, refused)._replace(
        weights=search.weights + taken * directions,
        logits=search.logits + taken * slopes,
        losses=jnp.where(refused, search.losses, losses),
        gradients=gradients,
        cautious=refused,
        iteration=search.iteration + 1,
    )


def _logits(problem: Problem, weights: Float[Array, "Q K P"]) -> Float[Array, "N K P"]:
    size, num_classes, num_problems = weights.shape
    columns = (weights / problem.scales[:, None]).reshape(size, num_classes * num_problems)
    return jnp.matmul(problem.scores, columns, precision=HIGHEST).reshape(-1, num_classes, num_problems)


def _evaluate(
    problem: Problem, weights: Float[Array, "Q K P"], logits: Float[Array, "N K P"]
) -> tuple[Float[Array, " P"], Float[Array, "Q K P"]]:
    """Returns the objective and its gradient in the scaled weights."""
    num_examples, num_classes, num_problems = logits.shape
    largest = jnp.max(logits, axis=1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = jnp.sum(exponentials, axis=1, keepdims=True)
    true = weights / problem.scales[:, None]
    pull = problem.penalties[:, None] * true
    correct = jnp.take_along_axis(logits, problem.labels[:, None, None], axis=1)
    # In this order an example that is surely right adds a small number, not the difference of two large ones.
    entropies = jnp.mean(jnp.log(total) + (largest - correct), axis=(0, 1))
    losses = entropies + jnp.sum(true * pull, axis=(0, 1)) / 2
    columns = (exponentials / total).reshape(num_examples, num_classes * num_problems)
    expected = jnp.matmul(problem.scores.T, columns, precision=HIGHEST).reshape(-1, num_classes, num_problems)
    gradients = expected / num_examples - problem.targets[..., None] + pull
    return losses, gradients / problem.scales[:, None]


def _lengths(
    problem: Problem, search: Search, directions: Float[Array, "Q K P"], slopes: Float[Array, "N K P"]
) -> Float[Array, " P"]:
    """Returns how far to go: the unit step, corrected by one step of Newton's method along the line."""
    logits = search.logits + slopes
    exponentials = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    total = jnp.sum(exponentials, axis=1)
    first = jnp.sum(exponentials * slopes, axis=1) / total
    second = jnp.sum(exponentials * jnp.square(slopes), axis=1) / total
    ahead, true = search.weights + directions, directions / problem.scales[:, None]
    pull = problem.penalties[:, None] * true
    rise = (
        jnp.mean(first, axis=0)
        - jnp.sum(true * problem.targets[..., None], axis=(0, 1))
        + jnp.sum(pull * ahead / problem.scales[:, None], axis=(0, 1))
    )
    bend = jnp.mean(second - jnp.square(first), axis=0) + jnp.sum(pull * true, axis=(0, 1))
    return jnp.clip(1 - rise / jnp.maximum(bend, jnp.finfo(jnp.float32).tiny), 0.1, 10.0)


def _quasi_newton(search: Search) -> Float[Array, "Q K P"]:
    """Returns the direction of L-BFGS (Nocedal and Wright 2006, algorithm 7.4); down the gradient without memory."""

    def back(direction: Any, slot: Any) -> tuple[Any, Any]:
        share = search.curvatures[slot] * _dot(search.steps[slot], direction)
        return direction - share * search.differences[slot], share

    def forth(direction: Any, slot_and_share: Any) -> tuple[Any, None]:
        slot, share = slot_and_share
        other = search.curvatures[slot] * _dot(search.differences[slot], direction)
        return direction + (share - other) * search.steps[slot], None

    slots = (search.iteration + jnp.arange(MEMORY)) % MEMORY  # the oldest first
    direction, shares = jax.lax.scan(back, -search.gradients, slots, reverse=True)
    newest = search.curvatures[slots[-1]] * _dot(search.differences[slots[-1]], search.differences[slots[-1]])
    direction /= jnp.where(newest > 0, newest, 1.0)
    return jax.lax.scan(forth, direction, (slots, shares))[0]


def _remember(
    search: Search, steps: Float[Array, "Q K P"], differences: Float[Array, "Q K P"], refused: Bool[Array, " P"]
) -> Search:
    """Puts the newest pair in place of the oldest, and forgets all pairs of a problem whose step was refused."""
    product = _dot(steps, differences)
    useful = product > jnp.finfo(jnp.float32).eps * _dot(differences, differences)
    curvature = jnp.where(useful, 1 / jnp.where(useful, product, 1.0), 0.0)
    slot = search.iteration % MEMORY
    return search._replace(
        steps=search.steps.at[slot].set(steps),
        differences=search.differences.at[slot].set(differences),
        curvatures=jnp.where(refused, 0.0, search.curvatures.at[slot].set(curvature)),
    )


def _dot(a: Float[Array, "Q K P"], b: Float[Array, "Q K P"]) -> Float[Array, " P"]:
    return jnp.sum(a * b, axis=(0, 1))


def _norms(gradients: Float[Array, "Q K P"]) -> Float[Array, " P"]:
    return jnp.sqrt(_dot(gradients, gradients))
