"""From a method and a model to checked phases, costed by compiling their steps before anything trains."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jxfer import models, optim, paths
from jxfer.config import DataConfig, Experiment, Method, ModelConfig, TrainConfig
from jxfer.cost import Cost, cost_of
from jxfer.data import Dataset, Prepare, load_dataset
from jxfer.known import known_of, resolve
from jxfer.models.stages import pack
from jxfer.objectives import classification
from jxfer.partition import Partition, arrays_of
from jxfer.planned import PlannedPhase, plan_phases
from jxfer.source import check_source
from jxfer.state import Fixed, TrainState, init_state
from jxfer.step import EvalStep, FromStage, TrainStep, from_input, make_eval_step, make_train_step
from jxfer.typing import Arrays, Batch, Input, InputError
from jxfer.weights.load import load_into

_DTYPES = {"image": jnp.uint8, "text": jnp.int32, "audio": jnp.int16}
"""Of what a data set holds."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a plan and a run need to know of the source and the target."""

    source_classes: tuple[str, ...]
    target_classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """How the target's examples are prepared."""
    input: Input = "image"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The phases of a method and their costs, in order."""

    method: str
    train: TrainConfig
    phases: tuple[tuple[PlannedPhase, Cost], ...]

    def to_json(self) -> dict[str, Any]:
        """Returns what `jxfer plan --json` prints; bytes and floating-point operations per optimizer step."""
        return {"method": self.method, "phases": [self._phase_json(phase, cost) for phase, cost in self.phases]}

    def _phase_json(self, planned: PlannedPhase, cost: Cost) -> dict[str, Any]:
        return {
            "name": planned.phase.name,
            "steps": planned.num_steps,
            "params_total": planned.partition.params_total,
            "params_trainable": planned.partition.params_trainable,
            **dataclasses.asdict(cost),
            "frozen_boundary": planned.boundary,
            "features": planned.why,
            "leaves": [self._leaf_json(planned.partition, leaf) for leaf in planned.partition.leaves],
        }

    def _leaf_json(self, partition: Partition, leaf: Any) -> dict[str, Any]:
        rate, decay = partition.scales(leaf)
        return {
            "path": leaf.path,
            "shape": list(leaf.shape),
            "dtype": leaf.dtype,
            "count": leaf.count,
            "kind": leaf.kind,
            "label": leaf.label,
            "learning_rate_scale": rate,
            "weight_decay": decay * self.train.weight_decay,
        }

    def __str__(self) -> str:
        if not self.phases:
            return f"{self.method}: nothing trains"
        parts = []
        for planned, cost in self.phases:
            parts += [
                f"{self.method} · phase {planned.phase.name} · {planned.num_steps} steps",
                str(planned.partition),
                f"one step: {cost.step_flops:,.0f} FLOPs, {cost.temp_bytes:,} temporary bytes; "
                f"optimizer state: {cost.optimizer_bytes:,} bytes",
                f"features: {planned.why}",
                "",
            ]
        return "\n".join(parts).rstrip()


def base_model(config: ModelConfig, method: Method, task: Task, *, seed: int) -> nnx.Module:
    """Returns the model before transfer, with random weights, for the classes of what the method starts from."""
    # Weights that come without a head leave the target's; then every method that transfers has to bring one.
    classes = (method.start == "source" and task.source_classes) or task.target_classes
    return models.build(config, num_classes=len(classes), input_shape=task.input_shape, rngs=nnx.Rngs(seed))


def target_model(
    model: nnx.Module, method: Method, task: Task, *, source: Mapping[str, Any] | None, seed: int
) -> nnx.Module:
    """Makes of a base model the one that a method trains: the source's weights, then the method's surgeries.

    Args:
      model: from `base_model`; altered in place and returned.
      method: where to start and what to alter.
      task: the classes of source and target.
      source: the source's arrays; None leaves the weights as they are, as a plan may.
      seed: of every random weight that surgeries bring.

    Raises:
      InputError: the weights do not fit the model, or the head does not fit the target's classes.
    """
    transfers = method.start == "source"
    classes = task.source_classes if transfers else task.target_classes
    if transfers and source is not None:
        fresh = [pattern for surgery in method.surgeries for pattern in surgery.fresh]
        load_into(model, _except(fresh, source, arrays_of(model)), what="source weights")
    rngs = nnx.Rngs(jax.random.fold_in(jax.random.key(seed), 1))
    for surgery in method.surgeries:
        surgery(model, source_classes=classes, target_classes=task.target_classes, data=task.data, rngs=rngs)
    head = getattr(model, "head", None)
    output = getattr(head, "out", head)
    fits = not isinstance(output, nnx.Linear) or output.out_features == len(task.target_classes)
    if not fits or (not method.surgeries and classes != task.target_classes):
        raise InputError(
            f"method `{method.name}` keeps the head of the source's {len(classes)} classes, which are not the target's "
            f"{len(task.target_classes)}; add surgeries=(NewHead(),) or (KeepRows(),)"
        )
    return model


def phase_steps(
    experiment: Experiment, method: Method, planned: PlannedPhase, num_classes: int
) -> tuple[TrainStep, EvalStep]:
    """Returns the training and evaluation steps of a phase; equal phases get the very same ones."""
    train = experiment.train
    objective = classification(train.label_smoothing)
    apply = FromStage(planned.boundary) if planned.stored and planned.boundary else from_input
    train_prepare, eval_prepare = (
        (None, None) if planned.stored else (prepare_images(experiment, num_classes, train=t) for t in (True, False))
    )
    train_step = make_train_step(
        objective,
        apply=apply,
        prepare=train_prepare,
        penalties=method.penalties,
        num_microbatches=train.num_microbatches,
        ema_decay=train.ema_decay,
    )
    return train_step, make_eval_step(objective, apply=apply, prepare=eval_prepare)


def prepare_images(experiment: Experiment, num_classes: int, *, train: bool) -> Prepare:
    """Returns the target's normalisation, with its augmentation if `train`."""
    return Prepare(config=experiment.target, num_classes=num_classes, train=train)


