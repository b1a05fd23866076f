"""Accuracy over shots, and accuracy against what it costs."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jxfer.report.document import Cell, Figure, Table, number, percent
from jxfer.report.findings import shots_name, shots_text
from jxfer.report.results import METRIC, Results, Shots, Summary, mean_of
from jxfer.report.style import INK, LINE, NARROW_BELOW, Look, picture, shorten

COSTS = (("params_trainable", "trainable parameters"), ("train_flops", "training FLOPs"))
_DODGE = 0.035
_Points = list[tuple[float, Summary]]


def accuracy_figure(results: Results, looks: Mapping[str, Look]) -> Figure:
    """Mean test accuracy of each method over labelled examples per class."""
    return picture(
        functools.partial(_draw_accuracy, results, looks),
        name="accuracy",
        alt=f"Test {METRIC} of {len(results.methods)} methods over labelled examples per class",
        caption="Test accuracy over labelled examples per class: means and 95% t-intervals over seeds. Points at the "
        "same number of examples are moved apart a little so that their intervals can be told apart.",
        data=_accuracy_data(results),
    )


def cost_figure(results: Results, looks: Mapping[str, Look]) -> Figure | None:
    """Test accuracy against each cost, at the fewest and the most shots; None if no cost was recorded."""
    costs = [(field, label) for field, label in COSTS if mean_of(results.rows, field) is not None]
    if not costs:
        return None
    return picture(
        functools.partial(_draw_costs, results, looks, costs),
        name="cost",
        alt="Test accuracy against " + " and ".join(label for _, label in costs),
        caption="Test accuracy (95% t-interval over seeds) against what a method trains and what training it costs, "
        "on logarithmic axes. Up and to the left is better. Methods of equal cost stand side by side.",
        data=_cost_data(results, costs),
    )


def _draw_accuracy(results: Results, looks: Mapping[str, Look], width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    narrow = width < NARROW_BELOW
    curves = _curves(results)
    height = max(4.0, 0.19 * len(curves) + 1.2) + (0.12 * len(curves) if narrow else 0.0)
    figure = Canvas(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        _errorbar(axes, points, looks[name])
    places = _places(results.shots)
    axes.set_xscale("log")
    axes.set_xticks(list(places.values()), [shots_name(shots) for shots in places])
    axes.minorticks_off()
    axes.set_xlabel("labelled examples per class")
    _accuracy_axis(axes)
    if narrow:
        _legend_below(figure, {name: looks[name] for name in curves}, columns=2)
    else:
        _label_ends(axes, curves, looks, axes_inches=0.86 * height)
    return figure


def _curves(results: Results) -> dict[str, _Points]:
    """Per method its (x, summary), x being where on the axis the shots lie, moved by the method's own bit."""
    places = _places(results.shots)
    middle = (len(results.methods) - 1) / 2
    step = 2 * _DODGE / max(len(results.methods) - 1, 1)
    curves: dict[str, _Points] = {}
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


def _errorbar(axes: Any, points: _Points, look: Look) -> None:
    axes.errorbar(
        [x for x, _ in points],
        [100 * summary.mean for _, summary in points],
        [100 * (summary.half_width or 0.0) for _, summary in points],
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        markersize=4.5,
        linewidth=1.4,
        elinewidth=0.9,
    )


