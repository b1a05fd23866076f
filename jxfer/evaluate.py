"""One pass over a split: each example counted once, padded rows not at all."""

from typing import Any

import jax
import numpy as np

from jxfer.data import Split, eval_batches
from jxfer.objectives import means
from jxfer.sharding import num_batch_shards, pad_batch, put_batch
from jxfer.state import Fixed
from jxfer.step import EvalStep

BATCHES_AHEAD = 2


def evaluate(
    eval_step: EvalStep,
    state: Any,
    fixed: Fixed,
    split: Split,
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the mean metrics, in float64, and the outputs [N K] float32 in the order of the split's examples.

    Of a `Population` as `state`, with its own step, these are metrics [V] and outputs [N V K].
    """
    pending: list[tuple[np.ndarray, Any]] = []
    fetched = []
    for rows in eval_batches(split, batch_size=batch_size):
        batch = pad_batch(rows, multiple=num_batch_shards(mesh))
        pending.append((batch["mask"], eval_step(state, fixed, put_batch(batch, mesh))))
        # Fetched a little late, so that the device need not wait for the host and holds few batches at a time.
        if len(pending) > BATCHES_AHEAD:
            fetched.append(jax.device_get(pending.pop(0)))
    fetched += jax.device_get(pending)
    outputs = np.concatenate([np.asarray(outputs, np.float32)[mask > 0] for mask, (_, outputs) in fetched])
    return means([sums for _, (sums, _) in fetched]), outputs
