"""Accuracy against what it costs, at the fewest and the most labelled examples."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jxfer.report.document import Cell, Figure, Table, number, percent, seconds, size
from jxfer.report.findings import shots_name, shots_text
from jxfer.report.panel import draw_points, finish_axes, legend_below, legend_columns
from jxfer.report.results import Results, Shots, Summary, extremes, mean_of
from jxfer.report.style import LINE, NARROW_BELOW, Look, picture

Cost: TypeAlias = tuple[str, str, Callable[[float | int | None], Cell]]
"""The field of a row, what it is called, and how it is written."""
COSTS: tuple[Cost, ...] = (
    ("params_trainable", "trainable parameters", number),
    ("train_flops", "training FLOPs, search included", number),
    ("seconds", "seconds, search included", seconds),
    ("checkpoint_bytes", "checkpoint bytes", size),
)


FRONT_NOTE = "● on the Pareto front of accuracy and this cost."


def pareto_front(points: Mapping[str, tuple[float, Summary]]) -> tuple[str, ...]:
    """The methods that no other matches or beats in both cost and mean accuracy (and beats in one), cheapest first."""
    ordered = sorted(points, key=lambda name: (points[name][0], -points[name][1].mean))
    front: list[str] = []
    for name in ordered:
        cost, summary = points[name]
        if not front or summary.mean > points[front[-1]][1].mean or (cost, summary.mean) == _place(points[front[-1]]):
            front.append(name)
    return tuple(front)


def _place(point: tuple[float, Summary]) -> tuple[float, float]:
    return point[0], point[1].mean


def cost_figure(results: Results, looks: Mapping[str, Look]) -> Figure | None:
    """Test accuracy against each cost, at the fewest and the most shots; None if no cost was recorded."""
    costs = [cost for cost in COSTS if mean_of(results.rows, cost[0]) is not None]
    if not costs or not results.accuracy:
        return None
    return picture(
        functools.partial(_draw_costs, results, looks, costs),
        name="cost",
        alt="Test accuracy against " + ", ".join(label for _, label, _ in costs),
        caption="Test accuracy (95% t-interval over seeds) against each cost, means over seeds on logarithmic axes. Up "
        "and to the left is better. The stepped line is the Pareto front: no method beyond it is both cheaper and more "
        "accurate, going by means alone. Methods of equal cost stand side by side.",
        data=_cost_data(results, costs),
    )


def _draw_costs(results: Results, looks: Mapping[str, Look], costs: Sequence[Cost], width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    shown = extremes(results)
    columns = 1 if width < NARROW_BELOW else min(2, len(costs))
    rows = math.ceil(len(shown) * len(costs) / columns)
    names = 0.2 * math.ceil(len(looks) / legend_columns(list(looks), width))
    figure = Canvas(figsize=(width, 2.45 * rows + names), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    contents = [(shots, cost) for shots in shown for cost in costs]
    for axes in panels[len(contents) :]:
        axes.set_axis_off()
    for axes, (shots, (field, label, _)) in zip(panels, contents, strict=False):
        _draw_cost(axes, cost_points(results, shots, field), looks)
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
    _draw_front(axes, [points[name] for name in pareto_front(points)], free_at=10.0 ** (low - 1))
    shifts = _apart([cost for cost, _ in points.values()], step=(high - low + 1) * min(0.02, 0.2 / max(len(points), 1)))
    for (name, (cost, summary)), shift in zip(points.items(), shifts, strict=True):
        draw_points(axes, [((cost if cost > 0 else 10.0 ** (low - 1)) * 10.0**shift, summary)], looks[name])
    decades = list(range(low, high + 1, 1 + (high - low) // 5))
    ticks = {10.0**decade: number(10**decade).text if decade >= 0 else f"{10.0**decade:g}" for decade in decades}
    axes.set_xscale("log")
    axes.set_xticks([10.0 ** (low - 1)] * free + list(ticks), ["0"] * free + list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlim(10.0 ** (low - (1.3 if free else 0.3)), 10.0 ** (high + 0.3))
    if free:
        axes.axvline(10.0 ** (low - 0.5), color=LINE, linestyle=":", linewidth=1)


def _draw_front(axes: Any, front: Sequence[tuple[float, Summary]], *, free_at: float) -> None:
    places = [cost if cost > 0 else free_at for cost, _ in front]
    heights = [100 * summary.mean for _, summary in front]
    axes.step(places, heights, where="post", color=LINE, linewidth=5, solid_capstyle="round", zorder=0)
    axes.plot(places, heights, "o", color=LINE, markersize=11, zorder=0)


def _apart(costs: Sequence[float | int], *, step: float) -> list[float]:
    """For each cost a shift in decades that sets equal costs side by side, centred where they belong."""
    ranks = [costs[:index].count(cost) for index, cost in enumerate(costs)]
    return [step * (rank - (costs.count(cost) - 1) / 2) for rank, cost in zip(ranks, costs, strict=True)]


def cost_points(results: Results, shots: Shots, field: str) -> dict[str, tuple[float, Summary]]:
    """Mean cost and accuracy of each method that has both."""
    points = {}
    for method in results.methods:
        cost = mean_of(results.of(method, shots), field)
        summary = results.accuracy.get((method, shots))
        if cost is not None and summary is not None:
            points[method] = (cost, summary)
    return points


def _cost_data(results: Results, costs: Sequence[Cost]) -> Table:
    rows = []
    for shots in extremes(results):
        points = {field: cost_points(results, shots, field) for field, _, _ in costs}
        fronts = {field: pareto_front(found) for field, found in points.items()}
        for method in results.methods:
            if not any(method in found for found in points.values()):
                continue
            amounts = [
                on_front(form(points[f][method][0] if method in points[f] else None), method in fronts[f])
                for f, _, form in costs
            ]
            label = Cell(shots_name(shots), math.inf if shots is None else shots)
            rows.append((Cell(method), label, *amounts, percent(results.accuracy[method, shots])))
    header = ("Method", "Examples per class", *(_capital(label) for _, label, _ in costs), "Accuracy %")
    return Table(header, tuple(rows), note=FRONT_NOTE)


def on_front(cell: Cell, is_on: bool) -> Cell:
    """The cell of a cost, marked if its method is on the Pareto front."""
    return dataclasses.replace(cell, text=f"● {cell.text}", tone="best") if is_on else cell


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
