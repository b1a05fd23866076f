"""What one step costs, from the compiled program: FLOPs, temporary memory, optimizer state."""

import dataclasses
import math
from typing import Any

import jax
import jax.extend.core

from jxfer.state import Fixed, TrainState
from jxfer.step import TrainStep
from jxfer.typing import Batch


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one optimizer step of a phase costs, from the compiled program."""

    step_flops: float
    """On all devices together; validation is not counted, for any method."""
    temp_bytes: int
    """On each device."""
    optimizer_bytes: int


def cost_of(train_step: TrainStep, state: TrainState, fixed: Fixed, batch: Batch) -> Cost:
    """Costs one step ahead of time, on arrays or on their shapes; jit reuses the program when it is then called."""
    compiled, flops = _compile(train_step, state, fixed, batch)
    memory = compiled.memory_analysis()
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state)]
    return Cost(flops, int(memory.temp_size_in_bytes) if memory else 0, sum(sizes))


def flops_of_step(step: jax.stages.Wrapped, state: TrainState, fixed: Fixed, batch: Batch) -> float:
    """Returns the floating-point operations of a jitted step on all devices together, loops counted in full."""
    return _compile(step, state, fixed, batch)[1]


def _compile(
    step: jax.stages.Wrapped, state: TrainState, fixed: Fixed, batch: Batch
) -> tuple[jax.stages.Compiled, float]:
    traced = step.trace(state, fixed, batch)
    compiled = traced.lower().compile()
    devices = {d for leaf in jax.tree.leaves(batch) for d in getattr(getattr(leaf, "sharding", None), "device_set", ())}
    return compiled, flops_of(compiled) * max(len(devices), 1) + _looped_flops(traced.jaxpr.jaxpr)


def flops_of(program: jax.stages.Compiled) -> float:
    """Returns XLA's own count of floating-point operations of a program, which has the body of a loop once."""
    analysis = program.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float((analysis or {}).get("flops", 0.0))


def _looped_flops(jaxpr: Any) -> float:
    """Returns what the loops of a traced program take beyond the one pass of each that XLA counts.

    Microbatches, scanned blocks and the steps of recurrent layers are such loops.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                once = _flops_of_jaxpr(inner) if repeats > 1 else 0.0
                total += (repeats - 1) * once + repeats * _looped_flops(getattr(inner, "jaxpr", inner))
    return total


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr))


def _flops_of_jaxpr(closed: Any) -> float:
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in closed.in_avals]
    return flops_of(jax.jit(jax.extend.core.jaxpr_as_fun(closed)).lower(*shapes).compile())
