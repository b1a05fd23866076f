"""Accuracy taken apart: by class, and by the depth at which a head reads its features."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jxfer.report.directory import Material
from jxfer.report.document import Cell, Figure, Table, percent
from jxfer.report.findings import shots_text
from jxfer.report.panel import draw_points, legend_below
from jxfer.report.predictions import Predictions
from jxfer.report.results import METRIC, Results, Shots, Summary, summarise
from jxfer.report.style import NARROW_BELOW, Look, picture, shorten

MAX_CLASSES = 20
"""Classes up to which all are listed; of more, the worst ten and the best ten."""


def class_table(material: Material, by_method: Mapping[str, Sequence[Predictions]], shots: Shots) -> Table:
    """Test accuracy of each class by method, over the runs of all seeds."""
    first = next(iter(by_method.values()))[0]
    K = max(int(said.labels.max()) + 1 for runs in by_method.values() for said in runs)
    counts = np.bincount(first.labels, minlength=K)
    rates = {method: _class_accuracy(runs, K) for method, runs in by_method.items()}
    mean = np.mean([np.nan_to_num(rate) for rate in rates.values()], axis=0)
    present = [int(index) for index in np.argsort(mean, kind="stable") if counts[index]]
    kept = present if len(present) <= MAX_CLASSES else [*present[:10], *present[-10:]]
    rows = [
        (
            Cell(material.class_name(index)),
            Cell(str(counts[index]), int(counts[index])),
            *(Cell(f"{100 * rate[index]:.1f}", float(rate[index])) for rate in rates.values()),
        )
        for index in kept
    ]
    which = "" if len(kept) == len(present) else f" The ten worst and the ten best of {len(present)} classes."
    note = f"Test accuracy in % with {shots_text(shots)}, over all seeds; n is the test examples of the class, the "
    note += f"same in every seed. Hardest first, by the mean of all methods.{which}"
    return Table(("Class", "n", *by_method), tuple(rows), note=note)


def depth_figure(results: Results, shots: Shots, looks: Mapping[str, Look]) -> Figure | None:
    """Validation accuracy of a head on each stage's features; None where no run recorded stages."""
    depths = {method: found for method in results.methods if (found := _depths(results, method, shots))}
    if not depths:
        return None
    return picture(
        functools.partial(_draw_depths, depths, looks),
        name="depth",
        alt=f"Validation accuracy by stage with {shots_text(shots)}",
        caption=f"Validation accuracy of a head on the features of each stage, with {shots_text(shots)}: means and 95% "
        "t-intervals over seeds. The head reads what the named stage gives out.",
        data=_depth_data(depths),
    )


def _class_accuracy(runs: Sequence[Predictions], num_classes: int) -> np.ndarray:
    """[K] float64, NaN for classes without examples."""
    right, counts = np.zeros(num_classes), np.zeros(num_classes)
    for said in runs:
        right += np.bincount(said.labels, weights=said.correct, minlength=num_classes)
        counts += np.bincount(said.labels, minlength=num_classes)
    return np.divide(right, counts, out=np.full(num_classes, np.nan), where=counts > 0)


def _depths(results: Results, method: str, shots: Shots) -> dict[str, Summary]:
    values: dict[str, list[float]] = {}
    for row in results.of(method, shots):
        for stage in row.get("stages") or ():
            if (value := (stage.get("validation_metrics") or {}).get(METRIC)) is not None:
                values.setdefault(str(stage["stage"]), []).append(value)
    return {stage: summarise(found) for stage, found in values.items()}


def _draw_depths(depths: Mapping[str, Mapping[str, Summary]], looks: Mapping[str, Look], width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot()
    stages = list(dict.fromkeys(stage for found in depths.values() for stage in found))
    for method, found in depths.items():
        draw_points(axes, [(float(stages.index(stage)), summary) for stage, summary in found.items()], looks[method])
    turn = 45 if width < NARROW_BELOW or len(stages) > 12 else 0
    axes.set_xticks(range(len(stages)), [shorten(stage, 14) for stage in stages], rotation=turn)
    axes.set_ylabel(f"validation {METRIC} (%)")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    legend_below(figure, {method: looks[method] for method in depths}, width)
    return figure


def _depth_data(depths: Mapping[str, Mapping[str, Summary]]) -> Table:
    rows = [
        (Cell(method), Cell(stage), percent(summary), Cell(str(summary.n), summary.n))
        for method, found in depths.items()
        for stage, summary in found.items()
    ]
    return Table(("Method", "Stage", "Validation accuracy %", "n"), tuple(rows))