def _label_ends(axes: Any, curves: Mapping[str, _Points], looks: Mapping[str, Look], *, axes_inches: float) -> None:
    """Names each curve at its right end, spread vertically so that no two names overlap."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    right = max(x for points in curves.values() for x, _ in points)
    left = min(x for points in curves.values() for x, _ in points)
    label_x = right * max((right / left) ** 0.06, 1.06)
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
    axes.set_xlim(left * (left / right) ** 0.04 * 0.97, right * (right / left) ** 0.02 * 1.02)


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


def _draw_costs(results: Results, looks: Mapping[str, Look], costs: Sequence[tuple[str, str]], width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    narrow = width < NARROW_BELOW
    shown = _extremes(results)
    columns = 1 if narrow else len(costs)
    rows = len(shown) * len(costs) // columns
    figure = Canvas(figsize=(width, 2.5 * rows + 0.25 * math.ceil(len(results.methods) / (2 if narrow else 4))))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (shots, (field, label)) in zip(panels, [(s, c) for s in shown for c in costs], strict=True):
        _draw_cost(axes, _cost_points(results, shots, field), looks)
        axes.set_xlabel(label)
        axes.set_title(shots_text(shots), loc="left")
        _accuracy_axis(axes)
    _legend_below(figure, looks, columns=2 if narrow else 4)
    return figure


def _draw_cost(axes: Any, points: Mapping[str, tuple[float, Summary]], looks: Mapping[str, Look]) -> None:
    """Draws one point per method; a cost of nothing, which no logarithm has, stands at the left under `0`."""
    positive = [cost for cost, _ in points.values() if cost > 0]
    low = math.floor(math.log10(min(positive, default=1.0)))
    high = max(math.ceil(math.log10(max(positive, default=1.0))), low + 1)
    free = any(cost <= 0 for cost, _ in points.values())
    shifts = _apart([cost for cost, _ in points.values()], step=0.02 * (high - low + 1))
    for (name, (cost, summary)), shift in zip(points.items(), shifts, strict=True):
        _errorbar(axes, [((cost if cost > 0 else 10.0 ** (low - 1)) * 10.0**shift, summary)], looks[name])
    decades = list(range(low, high + 1, 1 + (high - low) // 5))
    ticks = {10.0**decade: number(10.0**decade).text for decade in decades}
    axes.set_xscale("log")
    axes.set_xticks([10.0 ** (low - 1)] * free + list(ticks), ["0"] * free + list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlim(10.0 ** (low - (1.3 if free else 0.2)), 10.0 ** (high + 0.2))
    if free:
        axes.axvline(10.0 ** (low - 0.5), color=LINE, linestyle=":", linewidth=1)


def _apart(costs: Sequence[float | int], *, step: float) -> list[float]:
    """For each cost a shift in decades that sets equal costs side by side, centred where they belong."""
    ranks = [costs[:index].count(cost) for index, cost in enumerate(costs)]
    return [step * (rank - (costs.count(cost) - 1) / 2) for rank, cost in zip(ranks, costs, strict=True)]


def _extremes(results: Results) -> tuple[Shots, ...]:
    """The fewest and the most shots that have a result."""
    found = [shots for shots in results.shots if any((m, shots) in results.accuracy for m in results.methods)]
    return tuple(dict.fromkeys((found[0], found[-1])))


def _cost_points(results: Results, shots: Shots, field: str) -> dict[str, tuple[float, Summary]]:
    points = {}
    for method in results.methods:
        cost = mean_of(results.of(method, shots), field)
        summary = results.accuracy.get((method, shots))
        if cost is not None and summary is not None:
            points[method] = (cost, summary)
    return points


def _accuracy_axis(axes: Any) -> None:
    axes.set_ylabel(f"test {METRIC} (%)")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=3)


def _legend_below(figure: Any, looks: Mapping[str, Look], *, columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.line, markersize=4.5, linewidth=1.4)
        for look in looks.values()
    ]
    names = [shorten(name, 22) for name in looks]
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8.5, labelcolor=INK)


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


def _cost_data(results: Results, costs: Sequence[tuple[str, str]]) -> Table:
    rows = []
    for shots in _extremes(results):
        points = {field: _cost_points(results, shots, field) for field, _ in costs}
        for method in results.methods:
            if not any(method in found for found in points.values()):
                continue
            amounts = [number(points[f][method][0] if method in points[f] else None) for f, _ in costs]
            label = Cell(shots_name(shots), math.inf if shots is None else shots)
            rows.append((Cell(method), label, *amounts, percent(results.accuracy[method, shots])))
    header = ("Method", "Examples per class", *(label.capitalize() for _, label in costs), "Accuracy %")
    return Table(header, tuple(rows))