def start_phase(
    experiment: Experiment, method: Method, planned: PlannedPhase, model: nnx.Module, *, key: jax.Array
) -> tuple[TrainState, Fixed]:
    """Returns state and fixed part at the start of a phase, the reference being what penalties pull towards."""
    train = experiment.train
    tx = optim.optimizer(train, planned.partition, num_steps=planned.num_steps)
    # A new head has no pretrained value to be pulled towards (Li et al. 2018, section 3).
    pretrained = tuple(leaf.path for leaf in planned.partition.trainable if not leaf.path.startswith("head/"))
    state, fixed = init_state(
        model,
        planned.partition,
        tx,
        key=key,
        ema=train.ema_decay is not None,
        reference=pretrained if method.penalties else (),
    )
    opt_state = optim.set_hyperparams(
        state.opt_state, learning_rate=train.learning_rate, weight_decay=train.weight_decay
    )
    return dataclasses.replace(state, opt_state=opt_state), fixed


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


@functools.lru_cache(maxsize=8)
def load_data(data_config: DataConfig) -> Dataset:
    """Loads a data set once per process."""
    return load_dataset(data_config)


def task_of(experiment: Experiment) -> Task:
    """Returns the classes and examples' shape of a resolved experiment's source and target, without any weights.

    Raises:
      InputError: a data set or the run that the weights come from cannot be read, or the model reads something else.
    """
    target = load_data(experiment.target)
    if experiment.source.weights is None:
        source = load_data(experiment.source.data)
        _check_channels(source.input_shape[-1], target)
        classes = source.class_names
    else:
        known = known_of(experiment.source, experiment.model)
        if known.channels is not None:
            _check_channels(known.channels, target)
        classes = known.classes
    return task_between(classes, target, experiment)


def task_between(source_classes: tuple[str, ...], target: Dataset, experiment: Experiment) -> Task:
    """Returns the task of transferring from a head of these classes.

    Raises:
      InputError: the experiment's model reads something else than the target has.
    """
    reads = models.reads(experiment.model)
    if reads != target.input:
        raise InputError(f"`{experiment.model.name}` reads {reads}, but '{experiment.target.name}' has {target.input}")
    _check_fits(models.size_of(experiment.model), target, experiment)
    return Task(source_classes, target.class_names, target.input_shape, experiment.target, target.input)


