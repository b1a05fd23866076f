"""Accuracy against what it costs, at the fewest and the most labelled examples."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jxfer.report.document import Cell, Figure, Table, number, percent
from jxfer.report.findings import shots_name, shots_text
from jxfer.report.panel import draw_points, finish_axes, legend_below, legend_columns
from jxfer.report.results import Results, Shots, Summary, mean_of
from jxfer.report.style import LINE, NARROW_BELOW, Look, picture

COSTS = (("params_trainable", "trainable parameters"), ("train_flops", "training FLOPs"))


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


def _draw_costs(results: Results, looks: Mapping[str, Look], costs: Sequence[tuple[str, str]], width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    shown = _extremes(results)
    columns = 1 if width < NARROW_BELOW else len(costs)
    rows = len(shown) * len(costs) // columns
    names = 0.2 * math.ceil(len(looks) / legend_columns(list(looks), width))
    figure = Canvas(figsize=(width, 2.45 * rows + names), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (shots, (field, label)) in zip(panels, [(s, c) for s in shown for c in costs], strict=True):
        _draw_cost(axes, _cost_points(results, shots, field), looks)
        axes.set_xlabel(label)
        axes.set_title(shots_text(shots), loc="left")
        finish_axes(axes)
    legend_below(figure, looks, width)
    return figure


def _draw_cost(axes: Any, points: Mapping[str, tuple[float, Summary]], looks: Mapping[str, Look]) -> None:
    """Draws one point per method; a cost of nothing, which no logarithm has, stands at the left under `0`."""
    positive = [cost for cost, _ in points.values() if cost > 0]
    low = math.floor(math.log10(min(positive, default=1.0)))
    high = max(math.ceil(math.log10(max(positive, default=1.0))), low + 1)
    free = any(cost <= 0 for cost, _ in points.values())
    shifts = _apart([cost for cost, _ in points.values()], step=(high - low + 1) * min(0.02, 0.2 / max(len(points), 1)))
    for (name, (cost, summary)), shift in zip(points.items(), shifts, strict=True):
        draw_points(axes, [((cost if cost > 0 else 10.0 ** (low - 1)) * 10.0**shift, summary)], looks[name])
    decades = list(range(low, high + 1, 1 + (high - low) // 5))
    ticks = {10.0**decade: number(10.0**decade).text for decade in decades}
    axes.set_xscale("log")
    axes.set_xticks([10.0 ** (low - 1)] * free + list(ticks), ["0"] * free + list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlim(10.0 ** (low - (1.3 if free else 0.3)), 10.0 ** (high + 0.3))
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
