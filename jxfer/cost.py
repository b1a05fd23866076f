"""What one step costs, from the compiled program: FLOPs, temporary memory, optimizer state."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core

from jxfer.state import Fixed, Population
from jxfer.step import TrainStep
from jxfer.typing import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one optimizer step of a phase costs, from the compiled program."""

    step_flops: float
    """On all devices together; validation is not counted, for any method."""
    temp_bytes: int
    """On each device."""
    optimizer_bytes: int


def cost_of(train_step: TrainStep, state: PyTree, fixed: Fixed, batch: Batch) -> Cost:
    """Costs one step ahead of time, on arrays or on their shapes; jit reuses the program when it is then called.

    `state` is a `TrainState`, or a `Population` whose variants then cost what they cost together. The same step on the
    same shapes is costed once.
    """
    return _cost(*_shapes(train_step, state, fixed, batch))


def flops_of_step(step: jax.stages.Wrapped, state: PyTree, fixed: Fixed, batch: Batch) -> float:
    """Returns the floating-point operations of a jitted step on all devices together, loops counted in full."""
    return _cost(*_shapes(step, state, fixed, batch)).step_flops


def _shapes(step: jax.stages.Wrapped, state: PyTree, fixed: Fixed, batch: Batch) -> tuple[Any, Any, tuple[Any, ...]]:
    leaves, structure = jax.tree.flatten((state, fixed, batch))
    return step, structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)


@functools.lru_cache(maxsize=512)
def _cost(step: Any, structure: Any, shapes: tuple[Any, ...]) -> Cost:
    leaves = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in shapes]
    state, fixed, batch = jax.tree.unflatten(structure, leaves)
    traced = step.trace(state, fixed, batch)
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    moving = state.state if isinstance(state, Population) else state
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(moving.opt_state)]
    devices = {d for leaf in jax.tree.leaves(batch) for d in getattr(leaf.sharding, "device_set", ())}
    flops = flops_of(compiled) * max(len(devices), 1) + _looped_flops(traced.jaxpr.jaxpr)
    return Cost(flops, int(memory.temp_size_in_bytes) if memory else 0, sum(sizes))


def predicted_flops(function: Callable[..., Any], *shapes: Any) -> float:
    """Returns about how many floating-point operations a function takes, without compiling it."""
    traced = jax.jit(function).trace(*shapes)
    return flops_of(traced.lower()) + _looped_flops(traced.jaxpr.jaxpr)


def flops_of(program: jax.stages.Compiled | jax.stages.Lowered) -> float:
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
