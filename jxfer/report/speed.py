"""How fast training was: examples per second, waiting for input, and the share of the devices' peak."""

import collections
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jxfer.report.directory import Material
from jxfer.report.document import Cell, Table, number
from jxfer.report.results import Row, run_name, run_of

_MFU = "mfu"


def speed_table(material: Material) -> Table | None:
    """Medians over the windows of steps of all runs, by method and phase; None where none were logged."""
    windows: dict[tuple[str, str], list[Row]] = collections.defaultdict(list)
    for row in material.results.rows:
        for window in _windows(material.directory / "runs" / run_name(run_of(row)) / "metrics.jsonl"):
            windows[row["method"], str(window.get("phase"))].append(window)
    if not windows:
        return None
    with_mfu = any(_MFU in window for found in windows.values() for window in found)
    order = material.results.methods
    rows = [
        (Cell(method), Cell(phase), *_cells(found, with_mfu=with_mfu))
        for (method, phase), found in sorted(windows.items(), key=lambda item: order.index(item[0][0]))
    ]
    note = "Medians over windows of steps; looks at validation and saving are not counted."
    if with_mfu:
        note += f" MFU is of the stated peak, {material.versions.get('peak', 'which is not recorded')}."
    header = ("Method", "Phase", "Windows", "Examples per second", "Waits for input %", *(["MFU %"] * with_mfu))
    return Table(header, tuple(rows), note=note)


def _windows(path: Path) -> Iterator[Row]:
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill; the rows before it stand
            continue
        if row.get("split") == "train" and "input_wait" in row:
            yield row


def _cells(windows: Sequence[Row], *, with_mfu: bool) -> tuple[Cell, ...]:
    shares = [_share(windows, name) for name in ("input_wait", *([_MFU] * with_mfu))]
    return Cell(str(len(windows)), len(windows)), number(_median(windows, "examples_per_sec")), *shares


def _share(windows: Sequence[Row], name: str) -> Cell:
    value = _median(windows, name)
    return Cell("–", tone="muted") if value is None else Cell(f"{100 * value:.1f}", value)


def _median(windows: Sequence[Row], name: str) -> float | None:
    values = [window[name] for window in windows if window.get(name) is not None]
    return float(np.median(values)) if values else None
