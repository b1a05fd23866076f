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
    split: Split, *, batch_size: int, seed: int, start: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[HostBatch]:
    """Yields batches `start`, `start + 1`, … of an endless stream of shuffled epochs, read ahead in threads.

    The stream is the epochs' permutations one after the other, so batches cross from one epoch into the next and are
    always full. Batch k is a function of the split, `batch_size`, `seed` and k alone. Of stored `Views`, epoch e reads
    view e mod their number.

    Args:
      split: must not be empty.
      batch_size: over all processes.
      seed: of the permutations.
      start: the first batch; nothing before it is read.
      process_index: this process gets the rows of its part of each batch.
      process_count: divides `batch_size`.
    """
    import grain

    if not len(split):
        raise InputError("no examples to train on: the training split is empty")
    stream = _BatchSource(split, _check_rows(batch_size, process_index, process_count), batch_size, seed)
    # A batch in memory is copied faster than threads hand it over; decoding releases the interpreter lock.
    threads = 1 if _in_memory(split) else os.cpu_count() or 1
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


def eval_batches(
    split: Split, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[HostBatch]:
    """Yields each example once, in order; the last batch is filled up with copies whose `mask` is 0."""
    rows = _check_rows(batch_size, process_index, process_count)
    for start in range(0, len(split), batch_size):
        indices = np.arange(start, start + batch_size)[rows]
        batch = split.read(np.minimum(indices, len(split) - 1))
        yield {**batch, "mask": (indices < len(split)).astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class _BatchSource:
    """The stream as a random-access source whose elements are whole batches."""

    split: Split
    rows: slice
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, batch: int) -> HostBatch:
        size = len(self.split)
        indices = batch_indices(num_examples=size, batch_size=self.batch_size, seed=self.seed, batch=batch)[self.rows]
        if isinstance(self.split, Views):
            epochs = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)[self.rows] // size
            indices = indices + epochs % self.split.views * size
        return {**self.split.read(indices), "mask": np.ones(len(indices), np.float32)}


@functools.lru_cache(maxsize=8)
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def _check_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """Returns the rows of a global batch that belong to this process."""
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch size {batch_size} is no positive multiple of the number of processes, {process_count}")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _in_memory(split: Split) -> bool:
    return _in_memory(split.base) if isinstance(split, (Subset, Views)) else isinstance(split, ArraySplit)
