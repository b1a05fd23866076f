"""READ FIRST: one run from config to result, every stage in order.

`run` draws the subsets, trains each variant of the method through its phases, lets the validation split choose among
the variants, reads the test split once, and returns the row for `results.jsonl`.
"""

import dataclasses
import functools
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jxfer import checkpoint, config, data, logs
from jxfer.config import Experiment, Method, ModelConfig, TrainConfig
from jxfer.evaluate import evaluate
from jxfer.features import total
from jxfer.loop import Session
from jxfer.objectives import classification
from jxfer.partition import FROZEN, Audit, Partition, arrays_of, fingerprint
from jxfer.phase import EVAL_BATCH_SIZE, Context, PhaseResult, Splits, newest_checkpoint, rank, run_phase
from jxfer.plan import (
    PlannedPhase,
    Task,
    base_model,
    load_data,
    plan_phases,
    prepare_images,
    target_model,
    task_between,
)
from jxfer.sharding import make_mesh
from jxfer.source import Source, base_record, delta
from jxfer.state import init_state
from jxfer.step import make_eval_step
from jxfer.typing import Arrays, AuditError, NonFiniteError

COSTS = (
    "params_total",
    "params_trainable",
    "optimizer_bytes",
    "checkpoint_bytes",
    "step_flops",
    "train_flops",
    "steps",
    "features",
    "audit",
)
"""The fields of a row that only a run that reached its end can fill."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell of the grid."""

    experiment: Experiment
    method: Method
    shots: int | None
    seed: int

    @property
    def name(self) -> str:
        """The name of the run and its folder."""
        return f"{self.method.name}-shots{'all' if self.shots is None else self.shots}-seed{self.seed}"

    @property
    def title(self) -> str:
        """The name of the run for people."""
        return f"{self.method.name} · {'all' if self.shots is None else self.shots} shots · seed {self.seed}"

    @property
    def config_hash(self) -> str:
        """Changes with every setting that can change the result, and with nothing else."""
        method = dataclasses.replace(self.method, summary="")
        cell = dataclasses.replace(self.experiment, methods=(method,), shots=(self.shots,), seeds=1, wandb=False)
        return config.config_hash({"experiment": config.to_dict(cell), "seed": self.seed})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A variant after training: the whole model's arrays, how it does on validation, and its phases."""

    variant: str
    model: nnx.Module
    validation_metrics: dict[str, float]
    phases: tuple[PhaseResult, ...]


def run(job: Job, directory: Path, session: Session, *, source: Source | None) -> dict[str, Any]:
    """Runs one job and returns its row of `results.jsonl`; a run that fails on the way is a row that says why.

    Args:
      job: what to run.
      directory: of the run; an interrupted run that left checkpoints here continues from them.
      session: progress, and the wish to stop.
      source: what transfer starts from; None where the method starts from scratch.

    Raises:
      InputError: something in the job does not fit.
      InterruptedRun: after saving, once the session should stop.
    """
    started = time.perf_counter()
    dataset = load_data(job.experiment.target)
    drawn = data.draw(dataset, job.experiment.target, job.shots, job.seed)
    task = task_between(source.classes if source else dataset.class_names, dataset, job.experiment)
    hashes = {
        "config_hash": job.config_hash,
        "subset_hash": drawn.subset_hash,
        "weights_hash": source.weights_hash if source else None,
    }
    _record(job, task, hashes, directory)
    try:
        outcomes, failures = _train_variants(job, task, drawn, directory, session, source)
        chosen = max(outcomes, key=lambda outcome: rank(outcome.validation_metrics))
        measured = _measure(job, task, drawn, directory, chosen, source) | _costs(outcomes, chosen)
        measured["variants"] = [
            {"variant": o.variant, "validation_metrics": o.validation_metrics} for o in outcomes
        ] + failures
    except NonFiniteError as error:
        measured = {"status": "failed", "error": str(error), "metrics": None}
    except AuditError as error:
        measured = {"status": "failed", "error": error.args[0], "metrics": None, "audit": error.args[1]}
    row = {
        **_identity(job),
        **measured,
        "num_train": len(drawn.train),
        "seconds": time.perf_counter() - started,
        **hashes,
    }
    (directory / "result.json").write_text(json.dumps(row, indent=2) + "\n")
    return row


