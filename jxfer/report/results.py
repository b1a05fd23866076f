"""From `results.jsonl` to means over seeds with 95% intervals."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jxfer.typing import InputError

METRIC = "accuracy"
CONFIDENCE = 0.95
_REQUIRED = ("method", "shots", "seed", "status")

Row: TypeAlias = dict[str, Any]
Shots: TypeAlias = int | None
"""Labelled training examples per class; None is all there are."""
Run: TypeAlias = tuple[str, Shots, int]
"""Method, shots and seed."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """A mean over `n` seeds and the half-width of its 95% t-interval, which needs at least two seeds."""

    mean: float
    half_width: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Results:
    """The newest row of every run, and test accuracy (in [0, 1]) by method and shots."""

    rows: tuple[Row, ...]
    methods: tuple[str, ...]
    shots: tuple[Shots, ...]
    """Ascending, with None (all) last."""
    accuracy: Mapping[tuple[str, Shots], Summary]

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows of runs that ended without a result."""
        return tuple(row for row in self.rows if row["status"] != "ok")

    def of(self, method: str, shots: Shots) -> tuple[Row, ...]:
        """The finished runs of one method at one number of shots, by seed."""
        return tuple(r for r in self.rows if (r["method"], r["shots"], r["status"]) == (method, shots, "ok"))


def read_results(path: Path) -> list[Row]:
    """Reads one JSON object per line; a torn last line is what a killed writer leaves, and is no result.

    Raises:
      InputError: another line is not an object with `method`, `shots`, `seed` and `status`.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    complete = lines[:-1]  # what follows the last newline is empty or torn
    rows = [_parse(line, f"{path} line {number}") for number, line in enumerate(complete, start=1) if line.strip()]
    tail = _whole(lines[-1]) if lines else None
    return rows if tail is None else [*rows, tail]


def summarise(values: Iterable[float]) -> Summary:
    """Returns mean and 95% t-interval in float64.

    Raises:
      ValueError: there are no values.
    """
    from scipy.special import stdtrit

    sample = np.asarray(list(values), np.float64)
    if sample.size == 0:
        raise ValueError("no values to summarise")
    if sample.size == 1:
        return Summary(float(sample[0]), None, 1)
    standard_error = sample.std(ddof=1) / math.sqrt(sample.size)
    quantile = stdtrit(sample.size - 1, (1 + CONFIDENCE) / 2)
    return Summary(float(sample.mean()), float(quantile * standard_error), sample.size)


def collect(rows: Sequence[Row], order: Sequence[str] = ()) -> Results:
    """Groups rows by method and shots; methods come in `order`, then as first met. A later row of a run replaces it."""
    newest = tuple({run_of(row): row for row in rows}.values())
    met = dict.fromkeys(row["method"] for row in newest)
    methods = (*(name for name in order if name in met), *(name for name in met if name not in order))
    shots = tuple(sorted({row["shots"] for row in newest}, key=_shots_order))
    rank = {name: position for position, name in enumerate(methods)}
    ordered = tuple(sorted(newest, key=lambda r: (rank[r["method"]], _shots_order(r["shots"]), r["seed"])))
    cells: dict[tuple[str, Shots], list[float]] = {}
    for row in ordered:
        if (value := accuracy_of(row)) is not None:
            cells.setdefault((row["method"], row["shots"]), []).append(value)
    return Results(ordered, methods, shots, {key: summarise(values) for key, values in cells.items()})


def accuracy_of(row: Row) -> float | None:
    """The run's test accuracy; None if it failed or has none."""
    value = (row.get("metrics") or {}).get(METRIC) if row["status"] == "ok" else None
    return float(value) if value is not None and math.isfinite(value) else None


def mean_of(rows: Iterable[Row], field: str) -> float | None:
    """The mean of a numeric field over the rows that have it; None if none has."""
    values = [row[field] for row in rows if row.get(field) is not None]
    return float(np.mean(values, dtype=np.float64)) if values else None


def extremes(results: Results) -> tuple[Shots, ...]:
    """The fewest and the most shots that have a result: one or two."""
    found = [shots for shots in results.shots if any((m, shots) in results.accuracy for m in results.methods)]
    return tuple(dict.fromkeys((*found[:1], *found[-1:])))


def run_of(row: Row) -> Run:
    """Which run a row is of."""
    return row["method"], row["shots"], row["seed"]


def run_name(run: Run) -> str:
    """The folder of a run."""
    method, shots, seed = run
    return f"{method}-shots{'all' if shots is None else shots}-seed{seed}"


def _shots_order(shots: Shots) -> float:
    return math.inf if shots is None else float(shots)


def _whole(line: bytes) -> Row | None:
    """The object of a last line without its newline, if it happens to be complete."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and all(name in row for name in _REQUIRED) else None


def _parse(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        raise InputError(
            f"{place} is not JSON; delete the line and start the ablation again to redo that run"
        ) from None
    if not isinstance(row, dict) or (missing := [name for name in _REQUIRED if name not in row]):
        what = f"has no {missing[0]!r}" if isinstance(row, dict) else "is not an object"
        raise InputError(f"{place} {what}; each line is one run's result")
    return row
