"""What a report reads out of training, costs, classes and calibration, without drawing any of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import write_fake

from jxfer.report.breakdown import class_table
from jxfer.report.calibration import calibration_table, predictions_of
from jxfer.report.costs import pareto_front
from jxfer.report.details import comparison_table
from jxfer.report.directory import read_directory
from jxfer.report.results import Summary, collect
from jxfer.report.speed import speed_table
from jxfer.report.training import choices_table, learning_curves, settings_of


def _row(seed: int, variants: dict[str, float], **more: Any) -> dict[str, Any]:
    tried = [{"variant": name, "validation_metrics": {"accuracy": value}} for name, value in variants.items()]
    row = {"method": "m", "shots": 1, "seed": seed, "status": "ok", "metrics": {"accuracy": 0.5}, "variants": tried}
    return row | {"variant": max(variants, key=variants.__getitem__)} | more


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(points: dict[str, tuple[int, int]]):
    def dominated(name: str) -> bool:
        cost, value = points[name]
        return any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points.values())

    found = pareto_front({name: (float(c), Summary(float(v), None, 1)) for name, (c, v) in points.items()})
    assert set(found) == {name for name in points if not dominated(name)}


def test_the_steps_of_a_later_phase_follow_those_of_the_earlier(tmp_path: Path):
    material = read_directory(write_fake(tmp_path, methods=("lp_ft",), shots=(5,), seeds=2))
    (curves,) = learning_curves(material, 5)
    assert list(curves.chosen) == [50, 100, 150, 200]  # two phases, each logged at 50 and 100
    assert set(curves.others) == {"learning_rate=0.001", "learning_rate=0.01", "learning_rate=0.1"}
    assert curves.num_seeds == 2


def test_the_chosen_curve_is_that_of_each_seed_s_own_choice(tmp_path: Path):
    (tmp_path / "results.jsonl").write_text(
        "".join(json.dumps(_row(seed, {"a=1": 0.2, "a=2": best})) + "\n" for seed, best in enumerate((0.1, 0.8)))
    )
    for seed, values in enumerate(({"a=1": 0.2, "a=2": 0.1}, {"a=1": 0.2, "a=2": 0.8})):
        path = tmp_path / f"runs/m-shots1-seed{seed}/metrics.jsonl"
        path.parent.mkdir(parents=True)
        looks = [
            {"step": 10, "phase": "train", "variant": v, "split": s, "accuracy": a if s == "validation" else 1.0}
            for v, a in values.items()
            for s in ("train", "validation")
        ]
        path.write_text("".join(json.dumps(look) + "\n" for look in looks))
    (curves,) = learning_curves(read_directory(tmp_path), 1)
    assert curves.chosen == {10: pytest.approx((0.2 + 0.8) / 2)}
    assert curves.others["a=2"] == {10: pytest.approx((0.1 + 0.8) / 2)}


def test_settings_are_read_from_the_names_of_variants():
    assert settings_of("learning_rate=0.01,weight_decay=0") == {"learning_rate": 0.01, "weight_decay": 0.0}
    assert settings_of({"l2": 1}) == {"l2": 1.0}
    assert settings_of("default") == settings_of(None) == settings_of("kind=ridge") == {}


def test_choices_are_counted_by_value_where_one_setting_was_searched():
    rows = [_row(seed, {"l2=0.1": 0.5, "l2=1": 0.4 + 0.2 * (seed > 0)}) for seed in range(3)]
    table = choices_table(collect(rows))
    assert table is not None
    assert table.rows[0][1].text == "1 × 2, 0.1 × 1"
    assert "The l2 that did best" in table.note
    assert choices_table(collect([_row(0, {"default": 0.5})])) is None


def test_of_many_classes_the_hardest_and_the_easiest_are_listed(tmp_path: Path):
    write_fake(tmp_path, methods=("partial",), shots=(1,), seeds=1)
    K = 50
    labels = np.repeat(np.arange(K), 10)
    wrong = np.tile(np.arange(10), K) < labels // 10  # classes 0-9 all right, 40-49 four of ten wrong
    logits = np.eye(K, dtype=np.float32)[(labels + wrong) % K]
    path = tmp_path / "runs/partial-shots1-seed0/predictions.npz"
    np.savez(path, ids=np.arange(len(labels)).astype(str), labels=labels, logits=logits)
    material = read_directory(tmp_path)
    table = class_table(material, predictions_of(material, 1), 1)
    assert [row[2].text for row in table.rows] == ["60.0"] * 10 + ["100.0"] * 10
    assert {row[1].value for row in table.rows} == {10}
    assert "The ten worst and the ten best of 50 classes" in table.note


def test_calibration_is_given_with_and_without_the_temperature(tmp_path: Path):
    rng = np.random.default_rng(0)
    write_fake(tmp_path, methods=("linear_probe", "partial"), shots=(1,), seeds=1)
    logits = 2 * rng.normal(size=(6000, 4))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    overconfident = (3 * logits).astype(np.float32)
    arrays = {"labels": labels[:3000], "logits": overconfident[:3000], "ids": np.arange(3000).astype(str)}
    arrays |= {"validation_labels": labels[3000:], "validation_logits": overconfident[3000:]}
    np.savez(tmp_path / "runs/linear_probe-shots1-seed0/predictions.npz", **arrays)
    table = calibration_table(predictions_of(read_directory(tmp_path), 1))
    (_, _, before, nll, temperature, after, nll_after), partial = table.rows
    assert temperature.value == pytest.approx(3.0, rel=0.1)
    assert before.value > 0.1
    assert after.value < 0.03  # what is left is the noise of 3000 examples in 15 bins
    assert nll_after.value < nll.value
    assert [cell.text for cell in partial][-3:] == ["–"] * 3


def test_every_pair_is_listed_once_with_the_better_method_first(tmp_path: Path):
    material = read_directory(write_fake(tmp_path, methods=("scratch", "partial", "lp_ft"), shots=(1,), seeds=3))
    table = comparison_table(material.comparisons, 1)
    assert len(table.rows) == 3
    assert all(row[2].value >= 0 for row in table.rows)
    assert [row[3].value for row in table.rows] == sorted(row[3].value for row in table.rows)


def _write_windows(directory: Path, run: str, windows: list[dict[str, Any]]) -> None:
    path = directory / f"runs/{run}/metrics.jsonl"
    path.parent.mkdir(parents=True)
    rows = [{"step": 25 * k, "variant": "v", "split": "train", "phase": "tune"} | w for k, w in enumerate(windows, 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"split": "validation", "accuracy": 1.0}]) + "{")


def test_the_speed_of_training_is_the_median_over_windows_by_phase(tmp_path: Path):
    rows = [_row(seed, {"a=1": 0.5}) for seed in range(2)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "versions.json").write_text(json.dumps({"peak": "1 × 60 TFLOP/s"}))
    assert speed_table(read_directory(tmp_path)) is None
    probe = {"phase": "probe", "examples_per_sec": 90_000.0, "input_wait": 0.75}
    for seed, speeds in enumerate(((100.0, 900.0), (2000.0,))):
        windows = [{"examples_per_sec": speed, "input_wait": speed / 1e4, "mfu": speed / 1e3} for speed in speeds]
        _write_windows(tmp_path, f"m-shots1-seed{seed}", [probe, *windows])
    table = speed_table(read_directory(tmp_path))
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["m", "probe", "2", "90 k", "75.0", "–"],
        ["m", "tune", "3", "900", "9.0", "90.0"],
    ]
    assert "1 × 60 TFLOP/s" in table.note


def test_without_a_known_peak_there_is_no_column_of_it(tmp_path: Path):
    (tmp_path / "results.jsonl").write_text(json.dumps(_row(0, {"a=1": 0.5})) + "\n")
    _write_windows(tmp_path, "m-shots1-seed0", [{"examples_per_sec": 10.0, "input_wait": 0.0}])
    table = speed_table(read_directory(tmp_path))
    assert table.header[-1] == "Waits for input %"
