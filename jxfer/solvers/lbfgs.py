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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jxfer.solvers.basis import HIGHEST, Basis, one_hot, principal_with_targets
from jxfer.xla_flags import quick_to_compile

MEMORY = 8
"""Pairs of steps and gradient differences that L-BFGS remembers."""

LONG = 50
"""Evaluations after which the rounding of as many updates of the logits is to be looked at: 50 × 6e-8 of their size."""

COMPILER_OPTIONS = quick_to_compile()
"""What the programs here are compiled with beyond `XLA_FLAGS`; recorded with the results."""

_jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


class Data(NamedTuple):
    """What all problems share: features in their eigenbasis and a row of ones for the intercept, Q = R + 1."""

    scores: Float[Array, "Q N"]
    labels: Int[Array, " N"]
    targets: Float[Array, "K Q"]
    """Mean over the examples of their one-hot labels times their scores."""
    curvature: Float[Array, " Q"]
    """e / 4."""


class Problem(NamedTuple):
    """The problems that are solved together; of each, weights are one row of V = K Q numbers."""

    data: Data
    penalties: Float[Array, "P V"]
    """λ, and 0 for the intercepts."""
    scales: Float[Array, "P V"]
    """sqrt(e / 4 + λ): what L-BFGS moves in is the weights times this."""


class Memory(NamedTuple):
    """The last M pairs of steps s and gradient differences y of P problems, and what their products come to.

    The pair of evaluation i is in slot i modulo M. A pair that is not to be used has zeros in `inverse`.
    """

    rows: Float[Array, "P R V"]
    """Every s, every y, and the gradient."""
    inverse: Float[Array, "P M M"]
    """Of the matrix of s · y of all pairs of an s and a y that is not older."""
    squares: Float[Array, "P M M"]
    """y · y."""
    products: Float[Array, "P M"]
    """s · y of each pair."""


class Search(NamedTuple):
    """Where the P problems are; `weights` and everything like it is scaled."""

    weights: Float[Array, "P V"]
    logits: Float[Array, "P K N"]
    probabilities: Float[Array, "P K N"]
    offsets: Float[Array, "P V"]
    """From where a problem that went too far came from to where it is; 0 of others."""
    gradients: Float[Array, "P V"]
    """Of a problem that went too far, where it came from."""
    norms: Float[Array, " P"]
    """Of the gradients; infinite where a problem went too far."""
    directions: Float[Array, "P V"]
    """Where to go next."""
    falls: Float[Array, " P"]
    """How much the loss would fall over the directions if it went on falling as it does at their beginning."""
    straight: Bool[Array, " P"]
    """Whether to go there as it is: at the start, and back from too far."""
    memory: Memory
    evaluations: Int[Array, ""]


class Solution(NamedTuple):
    """Solved problems."""

    weights: Float[Array, "P K Q"]
    """Times e / 4 + λ. Under a strong penalty the weights are the first gradient over λ, so that this product hardly
    changes with λ, and what lies between two strengths can be interpolated."""
    gradient_norms: Float[Array, " P"]
    evaluations: Int[Array, ""]
    """Of which the first is that of the start."""


@functools.partial(_jit, static_argnames="num_classes")
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


@_jit
def solve(
    data: Data,
    strengths: Float[Array, " P"],
    tolerance: Float[Array, ""],
    start: Float[Array, "P K Q"],
    most: Int[Array, ""],
) -> tuple[Solution, Search]:
    """Solves problems together, each until the norm of its scaled gradient is at most `tolerance`.

    Half the square of that norm is about what the loss still lies above its minimum where the classes overlap, and less
    than it where they hardly do, so that the Hessian is far below its bound.

    Args:
      data: from `prepare`.
      strengths: λ of each problem.
      tolerance: of the norms.
      start: in the unit of `Solution.weights`, such as those of problems nearby, or zeros.
      most: iterations, after which the search ends as it is; 0 only measures the norms at the start.

    Returns:
      the solution, and the search, with which `resume` goes on.
    """
    problem = pose(data, strengths)
    return _search(problem, begin(problem, start), tolerance, most)


@functools.partial(_jit, donate_argnames="search")
def resume(
    data: Data, strengths: Float[Array, " P"], tolerance: Float[Array, ""], search: Search, most: Int[Array, ""]
) -> tuple[Solution, Search]:
    """Goes on with a search, which is donated, up to `most` iterations since its start."""
    return _search(pose(data, strengths), search, tolerance, most)


