"""Batches of a split: an endless shuffled stream that can start anywhere, and one padded pass for evaluation."""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator

import numpy as np

from jxfer.data.dataset import ArraySplit, Split, Subset, Views
from jxfer.typing import HostBatch, InputError


def batches(
    split: Split, *, batch_size: int, seed: int, start: int = 0, rows: np.ndarray | None = None
) -> Iterator[HostBatch]:
    """Yields batches `start`, `start + 1`, … of an endless stream of shuffled epochs.

    Grain's threads read ahead what is decoded or comes from a disk, a batch each. A batch of what lies in memory is
    made when it is asked for.

    The stream is the epochs' permutations one after the other, so batches cross from one epoch into the next and are
    always full. Batch k is a function of the split, `batch_size`, `seed` and k alone. Of stored `Views`, epoch e reads
    view e mod their number.

    Args:
      split: must not be empty.
      batch_size: over all processes.
      seed: of the permutations.
      start: the first batch; nothing before it is read.
      rows: the positions in the batch that this process reads, in order, as `jxfer.sharding.share_of` gives them; None
        reads all. A position beyond `batch_size` fills up: it holds row 0 again, with `mask` 0.
    """
    import grain

    if not len(split):
        raise InputError("no examples to train on: the training split is empty")
    stream = _BatchSource(split, _check_rows(batch_size, rows), batch_size, seed)
    # A batch in memory is copied faster than threads hand it over; decoding and reading release the interpreter lock.
    threads = 0 if _in_memory(split) else os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(grain.MapDataset.source(stream)[start:].to_iter_dataset(options))


def batch_indices(*, num_examples: int, batch_size: int, seed: int, batch: int) -> np.ndarray:
    """Returns which examples are in batch number `batch` of the stream, as [batch_size] indices."""
    first, last = batch * batch_size, (batch + 1) * batch_size
    parts = []
    for epoch in range(first // num_examples, (last - 1) // num_examples + 1):
        offset = epoch * num_examples
        parts.append(_permutation(num_examples, seed, epoch)[max(first - offset, 0) : last - offset])
    return np.concatenate(parts)


def eval_batches(split: Split, *, batch_size: int, rows: np.ndarray | None = None) -> Iterator[HostBatch]:
    """Yields each example once, in order; the last batch is filled up with copies whose `mask` is 0.

    For `rows` see `batches`.
    """
    rows = _check_rows(batch_size, rows)
    for start in range(0, len(split), batch_size):
        indices = start + _filled(rows, batch_size)
        batch = split.read(np.minimum(indices, len(split) - 1))
        yield {**batch, "mask": ((rows < batch_size) & (indices < len(split))).astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class _BatchSource:
    """The stream as a random-access source whose elements are whole batches."""

    split: Split
    rows: np.ndarray
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, batch: int) -> HostBatch:
        size, rows = len(self.split), _filled(self.rows, self.batch_size)
        indices = batch_indices(num_examples=size, batch_size=self.batch_size, seed=self.seed, batch=batch)[rows]
        if isinstance(self.split, Views):
            epochs = (batch * self.batch_size + rows) // size
            indices = indices + epochs % self.split.views * size
        return {**self.split.read(indices), "mask": (self.rows < self.batch_size).astype(np.float32)}


@functools.lru_cache(maxsize=8)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def _check_rows(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
    """Returns the rows of a batch that this process reads."""
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is not positive")
    return np.arange(batch_size) if rows is None else rows


def _filled(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Returns which rows are read at these positions: copies of row 0, real values for norms, beyond the batch."""
    return np.where(rows < batch_size, rows, 0)


def _in_memory(split: Split) -> bool:
    return _in_memory(split.base) if isinstance(split, (Subset, Views)) else isinstance(split, ArraySplit)
