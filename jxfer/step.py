"""The only jitted training code: `train_step(state, fixed, batch)` runs every method on every device count.

`state` holds what moves and is donated; `fixed` holds what does not, arrays and code, and is never returned. Gradients,
optimizer state, norms, clipping, averages and checkpoints see `state.params` alone: freezing is a fact of the types.
A population is many variants under the same step: what moves has a leading axis, all else is shared.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jxfer.models.stages import run_stages, unpack
from jxfer.objectives import Objective
from jxfer.partition import arrays_of
from jxfer.rounding import expand
from jxfer.state import STACKED, Definition, Fixed, Population, TrainState, merge_state
from jxfer.typing import INPUTS, Arrays, Batch, InputError, Metrics, PyTree

Apply = Callable[[Any, Batch], jax.Array]
"""Runs a module on a batch: `(model, batch) -> outputs`."""

Gather = Callable[[Arrays], Arrays]
"""Puts together what is split of the parameters, for a forward pass."""

Prepare = Callable[[jax.Array, Batch], Batch]
"""Augments and normalises a batch: `(key, batch) -> batch`."""

TrainStep = jax.stages.Wrapped
"""Jitted `(state, fixed, batch) -> (state, metrics)`; `state` is donated."""

EvalStep = jax.stages.Wrapped
"""Jitted `(state, fixed, batch) -> (sums of metrics, outputs)`."""


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


@dataclasses.dataclass(frozen=True)
class Rematerialised:
    """Runs a staged model as `apply` does, but keeps only what goes into each block for the backward pass.

    The blocks are those of the stages from `start` on: before the first stage with anything trainable there is no
    backward pass and nothing to save.
    """

    apply: Apply
    start: str

    def __call__(self, model: Any, batch: Batch) -> jax.Array:
        """Returns the model's outputs."""
        model.remat = self.start
        return self.apply(model, batch)


