"""Rows to means and intervals, and intervals to claims."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from jxfer.report.findings import best_table, compare, headline
from jxfer.report.results import Summary, collect, mean_of, read_results, summarise
from jxfer.typing import InputError


def _row(method: str, shots: int | None, seed: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    status = "failed" if accuracy is None else "ok"
    metrics = None if accuracy is None else {"accuracy": accuracy}
    return {"method": method, "shots": shots, "seed": seed, "status": status, "metrics": metrics} | more


def _rows(means: dict[tuple[str, int | None], float], spread: float = 0.01) -> list[dict[str, Any]]:
    steps = (-spread, 0.0, spread)
    return [_row(m, k, seed, mean + step) for (m, k), mean in means.items() for seed, step in enumerate(steps)]


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


def test_only_intervals_that_do_not_overlap_differ():
    assert compare(Summary(0.8, 0.01, 5), Summary(0.7, 0.01, 5)) == "better"
    assert compare(Summary(0.7, 0.01, 5), Summary(0.8, 0.01, 5)) == "worse"
    assert compare(Summary(0.715, 0.01, 5), Summary(0.7, 0.01, 5)) == "unclear"
    assert compare(Summary(0.9, None, 1), Summary(0.1, 0.01, 5)) == "unknown"


def test_the_headline_says_where_transfer_helps_and_where_not():
    means = {
        ("scratch", 1): 0.6,
        ("probe", 1): 0.8,
        ("scratch", 20): 0.9,
        ("probe", 20): 0.905,
        ("scratch", None): 0.99,
    }
    text = headline(collect(_rows({**means, ("probe", None): 0.9})), ("scratch",))
    assert text.startswith("With 1 labelled example per class, the best transfer is clearly better than training from")
    assert "with all labelled examples, training from scratch is clearly better than the best transfer" in text
    assert "with 20 labelled examples per class, there is no clear difference" in text
    assert "The largest gain is with 1 per class: probe 80.0 ± 2.5 % against scratch 60.0 ± 2.5 % (n = 3 and 3)" in text


def test_the_headline_claims_nothing_from_one_seed():
    text = headline(collect([_row("scratch", 1, 0, 0.1), _row("probe", 1, 0, 0.9)]), ("scratch",))
    assert "one seed gives no interval, so nothing can be claimed" in text
    assert "largest gain" not in text


def test_without_a_baseline_the_best_meets_the_runner_up():
    rows = _rows({("probe", 5): 0.8, ("partial", 5): 0.79})
    assert headline(collect(rows), ()).endswith("against partial (79.0 ± 2.5 %): no clear difference.")


def test_scratch_at_the_top_is_not_compared_with_itself():
    table = best_table(collect(_rows({("scratch", 5): 0.9, ("probe", 5): 0.8})), ("scratch",))
    assert [cell.text for cell in table.rows[0]][-2:] == ["clearly above", "is the best"]
