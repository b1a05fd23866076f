"""What one step costs, from the compiled program: FLOPs, temporary memory, optimizer state."""

import dataclasses
import math

import jax

from jxfer.step import Fixed, TrainState, TrainStep
from jxfer.typing import Batch


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one optimizer step of a phase costs, from the compiled program."""

    step_flops: float
    """On all devices together; validation is not counted, for any method."""
    temp_bytes: int
    """On each device."""
    optimizer_bytes: int


def cost_of(
    train_step: TrainStep, state: TrainState, fixed: Fixed, batch: Batch, *, whole_step: TrainStep | None = None
) -> Cost:
    """Costs one step ahead of time, on arrays or on their shapes; jit reuses the program when it is then called.

    Args:
      train_step: the step to cost.
      state: what moves.
      fixed: what does not.
      batch: one global batch.
      whole_step: the same without microbatches, to count FLOPs by: XLA counts the body of a loop once.
    """
    compiled = train_step.lower(state, fixed, batch).compile()
    counted = compiled if whole_step in (None, train_step) else whole_step.lower(state, fixed, batch).compile()
    memory = compiled.memory_analysis()
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state)]
    devices = {d for leaf in jax.tree.leaves(batch) for d in getattr(getattr(leaf, "sharding", None), "device_set", ())}
    return Cost(flops_of(counted) * max(len(devices), 1), int(memory.temp_size_in_bytes) if memory else 0, sum(sizes))


def flops_of(compiled: jax.stages.Compiled) -> float:
    """Returns XLA's own count of floating-point operations of a compiled program."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float((analysis or {}).get("flops", 0.0))
