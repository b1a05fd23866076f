"""From the settings to what is transferred between: the classes and examples of both sides, and the model to train."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jxfer import models, paths
from jxfer.config import DataConfig, Experiment, Method, ModelConfig
from jxfer.data import Dataset, draw, load_dataset
from jxfer.known import known_of
from jxfer.partition import arrays_of
from jxfer.typing import Arrays, Input, InputError
from jxfer.weights.load import load_into


@dataclasses.dataclass(frozen=True)
class Task:
    """What a plan and a run need to know of the source and the target."""

    source_classes: tuple[str, ...]
    target_classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """How the target's examples are prepared."""
    input: Input = "image"
    num_examples: int = dataclasses.field(default=0, compare=False)
    """About how many of the target train or validate where all do; 0 where nothing says."""
    num_train: int = 1
    """Training examples: of a run its own, of a plan of a solver those of the largest number of shots."""


def base_model(config: ModelConfig, method: Method, task: Task, *, seed: int) -> nnx.Module:
    """Returns the model before transfer, with random weights, for the classes of what the method starts from."""
    # Weights that come without a head leave the target's; then every method that transfers has to bring one.
    classes = (method.start == "source" and task.source_classes) or task.target_classes
    return models.build(config, num_classes=len(classes), input_shape=task.input_shape, rngs=nnx.Rngs(seed))


def source_model(config: ModelConfig, task: Task, arrays: Mapping[str, Any]) -> nnx.Module | None:
    """Returns the model of the source's task with these arrays; None where they are those of another structure."""
    classes = len(task.source_classes)
    model = models.build(config, num_classes=classes, input_shape=task.input_shape, rngs=nnx.Rngs(0))
    own = arrays_of(model)
    if {path: value.shape for path, value in own.items()} != {path: value.shape for path, value in arrays.items()}:
        return None
    load_into(model, arrays, what="source weights")
    return model


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
    for surgery in (_for_task(surgery, task) for surgery in method.surgeries):
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
    classes, num_examples = target.class_names, _num_examples(target, experiment.target)
    return Task(source_classes, classes, target.input_shape, experiment.target, target.input, num_examples)


def _num_examples(target: Dataset, config: DataConfig) -> int:
    """Returns how many examples are outside the test split, given or drawn."""
    share = 1.0 if "test" in target.splits else 1 - config.test_fraction
    return round(share * len(target.splits.get("train", ()))) + len(target.splits.get("validation", ()))


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


def num_train(experiment: Experiment) -> int:
    """Returns how many training examples the largest number of shots of an experiment has."""
    target = load_data(experiment.target)
    shots = [count for count in experiment.shots if count is not None]
    if len(shots) == len(experiment.shots):
        return max(shots) * len(target.class_names)
    return len(draw(target, experiment.target, None, 0).train)


def _for_task(surgery: Any, task: Task) -> Any:
    """Returns the surgery with its fields of the task's names filled in."""
    fields = {field.name for field in dataclasses.fields(surgery)} & {"num_train", "input_shape", "input"}
    return dataclasses.replace(surgery, **{name: getattr(task, name) for name in fields})


def _except(fresh: Sequence[str], source: Mapping[str, Any], own: Mapping[str, Any]) -> Arrays:
    """Returns the source's arrays, but the model's own for paths that a surgery is about to replace anyway."""

    def replaced(arrays: Mapping[str, Any]) -> set[str]:
        return {path for path in arrays if any(paths.match(path, pattern) for pattern in fresh)}

    kept = {path: value for path, value in source.items() if path not in replaced(source)}
    return kept | {path: own[path] for path in replaced(own)}
