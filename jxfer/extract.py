"""Running the frozen prefix of a phase's stages over examples, and keeping what comes out in files as it comes."""

import dataclasses
import functools
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from jxfer import distributed
from jxfer.chunks import Layout
from jxfer.cost import flops_of_step
from jxfer.data import Split
from jxfer.data.stall import result
from jxfer.loop import Session
from jxfer.models.stages import pack, run_stages
from jxfer.sharding import Share, share_of
from jxfer.state import Fixed, TrainState, merge_state
from jxfer.step import Prepare
from jxfer.store import Store, is_writer, make_room, writing
from jxfer.typing import INPUTS, Batch, HostBatch, InterruptedRun

FeatureStep = jax.stages.Wrapped
"""Jitted `(state, fixed, batch) -> activations`, under the keys by which a batch holds them."""

CHUNK_BYTES, CHUNK_SECS = 128 * 1024**2, 30.0
"""When rows go to disk: what comes first. A killed run loses no more."""

_BATCHES_AHEAD = 2


@functools.lru_cache(maxsize=64)
def make_feature_step(prepare: Prepare | None, *, stop: str) -> FeatureStep:
    """Returns the jitted `(state, fixed, batch) -> activations` before stage `stop`, [B ...] under `features`."""

    def feature_step(state: TrainState, fixed: Fixed, batch: Batch) -> dict[str, jax.Array]:
        batch = prepare(jax.random.key(0), batch) if prepare else batch
        definition = fixed.definition
        model = definition.partition.assemble(definition.eval_graphdef, merge_state(state, fixed))
        return pack(run_stages(model, next(batch[name] for name in INPUTS if name in batch), stop=stop))

    return jax.jit(feature_step)


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """The frozen stages of a phase, to be run over the mesh on `batch_size` examples at a time.

    The size is always the same, the last batch being filled up, so that a row does not depend on what else is missing.
    """

    feature_step: FeatureStep
    state: TrainState
    fixed: Fixed
    mesh: jax.sharding.Mesh
    batch_size: int

    @functools.cached_property
    def share(self) -> Share:
        """Which rows of a batch this process reads."""
        return share_of(self.mesh, self.batch_size)

    def __call__(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Returns the activations of a batch, of which this process gives its share; all processes get them whole.

        The rows that filled it up are still there.
        """
        return distributed.everywhere(self.feature_step(self.state, self.fixed, self._on_devices(batch)))

    def describe(self, split: Split) -> tuple[Layout, float]:
        """Returns the layout of a row, and the floating-point operations that one takes."""
        batch = self._on_devices(split.read(np.zeros(len(self.share.rows), np.int64)))
        arrays = jax.eval_shape(self.feature_step, self.state, self.fixed, batch)
        flops = flops_of_step(self.feature_step, self.state, self.fixed, batch)
        return Layout.of(arrays), flops / self.share.num_rows

    def _on_devices(self, batch: HostBatch) -> Batch:
        return self.share.put({name: value for name, value in batch.items() if name not in ("label", "mask")})


def compute_rows(
    prefix: Prefix, store: Store, split: Split, indices: Sequence[int], *, session: Session, title: str
) -> None:
    """Computes the rows of some examples of a split and stores them under the examples' ids.

    All processes must call it with the same examples. Of those that share a cache, one writes.

    Raises:
      InputError: they do not fit the limit of what is stored, the disk is full, or an example cannot be read.
      InterruptedRun: once the session should stop; what is done is stored.
    """
    writes = is_writer()
    if writes:
        with writing():
            make_room(len(indices) * store.layout.row_bytes)
    ids, done = split.ids[np.asarray(indices)].tolist(), 0
    kept: list[dict[str, np.ndarray]] = []
    since = time.monotonic()
    parts = map(prefix.share.take, _batches(indices, prefix.batch_size))
    for rows in _fetched(prefix, _read_ahead(split, parts), len(indices)):
        kept.append(rows)
        num_kept = sum(len(next(iter(each.values()))) for each in kept)
        stop = session.should_stop()
        late = num_kept * store.layout.row_bytes >= CHUNK_BYTES or time.monotonic() - since >= CHUNK_SECS
        if late or stop or done + num_kept == len(ids):
            if writes:
                arrays = {name: np.concatenate([r[name] for r in kept]) for name in rows}
                with writing():
                    store.add(ids[done : done + num_kept], arrays)
            kept, done, since = [], done + num_kept, time.monotonic()
        session.progress(title, done + sum(len(next(iter(each.values()))) for each in kept), len(ids))
        if stop and done < len(ids):
            raise InterruptedRun(f"stopped after storing features of {done} of {len(ids)} examples")
    distributed.barrier()
    if not writes:
        store.refresh()


def _batches(indices: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Yields indices, `batch_size` at a time; the last one repeated fills up the last batch."""
    for start in range(0, len(indices), batch_size):
        yield np.asarray(indices)[np.minimum(np.arange(start, start + batch_size), len(indices) - 1)]


def _read_ahead(split: Split, batches: Iterator[np.ndarray]) -> Iterator[HostBatch]:
    """Reads batches in threads, a few ahead, since decoding may take as long as what is done with them."""
    threads = os.cpu_count() or 1
    pending: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        for indices in batches:
            pending.append((indices, pool.submit(split.read, indices)))
            if len(pending) > threads:
                yield _result(split, *pending.popleft())
        while pending:
            yield _result(split, *pending.popleft())


def _result(split: Split, indices: np.ndarray, future: Future[HostBatch]) -> HostBatch:
    return result(future, lambda: f"the examples from '{split.ids[indices[0]]}' on, whose features are computed,")


def _fetched(prefix: Prefix, batches: Iterator[HostBatch], num_rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the activations of the batches, fetched a little late, so that the device need not wait for the host."""
    pending: deque = deque()
    left = num_rows
    for batch in batches:
        size = min(left, prefix.batch_size)
        left -= size
        pending.append((size, prefix(batch)))
        if len(pending) > _BATCHES_AHEAD:
            yield _fetch(*pending.popleft())
    while pending:
        yield _fetch(*pending.popleft())


def _fetch(size: int, activations: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value)[:size] for name, value in jax.device_get(activations).items()}
