"""Every two methods compared at every number of shots, on the same subsets, seeds and test examples."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jxfer.report.predictions import Predictions
from jxfer.report.results import Results, Row, Run, Shots, accuracy_of, run_of
from jxfer.report.statistics import Difference, holm, mcnemar, paired_bootstrap, paired_t, resample_examples

LEVEL = 0.05
Verdict = Literal["better", "worse", "unclear", "unknown"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Accuracy of `one` less that of `other`, over the seeds for which both trained on the same subset."""

    one: str
    other: str
    shots: Shots
    num_seeds: int
    num_examples: int | None
    """Test examples the test looked at; None where it saw accuracies only."""
    difference: Difference | None
    """None where nothing can be tested: no common seed, or a single one without predictions."""
    adjusted_p: float | None
    """Corrected (Holm) for all comparisons at these shots."""

    @property
    def verdict(self) -> Verdict:
        """Says whether `one` is better than `other`: only if the corrected p-value is below 5%."""
        if self.difference is None or self.adjusted_p is None:
            return "unknown"
        if self.adjusted_p >= LEVEL:
            return "unclear"
        return "better" if self.difference.mean > 0 else "worse"

    def turned(self) -> "Comparison":
        """The same comparison seen from `other`."""
        found = self.difference
        turned = found and dataclasses.replace(found, mean=-found.mean, low=-found.high, high=-found.low)
        return dataclasses.replace(self, one=self.other, other=self.one, difference=turned)


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """The comparisons by shots and methods, each held once."""

    pairs: Mapping[tuple[Shots, str, str], Comparison]

    def between(self, one: str, other: str, shots: Shots) -> Comparison:
        """Returns the comparison of two methods, seen from `one`; an empty one if there is none."""
        if (shots, other, one) in self.pairs:
            return self.pairs[shots, other, one].turned()
        return self.pairs.get((shots, one, other), Comparison(one, other, shots, 0, None, None, None))

    def at(self, shots: Shots) -> tuple[Comparison, ...]:
        """All comparisons at one number of shots that were tested: the family over which p-values are corrected."""
        return tuple(pair for pair in self.pairs.values() if pair.shots == shots and pair.difference is not None)


def compare_methods(results: Results, predictions: Mapping[Run, Predictions]) -> Comparisons:
    """Compares every two methods with results at the same shots.

    Two or more seeds with predictions on the same test examples are compared by the paired bootstrap over both, a
    single one by McNemar's exact test; without predictions, two or more seeds by the paired t-test.
    """
    resampled = _resampled(predictions)
    pairs: dict[tuple[Shots, str, str], Comparison] = {}
    for shots in results.shots:
        methods = [method for method in results.methods if (method, shots) in results.accuracy]
        found = [_compare(results, predictions, resampled, m, n, shots) for m, n in itertools.combinations(methods, 2)]
        pairs |= {(shots, pair.one, pair.other): pair for pair in _corrected(found)}
    return Comparisons(pairs)


def _resampled(predictions: Mapping[Run, Predictions]) -> dict[Run, np.ndarray]:
    """[B] accuracies of each run on resamples of its test examples, shared by all runs with the same examples."""
    groups: dict[int, list[Run]] = {}
    for run, said in predictions.items():
        groups.setdefault(id(said.ids), []).append(run)
    return {
        run: accuracies
        for runs in groups.values()
        for run, accuracies in zip(
            runs, resample_examples(np.stack([predictions[run].correct for run in runs])), strict=True
        )
    }


def _compare(
    results: Results,
    predictions: Mapping[Run, Predictions],
    resampled: Mapping[Run, np.ndarray],
    one: str,
    other: str,
    shots: Shots,
) -> Comparison:
    rows = _shared_rows(results, one, other, shots)
    said = [(predictions.get(run_of(mine)), predictions.get(run_of(theirs))) for mine, theirs in rows]
    difference = _test(rows, [(a, b) for a, b in said if a and b and a.ids is b.ids], resampled)
    num_examples = len(said[0][0].ids) if difference and difference.test != "t" and said[0][0] else None
    return Comparison(one, other, shots, len(rows), num_examples, difference, None)


def _test(
    rows: Sequence[tuple[Row, Row]],
    said: Sequence[tuple[Predictions, Predictions]],
    resampled: Mapping[Run, np.ndarray],
) -> Difference | None:
    if said and len(said) == len(rows) > 1 and len({id(a.ids) for a, _ in said}) == 1:
        observed = np.array([a.correct.mean() - b.correct.mean() for a, b in said])
        replicates = np.stack([resampled[run_of(mine)] - resampled[run_of(theirs)] for mine, theirs in rows])
        return paired_bootstrap(observed, replicates, num_examples=len(said[0][0].ids))
    if len(said) == len(rows) == 1:
        one, other = said[0][0].correct, said[0][1].correct
        return mcnemar(int((one & ~other).sum()), int((other & ~one).sum()), num_examples=len(one))
    if len(rows) > 1:
        return paired_t(np.array([(accuracy_of(mine) or 0.0) - (accuracy_of(theirs) or 0.0) for mine, theirs in rows]))
    return None


def _shared_rows(results: Results, one: str, other: str, shots: Shots) -> list[tuple[Row, Row]]:
    """The rows of both methods, by seed, where both have an accuracy and trained on the same subset."""
    theirs = {row["seed"]: row for row in results.of(other, shots) if accuracy_of(row) is not None}
    return [
        (mine, theirs[mine["seed"]])
        for mine in results.of(one, shots)
        if accuracy_of(mine) is not None
        and mine["seed"] in theirs
        and mine.get("subset_hash") == theirs[mine["seed"]].get("subset_hash")
    ]


def _corrected(pairs: Sequence[Comparison]) -> list[Comparison]:
    """With p-values corrected over all of `pairs` that were tested."""
    tested = [pair for pair in pairs if pair.difference is not None]
    adjusted = holm(np.array([pair.difference.p for pair in tested if pair.difference]))
    by_methods = {(pair.one, pair.other): float(p) for pair, p in zip(tested, adjusted, strict=True)}
    return [dataclasses.replace(pair, adjusted_p=by_methods.get((pair.one, pair.other))) for pair in pairs]
