"""Activations at the frozen boundary: what the frozen prefix of stages makes of each example, computed once."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jxfer.data import ArraySplit, Split, eval_batches
from jxfer.models.stages import pack, run_stages
from jxfer.sharding import num_batch_shards, pad_batch, put_batch
from jxfer.step import Fixed, Prepare, TrainState, merge_state
from jxfer.typing import INPUTS, Batch

FeatureStep = jax.stages.Wrapped
"""Jitted `(state, fixed, batch) -> activations`, under the keys by which a batch holds them."""


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What the stored features of a phase took; all zeros where the phase trains online."""

    boundary: str | None = None
    """The first stage that trains on them; None where there are none."""
    views: int = 0
    """Augmented views of each training example; 1 without augmentation."""
    examples: int = 0
    """Rows that the phase reads: every view of its training examples, and its validation examples."""
    computed: int = 0
    """Of these, how many this phase had to compute."""
    bytes: int = 0
    """Of the rows it reads."""
    flops: float = 0.0
    """Of computing all rows of its training examples, whoever did; validation is not counted, for any method."""

    def to_json(self) -> dict[str, Any]:
        """Returns what the results record."""
        reused = self.examples - self.computed
        return {"stored": self.boundary is not None, **dataclasses.asdict(self), "reused": reused}


def total(extractions: Iterable[Extraction]) -> Extraction:
    """Sums over the phases of a run; the boundaries of several that store are separated by commas."""
    stored = [extraction for extraction in extractions if extraction.boundary is not None]
    sums = {name: sum(getattr(each, name) for each in stored) for name in ("examples", "computed", "bytes")}
    flops = float(sum(each.flops for each in stored))
    boundary = ", ".join(dict.fromkeys(str(each.boundary) for each in stored)) or None
    return Extraction(boundary, max((each.views for each in stored), default=0), **sums, flops=flops)


@functools.lru_cache(maxsize=64)
def make_feature_step(prepare: Prepare | None, *, stop: str) -> FeatureStep:
    """Returns the jitted `(state, fixed, batch) -> activations` before stage `stop`, [B ...] under `features`."""

    def feature_step(state: TrainState, fixed: Fixed, batch: Batch) -> dict[str, jax.Array]:
        batch = prepare(jax.random.key(0), batch) if prepare else batch
        definition = fixed.definition
        model = definition.partition.assemble(definition.eval_graphdef, merge_state(state, fixed))
        return pack(run_stages(model, next(batch[name] for name in INPUTS if name in batch), stop=stop))

    return jax.jit(feature_step)


def extract(
    feature_step: FeatureStep,
    state: TrainState,
    fixed: Fixed,
    split: Split,
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> ArraySplit:
    """Returns the split with `features` in place of its inputs, in the order of its examples."""
    rows = []
    for examples in eval_batches(split, batch_size=batch_size):
        batch = pad_batch(examples, multiple=num_batch_shards(mesh))
        features = jax.device_get(feature_step(state, fixed, put_batch(batch, mesh)))
        rows.append({name: values[batch["mask"] > 0] for name, values in features.items()})
    arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return ArraySplit(ids=split.ids, labels=split.labels, arrays=arrays)
