"""Multinomial logistic regression for a whole path of penalties as one batched program.

Each strength λ has the problem: minimise over W [D K] and b [K] the mean over the examples of the cross-entropy in nats
plus λ / 2 ‖W‖². It is that of scikit-learn's `LogisticRegression(C=1 / (N λ))`, intercept unpenalised; for two classes,
where that has one logit instead of two, of `C=2 / (N λ)`.

The P problems share every pass over the data: their logits lie side by side as [P K N], so each iteration of L-BFGS is
two large matrix products. In the eigenbasis of the covariance, with eigenvalues e, the Hessian is at most e / 2 + λ in
the order of matrices (Böhning 1992, "Multinomial logistic regression algorithm"), so weights times sqrt(e / 4 + λ) make
it nearly the identity for every λ, however ill-conditioned the features are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxfer.solvers.basis import HIGHEST, Basis, one_hot, principal_with_targets

MEMORY = 8
"""Pairs of steps and gradient differences that L-BFGS remembers."""

LONG = 50
"""Iterations after which the rounding of as many updates of the logits is looked at: 50 × 6e-8 of their size."""

ROUNDING = 1e-6
"""Relative rise of a float32 loss that may be rounding."""


class Data(NamedTuple):
    """What all problems share: features in their eigenbasis and a row of ones for the intercept, Q = R + 1."""

    scores: Float[Array, "Q N"]
    labels: Int[Array, " N"]
    targets: Float[Array, "K Q"]
    """Mean over the examples of their one-hot labels times their scores."""
    curvature: Float[Array, " Q"]
    """e / 4."""


class Problem(NamedTuple):
    """The problems that are solved together."""

    data: Data
    penalties: Float[Array, "P 1 Q"]
    """λ, and 0 for the intercept."""
    scales: Float[Array, "P 1 Q"]
    """sqrt(e / 4 + λ): what L-BFGS moves in is the weights times this."""


class Search(NamedTuple):
    """Where the P problems are; `weights` and everything like it is [P K Q], scaled."""

    weights: Float[Array, "P K Q"]
    logits: Float[Array, "P K N"]
    losses: Float[Array, " P"]
    gradients: Float[Array, "P K Q"]
    steps: Float[Array, "M P K Q"]
    differences: Float[Array, "M P K Q"]
    curvatures: Float[Array, "M P"]
    """1 / (step · difference), 0 where there is none; iteration i has its pair in slot i modulo M."""
    cautious: Bool[Array, " P"]
    """Whether the last step was refused, so that the next one must be one that cannot fail."""
    iteration: Int[Array, ""]


class Solution(NamedTuple):
    """Solved problems."""

    weights: Float[Array, "P K Q"]
    """Times e / 4 + λ. Under a strong penalty the weights are the first gradient over λ, so that this product hardly
    changes with λ, and what lies between two strengths can be interpolated."""
    gradient_norms: Float[Array, " P"]
    iterations: Int[Array, ""]


@functools.partial(jax.jit, static_argnames="num_classes")
def prepare(features: Float[Array, "N D"], labels: Int[Array, " N"], *, num_classes: int) -> tuple[Basis, Data]:
    """Turns the features into their eigenbasis, and sums up what the labels contribute to every gradient."""
    targets = one_hot(labels, num_classes)
    basis, covariances = principal_with_targets(features, targets)
    scores = jnp.matmul(basis.axes.T, (features - basis.mean).T, precision=HIGHEST)
    return basis, Data(
        scores=jnp.concatenate([scores, jnp.ones((1, len(features)))]),
        labels=labels,
        targets=jnp.concatenate([covariances, jnp.mean(targets, axis=0)[:, None]], axis=1),
        curvature=jnp.concatenate([basis.variances, jnp.ones(1)]) / 4,
    )


@jax.jit
def solve(
    data: Data,
    strengths: Float[Array, " P"],
    tolerance: Float[Array, ""],
    start: Float[Array, "P K Q"],
    most: Int[Array, ""],
) -> tuple[Solution, Search]:
    """Solves problems together, each until the norm of its scaled gradient is at most `tolerance`.

    Half the square of that norm is about what the loss still lies above its minimum where the classes overlap, and less
    than it where they hardly do, so that the Hessian is far below its bound. After a long search the norm is measured
    on logits computed afresh, since those kept up to date by the iterations carry their rounding.

    Args:
      data: from `prepare`.
      strengths: λ of each problem.
      tolerance: of the norms.
      start: in the unit of `Solution.weights`, such as those of problems nearby, or zeros.
      most: iterations, after which the search ends as it is.

    Returns:
      the solution, and the search, with which `resume` goes on.
    """
    problem = pose(data, strengths)
    return _search(problem, begin(problem, start), tolerance, most)


@functools.partial(jax.jit, donate_argnames="search")
def resume(
    data: Data, strengths: Float[Array, " P"], tolerance: Float[Array, ""], search: Search, most: Int[Array, ""]
) -> tuple[Solution, Search]:
    """Goes on with a search, which is donated, up to `most` iterations since its start."""
    return _search(pose(data, strengths), search, tolerance, most)


def _search(problem: Problem, search: Search, tolerance: Float[Array, ""], most: Any) -> tuple[Solution, Search]:
    search = jax.lax.while_loop(
        lambda search: (search.iteration < most) & jnp.any(_norms(search.gradients) > tolerance),
        lambda search: advance(problem, search, tolerance),
        search,
    )
    gradients = jax.lax.cond(
        search.iteration > LONG,
        lambda: _evaluate(problem, search.weights, _logits(problem, search.weights))[1],
        lambda: search.gradients,
    )
    return Solution(search.weights * problem.scales, _norms(gradients), search.iteration), search


@jax.jit
def heads(
    basis: Basis, data: Data, strengths: Float[Array, " P"], weights: Float[Array, "P K Q"]
) -> tuple[Float[Array, "P D K"], Float[Array, "P K"]]:
    """Returns kernels and biases on the features as they were given, from `Solution.weights`."""
    true = weights / jnp.square(pose(data, strengths).scales)
    return basis.heads(true[..., :-1], true[..., -1])


def pose(data: Data, strengths: Float[Array, " P"]) -> Problem:
    """Returns the problems of these strengths; the intercept is a feature without penalty."""
    penalized = jnp.arange(len(data.curvature)) < len(data.curvature) - 1
    penalties = penalized * strengths[:, None, None]
    return Problem(data, penalties, jnp.sqrt(data.curvature + penalties))


def begin(problem: Problem, start: Float[Array, "P K Q"]) -> Search:
    """Returns the search at the start, without memory."""
    weights = start / problem.scales
    logits = _logits(problem, weights)
    losses, gradients = _evaluate(problem, weights, logits)
    num_problems = len(losses)
    return Search(
        weights=weights,
        logits=logits,
        losses=losses,
        gradients=gradients,
        steps=jnp.zeros((MEMORY, *weights.shape)),
        differences=jnp.zeros((MEMORY, *weights.shape)),
        curvatures=jnp.zeros((MEMORY, num_problems)),
        cautious=jnp.zeros(num_problems, bool),
        iteration=jnp.zeros((), jnp.int32),
    )


def advance(problem: Problem, search: Search, tolerance: Float[Array, ""]) -> Search:
    """Makes one iteration of every problem that is not solved yet.

    A step that raises the loss is refused. The next one then goes half a unit down the scaled gradient, where the bound
    on the Hessian promises that it falls.
    """
    cautious = search.cautious[:, None, None]
    directions = jnp.where(cautious, -search.gradients, _quasi_newton(search))
    slopes = _logits(problem, directions)
    lengths = jnp.where(search.cautious, 0.5, _lengths(problem, search, directions, slopes))
    lengths = jnp.where(_norms(search.gradients) > tolerance, lengths, 0.0)
    steps = lengths[:, None, None] * directions
    losses, gradients = _evaluate(problem, search.weights + steps, search.logits + lengths[:, None, None] * slopes)
    refused = ~(losses <= search.losses + ROUNDING * jnp.abs(search.losses))
    taken = jnp.where(refused, 0.0, lengths)[:, None, None]
    gradients = jnp.where(refused[:, None, None], search.gradients, gradients)
    return _remember(search, taken * directions, gradients - search.gradients, refused)._replace(
        weights=search.weights + taken * directions,
        logits=search.logits + taken * slopes,
        losses=jnp.where(refused, search.losses, losses),
        gradients=gradients,
        cautious=refused,
        iteration=search.iteration + 1,
    )


def _logits(problem: Problem, weights: Float[Array, "P K Q"]) -> Float[Array, "P K N"]:
    rows = (weights / problem.scales).reshape(-1, weights.shape[-1])
    return jnp.matmul(rows, problem.data.scores, precision=HIGHEST).reshape(*weights.shape[:2], -1)


def _evaluate(
    problem: Problem, weights: Float[Array, "P K Q"], logits: Float[Array, "P K N"]
) -> tuple[Float[Array, " P"], Float[Array, "P K Q"]]:
    """Returns the objective and its gradient in the scaled weights."""
    num_problems, num_classes, num_examples = logits.shape
    largest = jnp.max(logits, axis=1)
    exponentials = jnp.exp(logits - largest[:, None])
    total = jnp.sum(exponentials, axis=1)
    true = weights / problem.scales
    pull = problem.penalties * true
    labelled = problem.data.labels == jnp.arange(num_classes)[:, None]
    correct = jnp.sum(jnp.where(labelled, logits, 0.0), axis=1)
    # In this order an example that is surely right adds a small number, not the difference of two large ones.
    entropies = jnp.mean(jnp.log(total) + (largest - correct), axis=-1)
    losses = entropies + jnp.sum(true * pull, axis=(1, 2)) / 2
    rows = (exponentials / total[:, None]).reshape(-1, num_examples)
    expected = jnp.matmul(rows, problem.data.scores.T, precision=HIGHEST).reshape(num_problems, num_classes, -1)
    return losses, (expected / num_examples - problem.data.targets + pull) / problem.scales


def _lengths(
    problem: Problem, search: Search, directions: Float[Array, "P K Q"], slopes: Float[Array, "P K N"]
) -> Float[Array, " P"]:
    """Returns how far to go: the unit step, corrected by one step of Newton's method along the line."""
    logits = search.logits + slopes
    exponentials = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    total = jnp.sum(exponentials, axis=1)
    first = jnp.sum(exponentials * slopes, axis=1) / total
    second = jnp.sum(exponentials * jnp.square(slopes), axis=1) / total
    ahead, true = search.weights + directions, directions / problem.scales
    pull = problem.penalties * true
    rise = jnp.mean(first, axis=-1) + jnp.sum(pull * ahead / problem.scales - true * problem.data.targets, axis=(1, 2))
    bend = jnp.mean(second - jnp.square(first), axis=-1) + jnp.sum(pull * true, axis=(1, 2))
    return jnp.clip(1 - rise / jnp.maximum(bend, jnp.finfo(jnp.float32).tiny), 0.1, 10.0)


