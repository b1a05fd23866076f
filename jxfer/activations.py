"""What a step keeps for its backward pass, predicted from its trace on shapes alone, before anything is compiled."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jxfer.models.stages import stage, unpack
from jxfer.objectives import Objective
from jxfer.state import Fixed, TrainState
from jxfer.step import Apply, FromStage, Rematerialised, forward
from jxfer.typing import INPUTS, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Activations:
    """What one device keeps for the backward pass of its part of a batch, in bytes.

    They are the values that the traced backward pass reads and that are not parameters or the batch. What a layer needs
    only while it runs is not among them, and XLA, which may compute cheap values again, may keep less.
    """

    num_examples: int
    """In one forward and backward pass on one device: its part of a batch, or of a microbatch."""
    kept: int
    """Of all layers from the first that trains on."""
    remat: int
    """Where blocks run again (`train.remat`): what goes into each, and what the largest keeps while it does."""

    def __str__(self) -> str:
        count = f"{self.num_examples:,} example{'s' * (self.num_examples != 1)}"
        return f"{self.kept:,} bytes for {count} on each device, {self.remat:,} with train.remat"


def activations_of(
    objective: Objective, apply: Apply, start: str | None, state: TrainState, fixed: Fixed, batch: Batch
) -> Activations:
    """Returns the activations of one pass over the batch on one device.

    Args:
      objective: gives the losses.
      apply: runs the model on the batch, all of whose activations are kept.
      start: the first stage that trains, None or `head` where no block could run again.
      state: of the phase, arrays or shapes.
      fixed: likewise.
      batch: prepared, with its `mask`.
    """
    num_examples = batch["label"].shape[0]
    whole = _kept(objective, apply, state, fixed, batch)
    if start is None or start == "head":
        return Activations(num_examples, whole, whole)
    inputs = _kept(objective, Rematerialised(apply, start), state, fixed, batch)
    return Activations(num_examples, whole, inputs + _largest_block(apply, start, state, fixed, batch))


def _kept(objective: Objective, apply: Apply, state: TrainState, fixed: Fixed, batch: Batch) -> int:
    def trace(state: TrainState, fixed: Fixed, batch: Batch) -> list[jax.Array]:
        def loss_fn(params: PyTree) -> tuple[jax.Array, PyTree]:
            outputs, variables = forward(apply, fixed, params, state.variables, batch)
            return jnp.sum(objective.losses(outputs, batch) * batch["mask"]), variables

        _, pullback, _ = jax.vjp(loss_fn, state.params, has_aux=True)
        return _new(pullback, (state, fixed, batch))

    return _bytes(jax.eval_shape(trace, state, fixed, batch))


def _largest_block(apply: Apply, start: str, state: TrainState, fixed: Fixed, batch: Batch) -> int:
    """Returns the most that a block from stage `start` up to the head keeps, run alone."""
    sizes = [0]

    def run(model: Any, batch: Batch) -> jax.Array:
        first = apply.start if isinstance(apply, FromStage) else model.stages[0]
        x = unpack(batch) if isinstance(apply, FromStage) else next(batch[name] for name in INPUTS if name in batch)
        begin, trained = model.stages.index(first), model.stages.index(start)
        for index, name in enumerate(model.stages[begin:-1], start=begin):
            part = stage(model, name)
            for block in part if isinstance(part, nnx.List) else (part,):
                x, kept = _through(block, x)
                sizes.append(kept if index >= trained else 0)
        return jnp.zeros(())

    def trace(state: TrainState, fixed: Fixed, batch: Batch) -> jax.Array:
        return forward(run, fixed, state.params, state.variables, batch)[0]

    jax.eval_shape(trace, state, fixed, batch)
    return max(sizes)


def _through(block: Any, x: PyTree) -> tuple[PyTree, int]:
    if not isinstance(block, nnx.Module):
        return block(x), 0
    graphdef, *state = nnx.split(block, nnx.Param, ...)

    def run(state: PyTree, x: PyTree) -> PyTree:
        copy: Any = nnx.merge(graphdef, *state)
        return copy(x)

    outputs, pullback = jax.vjp(run, state, x)
    return outputs, _bytes(_new(pullback, (state, x)))


def _new(tree: PyTree, given: PyTree) -> list[jax.Array]:
    """Returns the leaves of a tree that are not among the given ones, each once."""
    known = {id(leaf) for leaf in jax.tree.leaves(given)}
    return [leaf for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values() if id(leaf) not in known]


def _bytes(leaves: list[Any]) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
