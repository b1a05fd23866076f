"""READ FIRST: one run from config to result, every stage in order.

`run` draws the subsets, trains each variant of the method through its phases, lets the validation split choose among
the variants, reads the test split once, and returns the row for `results.jsonl`.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from jxfer import config, data, distributed
from jxfer.loop import Session
from jxfer.measure import COSTS, costs, measure
from jxfer.phase import rank
from jxfer.search import Job, train_variants
from jxfer.solve import record
from jxfer.source import Source
from jxfer.task import Task, load_data, task_between
from jxfer.typing import AuditError, ConvergenceError, NonFiniteError


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
    task = dataclasses.replace(task, num_train=len(drawn.train))
    hashes = {
        "config_hash": job.config_hash,
        "subset_hash": drawn.subset_hash,
        "weights_hash": source.weights_hash if source else None,
    }
    distributed.on_main(lambda: _record(job, task, hashes, directory))
    try:
        outcomes, failed, tried = train_variants(job, task, drawn, directory, session, source)
        chosen = max(outcomes, key=lambda outcome: rank(outcome.validation_metrics))
        measured = measure(job, task, drawn, directory, chosen, source, session)
        measured |= costs(outcomes, chosen, failed) | tried
        measured |= record(job.method, chosen.phases)
    except (NonFiniteError, ConvergenceError) as error:
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
    session.guard()
    if distributed.is_main():
        config.save(row, directory / "result.json")
    return row


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
