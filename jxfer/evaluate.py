"""One pass over a split: each example counted once, padded rows not at all."""

import jax
import numpy as np

from jxfer.data import Split, eval_batches
from jxfer.objectives import means
from jxfer.sharding import num_batch_shards, pad_batch, put_batch
from jxfer.step import EvalStep, Fixed, TrainState


def evaluate(
    eval_step: EvalStep,
    state: TrainState,
    fixed: Fixed,
    split: Split,
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> tuple[dict[str, float], np.ndarray]:
    """Returns the mean metrics, in float64, and the outputs [N K] float32 in the order of the split's examples."""
    pending = []
    for rows in eval_batches(split, batch_size=batch_size):
        batch = pad_batch(rows, multiple=num_batch_shards(mesh))
        # Results are fetched only after everything has been dispatched, so that the device never waits for the host.
        pending.append((batch["mask"], eval_step(state, fixed, put_batch(batch, mesh))))
    fetched = [(mask, jax.device_get(result)) for mask, result in pending]
    outputs = np.concatenate([np.asarray(outputs, np.float32)[mask > 0] for mask, (_, outputs) in fetched])
    return means([sums for _, (sums, _) in fetched]), outputs