@functools.lru_cache(maxsize=128)
def make_train_step(
    objective: Objective,
    *,
    apply: Apply = from_input,
    prepare: Prepare | None = None,
    penalties: tuple[Callable[[Arrays, Arrays], jax.Array], ...] = (),
    num_microbatches: int = 1,
    ema_decay: float | None = None,
    skip_non_finite: bool = False,
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
      num_microbatches: parts, of equal size, whose gradients are added up before the update. Where several devices
        share the batch, the gradients of each part are summed over them: N parts move N times as many bytes.
      ema_decay: of the average of the trainable parameters; the state must have been made with `ema=True`.
      skip_non_finite: whether a step whose loss or gradient norm is not finite leaves all but the count of steps as it
        was, bit for bit; the state must have been made with `skips=True`. Its sums in `metrics` are 0, and `skipped`
        says how many such steps in a row there were up to this one.
    """

    gradients = functools.partial(_gradients, objective, apply, prepare, penalties, num_microbatches)

    def train_step(state: TrainState, fixed: Fixed, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, variables, metrics = gradients(state, fixed, batch, gather=_gather(state, fixed.definition))
        moved = _update(state, fixed, grads, variables, ema_decay)
        if skip_non_finite:
            moved, metrics = _skip_non_finite(state, moved, metrics)
        return _keep_placed(moved, fixed.definition), metrics

    return jax.jit(train_step, donate_argnums=0)


@functools.lru_cache(maxsize=128)
def make_population_step(
    objective: Objective,
    *,
    apply: Apply = from_input,
    prepare: Prepare | None = None,
    penalties: tuple[Callable[[Arrays, Arrays], jax.Array], ...] = (),
    num_microbatches: int = 1,
    ema_decay: float | None = None,
) -> TrainStep:
    """Returns the jitted step of a population: `(population, fixed, batch) -> (population, metrics)`, metrics [V].

    Each variant takes the step that `make_train_step` makes of the same arguments. The frozen part, the batch and what
    the frozen stages make of it are computed once for all. A variant whose loss or gradient norm is not finite keeps
    what it had before and never moves again; its metrics are NaN from then on.
    """
    gradients = functools.partial(_gradients, objective, apply, prepare, penalties, num_microbatches)

    def advance(
        state: TrainState, alive: jax.Array, fixed: Fixed, batch: Batch
    ) -> tuple[TrainState, jax.Array, Metrics]:
        grads, variables, metrics = gradients(state, fixed, batch)
        alive = alive & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        grads = _choose(alive, grads, jax.tree.map(jnp.zeros_like, grads))  # only finite numbers reach the optimizer
        moved = _update(state, fixed, grads, variables, ema_decay)
        names = ("params", "variables", "ema")
        kept = {name: _choose(alive, getattr(moved, name), getattr(state, name)) for name in names}
        metrics = {name: jnp.where(alive | (name == "count"), value, jnp.nan) for name, value in metrics.items()}
        return dataclasses.replace(moved, **kept), alive, metrics

    def population_step(population: Population, fixed: Fixed, batch: Batch) -> tuple[Population, Metrics]:
        state_axes, fixed_axes = _population_axes(fixed)
        every = jax.vmap(advance, in_axes=(state_axes, 0, fixed_axes, None), out_axes=(state_axes, 0, 0))
        state, alive, metrics = every(population.state, population.alive, fixed, batch)
        return _keep_placed(Population(state, alive), fixed.definition), metrics

    return jax.jit(population_step, donate_argnums=0)


@functools.lru_cache(maxsize=128)
def make_eval_step(objective: Objective, *, apply: Apply = from_input, prepare: Prepare | None = None) -> EvalStep:
    """Returns the jitted evaluation `(state, fixed, batch) -> (sums, outputs)`, with every layer in inference mode."""

    return jax.jit(_evaluation(objective, apply, prepare))


@functools.lru_cache(maxsize=128)
def make_population_eval_step(
    objective: Objective, *, apply: Apply = from_input, prepare: Prepare | None = None
) -> EvalStep:
    """Returns the jitted evaluation of a population: `(population, fixed, batch) -> (sums [V], outputs [B V K])`."""
    one = _evaluation(objective, apply, prepare)

    def eval_step(population: Population, fixed: Fixed, batch: Batch) -> tuple[Metrics, jax.Array]:
        in_axes = (*_population_axes(fixed), None)
        return jax.vmap(one, in_axes=in_axes, out_axes=(0, 1))(population.state, fixed, batch)

    return jax.jit(eval_step)


def _gradients(
    objective: Objective,
    apply: Apply,
    prepare: Prepare | None,
    penalties: tuple[Callable[[Arrays, Arrays], jax.Array], ...],
    num_microbatches: int,
    state: TrainState,
    fixed: Fixed,
    batch: Batch,
    gather: Gather = dict,
) -> tuple[Arrays, Arrays, Metrics]:
    """Returns the gradients of a batch, the variables after its forward pass, and its metrics with `grad_norm`."""
    objective, penalties = _with_numbers(objective, penalties, fixed.numbers)
    key = jax.random.fold_in(state.key, state.step)
    batch = _with_mask(batch)
    batch = prepare(key, batch) if prepare else batch
    grads, variables, metrics = _accumulate(objective, apply, state, fixed, batch, num_microbatches, gather)
    if penalties:
        pull = jax.grad(lambda params: sum(penalty(params, fixed.reference) for penalty in penalties))
        grads = jax.tree.map(jnp.add, grads, pull(state.params))
    return grads, variables, {**metrics, "grad_norm": optax.tree.norm(grads)}


def _update(state: TrainState, fixed: Fixed, grads: Arrays, variables: Arrays, ema_decay: float | None) -> TrainState:
    """Takes one optimizer step."""
    _check_average(state, ema_decay)
    updates, opt_state = fixed.definition.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema if ema_decay is None else optax.incremental_update(params, state.ema, 1 - ema_decay)
    return dataclasses.replace(
        state, step=state.step + 1, params=params, variables=variables, opt_state=opt_state, ema=ema
    )


def _skip_non_finite(state: TrainState, moved: TrainState, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """Returns what moved where loss and gradients are finite, and otherwise what was there before the step.

    The norm tells of gradients that are not finite while the loss is. The schedule's count is part of what stays.
    """
    if not state.skipped:
        raise InputError("make_train_step(skip_non_finite=True) needs a state of init_state(skips=True)")
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = {name: _choose(finite, getattr(moved, name), getattr(state, name)) for name in STACKED}
    in_a_row = jnp.where(finite, 0, state.skipped["in_a_row"] + 1)
    skipped = {"in_a_row": in_a_row, "total": state.skipped["total"] + jnp.where(finite, 0, 1)}
    metrics = {name: jnp.where(finite, value, jnp.zeros_like(value)) for name, value in metrics.items()}
    return dataclasses.replace(moved, **kept, skipped=skipped), {**metrics, "skipped": in_a_row}


def _with_numbers(objective: Any, penalties: tuple[Any, ...], numbers: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """Returns the objective and the penalties with the numbers of one variant in place of their own."""
    if "label_smoothing" in numbers:
        objective = dataclasses.replace(objective, label_smoothing=numbers["label_smoothing"])
    if "penalty_weight" in numbers:
        penalties = tuple(dataclasses.replace(penalty, weight=numbers["penalty_weight"]) for penalty in penalties)
    return objective, penalties


def _evaluation(
    objective: Objective, apply: Apply, prepare: Prepare | None
) -> Callable[[TrainState, Fixed, Batch], tuple[Metrics, jax.Array]]:
    def evaluation(state: TrainState, fixed: Fixed, batch: Batch) -> tuple[Metrics, jax.Array]:
        batch = _with_mask(batch)
        batch = prepare(jax.random.key(0), batch) if prepare else batch
        model = fixed.definition.partition.assemble(fixed.definition.eval_graphdef, merge_state(state, fixed))
        outputs = apply(model, batch)
        return objective.metrics(outputs, batch), outputs

    return evaluation


def _population_axes(fixed: Fixed) -> tuple[TrainState, Fixed]:
    """Returns which parts of state and fixed part have a leading axis of variants, as `jax.vmap` takes it."""
    state = TrainState(step=None, params=0, variables=0, opt_state=0, ema=0, key=None)
    return state, dataclasses.replace(fixed, params=None, variables=None, reference=0, numbers=0)


def _choose(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def _check_average(state: TrainState, ema_decay: float | None) -> None:
    if state.params and (ema_decay is None) != (not state.ema):
        raise InputError("init_state(ema=True) and make_train_step(ema_decay=...) go together; give both or neither")


def _with_mask(batch: Batch) -> Batch:
    return batch if "mask" in batch else {**batch, "mask": jnp.ones(batch["label"].shape, jnp.float32)}


def _accumulate(
    objective: Objective,
    apply: Apply,
    state: TrainState,
    fixed: Fixed,
    batch: Batch,
    num_microbatches: int,
    gather: Gather,
) -> tuple[Arrays, Arrays, Metrics]:
    """Returns gradients of the mean loss, the variables after the forward passes, and the metrics summed over parts."""
    total = jnp.maximum(jnp.sum(batch["mask"]), 1.0)

    def loss_fn(params: Arrays, variables: Arrays, part: Batch) -> tuple[jax.Array, tuple[Arrays, Metrics]]:
        outputs, variables = forward(apply, fixed, gather(params), variables, part)
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


def forward(apply: Apply, fixed: Fixed, params: Arrays, variables: Arrays, batch: Batch) -> tuple[jax.Array, Arrays]:
    """Runs the model in training mode and returns its outputs and the moving variables as it left them."""
    partition = fixed.definition.partition
    arrays = partition.merge({**params, **variables}, {**expand(fixed.params), **fixed.variables})
    model = partition.assemble(fixed.definition.train_graphdef, arrays)
    outputs = apply(model, batch)
    after = arrays_of(model)
    return outputs, {path: after[path] for path in variables}


def _cut(value: jax.Array, num_parts: int) -> jax.Array:
    # Row r goes to part r mod num_parts: every part takes an equal share of each device's rows, so nothing moves.
    if value.shape[0] % num_parts:
        raise ValueError(f"a batch of {value.shape[0]} does not divide into {num_parts} microbatches")
    return jnp.moveaxis(value.reshape(value.shape[0] // num_parts, num_parts, *value.shape[1:]), 1, 0)


def _gather(state: TrainState, definition: Definition) -> Gather:
    """Returns what puts the parameters together that `fsdp` splits; what `model` splits stays so.

    Left alone, XLA may split a transformer's activations in the backward pass as the parameters are, and then moves
    the activations of the whole batch instead of the parameters. Every microbatch asks for it, and XLA
    (jax 0.10.2, CPU) moves it out of their loop: a step gathers once, and holds the whole parameters all the while.
    """
    if not definition.shardings:
        return dict
    placed = jax.tree.unflatten(jax.tree.structure(state), definition.shardings).params
    split = {path: sharding for path, sharding in placed.items() if "fsdp" in sharding.spec}

    def gather(params: Arrays) -> Arrays:
        whole = {path: _without_fsdp(sharding) for path, sharding in split.items()}
        return {**params, **jax.lax.with_sharding_constraint({path: params[path] for path in whole}, whole)}

    return gather


def _without_fsdp(sharding: NamedSharding) -> NamedSharding:
    axes = [None if axis == "fsdp" else axis for axis in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def _keep_placed(state: PyTree, definition: Definition) -> PyTree:
    if not definition.shardings:
        return state
    shardings = jax.tree.unflatten(jax.tree.structure(state), definition.shardings)
    return jax.lax.with_sharding_constraint(state, shardings)
