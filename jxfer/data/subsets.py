"""Which examples a run sees: test, validation and few-shot training subsets, drawn per class and pinned by a hash."""

import dataclasses
import hashlib

import numpy as np

from jxfer.config import DataConfig
from jxfer.data.dataset import Dataset, Split, Subset
from jxfer.typing import InputError

TEST_SEED = 0
# Separates the streams of random numbers, so that no choice depends on how many numbers another one used.
TEST_STREAM, VALIDATION_STREAM, TRAIN_STREAM = range(3)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The three disjoint splits of one run; `subset_hash` names their examples and the data set's version."""

    train: Split
    validation: Split
    test: Split
    subset_hash: str


def draw(dataset: Dataset, config: DataConfig, shots: int | None, seed: int) -> Drawn:
    """Draws the examples of one run.

    The test split does not depend on `seed`; the validation split does not depend on `shots`; the training examples
    of fewer shots are among those of more.

    Args:
      dataset: must have a `train` split.
      config: the fractions used where the data set lacks a test or validation split.
      shots: training examples per class; None takes all.
      seed: of validation and training.

    Raises:
      InputError: a class has fewer examples than needed.
    """
    pool: Split = dataset.splits["train"]
    test, validation = dataset.splits.get("test"), dataset.splits.get("validation")
    if test is None:
        test, pool = _split_off(pool, config.test_fraction, (TEST_SEED, TEST_STREAM))
    if validation is None:
        validation, pool = _split_off(pool, config.validation_fraction, (seed, VALIDATION_STREAM))
    order = _per_class(pool.labels, len(dataset.class_names), (seed, TRAIN_STREAM))
    chosen = [_first(indices, shots, name) for indices, name in zip(order, dataset.class_names, strict=True)]
    train = Subset(pool, np.sort(np.concatenate(chosen)))
    return Drawn(train, validation, test, subset_hash(dataset, train, validation, test))


def subset_hash(dataset: Dataset, *splits: Split) -> str:
    """Returns 16 hex digits of the SHA-256 over the data set's name and version and the ids of `splits` in order."""
    digest = hashlib.sha256(f"{dataset.name}\n{dataset.version}\n".encode())
    for split in splits:
        digest.update("\n".join([str(len(split)), *split.ids, ""]).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _split_off(pool: Split, fraction: float, seed: tuple[int, int]) -> tuple[Subset, Subset]:
    """Takes `fraction` of each class: at least one example of it, and at least one is left; both keep the order."""
    if not 0 < fraction < 1:
        raise InputError(f"data.test_fraction and data.validation_fraction lie between 0 and 1, not {fraction}")
    mask = np.zeros(len(pool), bool)
    for indices in _per_class(pool.labels, int(pool.labels.max()) + 1, seed):
        num = min(max(round(fraction * len(indices)), 1), max(len(indices) - 1, 0))
        mask[indices[:num]] = True
    return Subset(pool, np.flatnonzero(mask)), Subset(pool, np.flatnonzero(~mask))


def _per_class(labels: np.ndarray, num_classes: int, seed: tuple[int, int]) -> list[np.ndarray]:
    """Returns the indices of each class in a random order; a class's order does not depend on the other classes."""
    return [
        np.random.default_rng([*seed, label]).permutation(np.flatnonzero(labels == label))
        for label in range(num_classes)
    ]


def _first(indices: np.ndarray, shots: int | None, class_name: str) -> np.ndarray:
    if shots is not None and not 1 <= shots <= len(indices):
        raise InputError(
            f"{shots} shots asked, but class {class_name!r} has {len(indices)} training examples left"
            " beside test and validation; ask for fewer shots or a smaller data.validation_fraction"
        )
    return indices[:shots]
