"""From a method and a model to checked phases, costed by compiling their steps before anything trains."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jxfer import models, optim
from jxfer.activations import Activations, activations_of
from jxfer.config import Experiment, Method, TrainConfig
from jxfer.cost import Cost, cost_of
from jxfer.data import Prepare
from jxfer.known import resolve
from jxfer.models.stages import pack
from jxfer.objectives import classification
from jxfer.partition import Partition, arrays_of
from jxfer.planned import PlannedPhase, plan_phases
from jxfer.saving import with_saving
from jxfer.sharding import part_of
from jxfer.source import check_source
from jxfer.state import Fixed, Population, TrainState, hold_frozen, init_population, init_state
from jxfer.statement import Plan
from jxfer.step import (
    Apply,
    EvalStep,
    FromStage,
    Rematerialised,
    TrainStep,
    from_input,
    make_eval_step,
    make_population_eval_step,
    make_population_step,
    make_train_step,
)
from jxfer.task import Task, base_model, num_train, target_model, task_of
from jxfer.typing import Arrays, Batch
from jxfer.variants import PlannedPopulation, Variant, device_memory, parts_of, variants

_DTYPES = {"image": jnp.uint8, "text": jnp.int32, "audio": jnp.int16}
"""Of what a data set holds."""


Makers: TypeAlias = tuple[Callable[..., TrainStep], Callable[..., EvalStep]]
"""What makes the training and the evaluation step of a phase."""

POPULATION: Makers = (make_population_step, make_population_eval_step)


def phase_steps(
    experiment: Experiment,
    method: Method,
    planned: PlannedPhase,
    num_classes: int,
    makers: Makers = (make_train_step, make_eval_step),
) -> tuple[TrainStep, EvalStep]:
    """Returns the training and evaluation steps of a phase; equal phases get the very same ones.

    `makers` are those of a population where variants train as one.
    """
    train = experiment.train
    objective = classification(train.label_smoothing)
    apply = _apply(planned)
    train_prepare, eval_prepare = (
        (None, None) if planned.stored else (prepare_images(experiment, num_classes, train=t) for t in (True, False))
    )
    make_train, make_eval = makers
    # Variants of a population are put aside instead, and never planned together where they would be skipped.
    skips = {"skip_non_finite": True} if train.non_finite == "skip" and makers != POPULATION else {}
    first = planned.first_trained if train.remat else None
    train_step = make_train(
        objective,
        apply=apply if first in (None, "head") else Rematerialised(apply, first),
        prepare=train_prepare,
        penalties=method.penalties,
        num_microbatches=train.num_microbatches,
        ema_decay=train.ema_decay,
        **skips,
    )
    return train_step, make_eval(objective, apply=apply, prepare=eval_prepare)


def _apply(planned: PlannedPhase) -> Apply:
    return FromStage(planned.boundary) if planned.stored and planned.boundary else from_input


def prepare_images(experiment: Experiment, num_classes: int, *, train: bool) -> Prepare:
    """Returns the target's normalisation, with its augmentation if `train`."""
    return Prepare(config=experiment.target, num_classes=num_classes, train=train)


def start_phase(
    experiment: Experiment, method: Method, planned: PlannedPhase, model: nnx.Module, *, key: jax.Array
) -> tuple[TrainState, Fixed]:
    """Returns state and fixed part at the start of a phase, the reference being what penalties pull towards."""
    train = experiment.train
    skips = train.non_finite == "skip"
    state, fixed = init_state(model, planned.partition, skips=skips, **_start(train, method, planned, key))
    opt_state = optim.set_hyperparams(
        state.opt_state, learning_rate=optim.learning_rate(train), weight_decay=train.weight_decay
    )
    return dataclasses.replace(state, opt_state=opt_state), hold_frozen(fixed, train.frozen_dtype)


def start_population(
    variants: Sequence[Variant],
    planned: PlannedPhase,
    models: Sequence[nnx.Module],
    *,
    key: jax.Array,
    multiple: int = 1,
) -> tuple[Population, Fixed]:
    """Returns population and fixed part at the start of a phase: each variant's model under its own numbers.

    Copies of the last variant fill the population up to a multiple of `multiple`.
    """
    first = variants[0]
    start = _start(first.train, first.method, planned, key)
    population, fixed = init_population(models, planned.partition, **start, multiple=multiple)
    filled = [*variants, *[variants[-1]] * (-len(variants) % multiple)]
    opt_state = optim.set_hyperparams(
        population.state.opt_state,
        learning_rate=np.asarray([optim.learning_rate(variant.train) for variant in filled]),
        weight_decay=np.asarray([variant.train.weight_decay for variant in filled]),
    )
    state = dataclasses.replace(population.state, opt_state=opt_state)
    fixed = hold_frozen(fixed, first.train.frozen_dtype)
    return dataclasses.replace(population, state=state), dataclasses.replace(fixed, numbers=_numbers(filled))


