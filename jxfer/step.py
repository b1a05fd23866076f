"""The only jitted training code: `train_step(state, fixed, batch)` runs every method on every device count.

`state` holds what moves and is donated; `fixed` holds what does not, arrays and code, and is never returned. Gradients,
optimizer state, norms, clipping, averages and checkpoints see `state.params` alone: freezing is a fact of the types.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jxfer.config import MeshConfig
from jxfer.models.stages import run_stages, unpack
from jxfer.objectives import Objective
from jxfer.partition import Partition, arrays_of, eval_graphdef
from jxfer.sharding import param_specs, place, state_shardings
from jxfer.typing import INPUTS, Arrays, Batch, InputError, Metrics, PyTree

Apply = Callable[[Any, Batch], jax.Array]
"""Runs a module on a batch: `(model, batch) -> outputs`."""

Prepare = Callable[[jax.Array, Batch], Batch]
"""Augments and normalises a batch: `(key, batch) -> batch`."""

TrainStep = jax.stages.Wrapped
"""Jitted `(state, fixed, batch) -> (state, metrics)`; `state` is donated."""

EvalStep = jax.stages.Wrapped
"""Jitted `(state, fixed, batch) -> (sums of metrics, outputs)`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """The code of a phase: structures for training and inference, the labels, the optimizer, where the state lives.

    Equal definitions are one object (`_define`), so that jit compares them by identity at every call.
    """

    partition: Partition
    train_graphdef: nnx.GraphDef
    eval_graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    shardings: tuple[jax.sharding.Sharding, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What moves: trainable parameters, moving statistics and random keys, optimizer state, average, step, key."""

    step: PyTree
    params: PyTree
    variables: PyTree
    opt_state: PyTree
    ema: PyTree
    key: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """What does not: frozen parameters and statistics, the pretrained reference of penalties, the definition."""

    params: PyTree
    variables: PyTree
    reference: PyTree
    definition: Definition = dataclasses.field(metadata={"static": True})


def init_state(
    model: nnx.Module,
    partition: Partition,
    tx: optax.GradientTransformation,
    *,
    key: jax.Array | None = None,
    ema: bool = False,
    reference: tuple[str, ...] = (),
) -> tuple[TrainState, Fixed]:
    """Splits a model once, before the loop. What moves is copied, so the caller's model survives the donation.

    Args:
      model: any NNX module; `partition` was made from it or from one of the same structure.
      partition: the labels of the phase.
      tx: any Optax transform over the flat dict of trainable parameters, such as `partition.optimizer(...)`.
      key: for augmentation; `jax.random.key(0)` when None.
      ema: whether to keep an average of the trainable parameters.
      reference: paths whose starting values penalties will need.
    """
    moving, frozen = partition.split(arrays_of(model))
    kinds = {leaf.path: leaf.kind for leaf in partition.leaves}
    params, variables = _by_kind(jax.tree.map(jnp.copy, moving), kinds)
    definition = _define(partition, partition.train_graphdef(model), eval_graphdef(model), tx)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=variables,
        opt_state=jax.tree.map(jnp.copy, tx.init(params)),  # some keep the parameters themselves: both are donated
        ema=jax.tree.map(jnp.copy, params) if ema else {},
        key=jnp.copy(jax.random.key(0) if key is None else key),
    )
    start = {path: jnp.copy(params[path]) for path in reference if path in params}
    return state, Fixed(*_by_kind(frozen, kinds), start, definition)


def place_state(
    state: TrainState, fixed: Fixed, mesh: jax.sharding.Mesh, config: MeshConfig
) -> tuple[TrainState, Fixed]:
    """Puts the state and the frozen part onto a mesh by the placement rules of each; the step keeps them there."""
    params = {**state.params, **fixed.params}  # rules are judged against the whole model, not against one phase's part
    specs = param_specs(params, config.trainable, mesh)
    frozen_specs = param_specs(params, config.frozen, mesh)
    shardings = state_shardings(state, specs, mesh)
    old = fixed.definition
    leaves = tuple(jax.tree.leaves(shardings))
    definition = _define(old.partition, old.train_graphdef, old.eval_graphdef, old.tx, leaves)
    placed = Fixed(
        jax.device_put(fixed.params, state_shardings(fixed.params, frozen_specs, mesh)),
        jax.device_put(fixed.variables, state_shardings(fixed.variables, {}, mesh)),
        jax.device_put(fixed.reference, state_shardings(fixed.reference, specs, mesh)),
        definition,
    )
    return place(state, shardings), placed


def merge_state(state: TrainState, fixed: Fixed) -> Arrays:
    """Returns all variables of the model as one flat dict, the average in place of the parameters where one is kept."""
    moving = {**state.params, **state.ema, **state.variables}
    return fixed.definition.partition.merge(moving, {**fixed.params, **fixed.variables})


def from_input(model: Any, batch: Batch) -> jax.Array:
    """Runs the whole model on the batch's `image`, `text` or `audio`."""
    return model(next(batch[name] for name in INPUTS if name in batch))


@dataclasses.dataclass(frozen=True)
class FromStage:
    """Runs a staged model from stage `start` on `features`, the stored activations before it."""

    start: str

    def __call__(self, model: Any, batch: Batch) -> jax.Array:
        """Returns the model's outputs."""
        return run_stages(model, unpack(batch), start=self.start)


@functools.lru_cache(maxsize=128)
def make_train_step(
    objective: Objective,
    *,
    apply: Apply = from_input,
    prepare: Prepare | None = None,
    penalties: tuple[Callable[[Arrays, Arrays], jax.Array], ...] = (),
    num_microbatches: int = 1,
    ema_decay: float | None = None,
) -> TrainStep:
    """Returns the jitted training step; equal arguments return the same one, with what it has compiled.

    The loss is the mean over the examples whose `mask` is 1, over the whole global batch however it is sharded or cut
    into microbatches. `metrics` are the objective's sums of the batch before the update, and `grad_norm`, the global
    norm of the gradients of what moves before clipping.

    Args:
      objective: loss and metrics of the task.
      apply: runs the model on a batch.
      prepare: augmentation and normalisation, on the device; None takes batches as they are.
      penalties: functions of the trainable parameters and the reference, added to the loss.
      num_microbatches: parts, of equal size, whose gradients are added up before the update.
      ema_decay: of the average of the trainable parameters; the state must have been made with `ema=True`.
    """

    def train_step(state: TrainState, fixed: Fixed, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_average(state, ema_decay)
        key = jax.random.fold_in(state.key, state.step)
        batch = _with_mask(batch)
        batch = prepare(key, batch) if prepare else batch
        grads, variables, metrics = _accumulate(objective, apply, state, fixed, batch, num_microbatches)
        if penalties:
            pull = jax.grad(lambda params: sum(penalty(params, fixed.reference) for penalty in penalties))
            grads = jax.tree.map(jnp.add, grads, pull(state.params))
        updates, opt_state = fixed.definition.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema if ema_decay is None else optax.incremental_update(params, state.ema, 1 - ema_decay)
        moved = TrainState(state.step + 1, params, variables, opt_state, ema, state.key)
        return _keep_placed(moved, fixed.definition), {**metrics, "grad_norm": optax.tree.norm(grads)}

    return jax.jit(train_step, donate_argnums=0)


@functools.lru_cache(maxsize=128)
def make_eval_step(objective: Objective, *, apply: Apply = from_input, prepare: Prepare | None = None) -> EvalStep:
    """Returns the jitted evaluation `(state, fixed, batch) -> (sums, outputs)`, with every layer in inference mode."""

    def eval_step(state: TrainState, fixed: Fixed, batch: Batch) -> tuple[Metrics, jax.Array]:
        batch = _with_mask(batch)
        batch = prepare(jax.random.key(0), batch) if prepare else batch
        model = fixed.definition.partition.assemble(fixed.definition.eval_graphdef, merge_state(state, fixed))
        outputs = apply(model, batch)
        return objective.metrics(outputs, batch), outputs

    return jax.jit(eval_step)


@functools.lru_cache(maxsize=512)
def _define(*code: Any) -> Definition:
    return Definition(*code)


def _by_kind(arrays: Arrays, kinds: Mapping[str, str]) -> tuple[Arrays, Arrays]:
    params = {path: value for path, value in arrays.items() if kinds[path] == "parameter"}
    return params, {path: value for path, value in arrays.items() if path not in params}


def _check_average(state: TrainState, ema_decay: float | None) -> None:
    if state.params and (ema_decay is None) != (not state.ema):
        raise InputError("init_state(ema=True) and make_train_step(ema_decay=...) go together; give both or neither")


def _with_mask(batch: Batch) -> Batch:
    return batch if "mask" in batch else {**batch, "mask": jnp.ones(batch["label"].shape, jnp.float32)}


def _accumulate(
    objective: Objective, apply: Apply, state: TrainState, fixed: Fixed, batch: Batch, num_microbatches: int
) -> tuple[Arrays, Arrays, Metrics]:
    """Returns gradients of the mean loss, the variables after the forward passes, and the metrics summed over parts."""
    total = jnp.maximum(jnp.sum(batch["mask"]), 1.0)

    def loss_fn(params: Arrays, variables: Arrays, part: Batch) -> tuple[jax.Array, tuple[Arrays, Metrics]]:
        outputs, variables = _forward(apply, fixed, params, variables, part)
        # A part's loss is its share of the whole batch's mean, so that the parts' gradients just add up.
        loss = jnp.sum(objective.losses(outputs, part) * part["mask"]) / total
        return loss, (variables, objective.metrics(outputs, part))

    def add_part(carry: tuple[Arrays, Arrays], part: Batch) -> tuple[tuple[Arrays, Arrays], Metrics]:
        sums, variables = carry
        grads, (variables, metrics) = jax.grad(loss_fn, has_aux=True)(state.params, variables, part)
        return (jax.tree.map(jnp.add, sums, grads), variables), metrics

    if num_microbatches == 1:
        grads, (variables, metrics) = jax.grad(loss_fn, has_aux=True)(state.params, state.variables, batch)
        return grads, variables, metrics
    parts = {name: _cut(value, num_microbatches) for name, value in batch.items()}
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (grads, variables), metrics = jax.lax.scan(add_part, (zeros, state.variables), parts)
    return grads, variables, jax.tree.map(lambda values: jnp.sum(values, 0), metrics)


def _forward(apply: Apply, fixed: Fixed, params: Arrays, variables: Arrays, batch: Batch) -> tuple[jax.Array, Arrays]:
    """Runs the model in training mode and returns its outputs and the moving variables as it left them."""
    partition = fixed.definition.partition
    arrays = partition.merge({**params, **variables}, {**fixed.params, **fixed.variables})
    model = partition.assemble(fixed.definition.train_graphdef, arrays)
    outputs = apply(model, batch)
    after = arrays_of(model)
    return outputs, {path: after[path] for path in variables}


def _cut(value: jax.Array, num_parts: int) -> jax.Array:
    # Row r goes to part r mod num_parts: every part takes an equal share of each device's rows, so nothing moves.
    if value.shape[0] % num_parts:
        raise ValueError(f"a batch of {value.shape[0]} does not divide into {num_parts} microbatches")
    return jnp.moveaxis(value.reshape(value.shape[0] // num_parts, num_parts, *value.shape[1:]), 1, 0)


def _keep_placed(state: TrainState, definition: Definition) -> TrainState:
    if not definition.shardings:
        return state
    shardings = jax.tree.unflatten(jax.tree.structure(state), definition.shardings)
    return jax.lax.with_sharding_constraint(state, shardings)