def _check_fits(size: Any, target: Dataset, experiment: Experiment) -> None:
    """Refuses sounds at another rate, and tokens beyond the table of embeddings, which would be clamped in silence."""
    name = experiment.model.name
    rate = getattr(size, "sample_rate", None)
    if target.input == "audio" and rate not in (None, target.sample_rate):
        raise InputError(
            f"`{name}` hears {rate} samples per second, '{target.name}' has {target.sample_rate}; "
            f"set target.sample_rate={rate}"
        )
    if target.input == "text":
        rows = size.vocab_size
        largest = max(int(split.read(np.arange(len(split)))["text"].max(initial=0)) for split in target.splits.values())
        if largest >= rows:
            raise InputError(
                f"`{name}` has {rows} embeddings, but '{target.name}' has token {largest}; choose the tokeniser that "
                f"the weights were trained with, or `--model.size vocab_size={largest + 1}`"
            )


def _check_channels(channels: int, target: Dataset) -> None:
    if target.input == "image" and channels != target.input_shape[-1]:
        raise InputError(
            f"the source's images have {channels} channels, the target's {target.input_shape[-1]}; "
            f"set target.channels={channels}"
        )


def plan_experiment(experiment: Experiment, method: Method) -> Plan:
    """Plans and costs one method of an experiment; never trains."""
    experiment = resolve(experiment)
    task = task_of(experiment)
    if method.start == "source":
        check_source(experiment, num_classes=len(task.target_classes), input_shape=task.input_shape)
    return plan_method(experiment, method, task)


def plan_method(experiment: Experiment, method: Method, task: Task) -> Plan:
    """Plans and costs a method on shapes alone: no weight is made, nothing trains."""
    model = nnx.eval_shape(
        lambda: target_model(base_model(experiment.model, method, task, seed=0), method, task, source=None, seed=0)
    )
    phases = []
    for planned in plan_phases(experiment, method, model):
        state, fixed = _abstract_state(experiment, method, planned, model)
        batch = _abstract_batch(experiment, planned, model, task)
        cost = cost_of_phase(experiment, method, planned, len(task.target_classes), state, fixed, batch)
        phases.append((planned, cost))
    return Plan(method.name, experiment.train, tuple(phases))


def _except(fresh: Sequence[str], source: Mapping[str, Any], own: Mapping[str, Any]) -> Arrays:
    """Returns the source's arrays, but the model's own for paths that a surgery is about to replace anyway."""

    def replaced(arrays: Mapping[str, Any]) -> set[str]:
        return {path for path in arrays if any(paths.match(path, pattern) for pattern in fresh)}

    kept = {path: value for path, value in source.items() if path not in replaced(source)}
    return kept | {path: own[path] for path in replaced(own)}


def _abstract_state(
    experiment: Experiment, method: Method, planned: PlannedPhase, model: nnx.Module
) -> tuple[TrainState, Fixed]:
    graphdef = nnx.graphdef(model)

    def build(arrays: Arrays) -> tuple[TrainState, Fixed]:
        real = planned.partition.assemble(graphdef, arrays)
        return start_phase(experiment, method, planned, real, key=jax.random.key(0))

    return jax.eval_shape(build, arrays_of(model))


def _abstract_batch(experiment: Experiment, planned: PlannedPhase, model: nnx.Module, task: Task) -> Batch:
    size = experiment.train.batch_size
    inputs = jax.ShapeDtypeStruct((size, *task.input_shape), _DTYPES[task.input])
    labels = {
        "label": jax.ShapeDtypeStruct((size,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((size,), jnp.float32),
    }
    if not planned.stored:
        return {task.input: inputs, **labels}
    dtype = jnp.int32 if task.input == "text" else jnp.float32
    prepared = jax.ShapeDtypeStruct(inputs.shape, dtype)
    run = nnx.eval_shape(lambda module, x: models.run_stages(module, x, stop=planned.boundary), model, prepared)
    return {**pack(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run)), **labels}