def variants(experiment: Experiment, method: Method) -> dict[str, TrainConfig]:
    """Returns the settings that the search tries for a method, by the name of the variant."""
    grid = {name: values for name, values in dataclasses.asdict(experiment.search).items() if values}
    if not grid or not method.phases:
        return {"default": experiment.train}
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return {
        ",".join(f"{name}={value:g}" for name, value in values.items()): dataclasses.replace(experiment.train, **values)
        for values in combinations
    }


def _record(job: Job, task: Task, hashes: dict[str, str | None], directory: Path) -> None:
    """Writes what the run is; what a run of this name on other settings, examples or weights left here goes first."""
    path = directory / "config.json"
    if path.exists() and _hashes_in(path) != hashes:
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    cell = {"experiment": job.experiment, "method": job.method, "shots": job.shots, "seed": job.seed}
    config.save({**cell, "task": task, "hashes": hashes}, path)


def _hashes_in(record: Path) -> Any:
    try:
        return json.loads(record.read_text()).get("hashes")
    except (ValueError, AttributeError):
        return None  # damaged: what it recorded cannot be continued


def _identity(job: Job) -> dict[str, Any]:
    experiment = job.experiment
    return {
        "experiment": experiment.name,
        "source": experiment.source.weights or experiment.source.data.name,
        "target": experiment.target.name,
        "model": experiment.model.name,
        "method": job.method.name,
        "variant": None,
        "shots": job.shots,
        "seed": job.seed,
        "status": "ok",
        "error": None,
        "source_metrics": None,
        **dict.fromkeys(COSTS),
    }


def _train_variants(
    job: Job, task: Task, drawn: data.Drawn, directory: Path, session: Session, source: Source | None
) -> tuple[list[Outcome], list[dict[str, str]]]:
    """Returns the variants that trained to their end and the names and errors of those that did not."""
    outcomes, failures, last_error = [], [], None
    splits = Splits(drawn.train, drawn.validation)
    logs.rewind(directory, keep=_saved_rows(directory, job.method))
    settings = config.to_dict(job.experiment)
    with logs.open_logs(directory, name=job.name, config=settings, wandb=job.experiment.wandb) as log:
        for variant, train_config in variants(job.experiment, job.method).items():
            context = Context(
                experiment=dataclasses.replace(job.experiment, train=train_config),
                method=job.method,
                variant=variant,
                seed=job.seed,
                num_classes=len(task.target_classes),
                directory=directory,
                mesh=make_mesh(job.experiment.mesh),
                session=session,
                log=log,
                title=job.title,
            )
            try:
                outcomes.append(_train_variant(context, task, splits, source))
            except NonFiniteError as error:
                last_error = error
                failures.append({"variant": variant, "error": str(error)})
    if last_error and not outcomes:
        raise last_error
    return outcomes, failures


def _train_variant(context: Context, task: Task, splits: Splits, source: Source | None) -> Outcome:
    start = _base_model(context.experiment.model, context.method, task, context.seed)
    model = nnx.merge(*start)
    own = arrays_of(model)
    arrays = {**{path: own[path] for path in source.fresh}, **source.arrays} if source else None
    model = target_model(model, context.method, task, source=arrays, seed=context.seed)
    results = []
    phases = plan_phases(context.experiment, context.method, model)
    tables = [f"{planned.phase.name}, {planned.num_steps} steps\n{planned.partition}" for planned in phases]
    (context.directory / "partition.txt").write_text("\n\n".join(tables) + "\n")
    for index, planned in enumerate(phases):
        result = run_phase(context, planned, model, splits, index=index)
        before = arrays_of(model)
        model = planned.partition.assemble(nnx.graphdef(model), before | result.arrays)
        _check_frozen(planned, before, arrays_of(model))
        results.append(result)
    metrics = (
        results[-1].validation_metrics if results else _test(context.experiment, task, model, splits.validation)[0]
    )
    return Outcome(context.variant, model, metrics, tuple(results))


def _saved_rows(directory: Path, method: Method) -> Callable[[logs.Row], bool]:
    """Returns whether a row of the log is from before the point at which its phase will resume."""
    names = [phase.name for phase in method.phases]

    @functools.cache
    def resumes_at(variant: str, phase: str) -> int:
        return newest_checkpoint(directory, variant=variant, index=names.index(phase))

    return lambda row: row["step"] <= resumes_at(row["variant"], row["phase"])