def _search(
    problem: Problem, search: Search, tolerance: Float[Array, ""], most: Int[Array, ""]
) -> tuple[Solution, Search]:
    search = jax.lax.while_loop(
        lambda search: (search.evaluations <= most) & jnp.any(search.norms > tolerance),
        lambda search: advance(problem, search, tolerance),
        search,
    )
    weights = (search.weights * problem.scales).reshape(-1, *problem.data.targets.shape)
    return Solution(weights, search.norms, search.evaluations), search


@_jit
def heads(
    basis: Basis, data: Data, strengths: Float[Array, " P"], weights: Float[Array, "P K Q"]
) -> tuple[Float[Array, "P D K"], Float[Array, "P K"]]:
    """Returns kernels and biases on the features as they were given, from `Solution.weights`."""
    true = (weights.reshape(len(weights), -1) / jnp.square(pose(data, strengths).scales)).reshape(weights.shape)
    return basis.heads(true[..., :-1], true[..., -1])


def pose(data: Data, strengths: Float[Array, " P"]) -> Problem:
    """Returns the problems of these strengths; the intercept is a feature without penalty."""
    num_classes, num_axes = data.targets.shape
    penalized = jnp.tile(jnp.arange(num_axes) < num_axes - 1, num_classes)
    penalties = penalized * strengths[:, None]
    return Problem(data, penalties, jnp.sqrt(jnp.tile(data.curvature, num_classes) + penalties))


def begin(problem: Problem, start: Float[Array, "P K Q"]) -> Search:
    """Returns the search at zero, from where the first step goes to the start.

    So the loop holds the only copy of what evaluates a point, and there is one to compile.
    """
    num_problems, num_classes, _ = start.shape
    directions = start.reshape(num_problems, -1) / problem.scales
    zeros, none = jnp.zeros_like(directions), jnp.zeros((num_problems, MEMORY, MEMORY))
    logits = jnp.zeros((num_problems, num_classes, problem.data.scores.shape[1]))
    rows = jnp.zeros((num_problems, 2 * MEMORY + 1, zeros.shape[1]))
    return Search(
        weights=zeros,
        logits=logits,
        probabilities=logits,
        offsets=zeros,
        gradients=zeros,
        norms=jnp.full(num_problems, jnp.inf),
        directions=directions,
        falls=jnp.zeros(num_problems),
        straight=jnp.ones(num_problems, bool),
        memory=Memory(rows, none, none, none[:, 0]),
        evaluations=jnp.zeros((), jnp.int32),
    )


def advance(problem: Problem, search: Search, tolerance: Float[Array, ""]) -> Search:
    """Makes one iteration of every problem that is not solved yet.

    A problem went too far if its loss rises at the end of its step by more than it fell at the beginning; slopes tell
    near the minimum too, where the rounding of losses hides what is gained. It then goes back to where the slope would
    be zero if it changed evenly between, as often as it takes.
    """
    first = search.evaluations == 0
    slopes = _logits(problem, search.directions)
    lengths = jnp.where(search.straight, 1.0, _lengths(problem, search, slopes))
    lengths = jnp.where(search.norms > tolerance, lengths, 0.0)
    moves = lengths[:, None] * search.directions
    weights, logits = search.weights + moves, search.logits + lengths[:, None, None] * slopes
    probabilities = _softmax(logits)
    gradients = _gradients(problem, weights, probabilities)
    steps, differences = search.offsets + moves, gradients - search.gradients
    slot, rows = search.evaluations % MEMORY, search.memory.rows
    for place, row in ((slot, steps), (MEMORY + slot, differences), (2 * MEMORY, gradients)):
        rows = jax.lax.dynamic_update_slice_in_dim(rows, row[:, None], place, axis=1)
    along = jnp.matmul(rows, jnp.stack([differences, gradients], axis=-1), precision=HIGHEST)
    falls = lengths * search.falls
    rises = jax.lax.dynamic_index_in_dim(along[..., 1], slot, axis=1, keepdims=False)
    far = ~(first | (rises <= falls))
    memory, factors = _quasi_newton(search.memory._replace(rows=rows), along, slot, leave=far | first)
    back, share = far[:, None], jnp.clip(falls / (falls + rises), 0.1, 0.5)
    # Rounding may have left a memory that does not lead down.
    descends = jnp.sum(factors * along[..., 1], axis=1, keepdims=True) > 0
    factors = jnp.where(descends, factors, jnp.arange(2 * MEMORY + 1) == 2 * MEMORY)
    directions = -jnp.matmul(factors[:, None], rows, precision=HIGHEST)[:, 0]
    return Search(
        weights=weights,
        logits=logits,
        probabilities=probabilities,
        offsets=jnp.where(back, steps, 0.0),
        gradients=jnp.where(back, search.gradients, gradients),
        norms=jnp.where(far, jnp.inf, jnp.sqrt(along[:, -1, 1])),
        directions=jnp.where(back, (share[:, None] - 1) * steps, directions),
        falls=jnp.where(far, share * falls, jnp.sum(factors * along[..., 1], axis=1)),
        straight=far,
        memory=memory,
        evaluations=search.evaluations + 1,
    )


