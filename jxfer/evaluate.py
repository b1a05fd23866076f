"""One pass over a split: each example counted once, padded rows not at all."""

from typing import Any

import jax
import numpy as np

from jxfer import distributed
from jxfer.data import Split, eval_batches
from jxfer.data.ahead import Ahead
from jxfer.objectives import means
from jxfer.sharding import share_of
from jxfer.state import Fixed
from jxfer.step import EvalStep
from jxfer.typing import Proceed, always

BATCHES_AHEAD = 2


def evaluate(
    eval_step: EvalStep,
    state: Any,
    fixed: Fixed,
    split: Split,
    *,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    proceed: Proceed = always,
) -> tuple[dict[str, Any], np.ndarray]:
    """Returns the mean metrics, in float64, and the outputs [N K] float32 in the order of the split's examples.

    Of a `Population` as `state`, with its own step, these are metrics [V] and outputs [N V K]. All processes get all.
    `proceed` is called with every batch.
    """
    pending: list[Any] = []
    fetched = []
    share = share_of(mesh, batch_size)
    placed = map(share.put, eval_batches(split, batch_size=batch_size, rows=share.rows))
    with Ahead(placed, what=lambda taken: f"the examples from '{split.ids[taken * batch_size]}' on") as batches:
        for batch in batches:
            proceed()
            pending.append(distributed.everywhere(eval_step(state, fixed, batch)))
            # Fetched a little late, so that the device need not wait for the host and holds few batches at a time.
            if len(pending) > BATCHES_AHEAD:
                fetched.append(jax.device_get(pending.pop(0)))
    fetched += jax.device_get(pending)
    outputs = np.concatenate([np.asarray(outputs, np.float32)[:batch_size] for _, outputs in fetched])[: len(split)]
    return _of_main(means([sums for sums, _ in fetched])), outputs


def _of_main(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns process 0's metrics: in their last bits those of others may differ, and what follows must not."""
    if distributed.count() == 1:
        return metrics
    lists = distributed.on_main(lambda: {name: np.asarray(value).tolist() for name, value in metrics.items()})
    return {name: np.asarray(value) if isinstance(value, list) else value for name, value in lists.items()}
