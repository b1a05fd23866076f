"""Confusion matrices and example predictions as pictures."""

import functools
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jxfer.report.confusions import Confusion, Shown
from jxfer.report.directory import Material
from jxfer.report.document import Card, Cell, Figure, Gallery, Table
from jxfer.report.findings import shots_text
from jxfer.report.style import HEAT, INK, NARROW_BELOW, drawing, picture, png_bytes, shorten

MAX_NUMBERS = 16
"""Classes up to which the cells of a matrix carry their percentage."""
MAX_NAMES = 40
"""Classes up to which the axes carry names and the table behind the figure holds every cell."""
_MAX_PAIRS = 50
_THUMBNAIL = 160


def best_confusion_figure(material: Material, best: Confusion) -> Figure:
    """The confusion matrix of the most accurate method."""
    return picture(
        functools.partial(_draw_one, material, best),
        name="confusion",
        alt=f"Confusion matrix of {best.method}",
        caption=f"{best.method} with {shots_text(best.shots)}: of each true class (row), the share in percent taken "
        f"for each class (column); {_runs_text([best])}.",
        data=_counts_table(material, [best]),
    )


def other_confusions_figure(material: Material, others: Sequence[Confusion]) -> Figure:
    """Small confusion matrices of the other methods."""
    return picture(
        functools.partial(_draw_many, others),
        name="confusion_others",
        alt="Confusion matrices of the other methods",
        caption=f"The other methods with {shots_text(others[0].shots)}, in the same order of classes and the same "
        f"scale; {_runs_text(others)}.",
        data=_counts_table(material, others),
    )


def gallery(material: Material, shown: Sequence[Shown], origin: str) -> Gallery:
    """The chosen examples with every method's prediction."""
    caption = (
        f"Test examples and what each method took them for ({origin}). Chosen to include errors, so how many are "
        "right here says nothing about accuracy."
    )
    with drawing("examples"):
        sheet = png_bytes(_draw_examples(material, shown))
    cards = tuple(_card(material, example) for example in shown)
    return Gallery(name="examples", alt="Example predictions", caption=caption, cards=cards, png=sheet)


def _draw_one(material: Material, matrix: Confusion, width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    K = len(matrix.counts)
    side = min(width, 5.0)
    figure = Canvas(figsize=(side, 0.95 * side), layout="constrained")
    axes = figure.add_subplot()
    _heat(axes, matrix.rates)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if K <= MAX_NAMES:
        names = [shorten(material.class_name(index), 14) for index in range(K)]
        turn = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(K), names, rotation=turn, fontsize=7 if K > 20 else 8)
        axes.set_yticks(range(K), names, fontsize=7 if K > 20 else 8)
    if K <= MAX_NUMBERS:
        _write_rates(axes, matrix.rates, fontsize=6.5 if width < NARROW_BELOW else 8.0)
    return figure


