"""What each finished run said about the test split, reduced to what a report needs of it."""

import dataclasses
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jxfer.report.results import Results, Run, run_name, run_of
from jxfer.report.statistics import confidence_of, fit_temperature, negative_log_likelihood


@dataclasses.dataclass(frozen=True, eq=False)
class Confidence:
    """How sure a run was at some temperature: the probability [N] of what it predicted, and the mean NLL in nats."""

    temperature: float
    of_predicted: np.ndarray
    loss: float


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """One run on the test split: `ids` [N] str, `labels` and `predicted` [N] int, `num_classes` K."""

    ids: np.ndarray
    """The same object for all runs with the same examples in the same order."""
    labels: np.ndarray
    predicted: np.ndarray
    num_classes: int
    confidence: Confidence
    scaled: Confidence | None
    """At the temperature that fits the validation split; None where the run did not keep validation logits."""

    @property
    def correct(self) -> np.ndarray:
        """[N] bool."""
        return self.labels == self.predicted


def read_predictions(directory: Path, results: Results) -> dict[Run, Predictions]:
    """Reads the predictions of all finished runs; a missing or broken file leaves its run out."""
    found: dict[Run, Predictions] = {}
    known: list[np.ndarray] = []
    for row in results.rows:
        path = directory / "runs" / run_name(run_of(row)) / "predictions.npz"
        arrays = read_arrays(path) if row["status"] == "ok" else {}
        if _is_whole(arrays):
            found[run_of(row)] = _predictions(arrays, ids=_shared(arrays["ids"], known))
    return found


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an `.npz`; none if it is missing or broken."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}


def _is_whole(arrays: Mapping[str, np.ndarray]) -> bool:
    if not {"ids", "labels", "logits"} <= arrays.keys() or not len(arrays["ids"]):
        return False
    logits, labels = arrays["logits"], arrays["labels"]
    return logits.ndim == 2 and len(logits) == len(labels) == len(arrays["ids"]) and bool(np.isfinite(logits).all())


def _predictions(arrays: Mapping[str, np.ndarray], ids: np.ndarray) -> Predictions:
    logits, labels = arrays["logits"], arrays["labels"]
    scaled, nothing = None, np.zeros(0)
    validation_logits = arrays.get("validation_logits", nothing)
    validation_labels = arrays.get("validation_labels", nothing)
    is_whole = 0 < len(validation_labels) == len(validation_logits)
    if is_whole and np.isfinite(validation_logits).all():
        scaled = _confidence(logits, labels, fit_temperature(validation_logits, validation_labels))
    return Predictions(ids, labels, logits.argmax(axis=1), logits.shape[1], _confidence(logits, labels, 1.0), scaled)


def _confidence(logits: np.ndarray, labels: np.ndarray, temperature: float) -> Confidence:
    loss = negative_log_likelihood(logits, labels, temperature=temperature)
    return Confidence(temperature, confidence_of(logits, temperature=temperature), loss)


def _shared(ids: np.ndarray, known: list[np.ndarray]) -> np.ndarray:
    """The array of `known` that equals `ids`, or `ids` itself, which is known from then on."""
    for other in known:
        if np.array_equal(ids, other):
            return other
    known.append(ids)
    return ids
