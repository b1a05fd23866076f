"""Whether the probabilities can be believed: calibration error, log-likelihood, reliability, temperature."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jxfer.report.directory import Material
from jxfer.report.document import Cell, Figure, Table, percent, plus_minus
from jxfer.report.findings import shots_text
from jxfer.report.panel import small_multiples
from jxfer.report.predictions import Confidence, Predictions
from jxfer.report.results import Shots, run_of, summarise
from jxfer.report.statistics import NUM_BINS, calibration_bins, expected_calibration_error
from jxfer.report.style import LINE, Look, picture, shorten


def predictions_of(material: Material, shots: Shots) -> dict[str, list[Predictions]]:
    """The predictions of each method that has some, by seed."""
    found = {
        method: [
            material.predictions[run_of(row)]
            for row in material.results.of(method, shots)
            if run_of(row) in material.predictions
        ]
        for method in material.results.methods
    }
    return {method: said for method, said in found.items() if said}


def calibration_table(by_method: Mapping[str, Sequence[Predictions]]) -> Table:
    """Calibration error and negative log-likelihood, as trained and with the temperature that fits validation."""
    scaled = any(said.scaled for runs in by_method.values() for said in runs)
    rows = [(Cell(method), *_calibration_cells(runs, scaled=scaled)) for method, runs in by_method.items()]
    header = ("Method", "n", "ECE %", "NLL")
    note = (
        f"ECE: expected calibration error, top label, {NUM_BINS} bins of equal width. NLL: mean negative "
        "log-likelihood in nats. Means over seeds ± half of the 95% t-interval. "
    )
    if not scaled:
        return Table(header, tuple(rows), note=f"{note}No temperatures: the runs kept no logits of validation.")
    note += "The temperature minimises the NLL of the validation split, which also chose the setting and the step."
    return Table((*header, "Temperature", "ECE % after", "NLL after"), tuple(rows), note=note)


def reliability_figure(
    by_method: Mapping[str, Sequence[Predictions]], shots: Shots, looks: Mapping[str, Look]
) -> Figure:
    """Accuracy over confidence, a panel for each method."""
    return picture(
        functools.partial(_draw_reliability, by_method, looks),
        name="reliability",
        alt=f"Reliability diagrams with {shots_text(shots)}",
        caption=f"Share right over confidence in the predicted class with {shots_text(shots)}, {NUM_BINS} bins, test "
        "examples of all seeds together. Solid: as trained; dotted: after temperature scaling, where there is one. "
        "Below the grey diagonal a model is too sure of itself. Larger dots hold more examples.",
        data=_reliability_data(by_method),
    )


def _calibration_cells(runs: Sequence[Predictions], *, scaled: bool) -> tuple[Cell, ...]:
    cells = [Cell(str(len(runs)), len(runs)), *_quality_cells(runs, [said.confidence for said in runs])]
    if not scaled:
        return tuple(cells)
    kept = [(said, said.scaled) for said in runs if said.scaled]
    if not kept:
        return (*cells, *[Cell("–", tone="muted")] * 3)
    temperature = plus_minus(summarise(after.temperature for _, after in kept), digits=2)
    return (*cells, temperature, *_quality_cells([said for said, _ in kept], [after for _, after in kept]))


def _quality_cells(runs: Sequence[Predictions], sure: Sequence[Confidence]) -> tuple[Cell, Cell]:
    errors = [expected_calibration_error(c.of_predicted, said.correct) for said, c in zip(runs, sure, strict=True)]
    return percent(summarise(errors)), plus_minus(summarise(c.loss for c in sure), digits=3)


def _draw_reliability(by_method: Mapping[str, Sequence[Predictions]], looks: Mapping[str, Look], width: float) -> Any:
    figure, panels = small_multiples(width, len(by_method))
    for axes, (method, runs) in zip(panels, by_method.items(), strict=True):
        axes.plot([0, 100], [0, 100], color=LINE, linewidth=1.5, zorder=0)
        for line, points in _curves(runs).items():
            confidence, accuracy, share = (100 * points).T
            axes.plot(confidence, accuracy, color=looks[method].colour, linestyle=line, linewidth=1.2)
            alpha = 1.0 if line == "-" else 0.5
            axes.scatter(
                confidence, accuracy, s=4 + 0.6 * share, color=looks[method].colour, alpha=alpha, clip_on=False
            )
        axes.set_title(shorten(method, 22), fontsize=8.5, loc="left")
        axes.set_xlim(-2, 102)
        axes.set_ylim(-2, 102)
    figure.supxlabel("confidence (%)", fontsize=9)
    figure.supylabel("right (%)", fontsize=9)
    return figure


def _curves(runs: Sequence[Predictions]) -> dict[str, np.ndarray]:
    """By line style, the bins [B 3] that are not empty: mean confidence, accuracy, share of all examples."""
    curves = {"-": _bins([(said.confidence, said.correct) for said in runs])}
    after = [(said.scaled, said.correct) for said in runs if said.scaled]
    return curves | {":": _bins(after)} if after else curves


def _bins(said: Sequence[tuple[Confidence, np.ndarray]]) -> np.ndarray:
    sums = [calibration_bins(confidence.of_predicted, correct) for confidence, correct in said]
    counts, confidence, right = np.sum(sums, axis=0)
    kept = counts > 0
    return np.stack([confidence[kept] / counts[kept], right[kept] / counts[kept], counts[kept] / counts.sum()], axis=1)


def _reliability_data(by_method: Mapping[str, Sequence[Predictions]]) -> Table:
    when = {"-": "as trained", ":": "temperature scaled"}
    rows = [
        (Cell(method), Cell(when[line]), *(Cell(f"{100 * value:.1f}", value) for value in point))
        for method, runs in by_method.items()
        for line, points in _curves(runs).items()
        for point in points.tolist()
    ]
    return Table(("Method", "Probabilities", "Confidence %", "Right %", "% of the examples"), tuple(rows))