def _start(train: TrainConfig, method: Method, planned: PlannedPhase, key: jax.Array) -> dict[str, Any]:
    # A new head has no pretrained value to be pulled towards (Li et al. 2018, section 3).
    pretrained = tuple(leaf.path for leaf in planned.partition.trainable if not leaf.path.startswith("head/"))
    return {
        "tx": optim.optimizer(train, planned.partition, num_steps=planned.num_steps),
        "key": key,
        "ema": train.ema_decay is not None,
        "reference": pretrained if method.penalties else (),
    }


def _numbers(variants: Sequence[Variant]) -> dict[str, jax.Array]:
    """Returns the numbers, [V] float32 each, in which the steps of the variants differ beyond rate and decay."""
    smoothing = [variant.train.label_smoothing for variant in variants]
    weights = [[getattr(penalty, "weight", None) for penalty in variant.method.penalties] for variant in variants]
    numbers = {"label_smoothing": jnp.float32(smoothing)} if len(set(smoothing)) > 1 else {}
    if any(weight != weights[0] for weight in weights):
        numbers["penalty_weight"] = jnp.float32([weight[0] for weight in weights])
    return numbers


def cost_of_phase(
    experiment: Experiment,
    method: Method,
    planned: PlannedPhase,
    num_classes: int,
    state: TrainState,
    fixed: Fixed,
    batch: Batch,
) -> Cost:
    """Costs one step of a phase of an experiment; see `cost_of`."""
    train_step, _ = phase_steps(experiment, method, planned, num_classes)
    return cost_of(train_step, state, fixed, batch)


def plan_experiment(experiment: Experiment, method: Method) -> Plan:
    """Plans and costs one method of an experiment; never trains."""
    experiment = resolve(experiment)
    task = task_of(experiment)
    if method.start == "source":
        check_source(experiment, num_classes=len(task.target_classes), input_shape=task.input_shape)
    return plan_method(experiment, method, task)


def plan_method(experiment: Experiment, method: Method, task: Task) -> Plan:
    """Plans and costs a method on shapes alone: no weight is made, nothing trains."""
    if any(phase.solver is not None for phase in method.phases):
        task = dataclasses.replace(task, num_train=num_train(experiment))
    model = nnx.eval_shape(
        lambda: target_model(base_model(experiment.model, method, task, seed=0), method, task, source=None, seed=0)
    )
    searched = variants(experiment, method)
    planned, prepared = plan_phases(experiment, method, model), _prepared(experiment, task)
    phases = tuple(
        (with_saving(experiment, each, cost, model, prepared, num_examples=task.num_examples), cost)
        for each in planned
        for cost in [abstract_cost(experiment, method, each, model, task)]
    )
    populations = tuple(plan_population(experiment, searched, each, model, task) for each in planned)
    activations = tuple(_activations(experiment, method, each, model, task) for each in planned)
    return Plan(method.name, experiment.train, phases, populations, activations)


def _activations(
    experiment: Experiment, method: Method, planned: PlannedPhase, model: nnx.Module, task: Task
) -> Activations | None:
    """Predicts what one device keeps, of as many as there are here, of one microbatch of one variant."""
    if planned.phase.solver is not None:
        return None
    train = experiment.train
    num_shards = max(1, jax.device_count() // experiment.mesh.model)  # the other axes of the mesh divide the batch
    num_rows = math.ceil(train.batch_size / (num_shards * train.num_microbatches))
    part = dataclasses.replace(experiment, train=dataclasses.replace(train, batch_size=num_rows))
    model, partition = part_of(model, planned.partition, experiment.mesh)
    planned = dataclasses.replace(planned, partition=partition)
    batch = abstract_batch(part, planned, model, task)
    if not planned.stored:
        prepare = prepare_images(experiment, len(task.target_classes), train=True)
        batch = jax.eval_shape(prepare, jax.random.key(0), batch)
    state, fixed = _abstract_state(experiment, method, planned, model)
    objective = classification(train.label_smoothing)
    return activations_of(objective, _apply(planned), planned.first_trained, state, fixed, batch)


def plan_population(
    experiment: Experiment, searched: Sequence[Variant], planned: PlannedPhase, model: nnx.Module, task: Task
) -> PlannedPopulation:
    """Plans which variants train a phase together, from what two of them take in memory beyond what one takes."""
    count, most = len(searched), experiment.search.population
    why = "one variant" if count == 1 else planned.apart or _why_apart(experiment)
    if why is not None:
        return PlannedPopulation((1,) * count, why)
    arrays = tuple((path, jax.ShapeDtypeStruct(x.shape, x.dtype)) for path, x in arrays_of(model).items())
    one, bytes_each = _costs_of_variant(experiment, searched[:2], planned, nnx.graphdef(model), arrays, task)
    memory = device_memory()
    parts = parts_of(count, bytes_each=bytes_each, memory=memory, most=most)
    why = "one batch and one frozen part serve all" if len(parts) == 1 else _why_split(parts, bytes_each, memory, most)
    return PlannedPopulation(parts, why, bytes_each, one)


@functools.lru_cache(maxsize=128)  # the runs of an ablation ask for the same ones
def _costs_of_variant(
    experiment: Experiment,
    two_variants: tuple[Variant, Variant],
    planned: PlannedPhase,
    graphdef: nnx.GraphDef,
    arrays: tuple[tuple[str, jax.ShapeDtypeStruct], ...],
    task: Task,
) -> tuple[Cost, int]:
    """Returns what a step of one variant costs, and what a second one adds in memory."""
    model, method = planned.partition.assemble(graphdef, dict(arrays)), two_variants[0].method
    one = abstract_cost(experiment, method, planned, model, task)
    batch = abstract_batch(experiment, planned, model, task)
    population, fixed = abstract_population(two_variants, planned, model)
    train_step, _ = phase_steps(experiment, method, planned, len(task.target_classes), POPULATION)
    two = cost_of(train_step, population, fixed, batch)
    # Beside the state there are its gradients and the best values so far.
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((population.state, population.state.params)))
    return one, held // 2 + max(two.temp_bytes - one.temp_bytes, 0)


