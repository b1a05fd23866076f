"""The tables of the report, and the one on the terminal."""

import collections
import math
from collections.abc import Sequence
from typing import Any

from jxfer.report.comparisons import Comparisons
from jxfer.report.costs import COSTS, FRONT_NOTE, cost_points, on_front, pareto_front
from jxfer.report.document import Cell, Table, number, percent, percent_text, seconds, size
from jxfer.report.findings import ranking, shots_name
from jxfer.report.results import Results, Row, Shots, accuracy_of, collect, mean_of

_COSTS = (
    ("params_trainable", "Trainable", number),
    ("params_total", "Parameters", number),
    ("optimizer_bytes", "Optimizer state", size),
    ("checkpoint_bytes", "Checkpoint", size),
    ("step_flops", "FLOPs per step", number),
    ("steps", "Steps", number),
    ("train_flops", "Training FLOPs", number),
    ("seconds", "Time", seconds),
)


def summary_table(rows: Sequence[Row], comparisons: Comparisons) -> Any:
    """The rich table for the terminal: methods by shots, test accuracy in percent, marked by `comparisons`."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text as RichText

    table = accuracy_table(collect(rows), comparisons)
    rich = RichTable(box=box.SIMPLE, caption=RichText(table.note, style="dim"), caption_justify="left")
    for index, name in enumerate(table.header):
        rich.add_column(RichText(name), justify="right" if index else "left", no_wrap=True)
    for row in table.rows:
        rich.add_row(*(RichText(cell.text, style="bold" if cell.tone == "best" else "") for cell in row))
    return rich


def accuracy_table(results: Results, comparisons: Comparisons) -> Table:
    """Methods by shots: mean test accuracy in percent ± the half-width of its 95% interval."""
    sizes = [summary.n for summary in results.accuracy.values()]
    usual = max(set(sizes), key=sizes.count, default=0)
    rows = [
        (Cell(method), *(_accuracy_cell(results, comparisons, (method, s), usual) for s in results.shots))
        for method in results.methods
    ]
    seeds = f"n = {usual} seeds{'' if len(set(sizes)) == 1 else ' unless given'}"
    interval = "one seed, so no interval" if set(sizes) == {1} else f"mean ± half of the 95% t-interval, {seeds}"
    note = f"Test accuracy in %: {interval}. {_marks_text(rows)}"
    header = ("Method", *(f"{shots_name(s)} per class" if s else shots_name(s) for s in results.shots))
    return Table(header, tuple(rows), note=note if sizes else "No run finished.")


def cost_table(results: Results, shots: Shots) -> Table:
    """What each method holds, moves and spends at one number of shots: means over seeds, Pareto fronts marked."""
    kinds = [cost for cost in _COSTS if mean_of(results.rows, cost[0]) is not None]
    fronts = {field: pareto_front(cost_points(results, shots, field)) for field, _, _ in COSTS}
    rows = [
        (Cell(method), *(on_front(form(mean_of(runs, f)), method in fronts.get(f, ())) for f, _, form in kinds))
        for method in results.methods
        if (runs := results.of(method, shots))
    ]
    return Table(("Method", *(label for _, label, _ in kinds)), tuple(rows), note=FRONT_NOTE)


def audit_table(results: Results) -> Table:
    """Per method, over its finished runs: whether what was frozen stayed and what was trainable moved."""
    rows = []
    for method in results.methods:
        audits = [row["audit"] for row in results.rows if row["method"] == method and row.get("audit")]
        if audits:
            rows.append((Cell(method), *_audit_cells(audits)))
    return Table(("Method", "Runs audited", "Frozen unchanged", "Trainable leaves that moved"), tuple(rows))


def failed_table(results: Results) -> Table:
    """The runs without a result and why."""
    rows = [
        (Cell(r["method"]), _shots_cell(r["shots"]), Cell(str(r["seed"]), r["seed"]), Cell(str(r.get("error") or "")))
        for r in results.failed
    ]
    return Table(("Method", "Examples per class", "Seed", "Error"), tuple(rows))


def disturbed_table(results: Results) -> Table | None:
    """The runs that skipped steps which were not finite, or went back because of one; None where there were none."""
    disturbed = [row for row in results.rows if row.get("skipped_steps") or row.get("rollbacks")]
    rows = [
        (
            Cell(row["method"]),
            _shots_cell(row["shots"]),
            Cell(str(row["seed"]), row["seed"]),
            Cell(f"{row['skipped_steps']} of {row['steps']}", row["skipped_steps"]),
            Cell(str(row["rollbacks"]), row["rollbacks"]),
        )
        for row in disturbed
    ]
    header = ("Method", "Examples per class", "Seed", "Steps skipped", "Rollbacks")
    return Table(header, tuple(rows)) if rows else None


def put_aside_table(results: Results) -> Table | None:
    """The settings that came to no result in some runs that others finished, and why; None where all did."""
    errors: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for row in results.rows:
        for variant in row.get("variants") or ():
            if variant.get("error"):
                errors[row["method"], _setting(variant["variant"])].append(str(variant["error"]))
    rows = [
        (Cell(method), Cell(setting), Cell(str(len(found)), len(found)), Cell(found[0]))
        for (method, setting), found in errors.items()
    ]
    return Table(("Method", "Setting", "Runs", "Why, in the first"), tuple(rows)) if rows else None


def runs_table(results: Results) -> Table:
    """Every run with its accuracy, its chosen setting, its audit and the hashes of what it was made from."""
    hashes = ("config_hash", "subset_hash", "weights_hash")
    rows = [
        (
            Cell(row["method"]),
            _shots_cell(row["shots"]),
            Cell(str(row["seed"]), row["seed"]),
            Cell(row["status"], tone="" if row["status"] == "ok" else "bad"),
            _ratio_cell(accuracy_of(row)),
            seconds(row.get("seconds")),
            Cell(_setting(row.get("variant"))),
            _audit_cell(row.get("audit")),
            *(Cell(str(row.get(name) or "–")) for name in hashes),
        )
        for row in results.rows
    ]
    header = ("Method", "Examples per class", "Seed", "Status", "Accuracy %", "Time", "Setting chosen on validation")
    return Table((*header, "Audit", "Config", "Subset", "Weights"), tuple(rows))


def leaves_table(phase: dict[str, Any]) -> Table:
    """The partition of one phase: every parameter with its label and how it trains."""
    rows = [
        (
            Cell(leaf["path"]),
            Cell(" × ".join(map(str, leaf.get("shape", ()))) or "scalar"),
            Cell(str(leaf.get("dtype", "–"))),
            number(_count(leaf)),
            Cell(str(leaf["label"]), tone="muted" if leaf["label"] == "frozen" else ""),
            _rate_cell(leaf.get("learning_rate_scale")),
            _rate_cell(leaf.get("weight_decay")),
        )
        for leaf in phase.get("leaves", ())
    ]
    return Table(("Path", "Shape", "Type", "Count", "Label", "Rate scale", "Decay"), tuple(rows))


def pairs_table(values: dict[str, Any], header: tuple[str, str]) -> Table:
    """Names and their values, one per line."""
    return Table(header, tuple((Cell(str(name)), Cell(str(value))) for name, value in values.items()))


def _marks_text(rows: Sequence[tuple[Cell, ...]]) -> str:
    marks = {
        "≈": "≈ no difference from the best found (paired test, corrected for all comparisons)",
        "?": "? cannot be tested against the best (a single seed without predictions)",
    }
    used = [text for mark, text in marks.items() if any(cell.text.startswith(mark) for row in rows for cell in row[1:])]
    return f"{'; '.join(['* best', *used])}."


def _accuracy_cell(results: Results, comparisons: Comparisons, key: tuple[str, Shots], usual: int) -> Cell:
    summary = results.accuracy.get(key)
    if summary is None:
        return percent(None)
    method, shots = key
    best = ranking(results, shots)[0].method
    count = "" if summary.n == usual else f" (n = {summary.n})"
    text = f"{percent_text(summary)}{count}"
    if best == method:
        return Cell(f"* {text}", summary.mean, "best")
    mark = {"unclear": "≈ ", "unknown": "? "}.get(comparisons.between(best, method, shots).verdict, "")
    return Cell(f"{mark}{text}", summary.mean)


def _audit_cells(audits: Sequence[dict[str, Any]]) -> tuple[Cell, ...]:
    unchanged = sum(bool(audit.get("frozen_unchanged")) for audit in audits)
    moved = sum(audit.get("trainable_moved") or 0 for audit in audits)
    total = sum(audit.get("trainable_total") or 0 for audit in audits)
    return (
        Cell(str(len(audits)), len(audits)),
        Cell(f"{unchanged} of {len(audits)}", unchanged, "good" if unchanged == len(audits) else "bad"),
        Cell(f"{moved} of {total}" if total else "nothing trains", moved, "good" if moved == total else "bad"),
    )


def _audit_cell(audit: dict[str, Any] | None) -> Cell:
    """`unchanged, 6 of 6 moved`: what was frozen, and what was to train."""
    if not audit:
        return Cell("–", tone="muted")
    unchanged, moved, total = (audit.get(name) for name in ("frozen_unchanged", "trainable_moved", "trainable_total"))
    passed = bool(unchanged) and moved == total
    text = f"{'unchanged' if unchanged else 'changed'}, {moved} of {total} moved"
    return Cell(text, tone="good" if passed else "bad")


def _shots_cell(shots: Shots) -> Cell:
    return Cell(shots_name(shots), math.inf if shots is None else shots)


def _ratio_cell(value: float | None) -> Cell:
    return Cell("–", tone="muted") if value is None else Cell(f"{100 * value:.2f}", value)


def _rate_cell(value: float | int | None) -> Cell:
    return Cell("–", tone="muted") if value is None else Cell(f"{value:g}", float(value))


def _count(leaf: dict[str, Any]) -> int:
    return int(leaf["count"]) if "count" in leaf else math.prod(leaf.get("shape", ()))


def _setting(variant: Any) -> str:
    """`learning_rate=0.001, weight_decay=0.0001`, or what was written."""
    if isinstance(variant, dict):
        return ", ".join(f"{name}={value}" for name, value in variant.items())
    return "–" if variant is None else str(variant)
