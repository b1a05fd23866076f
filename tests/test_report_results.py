"""Rows to means and intervals, and intervals to claims."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from jxfer.report.comparisons import compare_methods
from jxfer.report.findings import best_table, certainty, headline
from jxfer.report.results import Summary, collect, mean_of, read_results, summarise
from jxfer.typing import InputError


def _row(method: str, shots: int | None, seed: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    status = "failed" if accuracy is None else "ok"
    metrics = None if accuracy is None else {"accuracy": accuracy}
    return {"method": method, "shots": shots, "seed": seed, "status": status, "metrics": metrics} | more


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_that_of_scipy(n: int):
    values = np.random.default_rng(n).normal(0.8, 0.05, n)
    summary = summarise(values)
    low, high = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
    assert summary.n == n
    assert summary.half_width is not None
    np.testing.assert_allclose([summary.mean - summary.half_width, summary.mean + summary.half_width], [low, high])


def test_means_are_in_float64():
    value = float(np.float32(0.1))
    assert summarise([value] * 1000).mean == pytest.approx(value, abs=1e-15)


def test_one_seed_has_no_interval():
    assert summarise([0.5]) == Summary(0.5, None, 1)


def test_a_torn_last_line_is_ignored(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    whole = json.dumps(_row("partial", 1, 0, 0.5))
    path.write_text(whole + "\n" + whole[:30])
    assert len(read_results(path)) == 1
    path.write_text(whole + "\n" + whole)  # complete but for its newline
    assert len(read_results(path)) == 2


@pytest.mark.parametrize(
    ("line", "fact"), [("{", "is not JSON"), ("[]", "is not an object"), ("{}", "has no 'method'")]
)
def test_another_broken_line_is_named(tmp_path: Path, line: str, fact: str):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{json.dumps(_row('partial', 1, 0, 0.5))}\n{line}\n\n")
    with pytest.raises(InputError, match=f"line 2 {fact}"):
        read_results(path)


def test_a_later_row_of_a_run_replaces_the_earlier():
    results = collect([_row("partial", 1, 0, None), _row("partial", 1, 0, 0.5)])
    assert not results.failed
    assert results.accuracy["partial", 1].n == 1


def test_methods_keep_the_experiment_s_order_and_shots_ascend():
    rows = [_row(method, shots, 0, 0.5) for method in ("new", "b", "a") for shots in (None, 20, 5)]
    results = collect(rows, order=("a", "b", "absent"))
    assert results.methods == ("a", "b", "new")
    assert results.shots == (5, 20, None)


def test_missing_costs_are_left_out_of_means():
    assert mean_of([{"seconds": 2}, {"seconds": None}, {}, {"seconds": 4}], "seconds") == 3
    assert mean_of([{}], "seconds") is None


def test_the_headline_says_where_transfer_helps_and_where_not():
    means = {
        ("scratch", 1): 0.6,
        ("probe", 1): 0.8,
        ("scratch", 20): 0.9,
        ("probe", 20): 0.905,
        ("scratch", None): 0.99,
        ("probe", None): 0.9,
    }
    spreads = {"scratch": 0.01, "probe": 0.015}
    steps = np.linspace(-1, 1, 6)
    rows = [_row(m, k, i, mean + spreads[m] * step) for (m, k), mean in means.items() for i, step in enumerate(steps)]
    results = collect(rows)
    comparisons = compare_methods(results, {})
    text = headline(results, comparisons, ("scratch",))
    assert text.startswith("With 1 and 20 labelled examples per class, transfer is better than training from scratch;")
    assert "with all labelled examples, training from scratch is better than the best transfer" in text
    # Half a point at 20 is less than either interval: paired, it is seen all the same.
    assert "The largest gain is with 1 per class: probe 80.0 ± 1.2 % against scratch 60.0 ± 0.8 % (n = 6 and 6)" in text
    sure = certainty(results, comparisons, ("scratch",))
    assert "probe less scratch, 1 per class: +20.0 (+19.6 to +20.4; p < 0.001)" in sure
    assert "Paired t-test over seeds, as predictions are missing (6 seeds)" in sure


def test_no_difference_is_said_plainly():
    results = collect([_row(m, 5, i, 0.9 + a) for m, s in (("scratch", 1), ("probe", -1)) for i, a in _noise(s)])
    assert headline(results, compare_methods(results, {}), ("scratch",)) == (
        "With 5 labelled examples per class, no difference between transfer and training from scratch was found."
    )


def test_the_method_that_is_surely_better_speaks_for_transfer():
    seeds, sign = np.linspace(-0.02, 0.02, 6), (-1.0) ** np.arange(6)
    values = {"scratch": 0.5 + seeds, "best": 0.75 + 0.2 * sign, "steady": 0.7 + seeds + 0.004 * sign}
    results = collect([_row(m, 1, i, float(value)) for m, found in values.items() for i, value in enumerate(found)])
    comparisons = compare_methods(results, {})
    assert comparisons.between("best", "scratch", 1).verdict == "unclear"
    assert "steady 70.0" in headline(results, comparisons, ("scratch",))


def test_the_headline_claims_nothing_from_one_seed_without_predictions():
    results = collect([_row("scratch", 1, 0, 0.1), _row("probe", 1, 0, 0.9)])
    text = headline(results, compare_methods(results, {}), ("scratch",))
    assert "nothing can be claimed about transfer against scratch from one seed without predictions" in text
    assert "largest gain" not in text
    assert "nothing was tested" in certainty(results, compare_methods(results, {}), ("scratch",))


def test_without_a_baseline_the_best_meets_the_runner_up():
    rows = [_row(m, 5, i, mean + a) for m, mean, s in (("probe", 0.8, 1), ("partial", 0.79, -1)) for i, a in _noise(s)]
    results = collect(rows)
    text = headline(results, compare_methods(results, {}), ())
    assert re.search(r"against partial \(79\.0 ± \d\.\d %\): no difference found\.$", text)


def test_scratch_at_the_top_is_not_compared_with_itself():
    rows = [_row("scratch", 5, i, 0.9 + a) for i, a in _noise(1)] + [_row("probe", 5, i, 0.8) for i in range(4)]
    results = collect(rows)
    table = best_table(results, compare_methods(results, {}), ("scratch",))
    texts = [cell.text for cell in table.rows[0]][-2:]
    assert texts[0].startswith("better: +10.0 (")
    assert texts[1] == "is the best"


def _noise(sign: int) -> list[tuple[int, float]]:
    return list(enumerate(sign * np.array([0.02, -0.02, 0.01, -0.01])))
