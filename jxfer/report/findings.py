"""What the numbers say, in words, and no more than they say: first what was found, then how sure it is."""

import dataclasses
from collections.abc import Iterable, Mapping

from jxfer.report.comparisons import Comparison, Comparisons, Verdict
from jxfer.report.document import Cell, Table, difference_text, p_text, percent, percent_text, points_text
from jxfer.report.results import Results, Shots, Summary
from jxfer.report.statistics import Test

WORDS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "unclear": "no difference found",
    "unknown": "cannot be tested",
}
TESTS: dict[Test, str] = {
    "bootstrap": "paired bootstrap over seeds and test examples",
    "mcnemar": "McNemar's exact test on the test examples of a single seed",
    "t": "paired t-test over seeds, as predictions are missing",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A method and its accuracy at some number of shots."""

    method: str
    summary: Summary


def ranking(results: Results, shots: Shots) -> list[Entry]:
    """Methods with a result at these shots, best mean first."""
    entries = [Entry(m, results.accuracy[m, shots]) for m in results.methods if (m, shots) in results.accuracy]
    return sorted(entries, key=lambda entry: -entry.summary.mean)


def headline(results: Results, comparisons: Comparisons, baselines: tuple[str, ...]) -> str:
    """The finding in one or two sentences."""
    finished = [shots for shots in results.shots if ranking(results, shots)]
    if not finished:
        return f"No run finished: {len(results.rows)} of {len(results.rows)} failed."
    if duels := _duels(results, comparisons, baselines):
        return _against_baseline(results, duels)
    entries = ranking(results, finished[-1])
    best = entries[0]
    where = shots_text(finished[-1])
    claim = f"With {where}, {best.method} reaches {percent_text(best.summary)} % (n = {best.summary.n})"
    if len(entries) == 1:
        return f"{claim}; no other method was run to compare it with."
    second = entries[1]
    verdict = WORDS[comparisons.between(best.method, second.method, finished[-1]).verdict]
    return (
        f"{claim}, the best of {len(entries)}; against {second.method} ({percent_text(second.summary)} %): {verdict}."
    )


def certainty(results: Results, comparisons: Comparisons, baselines: tuple[str, ...]) -> str:
    """How sure the finding is: the differences it rests on, their intervals and p-values, and what these cover."""
    duels = _duels(results, comparisons, baselines) or _leads(results, comparisons)
    tested = [duel for duel in duels.values() if duel.difference]
    if not tested:
        return "How sure: nothing was tested; that takes two methods and predictions, or two seeds."
    listed = "; ".join(f"{duel.one} less {duel.other}, {_where(duel.shots)}: {_estimate(duel)}" for duel in tested)
    family = max(len(comparisons.at(duel.shots)) for duel in tested)
    return f"How sure, in points of accuracy with 95% intervals: {listed}. {methods_text(tested, family)}"


def methods_text(pairs: Iterable[Comparison], family: int) -> str:
    """Which tests were used on how much, and how they were corrected."""
    pairs = list(pairs)
    used = dict.fromkeys(TESTS[pair.difference.test] for pair in pairs if pair.difference)
    seeds = _range([pair.num_seeds for pair in pairs])
    examples = [pair.num_examples for pair in pairs if pair.num_examples is not None]
    size = f"{seeds} seed{'' if seeds == '1' else 's'}" + (f", {_range(examples)} test examples" if examples else "")
    corrected = f"; p is corrected (Holm) for the {family} comparisons at each number of shots" if family > 1 else ""
    text = "; ".join(used)
    return f"{text[0].upper()}{text[1:]} ({size}){corrected}. A difference is claimed where p is below 0.05."


def best_table(results: Results, comparisons: Comparisons, baselines: tuple[str, ...]) -> Table:
    """For each number of shots: the best method, the runner-up, and whether they differ."""
    rows = [
        _best_row(entries, comparisons, shots, baselines)
        for shots in results.shots
        if (entries := ranking(results, shots))
    ]
    header = ("Per class", "Best", "Accuracy\u00a0%", "n", "Runner-up", "Against runner-up")
    return Table(
        (*header, "Against scratch") if baselines else header,
        tuple(row if baselines else row[:-1] for row in rows),
        note="Differences in points of accuracy with their 95% intervals, each interval on its own; the words are the "
        "corrected test's, so an interval may leave out 0 where no difference is claimed. The best of several is "
        "chosen on the same test examples that measure it, so its mean flatters it a little.",
    )


def shots_text(shots: Shots) -> str:
    """`1 labelled example per class`, `all labelled examples`."""
    if shots is None:
        return "all labelled examples"
    return f"{shots} labelled example{'' if shots == 1 else 's'} per class"


def shots_name(shots: Shots) -> str:
    """The number, or `all`."""
    return "all" if shots is None else str(shots)


def _best_row(
    entries: list[Entry], comparisons: Comparisons, shots: Shots, baselines: tuple[str, ...]
) -> tuple[Cell, ...]:
    best = entries[0]
    second = entries[1] if len(entries) > 1 else None
    reference = next((entry for entry in entries if entry.method in baselines), None)
    return (
        Cell(shots_name(shots), float("inf") if shots is None else shots),
        Cell(best.method, tone="best"),
        percent(best.summary),
        Cell(str(best.summary.n), best.summary.n),
        Cell(second.method) if second else Cell("–", tone="muted"),
        _verdict_cell(best, second, comparisons, shots),
        _verdict_cell(best, reference, comparisons, shots),
    )


def _verdict_cell(best: Entry, other: Entry | None, comparisons: Comparisons, shots: Shots) -> Cell:
    if other is None:
        return Cell("–", tone="muted")
    if other is best:
        return Cell("is the best", tone="muted")
    pair = comparisons.between(best.method, other.method, shots)
    words = WORDS[pair.verdict]
    if pair.difference is None:
        return Cell(words, tone="muted")
    return Cell(f"{words}: {difference_text(pair.difference)}", tone="good" if pair.verdict == "better" else "muted")


def _duels(results: Results, comparisons: Comparisons, baselines: tuple[str, ...]) -> dict[Shots, Comparison]:
    """For each number of shots that has both: transfer against the best method that does not transfer.

    Transfer is the most accurate method of those that are better, or of all that transfer if none is; any of them may
    stand for transfer, since p-values are corrected over all.
    """
    found = {}
    for shots in results.shots:
        entries = ranking(results, shots)
        reference = next((entry.method for entry in entries if entry.method in baselines), None)
        transfers = [entry.method for entry in entries if entry.method not in baselines]
        if reference and transfers:
            duels = [comparisons.between(method, reference, shots) for method in transfers]
            found[shots] = next((duel for duel in duels if duel.verdict == "better"), duels[0])
    return found


def _leads(results: Results, comparisons: Comparisons) -> dict[Shots, Comparison]:
    """At the most shots that have two methods, the best against the runner-up."""
    for shots in reversed(results.shots):
        entries = ranking(results, shots)
        if len(entries) > 1:
            return {shots: comparisons.between(entries[0].method, entries[1].method, shots)}
    return {}


def _against_baseline(results: Results, duels: Mapping[Shots, Comparison]) -> str:
    by_verdict: dict[Verdict, list[Shots]] = {"better": [], "worse": [], "unclear": [], "unknown": []}
    for shots, duel in duels.items():
        by_verdict[duel.verdict].append(shots)
    phrases: dict[Verdict, str] = {
        "better": "transfer is better than training from scratch",
        "worse": "training from scratch is better than the best transfer",
        "unclear": "no difference between transfer and training from scratch was found",
        "unknown": "nothing can be claimed about transfer against scratch from one seed without predictions",
    }
    parts = [f"with {_several(shots)}, {phrases[verdict]}" for verdict, shots in by_verdict.items() if shots]
    text = "; ".join(parts)
    gain = _largest_gain(results, [duels[shots] for shots in by_verdict["better"]])
    return f"{text[0].upper()}{text[1:]}.{gain}"


def _largest_gain(results: Results, duels: list[Comparison]) -> str:
    gains = {duel.difference.mean: duel for duel in duels if duel.difference}
    if not gains:
        return ""
    duel = gains[max(gains)]
    one, other = results.accuracy[duel.one, duel.shots], results.accuracy[duel.other, duel.shots]
    return (
        f" The largest gain is with {_where(duel.shots)}: {duel.one} {percent_text(one)} % against "
        f"{duel.other} {percent_text(other)} % (n = {one.n} and {other.n})."
    )


def _estimate(pair: Comparison) -> str:
    """`+19.5 (10.1 to 28.9; p = 0.012)`."""
    if pair.difference is None or pair.adjusted_p is None:
        return "not tested"
    low, high = points_text(pair.difference.low), points_text(pair.difference.high)
    return f"{points_text(pair.difference.mean)} ({low} to {high}; {p_text(pair.adjusted_p)})"


def _where(shots: Shots) -> str:
    return "all" if shots is None else f"{shots} per class"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _several(shots: list[Shots]) -> str:
    names = [shots_name(value) for value in shots]
    if names == ["all"]:
        return "all labelled examples"
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} labelled example{'' if names == ['1'] else 's'} per class"
