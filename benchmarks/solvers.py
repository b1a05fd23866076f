"""What solving a path of heads at once saves over scikit-learn's fits one after the other, to the same objective.

    python benchmarks/solvers.py [--strengths P] [--all] [--quick]

scikit-learn is timed at strengths spread evenly over the path, 8 of them or, of the slowest fits, 2; these stand for
all, so that the time of the whole path is extrapolated, except with `--all`. It is fitted at ever smaller tolerances
until it ends at most 5e-5 above our objective, and only the last of these fits counts; how high it ends at its default
tolerance, and in what time, is in the table too. The excess is by how much the worst objective of ours lies above that
last fit's (negative: below). All objectives are computed in float64. Both are given the features as arrays of their own
kind.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
    num_fits: int = 8
    """Strengths at which scikit-learn is timed."""


FULL = (
    Setting("logistic", 20_000, 512, 10),
    Setting("logistic", 50_000, 512, 100, num_fits=2),
    Setting("ridge", 20_000, 512, 10),
)
WARM_ROUNDS = 3
"""Fits of the whole path, of whose times the median counts."""

TOLERANCES = (1e-4, 3e-5, 1e-5, 3e-6, 1e-6, 3e-7)
"""Of scikit-learn's logistic regression, its default first."""

SAME = 5e-5
"""Objectives, in nats per example, that are at most this far apart are the same."""

QUICK = (Setting("logistic", 400, 16, 3), Setting("ridge", 400, 16, 3))


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of the whole path, and how far apart the objectives are where they are farthest."""

    compiling: float
    warm: float
    sklearn: float
    """To the same objective."""
    sklearn_default: float
    excess: float
    sklearn_default_excess: float

    @property
    def ratios(self) -> tuple[float, float]:
        """How many times as long scikit-learn takes: warm, and with compilation."""
        return self.sklearn / self.warm, self.sklearn / self.compiling


@dataclasses.dataclass(frozen=True)
class Fit:
    """One of scikit-learn's."""

    seconds: float
    objective: float


def main(arguments: list[str] | None = None) -> dict[Setting, Result]:
    """Measures, prints the table, and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strengths", type=int, default=64, help="length of the path")
    parser.add_argument("--all", action="store_true", help="time the scikit-learn fits of the whole path")
    parser.add_argument("--quick", action="store_true", help="few examples, to see that it runs")
    options = parser.parse_args(arguments)
    print(f"{options.strengths} strengths\n{machine()}\n", flush=True)
    results = {}
    for setting in QUICK if options.quick else FULL:
        num_fits = options.strengths if options.all else setting.num_fits
        results[setting] = measure(setting, options.strengths, num_fits)
        print(results[setting], flush=True)
    print(f"\n{render(results)}")
    return results


def measure(setting: Setting, num_strengths: int, num_fits: int) -> Result:
    """Times one path, warm and with compilation, and scikit-learn at as many strengths as asked for."""
    features, labels = make_data(setting)
    strengths = tuple(np.logspace(-5, 1, num_strengths).tolist())
    solver = {"logistic": LogisticPath, "ridge": RidgePath}[setting.head](strengths)
    data = jax.block_until_ready((jnp.asarray(features), jnp.asarray(labels)))
    jax.clear_caches()
    compiling, _ = seconds(lambda: solver.fit(*data, setting.num_classes))
    rounds = [seconds(lambda: solver.fit(*data, setting.num_classes)) for _ in range(WARM_ROUNDS)]
    warm, heads = float(np.median([took for took, _ in rounds])), rounds[-1][1]
    last, default, excess, default_excess = [], [], [], []
    for index in np.unique(np.linspace(0, num_strengths - 1, num_fits).round().astype(int)).tolist():
        arrays = heads.arrays(index)
        ours = objective(setting, strengths[index], arrays["kernel"], arrays["bias"], features, labels)
        fits = fit_sklearn(setting, strengths[index], features, labels, enough=ours + SAME)
        last.append(fits[-1].seconds)
        default.append(fits[0].seconds)
        excess.append(ours - fits[-1].objective)
        default_excess.append(fits[0].objective - ours)
    of_path = num_strengths * float(np.mean(last)), num_strengths * float(np.mean(default))
    return Result(compiling, warm, *of_path, max(excess), max(default_excess))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns how long a call takes, and its result."""
    started = time.perf_counter()
    result = call()
    jax.block_until_ready(getattr(result, "kernels", None))
    return time.perf_counter() - started, result


def fit_sklearn(
    setting: Setting, strength: float, features: np.ndarray, labels: np.ndarray, *, enough: float
) -> list[Fit]:
    """Fits scikit-learn's model of the same objective, at ever smaller tolerances until the objective is low enough."""
    if setting.head == "ridge":
        models: Sequence[Any] = [Ridge(alpha=strength * len(labels))]
        targets = np.eye(setting.num_classes, dtype=np.float32)[labels]
    else:
        inverse = 1 / (strength * len(labels))
        models = [LogisticRegression(C=inverse, max_iter=10_000, tol=tolerance) for tolerance in TOLERANCES]
        targets = labels
    fits: list[Fit] = []
    for model in models:
        took, fitted = seconds(lambda model=model: model.fit(features, targets))
        fits.append(Fit(took, objective(setting, strength, fitted.coef_.T, fitted.intercept_, features, labels)))
        if fits[-1].objective <= enough:
            break
    return fits


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
        "scikit-learn s by default",
        "excess",
    )
    rows: Sequence[Sequence[object]] = [
        (
            setting.head,
            f"{setting.num_examples:,} × {setting.num_features}, {setting.num_classes}",
            f"{result.warm:.3g}",
            f"{result.compiling:.3g}",
            f"{result.sklearn:.3g}",
            *(f"{ratio:.0f}" for ratio in result.ratios),
            f"{result.excess:.0e}",
            f"{result.sklearn_default:.3g}",
            f"{result.sklearn_default_excess:.0e}",
        )
        for setting, result in results.items()
    ]
    return table(header, rows)


if __name__ == "__main__":
    main()
