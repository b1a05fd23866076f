"""Accuracy over labelled examples per class, one curve per method."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jxfer.report.document import Cell, Figure, Table
from jxfer.report.findings import shots_name
from jxfer.report.panel import Points, draw_points, finish_axes, legend_below, legend_columns
from jxfer.report.results import METRIC, Results, Shots, Summary
from jxfer.report.style import NARROW_BELOW, Look, picture, shorten

_DODGE = 0.05


def accuracy_figure(results: Results, looks: Mapping[str, Look]) -> Figure:
    """Mean test accuracy of each method over labelled examples per class."""
    return picture(
        functools.partial(_draw_accuracy, results, looks),
        name="accuracy",
        alt=f"Test {METRIC} of {len(results.methods)} methods over labelled examples per class",
        caption="Test accuracy over labelled examples per class: means and 95% t-intervals over seeds. They cover "
        "what varies with the seed, not the choice of test examples. Points at the same number of examples are moved "
        "apart a little so that their intervals can be told apart.",
        data=_accuracy_data(results),
    )


def _draw_accuracy(results: Results, looks: Mapping[str, Look], width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    narrow = width < NARROW_BELOW
    curves = _curves(results)
    names = 0.2 * math.ceil(len(curves) / legend_columns(list(curves), width)) if narrow else 0.0
    height = max(3.8, 0.19 * len(curves) + 1.2) + names
    figure = Canvas(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        draw_points(axes, points, looks[name])
    places = _places(results.shots)
    axes.set_xscale("log")
    axes.set_xticks(list(places.values()), [shots_name(shots) for shots in places])
    axes.minorticks_off()
    axes.set_xlabel("labelled examples per class")
    finish_axes(axes)
    if narrow:
        legend_below(figure, {name: looks[name] for name in curves}, width)
    else:
        _label_ends(axes, curves, looks, axes_inches=0.86 * height)
    return figure


def _curves(results: Results) -> dict[str, Points]:
    """Per method its (x, summary), x being where on the axis the shots lie, moved by the method's own bit."""
    places = _places(results.shots)
    middle = (len(results.methods) - 1) / 2
    step = 2 * _DODGE / max(len(results.methods) - 1, 1)
    curves: dict[str, Points] = {}
    for index, method in enumerate(results.methods):
        shift = math.exp((index - middle) * step)
        found = [(shots, results.accuracy.get((method, shots))) for shots in results.shots]
        points = [(places[shots] * shift, summary) for shots, summary in found if summary]
        if points:
            curves[method] = points
    return curves


def _places(shots: Sequence[Shots]) -> dict[Shots, float]:
    """Where each number of shots lies on a logarithmic axis; "all" stands to the right of the numbers."""
    counts = [value for value in shots if value is not None]
    beyond = 2.0 * max(counts, default=0.5)
    return {value: beyond if value is None else max(float(value), 0.5) for value in shots}


def _label_ends(axes: Any, curves: Mapping[str, Points], looks: Mapping[str, Look], *, axes_inches: float) -> None:
    """Names each curve at its right end, spread vertically so that no two names overlap."""
    low, high = axes.get_ylim()
    label_x = _set_limits(axes, [x for points in curves.values() for x, _ in points])
    ends = sorted((100 * points[-1][1].mean, name) for name, points in curves.items())
    spread = _spread([y for y, _ in ends], gap=0.17 * (high - low) / axes_inches, top=high)
    for (y, name), label_y in zip(ends, spread, strict=True):
        look = looks[name]
        x = curves[name][-1][0]
        axes.plot([x, label_x], [y, label_y], color=look.colour, linewidth=0.5, alpha=0.6, clip_on=False)
        axes.plot([label_x], [label_y], look.marker, color=look.colour, markersize=4, clip_on=False)
        axes.annotate(
            shorten(name, 26),
            (label_x, label_y),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=look.colour,
            annotation_clip=False,
        )


def _set_limits(axes: Any, places: Sequence[float]) -> float:
    """Gives the points some room (a single number of shots a good deal) and returns where names stand, on the right."""
    extent = math.log(max(places) / min(places))
    span = max(extent, math.log(3))
    margin = (span - extent) / 2
    axes.set_xlim(min(places) * math.exp(-margin - 0.05 * span), max(places) * math.exp(margin + 0.03 * span))
    return max(places) * math.exp(margin + 0.07 * span)


def _spread(values: Sequence[float], *, gap: float, top: float) -> list[float]:
    """Moves ascending values apart to at least `gap`, staying below `top` and close to where they were."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    limit = top
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _accuracy_data(results: Results) -> Table:
    rows = [
        (
            Cell(method),
            Cell(shots_name(shots), math.inf if shots is None else shots),
            Cell(f"{100 * summary.mean:.2f}", summary.mean),
            _bound(summary, -1),
            _bound(summary, +1),
            Cell(str(summary.n), summary.n),
        )
        for method in results.methods
        for shots in results.shots
        if (summary := results.accuracy.get((method, shots)))
    ]
    return Table(("Method", "Examples per class", "Mean %", "95% low", "95% high", "n"), tuple(rows))


def _bound(summary: Summary, sign: int) -> Cell:
    if summary.half_width is None:
        return Cell("–", tone="muted")
    bound = summary.mean + sign * summary.half_width
    return Cell(f"{100 * bound:.2f}", bound)