def _draw_many(others: Sequence[Confusion], width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    columns = min(len(others), 2 if width < NARROW_BELOW else 4)
    rows = math.ceil(len(others) / columns)
    cell = width / (2 if width < NARROW_BELOW else 4)
    figure = Canvas(figsize=(cell * columns, (cell + 0.15) * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, matrix in zip(panels, others, strict=False):
        _heat(axes, matrix.rates)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(shorten(matrix.method, 20), fontsize=8.5)
    for axes in panels[len(others) :]:
        axes.set_axis_off()
    return figure


def _heat(axes: Any, rates: np.ndarray) -> None:
    """One hue whose opacity is the rate, so that the page shows through where the rate is low, light or dark."""
    from matplotlib.colors import to_rgb

    rgba = np.empty((*rates.shape, 4))
    rgba[..., :3] = to_rgb(HEAT)
    rgba[..., 3] = np.sqrt(rates)  # errors are rare: the root makes 4 % visible beside 96 %
    axes.imshow(rgba, interpolation="none", aspect="equal")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _write_rates(axes: Any, rates: np.ndarray, *, fontsize: float) -> None:
    for (row, column), rate in np.ndenumerate(rates):
        if rate >= 0.005:
            colour = "#ffffff" if rate > 0.3 else INK
            axes.text(column, row, f"{100 * rate:.0f}", ha="center", va="center", color=colour, fontsize=fontsize)


def _draw_examples(material: Material, shown: Sequence[Shown]) -> Any:
    from matplotlib.figure import Figure as Canvas

    columns = min(len(shown), 4)
    rows = math.ceil(len(shown) / columns)
    lines = 1 + len(shown[0].predicted)
    figure = Canvas(figsize=(1.9 * columns, rows * (1.2 + 0.135 * lines)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, example in zip(panels, shown, strict=False):
        axes.imshow(_rgb(example.image), interpolation="nearest", aspect="equal")
        axes.set_title(f"true: {shorten(material.class_name(example.label))}", fontsize=8, loc="left")
        for line, (method, name, right) in enumerate(_verdicts(material, example)):
            text = f"{'✓' if right else '✗'} {shorten(method, 20)}" + ("" if right else f": {shorten(name, 10)}")
            colour = "#1d7a3f" if right else "#b3261e"
            axes.text(0, -0.06 - 0.135 * line, text, transform=axes.transAxes, va="top", fontsize=6.5, color=colour)
    return figure


def _card(material: Material, example: Shown) -> Card:
    from PIL import Image

    image = Image.fromarray(_rgb(example.image))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    tiny = max(image.size) < _THUMBNAIL // 2
    label = material.class_name(example.label)
    return Card(png=buffer.getvalue(), tiny=tiny, label=label, predictions=_verdicts(material, example))


def _verdicts(material: Material, example: Shown) -> tuple[tuple[str, str, bool], ...]:
    return tuple((m, material.class_name(p), p == example.label) for m, p in example.predicted.items())


def _rgb(image: np.ndarray) -> np.ndarray:
    """[H W C] with any C -> [H W 3]: one channel is grey, of more than three the first three are shown."""
    return np.repeat(image[..., :1], 3, axis=-1) if image.shape[-1] < 3 else np.ascontiguousarray(image[..., :3])


def _counts_table(material: Material, matrices: Sequence[Confusion]) -> Table:
    """Every cell of the matrices; of many classes only the most frequent errors."""
    K = max(len(matrix.counts) for matrix in matrices)
    if K > MAX_NAMES:
        return _pairs_table(material, matrices)
    rows = [
        (Cell(matrix.method), Cell(material.class_name(true)), *map(_count_cell, counts.tolist()))
        for matrix in matrices
        for true, counts in enumerate(np.pad(matrix.counts, (0, K - len(matrix.counts))))
    ]
    header = ("Method", "True class \\ predicted", *map(material.class_name, range(K)))
    return Table(header, tuple(rows), note="Counts of test examples, over all seeds.")


def _count_cell(count: int) -> Cell:
    return Cell(str(count), count, "" if count else "muted")


def _pairs_table(material: Material, matrices: Sequence[Confusion]) -> Table:
    """The errors made most often, as a list: it stays readable for any number of classes."""
    found = []
    for matrix in matrices:
        errors = matrix.counts * (1 - np.eye(len(matrix.counts), dtype=np.int64))
        for flat in np.argsort(-errors, axis=None, kind="stable")[:_MAX_PAIRS]:
            true, predicted = divmod(int(flat), len(errors))
            found.append((int(errors[true, predicted]), float(matrix.rates[true, predicted]), matrix, true, predicted))
    found = sorted((pair for pair in found if pair[0]), key=lambda pair: -pair[0])[:_MAX_PAIRS]
    rows = [
        (
            Cell(matrix.method),
            Cell(material.class_name(true)),
            Cell(material.class_name(predicted)),
            Cell(str(count), count),
            Cell(f"{100 * rate:.1f}", rate),
        )
        for count, rate, matrix, true, predicted in found
    ]
    header = ("Method", "True class", "Taken for", "Test examples", "% of the class")
    return Table(header, tuple(rows), note=f"The {_MAX_PAIRS} most frequent errors, over all seeds.")


def _runs_text(matrices: Sequence[Confusion]) -> str:
    read, finished = sum(m.num_runs for m in matrices), sum(m.num_finished for m in matrices)
    runs = f"{read} run{'' if read == 1 else 's'}"
    return (
        f"summed over {runs}" if read == finished else f"summed over {runs}; predictions of {finished - read} missing"
    )
