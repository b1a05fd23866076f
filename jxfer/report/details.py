"""Tables beside those of accuracy: comparisons, the source after transfer, stored features, populations, weights."""

import collections
from collections.abc import Sequence
from typing import Any

from jxfer.report.comparisons import Comparison, Comparisons
from jxfer.report.directory import Material
from jxfer.report.document import Cell, Table, difference_text, number, p_text, percent, size
from jxfer.report.findings import WORDS, shots_name
from jxfer.report.results import METRIC, Results, Row, Shots, mean_of, summarise


def comparison_table(comparisons: Comparisons, shots: Shots) -> Table:
    """Every two methods at one number of shots, the better one first, the surest difference first."""
    pairs = [pair if pair.difference and pair.difference.mean >= 0 else pair.turned() for pair in comparisons.at(shots)]
    rows = [_comparison_row(pair) for pair in sorted(pairs, key=_sureness)]
    header = ("Method", "Against", "Difference in points", "p", "p corrected", "Found", "Seeds")
    return Table(header, tuple(rows))


def source_table(material: Material) -> Table | None:
    """Accuracy on the source's task after transfer, by method and shots; None where it was not measured."""
    results = material.results
    found = {(m, s): _source_accuracies(results.of(m, s)) for m in results.methods for s in results.shots}
    if not any(found.values()):
        return None
    before = material.source_accuracy
    rows = [
        (Cell(method), *(percent(summarise(v) if (v := found[method, s]) else None) for s in results.shots))
        for method in results.methods
        if any(found[method, shots] for shots in results.shots)
    ]
    if before is not None:
        rows = [
            (Cell("before transfer", tone="muted"), *[Cell(f"{100 * before:.1f}", before)] * len(results.shots)),
            *rows,
        ]
    header = ("Method", *(f"{shots_name(s)} per class" if s else shots_name(s) for s in results.shots))
    note = "Accuracy in % on the source's test examples with the source's head, after training on the target."
    return Table(header, tuple(rows), note=note)


def features_table(results: Results) -> Table | None:
    """What was stored at the frozen boundary, means over all runs of a method; None where nothing was."""
    rows = []
    for method in results.methods:
        stored = [
            f for row in results.rows if row["method"] == method and (f := row.get("features")) and f.get("stored")
        ]
        if stored:
            boundary = ", ".join(dict.fromkeys(str(features.get("boundary")) for features in stored))
            counts = [number(mean_of(stored, name)) for name in ("views", "examples", "computed", "reused")]
            amounts = [size(mean_of(stored, "bytes")), number(mean_of(stored, "flops"))]
            rows.append((Cell(method), Cell(str(len(stored)), len(stored)), Cell(boundary), *counts, *amounts))
    header = ("Method", "Runs", "Trains from", "Views", "Rows read", "Computed", "Reused", "Bytes", "FLOPs of all")
    return Table(header, tuple(rows), note="Means per run.") if rows else None


def saving_table(plans: Sequence[dict[str, Any]]) -> Table | None:
    """What the plans say that storing takes and saves, by method and phase; None where no phase stores features."""
    rows = [
        (Cell(str(plan["method"])), Cell(str(phase["name"])), Cell(said.partition(": ")[2]))
        for plan in plans
        for phase in plan.get("phases", ())
        if (said := str(phase.get("features") or "")).startswith(("stored: ", "solved: "))
    ]
    return Table(("Method", "Phase", "What it takes and saves, by the plan"), tuple(rows)) if rows else None


def population_table(results: Results) -> Table | None:
    """How the settings of each search shared their training, by method and phase; None where nothing was searched."""
    rows = []
    for method in results.methods:
        phases = {
            (str(phase.get("phase")), tuple(phase.get("parts") or ()), str(phase.get("why") or "")): phase
            for row in results.rows
            if row["method"] == method
            for phase in row.get("population") or ()
        }
        rows += [
            (
                Cell(method),
                Cell(name),
                Cell(str(sum(parts)), sum(parts)),
                Cell(_parts_text(parts), len(parts)),
                size(phase.get("bytes_each")),
                Cell(why),
            )
            for (name, parts, why), phase in phases.items()
            if sum(parts) > 1
        ]
    header = ("Method", "Phase", "Settings", "Trained together", "Bytes of each", "Why so")
    return Table(header, tuple(rows)) if rows else None


def weights_table(manifest: dict[str, Any]) -> Table | None:
    """What loading a file of weights covered; None where the source was pre-trained here."""
    if not manifest:
        return None
    leaves, tensors = manifest.get("leaves", ()), manifest.get("tensors", ())
    rows = (
        (
            Cell("model"),
            _share_cell(manifest.get("coverage")),
            Cell("bytes that come from the file"),
            _statuses(leaves),
        ),
        (Cell("file"), _share_cell(manifest.get("used")), Cell("bytes that went into the model"), _statuses(tensors)),
    )
    what, naming = manifest.get("what", "the file"), manifest.get("naming", "?")
    return Table(("Of the", "%", "Share of", "Tensors"), rows, note=f"Loaded: {what} ({naming} names).")


def _comparison_row(pair: Comparison) -> tuple[Cell, ...]:
    found, corrected = pair.difference, pair.adjusted_p or 0.0
    if found is None:
        return ()
    tone: Any = "best" if pair.verdict in ("better", "worse") else "muted"
    return (
        Cell(pair.one),
        Cell(pair.other),
        Cell(difference_text(found), found.mean),
        Cell(p_text(found.p).removeprefix("p ").removeprefix("= "), found.p),
        Cell(p_text(corrected).removeprefix("p ").removeprefix("= "), corrected),
        Cell(WORDS[pair.verdict], tone=tone),
        Cell(str(pair.num_seeds), pair.num_seeds),
    )


def _sureness(pair: Comparison) -> tuple[float, float]:
    return (pair.difference.p, -pair.difference.mean) if pair.difference else (1.0, 0.0)


def _parts_text(parts: Sequence[int]) -> str:
    """`64`, `32 + 32`, `one by one`."""
    return "one by one" if max(parts) == 1 else " + ".join(map(str, parts))


def _source_accuracies(rows: Sequence[Row]) -> list[float]:
    found = [(row.get("source_metrics") or {}).get(METRIC) for row in rows]
    return [value for value in found if value is not None]


def _share_cell(share: float | None) -> Cell:
    return Cell("–", tone="muted") if share is None else Cell(f"{100 * share:.2f}", share)


def _statuses(records: Sequence[dict[str, Any]]) -> Cell:
    counts = collections.Counter(str(record.get("status")) for record in records)
    return Cell(", ".join(f"{count} {status}" for status, count in counts.most_common()) or "–")
