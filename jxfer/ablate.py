"""A grid of runs: what is done, what is left, which worker does it, and the source model they share."""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jxfer import data, distributed, methods, paths, programs
from jxfer.checks import check
from jxfer.claims import Claim, Followed, Holder, LostClaim, claim_first
from jxfer.config import Experiment, Method, SearchConfig
from jxfer.directory import (
    alone,
    append_result,
    check_data,
    claimed,
    claims_of,
    read_json,
    read_results,
    reporting,
    save_examples,
    save_plans,
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

POLL_SECS = 2.0
"""How often a worker looks again that waits for others."""

Cell = tuple[str, int | None, int, str]
"""Method, shots, seed and hash of the settings: what a row is of."""

Rows = Callable[[], Mapping[Cell, dict[str, Any]]]
"""Reads the rows of what is done."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a worker does next."""

    num_done: int
    """Of all jobs, whoever did them."""
    job: Job
    """To be trained, or the first of those to be waited for."""
    claim: Claim | Followed | dict[str, Holder]
    """Of the job; or who has the jobs that are left, by their names."""


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
    with session.at_once("the experiment was being checked"):  # for which published settings may have to be fetched
        check(experiment)
        experiment = resolve(experiment)
    jobs = [dataclasses.replace(job, experiment=experiment) for job in jobs]
    with reporting(directory), contextlib.ExitStack() as stack:
        with session.at_once("data and weights were being opened"):
            distributed.on_main(lambda: stack.enter_context(claimed(experiment, directory)))
            needs_source = any(job.method.start == "source" for job in jobs)
            given = _given_source(experiment) if needs_source else None
            data_versions = _data_versions(experiment, needs_source, given)
            distributed.on_main(lambda: check_data(directory, data_versions))
        rows = functools.partial(_rows_of, directory)
        source = None
        if distributed.on_main(lambda: bool(_lacking(jobs, rows()))):
            source = _prepare_directory(experiment, jobs, directory, session, command, given)

        def train(job: Job, session: Session) -> None:
            used = source if job.method.start == "source" else None
            row = run(job, directory / "runs" / job.name, session, source=used)
            distributed.on_main(lambda: append(row, session))

        def append(row: dict[str, Any], session: Session) -> None:
            with alone(directory):
                session.guard()
                if _cell(row) not in rows():  # one row per run, whatever a worker that was away may think
                    append_result(directory, row)

        while turn := next_turn(jobs, directory, rows):
            session.progress("runs", turn.num_done, len(jobs))
            programs.make_room()
            take_turn(turn, session, train)
        session.progress("runs", len(jobs), len(jobs))
        return distributed.on_main(lambda: _in_order(jobs, rows()))


def next_turn(jobs: Sequence[Job], directory: Path, rows: Rows) -> Turn | None:
    """Claims the first job that is neither done nor another worker's; returns None once all are done.

    A worker of several processes claims by its first one, which the others follow.

    Args:
      jobs: in the order in which they are claimed.
      directory: where the workers claim them.
      rows: reads what is done.

    Raises:
      InputError: the directory cannot be written to.
    """
    turns: list[Turn | None] = []

    def ask() -> dict[str, Any] | None:
        turns.append(turn := _claim_next(jobs, directory, rows))
        if turn is None:
            return None
        held = turn.claim if isinstance(turn.claim, dict) else {}
        holders = {name: dataclasses.asdict(holder) for name, holder in held.items()}
        return {"num_done": turn.num_done, "job": jobs.index(turn.job), "holders": holders}

    told = distributed.on_main(ask)
    if turns or told is None:
        return turns[0] if turns else None
    holders = {name: Holder(**holder) for name, holder in told["holders"].items()}
    return Turn(told["num_done"], jobs[told["job"]], holders or Followed())


def _claim_next(jobs: Sequence[Job], directory: Path, rows: Rows) -> Turn | None:
    while left := _lacking(jobs, rows()):
        num_done = len(jobs) - len(left)
        found = claim_first(claims_of(directory), [job.name for job in left])
        if not isinstance(found, Claim):
            return Turn(num_done, next(job for job in left if job.name in found), found)
        job = next(job for job in left if job.name == found.name)
        if _lacking([job], rows()):
            return Turn(num_done, job, found)
        found.release()  # somebody has finished it since we looked
    return None


def take_turn(turn: Turn, session: Session, train: Callable[[Job, Session], None]) -> None:
    """Trains the job of a turn, or waits a little where it is another worker's.

    Raises:
      InterruptedRun: once the session should stop.
    """
    title = turn.job.title
    if isinstance(turn.claim, dict):
        holder = turn.claim[turn.job.name]
        others = f" (and {len(turn.claim) - 1} more)" if len(turn.claim) > 1 else ""
        session.progress(f"{title}: waiting for {holder}{others}", 0, 0)
        return _pause(session, f"stopped while waiting for {holder}, which has {title}")
    with turn.claim as claim:
        if session.should_stop():
            raise InterruptedRun(f"stopped before {title}")
        if claim.left_by is not None:
            session.note(f"{title}: continuing what {claim.left_by} left")
        try:
            train(turn.job, _lent(session, claim))
        except Exception:
            try:
                claim.check()
            except LostClaim as lost:  # whatever went wrong is what comes of two at one run
                if distributed.count() > 1:  # the other processes are still at it
                    raise InterruptedRun(str(lost)) from lost
                session.note(f"{lost}; going on with what is left")
            else:
                raise
    return None


def _lent(session: Session, claim: Claim | Followed) -> Session:
    """Returns a session that ends a run soon after its claim is lost, and before it writes anything more."""

    def progress(what: str, done: int, total: int) -> None:
        claim.raise_if_lost()
        session.progress(what, done, total)

    return dataclasses.replace(session, progress=progress, guard=claim.check)


def _pause(session: Session, stopped: str) -> None:
    num_looks = max(1, round(POLL_SECS / 0.1))
    for _ in range(num_looks):  # and not until a time: processes must ask equally often
        if session.should_stop():
            raise InterruptedRun(stopped)
        time.sleep(POLL_SECS / num_looks)


def _in_order(jobs: Sequence[Job], rows: Mapping[Any, dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[_cell_of(job)] for job in jobs]


def _lacking(jobs: Sequence[Job], rows: Mapping[Any, Any]) -> list[Job]:
    return [job for job in jobs if _cell_of(job) not in rows]


def _rows_of(directory: Path) -> dict[Cell, dict[str, Any]]:
    return {_cell(row): row for row in read_results(directory)}


def _cell(row: Mapping[str, Any]) -> Cell:
    return row["method"], row["shots"], row["seed"], row["config_hash"]


def _cell_of(job: Job) -> Cell:
    return job.method.name, job.shots, job.seed, job.config_hash


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
    with session.at_once("plans were being made"):
        for shots in {job.shots for job in jobs}:  # too many shots are an error now, not after an hour of other runs
            data.draw(load_data(experiment.target), experiment.target, shots, 0)
        task = task_of(experiment) if needs_source else _task_without_source(experiment)
        if distributed.is_main():
            write_json(directory / "classes.json", {"source": task.source_classes, "target": task.target_classes})
            write_json(directory / "versions.json", versions(command))
            save_examples(experiment, directory)
        plans: dict[str, Any] = {}
        for method in picked:
            session.progress(f"planning {method.name}", len(plans), len(picked))
            plans[method.name] = plan_method(experiment, method, task).to_json()
        if distributed.is_main():
            save_plans(directory, plans)
    if given is not None and given.manifest is not None and distributed.is_main():
        write_json(directory / "manifest.json", given.manifest.to_json())
        session.note(str(given.manifest))
    return given or (source_model(experiment, directory, session) if needs_source else None)


def source_model(experiment: Experiment, directory: Path, session: Session) -> Source:
    """Returns the source model, pre-trained once into `directory`/source by whichever worker comes first.

    Raises:
      InputError: pre-training failed.
    """
    folder, session = directory / "source", dataclasses.replace(session, trace_steps=None)
    settings = dataclasses.replace(
        experiment,
        target=experiment.source.data,
        train=experiment.source.train,
        search=SearchConfig(),
        save="full",
    )
    job = Job(settings, dataclasses.replace(methods.scratch, name="pre-training"), None, experiment.source.seed)

    def rows() -> dict[Cell, dict[str, Any]]:
        row = read_json(folder / "result.json", None)
        return {_cell(row): row} if row else {}

    def train(job: Job, session: Session) -> None:
        run(job, folder, session, source=None)  # leaves result.json

    while turn := next_turn([job], directory, rows):
        take_turn(turn, session, train)
    row = distributed.on_main(lambda: rows()[_cell_of(job)])
    if row["status"] != "ok":
        raise InputError(f"pre-training on {experiment.source.data.name} failed: {row['error']}")
    return load_source(folder)


def _task_without_source(experiment: Experiment) -> Task:
    target = load_data(experiment.target)
    return task_between(target.class_names, target, experiment)
