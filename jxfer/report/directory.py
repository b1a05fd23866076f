"""Reads what an ablation left in its directory; a report needs only results, and what else is missing stays empty."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jxfer.report.comparisons import Comparisons, compare_methods
from jxfer.report.predictions import Predictions, read_arrays, read_predictions
from jxfer.report.results import METRIC, Results, Row, Run, collect, read_results
from jxfer.typing import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Pictures of some test examples: `ids` [M] str and `images` [M H W C] uint8."""

    ids: np.ndarray
    images: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """Everything a report is made from."""

    directory: Path
    results: Results
    experiment: dict[str, Any]
    versions: dict[str, Any]
    plans: list[dict[str, Any]]
    classes: tuple[str, ...]
    """Names of the target's classes; empty if unknown."""
    examples: Examples | None
    manifest: dict[str, Any]
    """What came out of a file of published weights; empty where the source was pre-trained here."""
    predictions: Mapping[Run, Predictions]
    comparisons: Comparisons
    source_accuracy: float | None
    """Of the source model on the source's test split, before any transfer."""
    source_validation: Row | None
    """Last look at the validation split in pre-training, from `source/metrics.jsonl`."""

    @property
    def baselines(self) -> tuple[str, ...]:
        """Methods that start from random weights: what transfer must beat."""
        configured = {m["name"]: m.get("start") for m in self.experiment.get("methods", ())}
        return tuple(name for name in self.results.methods if configured.get(name, name) == "scratch")

    def class_name(self, index: int) -> str:
        """The name of a class, or its number where no name is known."""
        return self.classes[index] if index < len(self.classes) else str(index)


def read_directory(directory: Path) -> Material:
    """Reads `directory` as an ablation wrote it.

    Raises:
      InputError: it holds no result, or a file in it is not what its name says.
    """
    rows = read_results(directory / "results.jsonl")
    if not rows:
        raise InputError(f"no finished runs in {directory}")
    experiment = _read_json(directory / "experiment.json", {})
    results = collect(rows, [method["name"] for method in experiment.get("methods", ())])
    predictions = read_predictions(directory, results)
    return Material(
        directory=directory,
        results=results,
        experiment=experiment,
        versions=_read_json(directory / "versions.json", {}),
        plans=_read_json(directory / "plans.json", []),
        classes=tuple(_read_json(directory / "classes.json", {}).get("target", ())),
        examples=_read_examples(directory / "examples.npz"),
        manifest=_read_json(directory / "manifest.json", {}),
        predictions=predictions,
        comparisons=compare_methods(results, predictions),
        source_accuracy=(_read_json(directory / "source" / "result.json", {}).get("metrics") or {}).get(METRIC),
        source_validation=_best_validation(directory / "source" / "metrics.jsonl"),
    )


def _read_examples(path: Path) -> Examples | None:
    arrays = read_arrays(path)
    if not {"ids", "images"} <= arrays.keys() or not len(arrays["ids"]):
        return None
    return Examples(arrays["ids"], arrays["images"])


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); remove it to report without it") from None
    if not isinstance(value, type(default)):
        raise InputError(f"{path} holds a {type(value).__name__}, not a {type(default).__name__}; remove it")
    return value


def _best_validation(path: Path) -> Row | None:
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # torn by a kill; the rows before it stand
            continue
    looks = [row for row in rows if row.get("split") == "validation" and row.get("accuracy") is not None]
    return max(looks, key=lambda row: row["accuracy"]) if looks else None  # the source is the best on validation