def _quasi_newton(search: Search) -> Float[Array, "P K Q"]:
    """Returns the direction of L-BFGS (Nocedal and Wright 2006, algorithm 7.4); down the gradient without memory."""

    def back(direction: Any, slot: Any) -> tuple[Any, Any]:
        share = (search.curvatures[slot] * _dot(search.steps[slot], direction))[:, None, None]
        return direction - share * search.differences[slot], share

    def forth(direction: Any, slot_and_share: Any) -> tuple[Any, None]:
        slot, share = slot_and_share
        other = (search.curvatures[slot] * _dot(search.differences[slot], direction))[:, None, None]
        return direction + (share - other) * search.steps[slot], None

    slots = (search.iteration + jnp.arange(MEMORY)) % MEMORY  # the oldest first
    direction, shares = jax.lax.scan(back, -search.gradients, slots, reverse=True)
    newest = search.curvatures[slots[-1]] * _dot(search.differences[slots[-1]], search.differences[slots[-1]])
    direction /= jnp.where(newest > 0, newest, 1.0)[:, None, None]
    return jax.lax.scan(forth, direction, (slots, shares))[0]


def _remember(
    search: Search, steps: Float[Array, "P K Q"], differences: Float[Array, "P K Q"], refused: Bool[Array, " P"]
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


def _dot(a: Float[Array, "P K Q"], b: Float[Array, "P K Q"]) -> Float[Array, " P"]:
    return jnp.sum(a * b, axis=(1, 2))


def _norms(gradients: Float[Array, "P K Q"]) -> Float[Array, " P"]:
    return jnp.sqrt(_dot(gradients, gradients))
