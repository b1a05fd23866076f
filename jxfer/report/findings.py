"""What the numbers say, in words, and no more than they say."""

import dataclasses
from typing import Literal

from jxfer.report.document import Cell, Table, percent, percent_text
from jxfer.report.results import Results, Shots, Summary

Verdict = Literal["better", "worse", "unclear", "unknown"]
_WORDS: dict[Verdict, str] = {
    "better": "clearly above",
    "worse": "clearly below",
    "unclear": "no clear difference",
    "unknown": "one seed, no interval",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method and its accuracy at some number of shots."""

    method: str
    summary: Summary


def compare(one: Summary, other: Summary) -> Verdict:
    """Says whether `one` is better than `other`: only if their 95% intervals do not overlap.

    This errs towards "unclear": seeds and subsets are shared, and pairing them would see smaller differences.
    """
    if one.half_width is None or other.half_width is None:
        return "unknown"
    reach = one.half_width + other.half_width
    if abs(one.mean - other.mean) <= reach:
        return "unclear"
    return "better" if one.mean > other.mean else "worse"


def ranking(results: Results, shots: Shots) -> list[Entry]:
    """Methods with a result at these shots, best mean first."""
    entries = [Entry(m, results.accuracy[m, shots]) for m in results.methods if (m, shots) in results.accuracy]
    return sorted(entries, key=lambda entry: -entry.summary.mean)


def headline(results: Results, baselines: tuple[str, ...]) -> str:
    """The finding in one or two sentences."""
    finished = [shots for shots in results.shots if ranking(results, shots)]
    if not finished:
        return f"No run finished: {len(results.rows)} of {len(results.rows)} failed."
    duels = {shots: duel for shots in finished if (duel := _duel(results, baselines, shots))}
    if duels:
        return _against_baseline(duels)
    shots = finished[-1]
    entries = ranking(results, shots)
    best = entries[0]
    claim = f"With {shots_text(shots)}, {best.method} reaches {percent_text(best.summary)} % (n = {best.summary.n})"
    if len(entries) == 1:
        return f"{claim}; no other method was run to compare it with."
    second = entries[1]
    verdict = _WORDS[compare(best.summary, second.summary)]
    return (
        f"{claim}, the best of {len(entries)}; against {second.method} ({percent_text(second.summary)} %): {verdict}."
    )


def best_table(results: Results, baselines: tuple[str, ...]) -> Table:
    """For each number of shots: the best method, the runner-up, and whether they differ."""
    rows = [_best_row(ranking(results, shots), shots, baselines) for shots in results.shots if ranking(results, shots)]
    header = ("Per class", "Best", "Accuracy\u00a0%", "n", "Runner-up", "Accuracy\u00a0%", "Against runner-up")
    return Table(
        (*header, "Against scratch") if baselines else header,
        tuple(row if baselines else row[:-1] for row in rows),
        note="“Clearly” means that the two 95% intervals do not overlap. The best of several is chosen on the "
        "same test examples that measure it, so its mean flatters it a little.",
    )


def shots_text(shots: Shots) -> str:
    """`1 labelled example per class`, `all labelled examples`."""
    if shots is None:
        return "all labelled examples"
    return f"{shots} labelled example{'' if shots == 1 else 's'} per class"


def shots_name(shots: Shots) -> str:
    """The number, or `all`."""
    return "all" if shots is None else str(shots)


def _best_row(entries: list[Entry], shots: Shots, baselines: tuple[str, ...]) -> tuple[Cell, ...]:
    best = entries[0]
    second = entries[1] if len(entries) > 1 else None
    reference = next((entry for entry in entries if entry.method in baselines), None)
    return (
        Cell(shots_name(shots), float("inf") if shots is None else shots),
        Cell(best.method, tone="best"),
        percent(best.summary),
        Cell(str(best.summary.n), best.summary.n),
        Cell(second.method) if second else Cell("–", tone="muted"),
        percent(second.summary if second else None),
        _verdict_cell(best, second),
        _verdict_cell(best, reference),
    )


def _verdict_cell(best: Entry, other: Entry | None) -> Cell:
    if other is None:
        return Cell("–", tone="muted")
    if other is best:
        return Cell("is the best", tone="muted")
    verdict = compare(best.summary, other.summary)
    return Cell(_WORDS[verdict], tone="good" if verdict == "better" else "muted")


def _duel(results: Results, baselines: tuple[str, ...], shots: Shots) -> tuple[Entry, Entry] | None:
    """The best method that transfers, and the best that does not."""
    entries = ranking(results, shots)
    transfer = next((entry for entry in entries if entry.method not in baselines), None)
    reference = next((entry for entry in entries if entry.method in baselines), None)
    return (transfer, reference) if transfer and reference else None


def _against_baseline(duels: dict[Shots, tuple[Entry, Entry]]) -> str:
    by_verdict: dict[Verdict, list[Shots]] = {"better": [], "worse": [], "unclear": [], "unknown": []}
    for shots, (transfer, reference) in duels.items():
        by_verdict[compare(transfer.summary, reference.summary)].append(shots)
    phrases: dict[Verdict, str] = {
        "better": "the best transfer is clearly better than training from scratch",
        "worse": "training from scratch is clearly better than the best transfer",
        "unclear": "there is no clear difference between the best transfer and training from scratch",
        "unknown": "one seed gives no interval, so nothing can be claimed about transfer against scratch",
    }
    parts = [f"with {_several(shots)}, {phrases[verdict]}" for verdict, shots in by_verdict.items() if shots]
    text = "; ".join(parts)
    gain = _largest_gain({shots: duels[shots] for shots in by_verdict["better"]})
    return f"{text[0].upper()}{text[1:]}.{gain}"


def _largest_gain(duels: dict[Shots, tuple[Entry, Entry]]) -> str:
    if not duels:
        return ""
    shots = max(duels, key=lambda key: duels[key][0].summary.mean - duels[key][1].summary.mean)
    transfer, reference = duels[shots]
    where = "all" if shots is None else f"{shots} per class"
    return (
        f" The largest gain is with {where}: {transfer.method} {percent_text(transfer.summary)} % against "
        f"{reference.method} {percent_text(reference.summary)} % (n = {transfer.summary.n} and {reference.summary.n})."
    )


def _several(shots: list[Shots]) -> str:
    names = [shots_name(value) for value in shots]
    if names == ["all"]:
        return "all labelled examples"
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} labelled example{'' if names == ['1'] else 's'} per class"