def _logits(problem: Problem, weights: Float[Array, "P V"]) -> Float[Array, "P K N"]:
    scores = problem.data.scores
    rows = (weights / problem.scales).reshape(-1, len(scores))
    return jnp.matmul(rows, scores, precision=HIGHEST).reshape(len(weights), -1, scores.shape[1])


def _softmax(logits: Float[Array, "P K N"]) -> Float[Array, "P K N"]:
    exponentials = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return exponentials / jnp.sum(exponentials, axis=1, keepdims=True)


def _gradients(
    problem: Problem, weights: Float[Array, "P V"], probabilities: Float[Array, "P K N"]
) -> Float[Array, "P V"]:
    """Returns the gradients in the scaled weights."""
    num_examples = probabilities.shape[2]
    rows = probabilities.reshape(-1, num_examples)
    expected = jnp.matmul(rows, problem.data.scores.T, precision=HIGHEST).reshape(weights.shape)
    pull = problem.penalties * weights / problem.scales
    return (expected / num_examples - problem.data.targets.reshape(-1) + pull) / problem.scales


def _lengths(problem: Problem, search: Search, slopes: Float[Array, "P K N"]) -> Float[Array, " P"]:
    """Returns how far Newton's method along the line goes."""
    moved = search.probabilities * slopes
    spread = jnp.sum(moved * slopes, axis=1) - jnp.square(jnp.sum(moved, axis=1))
    pull = problem.penalties * jnp.square(search.directions / problem.scales)
    bend = jnp.sum(jnp.concatenate([spread / slopes.shape[2], pull], axis=1), axis=1)
    return jnp.clip(search.falls / jnp.maximum(bend, jnp.finfo(jnp.float32).tiny), 0.1, 10.0)


def _quasi_newton(
    memory: Memory, along: Float[Array, "P R 2"], slot: Int[Array, ""], *, leave: Bool[Array, " P"]
) -> tuple[Memory, Float[Array, "P R"]]:
    """Returns the memory with the newest pair, and of which sum of rows the direction of L-BFGS is the negative.

    It is the compact form (Byrd, Nocedal and Schnabel 1994, theorem 2.2) of the recursion over the pairs, which would
    be two loops to compile. The inverse of their triangular matrix grows by a column with each pair, and without the
    row and the column of the oldest it is that of the others.

    Args:
      memory: with the newest pair in its rows.
      along: the products of the rows with the newest difference and the gradient.
      slot: of the newest pair.
      leave: whether not to use the newest pair.
    """
    here = jnp.arange(MEMORY) == slot
    steps, differences = along[:, :MEMORY], along[:, MEMORY:-1]
    product, square = (jax.lax.dynamic_index_in_dim(part[..., 0], slot, axis=1) for part in (steps, differences))
    useful = (product > jnp.finfo(jnp.float32).eps * square) & ~leave[:, None]
    scale = jnp.where(useful, product / jnp.where(useful, square, 1.0), 1.0)
    curvature = jnp.where(useful, 1 / jnp.where(useful, product, 1.0), 0.0)
    inverse = jnp.where(here | here[:, None], 0.0, memory.inverse)
    both = jnp.matmul(inverse, steps, precision=HIGHEST)
    column = jnp.where(here, curvature, -curvature * both[..., 0])
    shares = both[..., 1] + column * jax.lax.dynamic_index_in_dim(steps[..., 1], slot, axis=1)
    inverse = jnp.where(here, column[..., None], inverse)
    squares = jnp.where(here, differences[..., :1], memory.squares)
    squares = jnp.where(here[:, None], differences[:, None, :, 0], squares)
    products = jnp.where(here, product, memory.products)
    inner = jnp.matmul(squares, shares[..., None], precision=HIGHEST)[..., 0] - differences[..., 1]
    inner = (products * shares + scale * inner)[:, None]
    outer = jnp.matmul(inner, inverse, precision=HIGHEST)[:, 0]
    return Memory(memory.rows, inverse, squares, products), jnp.concatenate([outer, -scale * shares, scale], axis=1)
