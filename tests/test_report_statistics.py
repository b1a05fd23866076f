"""The tests behind the report's claims, against scipy, closed forms and simulated truth."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from jxfer.report.comparisons import compare_methods
from jxfer.report.predictions import Confidence, Predictions
from jxfer.report.results import collect
from jxfer.report.statistics import (
    calibration_bins,
    confidence_of,
    expected_calibration_error,
    fit_temperature,
    holm,
    mcnemar,
    negative_log_likelihood,
    paired_bootstrap,
    paired_t,
    resample_examples,
)


def _correct(rng: np.random.Generator, *size: int, gain: float = 0.0, seeds: float = 0.3) -> np.ndarray:
    """[2 S N] bool: two methods of which the second is better by `gain` logits, on examples of varied difficulty."""
    S, N = size
    logits = 1 + 1.5 * rng.normal(size=N) + seeds * rng.normal(size=(2, S, 1)) + 0.5 * rng.normal(size=(2, 1, N))
    return logits + np.array([0.0, gain])[:, None, None] + rng.logistic(scale=0.5, size=(2, S, N)) > 0


def _bootstrap(correct: np.ndarray, **sizes: int):
    S, N = correct.shape[1:]
    resampled = resample_examples(correct.reshape(2 * S, N), **sizes).reshape(2, S, -1)
    observed = correct[1].mean(axis=1) - correct[0].mean(axis=1)
    return paired_bootstrap(observed, resampled[1] - resampled[0], num_examples=N)


def test_resampled_accuracies_have_the_binomial_s_spread():
    correct = np.arange(500) < 400
    resampled = resample_examples(np.stack([correct, correct]))
    np.testing.assert_array_equal(resampled[0], resampled[1])  # the same resamples for every run
    assert resampled.mean() == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / 500 / 2000))
    assert resampled[0].std() == pytest.approx(np.sqrt(0.16 / 500), rel=0.06)  # its own error: 1 / sqrt(2 B) = 1.6%


def test_on_large_samples_the_interval_is_that_of_normal_theory():
    rng = np.random.default_rng(1)
    S, N = 60, 4000
    correct = _correct(rng, S, N, gain=0.3)
    found = _bootstrap(correct)
    gaps = correct[1].astype(float) - correct[0]
    error = np.sqrt(gaps.mean(1).var(ddof=1) / S + gaps.mean(0).var(ddof=1) / N)
    assert found.mean == pytest.approx(gaps.mean(), abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    assert found.p == pytest.approx(2 * scipy.stats.norm.sf(found.mean / error), rel=1, abs=1e-6)


def test_identical_examples_leave_the_t_test_over_seeds():
    seeds = np.array([1, 1, 1, 0, 1, 1, 0, 1])
    correct = np.stack([np.zeros((8, 50)), np.repeat(seeds[:, None], 50, axis=1)]).astype(bool)
    found, expected = _bootstrap(correct), scipy.stats.ttest_1samp(seeds, 0)
    low, high = expected.confidence_interval()
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=0.1)
    assert found.p == pytest.approx(expected.pvalue, rel=0.5)


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_equal_methods_are_told_apart_in_at_most_one_of_twenty(num_seeds: int):
    rng = np.random.default_rng(num_seeds)
    found = [_bootstrap(_correct(rng, num_seeds, 100), num_resamples=200).p < 0.05 for _ in range(300)]
    assert np.sum(found) <= scipy.stats.binom.ppf(0.999, 300, 0.05)


def test_a_real_difference_is_found():
    rng = np.random.default_rng(0)
    found = _bootstrap(_correct(rng, 5, 1000, gain=1.0, seeds=0.1))
    assert found.p < 0.01
    assert 0 < found.low < found.mean < found.high


def test_the_t_test_is_that_of_scipy():
    observed = np.array([0.02, 0.05, 0.01, 0.04])
    found, expected = paired_t(observed), scipy.stats.ttest_1samp(observed, 0)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    np.testing.assert_allclose([found.low, found.high], expected.confidence_interval(), rtol=1e-12)


def test_seeds_that_agree_to_the_digit_prove_no_more_than_their_signs():
    assert paired_t(np.array([0.1, 0.1])).p == 0.5
    assert paired_t(np.zeros(3)).p == 1.0


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test_of_scipy(one: int, other: int):
    found = mcnemar(one, other, num_examples=100)
    assert found.mean == pytest.approx((one - other) / 100)
    if one + other:
        expected = scipy.stats.binomtest(one, one + other)
        assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
        low, high = expected.proportion_ci(0.95, "exact")
        scale = (one + other) / 100
        np.testing.assert_allclose([found.low, found.high], [(2 * low - 1) * scale, (2 * high - 1) * scale], atol=1e-9)
    else:
        assert (found.low, found.high, found.p) == (0, 0, 1)


def test_holm_on_an_example_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, which may not descend: .02 .03 .06 .06
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([])).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]):
    raw = np.array(p_values)
    adjusted = holm(raw)
    assert (adjusted >= raw).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(raw, kind="stable")]) >= 0).all()
    assert adjusted.min() == pytest.approx(min(1, len(raw) * raw.min()))  # as Bonferroni for the smallest


def test_the_calibration_error_of_a_model_always_this_sure_is_the_gap():
    correct = np.arange(1000) < 700
    assert expected_calibration_error(np.full(1000, 0.9), correct) == pytest.approx(0.2)
    assert expected_calibration_error(np.full(1000, 0.7), correct) == pytest.approx(0.0, abs=1e-12)


def test_bins_hold_their_upper_edge():
    counts, sums, right = calibration_bins(np.array([1 / 15, 1 / 15 + 1e-9, 1.0, 0.0]), np.array([1, 0, 1, 1]))
    assert counts[[0, 1, 14]].tolist() == [2, 1, 1]
    assert sums.sum() == pytest.approx(2 / 15 + 1, abs=1e-8)
    assert right.tolist() == [2, 0, *[0] * 12, 1]


def test_confidence_and_loss_are_those_of_scipy():
    rng = np.random.default_rng(0)
    logits = (100 * rng.normal(size=(50, 4))).astype(np.float32)  # large enough to overflow a plain exp
    labels = rng.integers(0, 4, 50)
    log_probabilities = scipy.special.log_softmax(logits.astype(np.float64) / 3, axis=1)
    # float32 logits of ~100 are exact to 1e-5
    np.testing.assert_allclose(confidence_of(logits, temperature=3.0), np.exp(log_probabilities).max(1), atol=1e-5)
    expected = -log_probabilities[np.arange(50), labels].mean()
    assert negative_log_likelihood(logits, labels, temperature=3.0) == pytest.approx(expected, rel=1e-5)


def test_the_temperature_undoes_a_factor_of_the_logits():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(20_000, 5))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # distributed as softmax(logits)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(1.0, rel=0.05)
    assert fit_temperature((4 * logits).astype(np.float32), labels) == pytest.approx(4.0, rel=0.05)


def _said(ids: np.ndarray, correct: np.ndarray) -> Predictions:
    labels = np.zeros(len(ids), int)
    return Predictions(ids, labels, (~correct).astype(int), 2, Confidence(1.0, np.ones(len(ids)), 0.0), None)


def _compared(correct: np.ndarray, **changes):
    """Two methods [2 S N] through the report's own door."""
    ids = np.arange(correct.shape[2]).astype(str)
    runs = {(m, 5, s): _said(ids, correct[i, s]) for i, m in enumerate("ab") for s in range(correct.shape[1])}
    rows = [
        {"method": m, "shots": k, "seed": s, "status": "ok", "metrics": {"accuracy": float(said.correct.mean())}}
        | {"subset_hash": changes.get("hashes", {}).get((m, s), f"{s}")}
        for (m, k, s), said in runs.items()
    ]
    results = collect(rows)
    return compare_methods(results, {} if changes.get("blind") else runs).between("b", "a", 5)


def test_the_test_follows_from_what_there_is():
    correct = _correct(np.random.default_rng(0), 3, 80, gain=1.0)
    assert _compared(correct).difference.test == "bootstrap"
    assert _compared(correct).num_examples == 80
    assert _compared(correct[:, :1]).difference.test == "mcnemar"
    assert _compared(correct, blind=True).difference.test == "t"
    assert _compared(correct[:, :1], blind=True).verdict == "unknown"


def test_only_runs_on_the_same_subset_are_compared():
    correct = _correct(np.random.default_rng(0), 4, 80, gain=1.0)
    pair = _compared(correct, hashes={("a", 0): "other"})
    assert pair.num_seeds == 3
    expected = (correct[1, 1:].mean() - correct[0, 1:].mean()).item()
    assert pair.difference.mean == pytest.approx(expected)
    assert _compared(correct, hashes={("a", s): "other" for s in range(4)}).verdict == "unknown"


def test_a_comparison_turned_twice_is_itself():
    pair = _compared(_correct(np.random.default_rng(0), 4, 80, gain=1.0))
    assert dataclasses.asdict(pair.turned().turned()) == dataclasses.asdict(pair)
    assert pair.turned().difference.mean == -pair.difference.mean
