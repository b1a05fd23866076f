"""What the figures of accuracy share: points with intervals, the accuracy axis, the legend."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jxfer.report.results import METRIC, Summary
from jxfer.report.style import INK, NARROW_BELOW, Look, shorten

Points: TypeAlias = list[tuple[float, Summary]]
"""Where on the horizontal axis, and the accuracy there."""

_LEGEND_LETTERS = 20  # two columns of them fit into the narrow width


def draw_points(axes: Any, points: Points, look: Look) -> None:
    """Draws one method: its means in percent, their intervals, and the line between them."""
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


def finish_axes(axes: Any) -> None:
    """Labels the vertical axis and keeps it to accuracies that there are."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2), min(high, 102))  # a t-interval may leave [0, 100]; the axis need not follow
    axes.set_ylabel(f"test {METRIC} (%)")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=3)


def small_multiples(width: float, count: int) -> tuple[Any, list[Any]]:
    """A figure `width` inches wide with `count` axes that share their scales, four in a row, two if it is narrow."""
    from matplotlib.figure import Figure as Canvas

    columns = max(1, min(count, 2 if width < NARROW_BELOW else 4))
    rows = math.ceil(count / columns)
    figure = Canvas(figsize=(width, 1.75 * rows + 0.35), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for index, axes in enumerate(panels):
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.tick_params(length=3, labelbottom=index + columns >= count, labelleft=index % columns == 0)
        if index >= count:
            axes.set_axis_off()
    return figure, panels[:count]


def legend_below(figure: Any, looks: Mapping[str, Look], width: float) -> None:
    """One legend for all panels, under them."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.line, markersize=4.5, linewidth=1.4)
        for look in looks.values()
    ]
    names = [shorten(name, _LEGEND_LETTERS) for name in looks]
    columns = legend_columns(list(looks), width)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=8.5, labelcolor=INK)


def legend_columns(names: Sequence[str], width: float) -> int:
    """How many columns of marker and name fit into `width` inches, going by the longest name."""
    longest = max(len(shorten(name, _LEGEND_LETTERS)) for name in names)
    return min(4, int(width / (0.5 + 0.068 * longest)))
