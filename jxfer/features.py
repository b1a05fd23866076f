"""Activations at the frozen boundary: what the frozen prefix of stages makes of each example, computed once."""

import functools

import jax
import numpy as np

from jxfer.data import ArraySplit, Split, eval_batches
from jxfer.models.stages import pack, run_stages
from jxfer.sharding import num_batch_shards, pad_batch, put_batch
from jxfer.step import Fixed, Prepare, TrainState, merge_state
from jxfer.typing import INPUTS, Batch

FeatureStep = jax.stages.Wrapped
"""Jitted `(state, fixed, batch) -> activations`, under the keys by which a batch holds them."""


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
