"""How training went: validation accuracy over steps, and which settings the search chose."""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jxfer.report.directory import Material
from jxfer.report.document import Cell, Figure, Table
from jxfer.report.findings import shots_name, shots_text
from jxfer.report.panel import legend_below, small_multiples
from jxfer.report.results import METRIC, Results, Row, Shots, run_name, run_of
from jxfer.report.style import INK, NARROW_BELOW, Look, picture, shorten

MAX_OTHERS = 12
"""Settings besides the chosen that a panel shows: more would be a smear."""

Curve: TypeAlias = dict[int, float]
"""Validation accuracy by steps since the start of the run, all phases counted."""


@dataclasses.dataclass(frozen=True)
class Curves:
    """One method at some number of shots, each curve a mean over seeds at the steps they share."""

    method: str
    chosen: Curve
    """Of the setting that each seed chose."""
    others: Mapping[str, Curve]
    """Of up to `MAX_OTHERS` settings, over all seeds, where there was more than one."""
    num_seeds: int


def learning_curves(material: Material, shots: Shots) -> list[Curves]:
    """The curves of all methods whose runs logged looks at the validation split."""
    found = []
    for method in material.results.methods:
        runs = [(row, _read_curves(material.directory, row)) for row in material.results.of(method, shots)]
        runs = [(row, curves) for row, curves in runs if curves]
        if chosen := _mean([curves[_chosen(row, curves)] for row, curves in runs]):
            found.append(Curves(method, chosen, _others([curves for _, curves in runs]), len(runs)))
    return found


def curves_figure(shots: Shots, curves: Sequence[Curves], looks: Mapping[str, Look], *, name: str) -> Figure:
    """Validation accuracy over steps, a panel for each method."""
    return picture(
        functools.partial(_draw_curves, curves, looks),
        name=name,
        alt=f"Validation accuracy over training steps with {shots_text(shots)}",
        caption=f"Validation accuracy over steps with {shots_text(shots)}, means over seeds: strong for the setting "
        f"each seed chose, faint for each setting of the search (at most {MAX_OTHERS} are drawn). The weights of the "
        "best look are kept.",
        data=_curves_data(curves),
    )


def choices_table(results: Results) -> Table | None:
    """Which setting won how often, by method and shots; None where there was nothing to choose."""
    searched = [row for row in results.rows if len(row.get("variants") or ()) > 1]
    if not searched:
        return None
    names = {name for row in searched for variant in row["variants"] for name in settings_of(variant["variant"])}
    only = next(iter(names)) if len(names) == 1 else None
    rows = [
        (Cell(method), *(_choice_cell(results.of(method, shots), only) for shots in results.shots))
        for method in results.methods
    ]
    header = ("Method", *(f"{shots_name(s)} per class" if s else "all" for s in results.shots))
    what = f"The {only.replace('_', ' ')}" if only else "The setting"
    note = f"{what} that did best on validation, and in how many of the seeds it was the one (×)."
    return Table(header, tuple(rows), note=note)


def settings_figure(results: Results, shots: Shots, looks: Mapping[str, Look], *, name: str) -> Figure | None:
    """Validation accuracy over the value of each setting that was searched at three values or more."""
    found = _searched(results, shots)
    if not found:
        return None
    return picture(
        functools.partial(_draw_settings, found, looks),
        name=name,
        alt=f"Validation accuracy over searched settings with {shots_text(shots)}",
        caption=f"Validation accuracy over the searched values with {shots_text(shots)}: means over seeds, of the best "
        "among the other settings. The ring is where the mean is highest.",
        data=_settings_data(found),
    )


def settings_of(variant: Any) -> dict[str, float]:
    """The numbers in a variant's name, such as `learning_rate=0.01,weight_decay=0`; others are left out."""
    if isinstance(variant, dict):
        return {str(name): float(value) for name, value in variant.items() if isinstance(value, float | int)}
    parts = [part.partition("=") for part in str(variant).split(",")]
    return {name: number for name, _, value in parts if (number := _number(value)) is not None}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _read_curves(directory: Path, row: Row) -> dict[str, Curve]:
    """By variant. Steps start anew in each phase, so those of the phases before are added."""
    path = directory / "runs" / run_name(run_of(row)) / "metrics.jsonl"
    curves: dict[str, Curve] = {}
    phases: dict[str, dict[str, int]] = {}
    for look in _looks(path):
        variant, phase = str(look.get("variant")), str(look.get("phase"))
        curve = curves.setdefault(variant, {})
        start = phases.setdefault(variant, {}).setdefault(phase, max(curve, default=0))
        curve[start + look["step"]] = look[METRIC]
    return curves


def _looks(path: Path) -> list[Row]:
    looks = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill; the rows before it stand
            continue
        if row.get("split") == "validation" and row.get(METRIC) is not None and math.isfinite(row[METRIC]):
            looks.append(row)
    return looks


def _chosen(row: Row, curves: Mapping[str, Curve]) -> str:
    name = str(row.get("variant"))
    return name if name in curves else next(iter(curves))


def _mean(curves: Sequence[Curve]) -> Curve:
    steps = set.intersection(*map(set, curves)) if curves else ()
    return {step: float(np.mean([curve[step] for curve in curves])) for step in sorted(steps)}


