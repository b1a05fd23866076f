"""What solving a path of heads at once saves over scikit-learn's fits one after the other, to the same objective.

    python benchmarks/solvers.py [--strengths P] [--fits N | --all] [--quick]

scikit-learn's fits of N strengths spread evenly over the path are timed, 4 unless told otherwise, and stand for all; so
the time of the whole path is extrapolated, except with `--all`. Its solvers run at their default tolerance, and so do
ours; the table says by how much the worst objective of ours lies above its own (negative: below), both computed in
float64.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from timing import machine, table

from jxfer.solvers.logistic import LogisticPath
from jxfer.solvers.ridge import RidgePath


@dataclasses.dataclass(frozen=True)
class Setting:
    """A kind of head, and the features it is fitted to."""

    head: str
    num_examples: int
    num_features: int
    num_classes: int


FULL = (
    Setting("logistic", 20_000, 512, 10),
    Setting("logistic", 50_000, 512, 100),
    Setting("ridge", 20_000, 512, 10),
)
WARM_ROUNDS = 3
"""Fits of the whole path, of whose times the median counts."""

QUICK = (Setting("logistic", 400, 16, 3), Setting("ridge", 400, 16, 3))


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of the whole path, and how the objectives compare."""

    compiling: float
    warm: float
    sklearn: float
    excess: float

    @property
    def ratios(self) -> tuple[float, float]:
        """How many times as long scikit-learn takes: warm, and with compilation."""
        return self.sklearn / self.warm, self.sklearn / self.compiling


def main(arguments: list[str] | None = None) -> dict[Setting, Result]:
    """Measures, prints the table, and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strengths", type=int, default=64, help="length of the path")
    parser.add_argument("--fits", type=int, default=4, help="scikit-learn fits to time")
    parser.add_argument("--all", action="store_true", help="time the scikit-learn fits of the whole path")
    parser.add_argument("--quick", action="store_true", help="few examples, to see that it runs")
    options = parser.parse_args(arguments)
    num_fits = options.strengths if options.all else options.fits
    print(f"{options.strengths} strengths, {num_fits} of them fitted by scikit-learn\n{machine()}\n", flush=True)
    results = {}
    for setting in QUICK if options.quick else FULL:
        results[setting] = measure(setting, options.strengths, num_fits)
        print(f"done: {setting}", flush=True)
    print(render(results))
    return results


def measure(setting: Setting, num_strengths: int, num_fits: int) -> Result:
    """Times one path, warm and with compilation, and as many of scikit-learn's fits as asked for."""
    features, labels = make_data(setting)
    strengths = tuple(np.logspace(-5, 1, num_strengths).tolist())
    solver = {"logistic": LogisticPath, "ridge": RidgePath}[setting.head](strengths)
    jax.clear_caches()
    compiling, _ = seconds(lambda: jax.block_until_ready(solver.fit(features, labels, setting.num_classes).kernels))
    rounds = [seconds(lambda: solver.fit(features, labels, setting.num_classes)) for _ in range(WARM_ROUNDS)]
    warm, heads = float(np.median([took for took, _ in rounds])), rounds[-1][1]
    chosen = np.unique(np.linspace(0, num_strengths - 1, num_fits).round().astype(int))
    spent, excess = [], []
    for index in chosen:
        took, fitted = seconds(lambda index=index: fit_sklearn(setting, strengths[index], features, labels))
        spent.append(took)
        theirs = objective(setting, strengths[index], fitted.coef_.T, fitted.intercept_, features, labels)
        arrays = heads.arrays(int(index))
        ours = objective(setting, strengths[index], arrays["kernel"], arrays["bias"], features, labels)
        excess.append(ours - theirs)
    return Result(compiling, warm, float(np.mean(spent)) * num_strengths, max(excess))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns how long a call takes, and its result."""
    started = time.perf_counter()
    result = call()
    jax.block_until_ready(getattr(result, "kernels", None))
    return time.perf_counter() - started, result


def fit_sklearn(setting: Setting, strength: float, features: np.ndarray, labels: np.ndarray) -> Any:
    """Fits scikit-learn's model of the same objective."""
    if setting.head == "ridge":
        return Ridge(alpha=strength * len(labels)).fit(features, np.eye(setting.num_classes, dtype=np.float32)[labels])
    return LogisticRegression(C=1 / (strength * len(labels)), max_iter=10_000).fit(features, labels)


def objective(
    setting: Setting, strength: float, kernel: Any, bias: Any, features: np.ndarray, labels: np.ndarray
) -> float:
    """Returns what both minimise, per example, in float64."""
    kernel = np.asarray(kernel, np.float64)
    logits = features.astype(np.float64) @ kernel + np.asarray(bias, np.float64)
    penalty = strength / 2 * np.square(kernel).sum()
    if setting.head == "ridge":
        return float(np.square(logits - np.eye(setting.num_classes)[labels]).sum(1).mean() / 2 + penalty)
    logits -= logits.max(1, keepdims=True)
    return float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]).mean() + penalty)


def make_data(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Returns features [N D] float32 as a frozen network hands them on, and labels of classes that overlap.

    They are what a random layer with ReLU makes of noisy points: never negative, away from the origin, correlated.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, setting.num_classes, setting.num_examples).astype(np.int32)
    size = setting.num_features
    centres = rng.normal(size=(setting.num_classes, size // 4))
    points = centres[labels] + 2.5 * rng.normal(size=(setting.num_examples, size // 4))
    features = np.maximum(points @ rng.normal(size=(size // 4, size)) / np.sqrt(size), 0)
    return features.astype(np.float32), labels


def render(results: dict[Setting, Result]) -> str:
    """Returns the table."""
    header = (
        "path of",
        "N × D, classes",
        "jxfer s",
        "with compilation s",
        "scikit-learn s",
        "ratio",
        "with compilation",
        "excess",
    )
    rows: Sequence[Sequence[object]] = [
        (
            setting.head,
            f"{setting.num_examples:,} × {setting.num_features}, {setting.num_classes}",
            f"{result.warm:.2f}",
            f"{result.compiling:.2f}",
            f"{result.sklearn:.0f}",
            *(f"{ratio:.0f}" for ratio in result.ratios),
            f"{result.excess:.1e}",
        )
        for setting, result in results.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
