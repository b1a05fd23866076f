"""A grid of runs: what is done, what is left, and the source model they share."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jxfer import data, methods, paths
from jxfer.checks import check
from jxfer.config import Experiment, Method, SearchConfig
from jxfer.directory import (
    append_result,
    check_data,
    claimed,
    read_json,
    read_results,
    save_examples,
    versions,
    write_json,
)
from jxfer.known import resolve
from jxfer.loop import Session
from jxfer.plan import plan_method
from jxfer.run import run
from jxfer.search import Job
from jxfer.source import Source, load_source, read_source
from jxfer.task import Task, load_data, task_between, task_of
from jxfer.typing import InputError, InterruptedRun


def ablate(experiment: Experiment, directory: Path, session: Session, *, command: str) -> list[dict[str, Any]]:
    """Runs what the grid still lacks and returns the rows of all its runs, in the order of the grid.

    Args:
      experiment: the grid is its methods, shots and seeds.
      directory: the ablation's; finished runs there are kept, an interrupted one continues.
      session: progress, and the wish to stop.
      command: recorded with the results.

    Raises:
      InputError: the directory holds another experiment, or something in this one does not fit.
      InterruptedRun: once the session should stop; finished runs and checkpoints are on disk.
    """
    return _run_all(experiment, list(grid(experiment)), directory, session, command)


def run_one(
    experiment: Experiment,
    method_name: str,
    shots: int | None,
    seed: int,
    directory: Path,
    session: Session,
    *,
    command: str,
) -> dict[str, Any]:
    """Runs one cell of the grid, or finds it done, and returns its row; raises what `ablate` does."""
    method = pick_methods(experiment, [method_name])[0]
    return _run_all(experiment, [Job(experiment, method, shots, seed)], directory, session, command)[0]


def grid(experiment: Experiment) -> Iterator[Job]:
    """Yields the jobs of an experiment: for each number of shots, each method, each seed."""
    for shots, method, seed in itertools.product(experiment.shots, experiment.methods, range(experiment.seeds)):
        yield Job(experiment, method, shots, seed)


def pick_methods(experiment: Experiment, names: Sequence[str]) -> tuple[Method, ...]:
    """Returns methods by name: the experiment's own, or else those of `jxfer.methods`.

    Raises:
      InputError: no such method.
    """
    known = methods.METHODS | {method.name: method for method in experiment.methods}
    for name in names:
        if name not in known:
            raise paths.unknown("method", name, known)
    return tuple(known[name] for name in names)


def default_directory(experiment: Experiment) -> Path:
    """Returns where an experiment's results go unless the user says otherwise."""
    return Path("out") / experiment.name


def _run_all(
    experiment: Experiment, jobs: Sequence[Job], directory: Path, session: Session, command: str
) -> list[dict[str, Any]]:
    check(experiment)
    experiment = resolve(experiment)
    jobs = [dataclasses.replace(job, experiment=experiment) for job in jobs]
    with claimed(experiment, directory):
        done = {_cell(row): row for row in read_results(directory)}
        left = [job for job in jobs if _cell_of(job) not in done]
        needs_source = any(job.method.start == "source" for job in jobs)
        given = _given_source(experiment) if needs_source else None
        check_data(directory, _data_versions(experiment, needs_source, given))
        source = _prepare_directory(experiment, jobs, directory, session, command, given) if left else None
        for index, job in enumerate(left, start=len(jobs) - len(left)):
            session.progress("runs", index, len(jobs))
            if session.should_stop():
                raise InterruptedRun(f"stopped before {job.title}")
            used = source if job.method.start == "source" else None
            done[_cell_of(job)] = row = run(job, directory / "runs" / job.name, session, source=used)
            append_result(directory, row)
        session.progress("runs", len(jobs), len(jobs))
    return [done[_cell_of(job)] for job in jobs]


def _given_source(experiment: Experiment) -> Source | None:
    """Reads the weights that the experiment names; None where it pre-trains its own."""
    if experiment.source.weights is None:
        return None
    target = load_data(experiment.target)
    return read_source(experiment, num_classes=len(target.class_names), input_shape=target.input_shape)


def _data_versions(experiment: Experiment, needs_source: bool, given: Source | None) -> dict[str, str]:
    versions = {"target data": load_data(experiment.target).version}
    if needs_source and experiment.source.weights is None:
        versions["source data"] = load_data(experiment.source.data).version
    elif given is not None:
        versions["source weights"] = given.weights_hash
    return versions


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["shots"], row["seed"], row["config_hash"]


def _cell_of(job: Job) -> tuple[Any, ...]:
    return job.method.name, job.shots, job.seed, job.config_hash


def _prepare_directory(
    experiment: Experiment,
    jobs: Sequence[Job],
    directory: Path,
    session: Session,
    command: str,
    given: Source | None,
) -> Source | None:
    """Writes what the report needs besides results, and returns the source model where a job starts from it."""
    picked = list({job.method.name: job.method for job in jobs}.values())
    needs_source = any(method.start == "source" for method in picked)
    for shots in {job.shots for job in jobs}:  # too many shots are an error now, not after an hour of other runs
        data.draw(load_data(experiment.target), experiment.target, shots, 0)
    task = task_of(experiment) if needs_source else _task_without_source(experiment)
    write_json(directory / "classes.json", {"source": task.source_classes, "target": task.target_classes})
    write_json(directory / "versions.json", versions(command))
    save_examples(experiment, directory)
    # The widest grid decides what the report shows; a later, narrower call of the same experiment keeps it.
    plans = {plan["method"]: plan for plan in read_json(directory / "plans.json", [])}
    for method in picked:
        session.progress(f"planning {method.name}", len(plans), len(plans) + 1)
        plans[method.name] = plan_method(experiment, method, task).to_json()
    write_json(directory / "plans.json", list(plans.values()))
    if given is not None and given.manifest is not None:
        write_json(directory / "manifest.json", given.manifest.to_json())
        session.note(str(given.manifest))
    return given or (source_model(experiment, directory, session) if needs_source else None)


def source_model(experiment: Experiment, directory: Path, session: Session) -> Source:
    """Returns the source model, pre-trained once into `directory`/source.

    Raises:
      InputError: pre-training failed.
    """
    folder = directory / "source"
    settings = dataclasses.replace(
        experiment,
        target=experiment.source.data,
        train=experiment.source.train,
        search=SearchConfig(),
        save="full",
    )
    job = Job(settings, dataclasses.replace(methods.scratch, name="pre-training"), None, experiment.source.seed)
    row = read_json(folder / "result.json", {})
    if row.get("config_hash") != job.config_hash:
        row = run(job, folder, session, source=None)
        if row["status"] != "ok":
            raise InputError(f"pre-training on {experiment.source.data.name} failed: {row['error']}")
        write_json(folder / "result.json", row)
    return load_source(folder)


def _task_without_source(experiment: Experiment) -> Task:
    target = load_data(experiment.target)
    return task_between(target.class_names, target, experiment)
