"""Activations at the frozen boundary: what the frozen prefix of stages makes of each example, computed once."""

import functools

import jax
import numpy as np

from jxfer.data import ArraySplit, Split, eval_batches
from jxfer.models.stages import run_stages
from jxfer.sharding import num_batch_shards, pad_batch, put_batch
from jxfer.step import Fixed, Prepare, TrainState, merge_state
from jxfer.typing import Batch

FeatureStep = jax.stages.Wrapped
"""Jitted `(state, fixed, batch) -> features`."""


@functools.lru_cache(maxsize=64)
def make_feature_step(prepare: Prepare | None, *, stop: str) -> FeatureStep:
    """Returns the jitted `(state, fixed, batch) -> features`, the activations before stage `stop`, [B ...]."""

    def feature_step(state: TrainState, fixed: Fixed, batch: Batch) -> jax.Array:
        batch = prepare(jax.random.key(0), batch) if prepare else batch
        definition = fixed.definition
        model = definition.partition.assemble(definition.eval_graphdef, merge_state(state, fixed))
        return run_stages(model, batch["image"], stop=stop)

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
    """Returns the split with `features` in place of its images, in the order of its examples."""
    rows = []
    for examples in eval_batches(split, batch_size=batch_size):
        batch = pad_batch(examples, multiple=num_batch_shards(mesh))
        features = jax.device_get(feature_step(state, fixed, put_batch(batch, mesh)))
        rows.append(features[batch["mask"] > 0])
    return ArraySplit(ids=split.ids, labels=split.labels, arrays={"features": np.concatenate(rows)})
