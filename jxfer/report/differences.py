"""How far each method is from a reference, with the interval of the difference: the paired test as a picture."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jxfer.report.comparisons import Comparison
from jxfer.report.directory import Material
from jxfer.report.document import Cell, Figure, Table, difference_text, p_text
from jxfer.report.findings import WORDS, ranking, shots_name, shots_text
from jxfer.report.results import Shots, extremes
from jxfer.report.style import LINE, NARROW_BELOW, PAPER, Look, picture, shorten


def differences_figure(material: Material, looks: Mapping[str, Look]) -> Figure | None:
    """Each method less the best without transfer, or less the best of all where none is without; None if untested."""
    found = {shots: pairs for shots in extremes(material.results) if (pairs := _pairs(material, shots))}
    if not found:
        return None
    return picture(
        functools.partial(_draw, found, looks),
        name="differences",
        alt="Differences between methods with their intervals",
        caption="Accuracy of each method less that of the reference, in points, with the 95% interval of the paired "
        "test. Filled: a difference is claimed after correction; hollow: none was found.",
        data=_data(found),
    )


def _pairs(material: Material, shots: Shots) -> list[Comparison]:
    methods = [entry.method for entry in ranking(material.results, shots)]
    reference = next((method for method in methods if method in material.baselines), methods[0])
    pairs = [material.comparisons.between(method, reference, shots) for method in methods if method != reference]
    return [pair for pair in pairs if pair.difference]


def _draw(found: Mapping[Shots, Sequence[Comparison]], looks: Mapping[str, Look], width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    columns = 1 if width < NARROW_BELOW else len(found)
    rows = math.ceil(len(found) / columns)
    tallest = max(map(len, found.values()))
    figure = Canvas(figsize=(width, rows * (0.24 * tallest + 0.85)), layout="constrained")
    for axes, (shots, pairs) in zip(figure.subplots(rows, columns, squeeze=False).flat, found.items(), strict=True):
        for place, pair in enumerate(pairs):
            _draw_pair(axes, place, pair, looks[pair.one])
        axes.axvline(0, color=LINE, linewidth=1.5, zorder=0)
        axes.set_yticks(range(len(pairs)), [shorten(pair.one, 22) for pair in pairs])
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.set_title(shots_text(shots), loc="left")
        axes.set_xlabel(f"points above {shorten(pairs[0].other, 22)}")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.tick_params(length=0, axis="y")
    return figure


def _draw_pair(axes: Any, place: int, pair: Comparison, look: Look) -> None:
    if (found := pair.difference) is None:
        return
    filled = "full" if pair.verdict in ("better", "worse") else "none"
    axes.plot([100 * found.low, 100 * found.high], [place, place], color=look.colour, linewidth=1.4)
    # A hollow marker hides the line behind it: the page's background, light or dark, takes the place of white.
    axes.plot([100 * found.mean], [place], look.marker, color=PAPER, markersize=6)
    axes.plot([100 * found.mean], [place], look.marker, color=look.colour, markersize=6, fillstyle=filled)


def _data(found: Mapping[Shots, Sequence[Comparison]]) -> Table:
    rows = [
        (
            Cell(shots_name(shots), math.inf if shots is None else shots),
            Cell(pair.one),
            Cell(pair.other),
            Cell(difference_text(pair.difference), pair.difference.mean),
            Cell(p_text(pair.adjusted_p or 0.0), pair.adjusted_p),
            Cell(WORDS[pair.verdict]),
        )
        for shots, pairs in found.items()
        for pair in pairs
        if pair.difference
    ]
    header = ("Examples per class", "Method", "Reference", "Difference in points", "p corrected", "Found")
    return Table(header, tuple(rows))
