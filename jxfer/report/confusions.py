"""What the finished models said about the test split: confusion matrices, and examples worth looking at."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jxfer.report.directory import Examples, Material
from jxfer.report.findings import ranking
from jxfer.report.predictions import Predictions
from jxfer.report.results import Shots, run_of

MAX_EXAMPLES = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Confusion:
    """Counts [K K] of (true class, predicted class), summed over the runs whose predictions could be read."""

    method: str
    shots: Shots
    counts: np.ndarray
    num_runs: int
    num_finished: int

    @property
    def rates(self) -> np.ndarray:
        """[K K] float64: each row divided by its sum; rows of classes without examples are zero."""
        totals = self.counts.sum(axis=1, keepdims=True)
        return self.counts / np.maximum(totals, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """A test example with what each method took it for."""

    image: np.ndarray
    label: int
    predicted: Mapping[str, int]

    @property
    def num_wrong(self) -> int:
        """How many methods got it wrong."""
        return sum(value != self.label for value in self.predicted.values())


def confusions(material: Material) -> list[Confusion]:
    """One matrix per method with predictions at the most shots, best method first."""
    for shots in reversed(material.results.shots):
        found = [_confusion(material, entry.method, shots) for entry in ranking(material.results, shots)]
        if kept := [matrix for matrix in found if matrix is not None]:
            return kept
    return []


def shown_examples(material: Material) -> tuple[str, list[Shown]]:
    """Up to twelve examples of one seed at the most shots, errors preferred, and where they come from.

    A third are those most methods get wrong, a third those they disagree about, the rest come as they are stored.
    """
    examples = material.examples
    if examples is None:
        return "", []
    for shots in reversed(material.results.shots):
        for seed in sorted({row["seed"] for row in material.results.rows if row["shots"] == shots}):
            by_method = _predictions_of_seed(material, shots, seed)
            if shown := _join(examples, by_method):
                return f"shots {'all' if shots is None else shots}, seed {seed}", _choose(shown)
    return "", []


def _confusion(material: Material, method: str, shots: Shots) -> Confusion | None:
    rows = material.results.of(method, shots)
    read = [material.predictions.get(run_of(row)) for row in rows]
    found = [predictions for predictions in read if predictions is not None]
    if not found:
        return None
    K = max(max(p.num_classes, int(p.labels.max()) + 1) for p in found)
    counts = np.zeros((K, K), np.int64)
    for predictions in found:
        np.add.at(counts, (predictions.labels, predictions.predicted), 1)
    return Confusion(method, shots, counts, len(found), len(rows))


def _predictions_of_seed(material: Material, shots: Shots, seed: int) -> dict[str, Predictions]:
    methods = [entry.method for entry in ranking(material.results, shots)]
    found = {method: material.predictions.get((method, shots, seed)) for method in methods}
    return {method: predictions for method, predictions in found.items() if predictions is not None}


def _join(examples: Examples, by_method: Mapping[str, Predictions]) -> list[Shown]:
    """The examples that every method predicted, by id."""
    if not by_method:
        return []
    tables = {m: dict(zip(p.ids.tolist(), p.predicted.tolist(), strict=True)) for m, p in by_method.items()}
    first = next(iter(by_method.values()))
    labels = dict(zip(first.ids.tolist(), first.labels.tolist(), strict=True))
    return [
        Shown(image, labels[name], {method: table[name] for method, table in tables.items()})
        for name, image in zip(examples.ids.tolist(), examples.images, strict=True)
        if all(name in table for table in tables.values())
    ]


def _choose(shown: list[Shown]) -> list[Shown]:
    wrong = [index for index, example in enumerate(shown) if example.num_wrong]
    hardest = sorted(wrong, key=lambda index: -shown[index].num_wrong)
    disputed = sorted(wrong, key=lambda index: -len(set(shown[index].predicted.values())))
    third = MAX_EXAMPLES // 3
    picked = dict.fromkeys([*hardest[:third], *disputed[:third], *range(len(shown))])
    return [shown[index] for index in list(picked)[:MAX_EXAMPLES]]
