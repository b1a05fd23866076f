"""What a trained model is worth and what it took: the test split read once, predictions, weights, costs."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jxfer import checkpoint, config, data, distributed
from jxfer.config import DataConfig, Experiment
from jxfer.features import total
from jxfer.loop import Session
from jxfer.partition import FROZEN, Partition, arrays_of, fingerprint
from jxfer.phase import evaluate_model
from jxfer.search import Candidate, Job, Outcome
from jxfer.source import Source, base_record, delta
from jxfer.surgery.lora import merged
from jxfer.task import Task, load_data, source_model
from jxfer.typing import InputError, Proceed, always

COSTS = (
    "params_total",
    "params_trainable",
    "optimizer_bytes",
    "checkpoint_bytes",
    "step_flops",
    "train_flops",
    "steps",
    "skipped_steps",
    "rollbacks",
    "features",
    "audit",
)
"""The fields of a row that only a run that reached its end can fill."""


def measure(
    job: Job,
    task: Task,
    drawn: data.Drawn,
    directory: Path,
    chosen: Outcome,
    source: Source | None,
    session: Session,
) -> dict[str, Any]:
    """Reads the test split, for the first and only time, and writes predictions and weights.

    Raises:
      InterruptedRun: once the session should stop, where checkpoints or solvers bring the run back here soon.
    """
    num_classes = len(task.target_classes)
    steps = any(phase.solver is None for phase in job.method.phases)
    lost = steps and job.experiment.train.checkpoint_every is None  # all of the training, if this were to stop
    proceed = always if lost else functools.partial(session.proceed, f"evaluating {job.title}")
    metrics, outputs = evaluate_model(job.experiment, num_classes, chosen.model, drawn.test, proceed=proceed)
    _, validation = evaluate_model(job.experiment, num_classes, chosen.model, drawn.validation, proceed=proceed)
    session.guard()
    if distributed.is_main():
        np.savez(
            directory / "predictions.npz",
            ids=drawn.test.ids,
            labels=drawn.test.labels,
            logits=outputs,
            validation_ids=drawn.validation.ids,
            validation_labels=drawn.validation.labels,
            validation_logits=validation,
        )
    arrays = {path: value for path, value in arrays_of(chosen.model).items() if not _is_key(value)}
    sample_rate = load_data(job.experiment.target).sample_rate or job.experiment.target.sample_rate
    metadata = {
        "model": config.to_dict(job.experiment.model),
        "classes": list(task.target_classes),
        "input": task.input,
        "input_shape": list(task.input_shape),
        "data": config.to_dict(dataclasses.replace(job.experiment.target, sample_rate=sample_rate)),
    }
    if job.experiment.save == "delta" and source is not None:
        whole, dtype = distributed.fetch(arrays), job.experiment.train.frozen_dtype
        arrays, rounds = delta(whole, source, dtype)
        metadata |= {"paths": list(whole), "base": base_record(job.experiment, source, directory, rounds=rounds)}
    if task.input == "text" and distributed.is_main():
        (directory / "tokenizer.json").write_text(data.tokenizer_json(job.experiment.target))
    checkpoint.save_arrays(directory / "checkpoints" / "final", arrays, metadata=metadata)
    return {
        "variant": chosen.variant,
        "metrics": metrics,
        "validation_metrics": chosen.validation_metrics,
        "source_metrics": source_metrics(job.experiment, task, chosen, source, proceed=proceed),
    }


def source_metrics(
    experiment: Experiment, task: Task, chosen: Outcome, source: Source | None, *, proceed: Proceed = always
) -> dict[str, float] | None:
    """Measures what transfer left of the source task: the source's own head on the backbone as it is now.

    Returns:
      metrics on the test split of what the source was trained on; None where that or a head of it is not known, or
      where a surgery altered the backbone.
    """
    if source is None or source.data is None or not source.classes:
        return None
    backbone = merged(arrays_of(chosen.model))
    own = {path: value for path, value in backbone.items() if not path.startswith("head/")}
    head = {path: value for path, value in source.arrays.items() if path.startswith("head/")}
    # A hash of them all, because every backbone that was trained stays here.
    digest = hashlib.sha256(repr(sorted(fingerprint({**own, **head}).items())).encode()).hexdigest()
    if digest in _MEASURED:
        return _MEASURED[digest]
    model = source_model(experiment.model, task, {**own, **head})
    if model is None:
        return None
    try:
        split = _test_split(source.data)
    except InputError:  # its data are gone, which need not stop a transfer from it
        return None
    settings = dataclasses.replace(experiment, target=source.data)
    _MEASURED[digest] = evaluate_model(settings, len(source.classes), model, split, proceed=proceed)[0]
    return _MEASURED[digest]


_MEASURED: dict[str, dict[str, float]] = {}
"""Metrics on the source by the bits of the model, because most methods leave the backbone alone."""


def _test_split(config: DataConfig) -> data.Split:
    return data.draw(load_data(config), config, None, 0).test  # the test split does not depend on the seed


def _is_key(value: Any) -> bool:
    return bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key))


def costs(outcomes: list[Outcome], chosen: Outcome, failed: list[Candidate]) -> dict[str, Any]:
    """Sums over the phases of the chosen variant; `train_flops` counts every variant that was tried, failed ones too.

    Variants that train on the same stored features share these, so that computing them counts once.
    """
    phases = chosen.phases
    num_steps = sum(phase.num_steps for phase in phases)
    sizes = {path: value.size for phase in phases for path, value in phase.arrays.items()}
    trainable = {leaf_path for phase in phases for leaf_path in phase.trainable}
    step_flops = sum(phase.num_steps * phase.cost.step_flops for phase in phases)
    params = Partition.of(chosen.model, [("**", FROZEN)])
    every: list[Outcome | Candidate] = [*outcomes, *failed]
    tried = [list(enumerate(each.phases)) for each in every]
    computed = sum(phase.features.computed for each in tried for _, phase in each)
    stored = {(index, phase.features.weights): phase.features for each in tried for index, phase in each}
    features = dataclasses.replace(total(stored.values()), computed=computed)
    # Those of a population that failed as a whole share their error.
    vain = sum({id(each.error): each.error.flops for each in failed if each.error}.values())
    return {
        "params_total": params.params_total,
        "params_trainable": sum(sizes[path] for path in trainable),
        "optimizer_bytes": max((phase.cost.optimizer_bytes for phase in phases), default=0),
        "checkpoint_bytes": max((phase.checkpoint_bytes for phase in phases), default=0),
        "step_flops": step_flops / num_steps if num_steps else 0.0,
        "train_flops": sum(phase.train_flops for each in tried for _, phase in each) + vain + features.flops,
        "steps": num_steps,
        "skipped_steps": sum(phase.num_skipped for phase in phases),
        "rollbacks": sum(phase.num_rollbacks for phase in phases),
        "features": features.to_json(),
        "audit": {
            "frozen_unchanged": not any(phase.audit.leaks for phase in phases),
            "trainable_moved": sum(phase.audit.trainable_total - len(phase.audit.stuck) for phase in phases),
            "trainable_total": sum(phase.audit.trainable_total for phase in phases),
        },
    }