@functools.lru_cache(maxsize=16)
def _base_model(model: ModelConfig, method: Method, task: Task, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    """Makes the random weights of a seed once for all the runs of a method that begin with them."""
    return nnx.split(base_model(model, method, task, seed=seed))


def _check_frozen(planned: PlannedPhase, before: Arrays, after: Arrays) -> None:
    """Audits the model that is evaluated and saved: what the phase froze is what it was, whatever was put together."""
    _, frozen = planned.partition.split(before)
    now = fingerprint({path: after[path] for path in frozen})
    if leaks := tuple(path for path, digest in fingerprint(frozen).items() if now[path] != digest):
        audit = Audit(leaks, (), len(planned.partition.trainable))
        raise AuditError(f"audit after phase `{planned.phase.name}`: {audit}", audit.to_json())


def _test(experiment: Experiment, task: Task, model: nnx.Module, split: data.Split) -> tuple[dict[str, float], Any]:
    """Evaluates the whole model on images, however it was trained."""
    partition = Partition.of(model, [("**", FROZEN)])
    state, fixed = init_state(model, partition, optax.identity())
    prepare = prepare_images(experiment, len(task.target_classes), train=False)
    eval_step = make_eval_step(classification(), prepare=prepare)
    mesh = make_mesh(experiment.mesh)
    return evaluate(eval_step, state, fixed, split, batch_size=EVAL_BATCH_SIZE, mesh=mesh)


def _measure(
    job: Job, task: Task, drawn: data.Drawn, directory: Path, chosen: Outcome, source: Source | None
) -> dict[str, Any]:
    """Reads the test split, for the first and only time, and writes predictions and weights."""
    metrics, outputs = _test(job.experiment, task, chosen.model, drawn.test)
    np.savez(directory / "predictions.npz", ids=drawn.test.ids, labels=drawn.test.labels, logits=outputs)
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
        metadata |= {"paths": list(arrays), "base": base_record(job.experiment, source, directory)}
        arrays = delta(arrays, source)
    if task.input == "text":
        (directory / "tokenizer.json").write_text(data.tokenizer_json(job.experiment.target))
    checkpoint.save_arrays(directory / "checkpoints" / "final", arrays, metadata=metadata)
    return {"variant": chosen.variant, "metrics": metrics, "validation_metrics": chosen.validation_metrics}


def _is_key(value: Any) -> bool:
    return bool(jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key))


def _costs(outcomes: list[Outcome], chosen: Outcome) -> dict[str, Any]:
    """Sums over the phases of the chosen variant; `train_flops` counts every variant that was tried.

    All variants train on the same stored features, so that computing these counts once.
    """
    phases = chosen.phases
    num_steps = sum(phase.num_steps for phase in phases)
    sizes = {path: value.size for phase in phases for path, value in phase.arrays.items()}
    trainable = {leaf_path for phase in phases for leaf_path in phase.trainable}
    step_flops = sum(phase.num_steps * phase.cost.step_flops for phase in phases)
    params = Partition.of(chosen.model, [("**", FROZEN)])
    computed = sum(phase.features.computed for outcome in outcomes for phase in outcome.phases)
    features = dataclasses.replace(total(phase.features for phase in phases), computed=computed)
    return {
        "params_total": params.params_total,
        "params_trainable": sum(sizes[path] for path in trainable),
        "optimizer_bytes": max((phase.cost.optimizer_bytes for phase in phases), default=0),
        "checkpoint_bytes": max((phase.checkpoint_bytes for phase in phases), default=0),
        "step_flops": step_flops / num_steps if num_steps else 0.0,
        "train_flops": sum(phase.train_flops for outcome in outcomes for phase in outcome.phases) + features.flops,
        "steps": num_steps,
        "features": features.to_json(),
        "audit": {
            "frozen_unchanged": not any(phase.audit.leaks for phase in phases),
            "trainable_moved": sum(phase.audit.trainable_total - len(phase.audit.stuck) for phase in phases),
            "trainable_total": sum(phase.audit.trainable_total for phase in phases),
        },
    }
