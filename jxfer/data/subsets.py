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
      InputError: a class has fewer examples than needed, or none in one of the splits.
    """
    pool: Split = dataset.splits["train"]
    test, validation = dataset.splits.get("test"), dataset.splits.get("validation")
    if test is None:
        keep = 2 if validation is None else 1
        test, pool = _split_off(pool, config.test_fraction, (TEST_SEED, TEST_STREAM), keep=keep)
    if validation is None:
        validation, pool = _split_off(pool, config.validation_fraction, (seed, VALIDATION_STREAM), keep=1)
    _check_every_class(dataset, {"test": test, "validation": validation, "training": pool})
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


def _split_off(pool: Split, fraction: float, seed: tuple[int, int], *, keep: int) -> tuple[Subset, Subset]:
    """Takes `fraction` of each class: at least one example if `keep` are left then; both parts keep the order."""
    if not 0 < fraction < 1:
        raise InputError(f"data.test_fraction and data.validation_fraction lie between 0 and 1, not {fraction}")
    mask = np.zeros(len(pool), bool)
    for indices in _per_class(pool.labels, int(pool.labels.max(initial=-1)) + 1, seed):
        num = min(max(round(fraction * len(indices)), 1), max(len(indices) - keep, 0))
        mask[indices[:num]] = True
    return Subset(pool, np.flatnonzero(mask)), Subset(pool, np.flatnonzero(~mask))


def _check_every_class(dataset: Dataset, drawn: dict[str, Split]) -> None:
    """Raises InputError where a split, by what it is for, has no example of a class."""
    needed = 1 + sum(name not in dataset.splits for name in ("test", "validation"))
    for purpose, split in drawn.items():
        for label, name in enumerate(dataset.class_names):
            if (split.labels == label).any():
                continue
            if purpose in dataset.splits:
                raise InputError(f"class {name!r} has no example in the {purpose} split of data set '{dataset.name}'")
            count = int((dataset.splits["train"].labels == label).sum())
            raise InputError(
                f"class {name!r} has too few examples ({count}), none is left for {purpose};"
                f" it needs at least {needed}: add some or leave the class out"
            )


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