def _others(runs: Sequence[Mapping[str, Curve]]) -> dict[str, Curve]:
    names = list(dict.fromkeys(name for curves in runs for name in curves))
    if len(names) == 1:
        return {}
    kept = np.unique(np.linspace(0, len(names) - 1, min(len(names), MAX_OTHERS)).astype(int))
    return {names[index]: _mean([curves[names[index]] for curves in runs if names[index] in curves]) for index in kept}


def _draw_curves(found: Sequence[Curves], looks: Mapping[str, Look], width: float) -> Any:
    figure, panels = small_multiples(width, len(found))
    for axes, curves in zip(panels, found, strict=True):
        colour = looks[curves.method].colour
        for curve in curves.others.values():
            axes.plot(list(curve), [100 * value for value in curve.values()], color=colour, alpha=0.3, linewidth=0.9)
        values = [100 * value for value in curves.chosen.values()]
        axes.plot(list(curves.chosen), values, color=colour, linewidth=1.9, marker="o", markersize=2.5)
        axes.set_title(shorten(curves.method, 22), fontsize=8.5, loc="left")
    figure.supxlabel("steps", fontsize=9)
    figure.supylabel(f"validation {METRIC} (%)", fontsize=9)
    return figure


def _curves_data(found: Sequence[Curves]) -> Table:
    rows = []
    for curves in found:
        for setting, curve in (("chosen by each seed", curves.chosen), *curves.others.items()):
            cells = [(Cell(str(step), step), Cell(f"{100 * value:.2f}", value)) for step, value in curve.items()]
            seeds = Cell(str(curves.num_seeds), curves.num_seeds)
            rows += [(Cell(curves.method), Cell(setting), step, value, seeds) for step, value in cells]
    return Table(("Method", "Setting", "Step", "Validation accuracy %", "Seeds"), tuple(rows))


def _choice_cell(rows: Sequence[Row], only: str | None) -> Cell:
    chosen = [row["variant"] for row in rows if len(row.get("variants") or ()) > 1]
    texts = [_setting_text(variant).removeprefix(f"{only}=") for variant in chosen]
    listed = [f"{text} × {count}" for text, count in collections.Counter(texts).most_common()]
    return Cell(", ".join(listed)) if listed else Cell("–", tone="muted")


def _setting_text(variant: Any) -> str:
    return " ".join(f"{name}={value:g}" for name, value in settings_of(variant).items()) or str(variant)


Searched: TypeAlias = dict[str, dict[str, dict[float, float]]]
"""Setting -> method -> value -> validation accuracy."""


def _searched(results: Results, shots: Shots) -> Searched:
    found: Searched = {}
    for method in results.methods:
        scores: dict[tuple[str, float], dict[int, float]] = {}
        for row in results.of(method, shots):
            for variant in row.get("variants") or ():
                metrics = variant.get("validation_metrics") or {}
                for setting in settings_of(variant["variant"]).items() if METRIC in metrics else ():
                    seeds = scores.setdefault(setting, {})
                    seeds[row["seed"]] = max(metrics[METRIC], seeds.get(row["seed"], 0.0))
        for (name, value), seeds in sorted(scores.items()):
            found.setdefault(name, {}).setdefault(method, {})[value] = float(np.mean(list(seeds.values())))
    kept = {name: {m: curve for m, curve in methods.items() if len(curve) >= 3} for name, methods in found.items()}
    return {name: methods for name, methods in kept.items() if methods}


def _draw_settings(found: Searched, looks: Mapping[str, Look], width: float) -> Any:
    from matplotlib.figure import Figure as Canvas

    columns = 1 if width < NARROW_BELOW else min(2, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Canvas(figsize=(width, 3.1 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes, (name, methods) in zip(panels, found.items(), strict=False):
        for method, curve in methods.items():
            look = looks[method]
            values = [100 * value for value in curve.values()]
            axes.plot(list(curve), values, color=look.colour, marker=look.marker, linestyle=look.line, markersize=4)
            best = max((score, value) for value, score in curve.items())[1]
            axes.plot(
                [best], [100 * max(curve.values())], "o", color=INK, markersize=9, fillstyle="none", markeredgewidth=0.9
            )
        _scale_values(axes, sorted({value for curve in methods.values() for value in curve}))
        axes.set_xlabel(name.replace("_", " "))
        axes.set_ylabel(f"validation {METRIC} (%)")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
    legend_below(figure, {m: looks[m] for m in looks if any(m in methods for methods in found.values())}, width)
    return figure


def _scale_values(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis with up to seven of the values under it; zero, which no logarithm has, stands at its left."""
    positive = [value for value in values if value > 0]
    if len(positive) == len(values):
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=min(positive, default=1.0))
    shown = [values[index] for index in np.unique(np.linspace(0, len(values) - 1, min(len(values), 7)).astype(int))]
    axes.set_xticks(shown, [f"{value:.3g}" for value in shown])
    axes.minorticks_off()


def _settings_data(found: Searched) -> Table:
    rows = [
        (Cell(name), Cell(method), Cell(f"{value:g}", value), Cell(f"{100 * score:.2f}", score))
        for name, methods in found.items()
        for method, curve in methods.items()
        for value, score in curve.items()
    ]
    return Table(("Setting", "Method", "Value", "Validation accuracy %"), tuple(rows))
