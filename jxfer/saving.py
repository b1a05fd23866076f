"""What storing a phase's features takes and saves, predicted on shapes alone."""

import dataclasses
import math

import jax
from flax import nnx

from jxfer.config import Experiment
from jxfer.cost import Cost, predicted_flops
from jxfer.models.stages import pack, run_stages
from jxfer.partition import arrays_of, eval_graphdef
from jxfer.planned import PlannedPhase
from jxfer.store import LIMIT, limit_bytes
from jxfer.typing import Arrays


def with_saving(
    experiment: Experiment,
    planned: PlannedPhase,
    cost: Cost,
    model: nnx.Module,
    inputs: jax.ShapeDtypeStruct,
    *,
    num_examples: int,
) -> PlannedPhase:
    """Returns a phase that stores features with the bytes and the operations of all examples added to its `why`.

    Args:
      experiment: with the size of its batches.
      planned: the phase.
      cost: of one of its steps on stored features; a solver has no epochs that could be shorter.
      model: abstract.
      inputs: a batch as the model reads it.
      num_examples: 0 where they are not known, and nothing is predicted.
    """
    if not planned.stored or not num_examples:
        return planned
    graphdef = eval_graphdef(model)

    def run(arrays: Arrays, x: jax.Array) -> dict[str, jax.Array]:
        return pack(run_stages(planned.partition.assemble(graphdef, arrays), x, stop=planned.boundary))

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays_of(model))
    rows = jax.eval_shape(run, shapes, inputs).values()
    # A solver sees each example once, as it is.
    views = 1 if planned.phase.solver is not None else experiment.views or 1
    num_rows = num_examples * views
    num_bytes = num_rows * sum(math.prod(row.shape[1:]) * row.dtype.itemsize for row in rows)
    once = predicted_flops(run, shapes, inputs) / len(inputs) * num_rows
    parts = [planned.why, f"{_bytes(num_bytes)} for all {num_examples:,} examples"]
    if planned.phase.solver is not None:
        parts.append(f"computing them takes {once:.2g} FLOPs")
    else:
        epoch = cost.step_flops / experiment.train.batch_size * num_examples
        online = epoch + once / views
        parts.append(f"an epoch of these takes {epoch:.2g} FLOPs instead of {online:.2g}, after {once:.2g} once")
    if num_bytes > limit_bytes():
        parts.append(f"more than {LIMIT}={limit_bytes() / 1e9:g} allows")
    return dataclasses.replace(planned, why="; ".join(parts))


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
