"""Paired comparison of classifiers measured on the same test examples, and calibration: numbers in, numbers out."""

import dataclasses
import math
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
NUM_BINS = 15
Test = Literal["bootstrap", "mcnemar", "t"]

_SEED = 0
_BLOCK = 2_000_000  # drawn indices at a time: they stay in the cache
_MIN_SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Difference:
    """An estimated difference with its 95% interval, the two-sided p-value of no difference, and their test."""

    mean: float
    low: float
    high: float
    p: float
    test: Test


def resample_examples(correct: np.ndarray, *, num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """Returns the accuracies [R B] float64 of R runs on B resamples, drawn with replacement, of their N test examples.

    Args:
      correct: [R N] bool, which examples each run got right. All runs meet the same resamples, so that differences
        between rows of the result are paired.
      num_resamples: B.
    """
    N = correct.shape[1]
    rng = np.random.default_rng(_SEED)
    values = correct.astype(np.float32)  # sums of counts below 2^24 are exact
    blocks, left = [], num_resamples
    while left > 0:
        size = min(left, max(1, _BLOCK // N))
        drawn = rng.integers(0, N, (size, N)) + N * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * N).reshape(size, N)
        blocks.append(values @ counts.astype(np.float32).T)
        left -= size
    return np.concatenate(blocks, axis=1).astype(np.float64) / N


def paired_bootstrap(observed: np.ndarray, resampled: np.ndarray, *, num_examples: int) -> Difference:
    """Compares two methods over both levels that could have been drawn otherwise: seeds and test examples.

    Each replicate draws seeds and examples with replacement, independently (the pigeonhole bootstrap: Owen, "The
    pigeonhole bootstrap", 2007, which errs towards too large a variance). Percentiles of the replicates would claim too
    much from a handful of seeds, so two things are done. The seeds' weights are rescaled to the variance of S - 1
    degrees of freedom (Rao and Wu, 1988, section 2). The interval is the replicates' standard error times a quantile of
    t, whose degrees of freedom are S - 1 times the square of how much larger that error is than that of the seeds
    alone; Satterthwaite's formula has the fourth power, which at five seeds found something among six equal methods
    in 9% of simulated ablations instead of 6%. Below five seeds the spread over seeds is known too poorly for
    either, and the degrees of freedom are S - 1.

    Args:
      observed: [S] differences of accuracy, one per seed, S of at least 2.
      resampled: [S B] the same differences on B resamples of the test examples.
      num_examples: N, how many test examples there are.
    """
    S, num_resamples = resampled.shape
    replicates = (_seed_weights(S, num_resamples) * resampled).mean(axis=0)
    error = float(replicates.std(ddof=1))
    seeds_error = float(observed.std(ddof=1)) / math.sqrt(S)
    degrees = S - 1.0
    if S >= _MIN_SEEDS:
        degrees *= max(1.0, (error / seeds_error) ** 2) if seeds_error else math.inf
    return _by_t(float(observed.mean()), error, min(degrees, 1e9), num_examples, "bootstrap")


def paired_t(observed: np.ndarray) -> Difference:
    """Compares two methods over seeds alone: the paired t-test on S >= 2 differences of accuracy, one per seed."""
    error = float(observed.std(ddof=1)) / math.sqrt(len(observed))
    return _by_t(float(observed.mean()), error, len(observed) - 1.0, len(observed), "t")


def mcnemar(one_only: int, other_only: int, *, num_examples: int) -> Difference:
    """Compares two single runs by the test examples that exactly one of them got right: the exact McNemar test.

    The interval is Clopper and Pearson's for the share of those examples that `one` got right, which contains one half
    exactly where p is above 5%, turned into a difference of accuracies; how many examples the runs disagree on is
    taken as given.
    """
    from scipy.special import bdtr, betaincinv

    n, k = one_only + other_only, one_only
    if not n:
        return Difference(0.0, 0.0, 0.0, 1.0, "mcnemar")
    p = min(1.0, 2.0 * float(bdtr(min(k, n - k), n, 0.5)))
    tail = (1 - CONFIDENCE) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    scale = n / num_examples
    return Difference((2 * k - n) / num_examples, (2 * low - 1) * scale, (2 * high - 1) * scale, p, "mcnemar")


def holm(p_values: np.ndarray) -> np.ndarray:
    """Returns p-values adjusted so that the chance of any false finding among them is kept (Holm, 1979)."""
    order = np.argsort(p_values, kind="stable")
    steps = (len(p_values) - np.arange(len(p_values))) * p_values[order]
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def calibration_bins(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns for each of 15 equal bins of confidence its count, summed confidence and number right, [15] float64.

    Args:
      confidence: [N] the probability given to the predicted class, in [0, 1]; a bin holds its upper edge.
      correct: [N] bool.
    """
    index = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(index, minlength=NUM_BINS).astype(np.float64)
    sums = np.bincount(index, weights=confidence, minlength=NUM_BINS)
    return counts, sums, np.bincount(index, weights=correct.astype(np.float64), minlength=NUM_BINS)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean gap between confidence and accuracy over 15 bins, by their counts (Guo et al., 2017, equation 3)."""
    _, sums, right = calibration_bins(confidence, correct)
    return float(np.abs(sums - right).sum() / len(confidence))


def confidence_of(logits: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """Returns [N] float64: the largest softmax probability of logits [N K] divided by `temperature`."""
    shifted = (logits - logits.max(axis=1, keepdims=True)) / np.float32(temperature)
    return 1.0 / np.exp(shifted).sum(axis=1, dtype=np.float64)


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, *, temperature: float = 1.0) -> float:
    """Mean over examples of -log softmax(logits [N K] / temperature) at the labels [N], in nats."""
    shifted = (logits - logits.max(axis=1, keepdims=True)) / np.float32(temperature)
    at_label = shifted[np.arange(len(labels)), labels].astype(np.float64)
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1, dtype=np.float64)) - at_label))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature within [1/20, 20] of least negative log-likelihood (Guo et al., 2017, section 4.2)."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(logits, labels, temperature=math.exp(log_temperature))

    bound = math.log(20.0)
    return math.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-3}).x)


def _by_t(mean: float, error: float, degrees: float, num_units: int, test: Test) -> Difference:
    from scipy.special import stdtr, stdtrit

    if error == 0.0:
        # All units agree, of which there are finitely many: no test of them says more than that of their signs.
        return Difference(mean, mean, mean, 2.0 * 0.5**num_units if mean else 1.0, test)
    reach = float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * error
    return Difference(mean, mean - reach, mean + reach, 2.0 * float(stdtr(degrees, -abs(mean) / error)), test)


def _seed_weights(num_seeds: int, num_resamples: int) -> np.ndarray:
    """[S B]: how often each seed is drawn in each resample, spread around 1 by sqrt(S / (S - 1))."""
    rng = np.random.default_rng(_SEED + 1)
    drawn = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples).T
    return 1.0 + (drawn - 1.0) * math.sqrt(num_seeds / (num_seeds - 1))