def _why_apart(experiment: Experiment) -> str | None:
    if experiment.search.population == 1:
        return "search.population is 1"
    policy = experiment.train.non_finite
    return None if policy == "stop" else f"train.non_finite={policy} treats the steps of each by themselves"


def _why_split(parts: Sequence[int], bytes_each: int, memory: int | None, most: int | None) -> str:
    limit = (
        f"search.population is {most}" if most is not None and max(parts) == most else f"{memory:,} bytes may be used"
    )
    return f"{len(parts)} populations, one after the other: a variant takes {bytes_each:,} bytes and {limit}"


def abstract_cost(experiment: Experiment, method: Method, planned: PlannedPhase, model: nnx.Module, task: Task) -> Cost:
    """Costs one step of one variant on shapes alone; of a solver one iteration, or all of it where it has a formula."""
    batch = abstract_batch(experiment, planned, model, task)
    if planned.phase.solver is not None:
        sizes = task.num_train, batch["features"].shape[-1], len(task.target_classes)
        flops, temp_bytes = planned.phase.solver.cost(*sizes)
        return Cost(flops, temp_bytes, optimizer_bytes=0)
    state, fixed = _abstract_state(experiment, method, planned, model)
    return cost_of_phase(experiment, method, planned, len(task.target_classes), state, fixed, batch)


def abstract_population(
    searched: Sequence[Variant], planned: PlannedPhase, model: nnx.Module
) -> tuple[Population, Fixed]:
    """Returns the shapes of a population at the start of a phase and of its fixed part."""
    graphdef = nnx.graphdef(model)

    def build(arrays: Arrays) -> tuple[Population, Fixed]:
        models = [planned.partition.assemble(graphdef, arrays)] * len(searched)
        return start_population(searched, planned, models, key=jax.random.key(0))

    population, fixed = jax.eval_shape(build, arrays_of(model))
    return population, hold_frozen(fixed, searched[0].train.frozen_dtype)


def _abstract_state(
    experiment: Experiment, method: Method, planned: PlannedPhase, model: nnx.Module
) -> tuple[TrainState, Fixed]:
    graphdef = nnx.graphdef(model)

    def build(arrays: Arrays) -> tuple[TrainState, Fixed]:
        real = planned.partition.assemble(graphdef, arrays)
        return start_phase(experiment, method, planned, real, key=jax.random.key(0))

    state, fixed = jax.eval_shape(build, arrays_of(model))
    return state, hold_frozen(fixed, experiment.train.frozen_dtype)


def abstract_batch(experiment: Experiment, planned: PlannedPhase, model: nnx.Module, task: Task) -> Batch:
    """Returns the shapes of a training batch of a phase."""
    size = experiment.train.batch_size
    inputs = jax.ShapeDtypeStruct((size, *task.input_shape), _DTYPES[task.input])
    labels = {
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((size,), jnp.float32),
    }
    if not planned.stored:
        return {task.input: inputs, **labels}
    arrays = tuple((path, jax.ShapeDtypeStruct(x.shape, x.dtype)) for path, x in arrays_of(model).items())
    features = _features(nnx.graphdef(model), planned.partition, arrays, _prepared(experiment, task), planned.boundary)
    return {**features, **labels}


@functools.lru_cache(maxsize=128)  # a run asks for them several times, and the runs of an ablation for the same ones
def _features(
    graphdef: nnx.GraphDef,
    partition: Partition,
    arrays: tuple[tuple[str, jax.ShapeDtypeStruct], ...],
    prepared: jax.ShapeDtypeStruct,
    boundary: str | None,
) -> Batch:
    """Returns the shapes of what is stored of a batch before the boundary."""

    def run(arrays: Arrays, x: jax.Array) -> Batch:
        return pack(models.run_stages(partition.assemble(graphdef, arrays), x, stop=boundary))

    shapes = jax.eval_shape(run, dict(arrays), prepared)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


def _prepared(experiment: Experiment, task: Task) -> jax.ShapeDtypeStruct:
    """Returns the shape of a batch of examples as the model reads them."""
    dtype = jnp.int32 if task.input == "text" else jnp.float32
    return jax.ShapeDtypeStruct((experiment.train.batch_size, *task.input_shape), dtype)
