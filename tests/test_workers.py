"""Several workers at one ablation: every run is trained once, by whoever comes first, and finished if that one dies."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs

from jxfer import ablate, checkpoint, claims, cli, directory, methods, run
from jxfer.claims import Claim, LostClaim, claim_first
from jxfer.config import Experiment
from jxfer.loop import Session
from jxfer.overrides import load_experiment
from jxfer.search import Job
from jxfer.typing import InterruptedRun

GRID = Experiment("grid", methods=(methods.scratch, methods.zero_shot), shots=(1, 2), seeds=2)
JOBS = list(ablate.grid(GRID))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(ablate, "POLL_SECS", 0.02)


def row_of(job: Job, **fields: object) -> dict[str, Any]:
    """Returns as much of a row as says what it is of."""
    cell = {"method": job.method.name, "shots": job.shots, "seed": job.seed, "config_hash": job.config_hash}
    return {**cell, "status": "ok", **fields}


def claim(out: Path, job: Job) -> Claim:
    """Claims a job as another worker would."""
    found = claim_first(directory.claims_of(out), [job.name])
    assert isinstance(found, Claim)
    return found


def steal(out: Path, job: Job) -> Claim:
    """Claims a job whose holder was not heard of for long."""
    for path in directory.claims_of(out).glob(f"{job.name}.*"):
        os.utime(path, (0, 0))
    return claim(out, job)


def session_of(on_progress: Callable[[str], None], notes: list[str] | None = None) -> Session:
    """Returns a session that shows each line of progress to a function."""
    note = (lambda text: None) if notes is None else notes.append
    return Session(lambda what, done, total: on_progress(what), lambda: False, note)


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("this worker has nothing to train")


def test_workers_take_turns_in_the_order_of_the_grid_and_leave_out_what_is_done_or_taken(tmp_path):
    rows = {ablate._cell(row): row for row in (row_of(JOBS[0]), row_of(JOBS[2]))}
    turns = [ablate.next_turn(JOBS, tmp_path, lambda: rows) for _ in range(len(JOBS) - 2)]
    assert [turn.job for turn in turns] == [JOBS[1], *JOBS[3:]]
    assert {turn.num_done for turn in turns} == {2}
    assert all(turn.claim.name == turn.job.name for turn in turns)
    waiting = ablate.next_turn(JOBS, tmp_path, lambda: rows)
    assert waiting.job == JOBS[1]
    assert list(waiting.claim) == [turn.job.name for turn in turns]
    turns[-1].claim.release()
    assert ablate.next_turn(JOBS, tmp_path, lambda: rows).job == JOBS[-1]
    rows = {ablate._cell(row): row for row in map(row_of, JOBS)}
    assert ablate.next_turn(JOBS, tmp_path, lambda: rows) is None


def test_what_was_finished_just_before_it_was_claimed_is_not_done_again(tmp_path):
    looks = [{}, *[{ablate._cell(row_of(JOBS[0])): {}}] * 3]
    turn = ablate.next_turn(JOBS[:2], tmp_path, lambda: looks.pop(0))
    assert turn.job == JOBS[1]
    claim(tmp_path, JOBS[0])  # nobody has it


def test_a_worker_with_nothing_left_says_for_whom_it_waits_and_stops_when_it_should(tmp_path):
    held = [claim(tmp_path, job) for job in JOBS]
    turn = ablate.next_turn(JOBS, tmp_path, dict)
    seen: list[str] = []
    ablate.take_turn(turn, session_of(seen.append), never)
    me = f"{os.uname().nodename}, pid {os.getpid()}"
    assert seen == [f"scratch · 1 shots · seed 0: waiting for {me} (and 7 more)"]
    with pytest.raises(InterruptedRun, match=f"stopped while waiting for {me}, which has scratch · 1 shots · seed 0"):
        ablate.take_turn(turn, Session(lambda *_: None, lambda: True), never)
    for each in held:
        each.check()


def test_a_worker_that_should_stop_gives_its_turn_back(tmp_path):
    turn = ablate.next_turn(JOBS, tmp_path, dict)
    with pytest.raises(InterruptedRun, match="stopped before scratch · 1 shots · seed 0"):
        ablate.take_turn(turn, Session(lambda *_: None, lambda: True), never)
    claim(tmp_path, JOBS[0])


def test_a_run_whose_claim_is_lost_ends_at_its_next_write_and_others_are_not_disturbed(tmp_path):
    notes: list[str] = []

    def train(job: Job, session: Session) -> None:
        session.guard()
        thief.append(steal(tmp_path, job))
        session.progress("training", 1, 2)  # not noticed yet
        with pytest.raises(LostClaim):
            session.guard()
        session.progress("training", 2, 2)
        raise AssertionError("it knows by now")

    thief: list[Claim] = []
    ablate.take_turn(ablate.next_turn(JOBS, tmp_path, dict), session_of(lambda what: None, notes), train)
    assert f"pid {os.getpid()} has taken over scratch-shots1-seed0" in notes[0]
    thief[0].check()


def test_who_continues_what_another_left_says_so(tmp_path):
    claim(tmp_path, JOBS[0])
    for path in directory.claims_of(tmp_path).iterdir():
        os.utime(path, (0, 0))
    notes: list[str] = []
    trained: list[Job] = []
    turn = ablate.next_turn(JOBS, tmp_path, dict)
    ablate.take_turn(turn, session_of(lambda what: None, notes), lambda job, session: trained.append(job))
    assert trained == [JOBS[0]]
    assert notes == [f"{JOBS[0].title}: continuing what {os.uname().nodename}, pid {os.getpid()} left"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """Two runs that write a checkpoint at every step."""
    experiment = runs.write_data(tmp_path_factory.mktemp("data"))
    experiment = runs.with_methods(experiment, methods.scratch, seeds=2)
    return runs.with_train(experiment, num_steps=6, eval_every=1, checkpoint_every=1)


@pytest.fixture
def tiny(monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)


@pytest.mark.usefixtures("tiny")
def test_a_worker_waits_for_the_run_of_another_and_returns_its_row_too(experiment, tmp_path, monkeypatch):
    expected = ablate.ablate(experiment, tmp_path, runs.QUIET, command="test")
    monkeypatch.setattr(ablate, "run", never)
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text().splitlines()[0] + "\n")
    job = Job(experiment, experiment.methods[0], 3, 1)
    other = claim(tmp_path, job)
    failed = expected[1] | {"status": "failed", "error": "test"}

    def finish(what: str) -> None:
        if "waiting for" in what and not other._ended.is_set():
            directory.append_result(tmp_path, failed)
            other.release()

    assert ablate.ablate(experiment, tmp_path, session_of(finish), command="test") == [expected[0], failed]
    results.write_text(results.read_text().splitlines()[0] + "\n")
    other = claim(tmp_path, job)
    one = ablate.run_one(experiment, "scratch", 3, 1, tmp_path, session_of(finish), command="test")
    assert one == failed


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("when", ["scratch · 3 shots · seed 0 · train", "4"])
def test_a_worker_that_lost_a_run_writes_nothing_of_it_and_goes_on(experiment, tmp_path, when):
    job = Job(experiment, experiment.methods[0], 3, 0)
    folder = tmp_path / "runs" / job.name
    thief: list[Claim] = []
    steps: list[int] = []
    before: list[dict[Path, int]] = []

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").rglob("*") if path.is_file()}

    def progress(what: str, done: int, total: int) -> None:
        if "seed 0" in what and " · " in what and not thief:
            steps.append(done)
            if when in (what, str(done)):
                thief.append(steal(tmp_path, job))
        elif "waiting for" in what:
            before.append(written())
            directory.append_result(tmp_path, json.loads(json.dumps(rows[0])))
            thief[0].release()

    rows = runs_alone(experiment, tmp_path.with_name(f"{tmp_path.name}-alone"))
    session = Session(progress, lambda: False)
    assert list(map(runs.timeless, ablate.ablate(experiment, tmp_path, session, command="test"))) == rows
    assert len(thief) == len(before) == 1
    saved = {int(path.name) for path in folder.glob("checkpoints/*/0/*") if path.name.isdigit()}
    assert max(saved, default=0) < steps[-1]
    assert not (folder / "checkpoints" / "final").exists()
    assert not (folder / "predictions.npz").exists()
    assert not (folder / "result.json").exists()
    assert [row["seed"] for row in runs.rows_on_disk(tmp_path)] == [1, 0], "it went on before it waited"


def runs_alone(experiment: Experiment, out: Path) -> list[dict[str, Any]]:
    return list(map(runs.timeless, ablate.ablate(experiment, out, runs.QUIET, command="test")))


@pytest.mark.usefixtures("tiny")
def test_a_row_that_is_there_already_is_not_appended_again(experiment, tmp_path, monkeypatch):
    def run_late(job: Job, folder: Path, session: Session, *, source: object) -> dict[str, Any]:
        row = run.run(job, folder, session, source=source)
        with directory.alone(tmp_path):
            directory.append_result(tmp_path, row | {"seconds": -1.0})  # as one does that was away between two writes
        return row

    monkeypatch.setattr(ablate, "run", run_late)
    ablate.ablate(experiment, tmp_path, runs.QUIET, command="test")
    assert [row["seconds"] for row in runs.rows_on_disk(tmp_path)] == [-1.0, -1.0]


@pytest.mark.usefixtures("tiny")
def test_the_source_is_waited_for(experiment, tmp_path, monkeypatch):
    own = dataclasses.replace(experiment, source=dataclasses.replace(experiment.source, weights=None))
    seen: list[str] = []
    expected = ablate.source_model(own, tmp_path, session_of(seen.append))
    (done,) = (tmp_path / "source").glob("result.json")
    hidden = done.rename(tmp_path / "hidden")
    job = dataclasses.replace(JOBS[0], method=dataclasses.replace(methods.scratch, name="pre-training"), shots=None)
    other = claim(tmp_path, job)

    def finish(what: str) -> None:
        assert what.startswith("pre-training · all shots · seed 0: waiting for ")
        hidden.rename(done)
        other.release()

    monkeypatch.setattr(ablate, "run", never)
    assert ablate.source_model(own, tmp_path, session_of(finish)).weights_hash == expected.weights_hash


EXPERIMENT = '''"""Six runs, from a source that is trained here too."""

from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SourceConfig, TrainConfig

train = TrainConfig(num_steps={num_steps}, batch_size=16, eval_every=5, log_every=5, checkpoint_every=5)
experiment = Experiment(
    name="shared",
    source=SourceConfig(DataConfig({source!r}), train),
    target=DataConfig({target!r}),
    model=ModelConfig("convnet"),
    train=train,
    methods=(methods.scratch, methods.linear_probe),
    shots=(3,),
    seeds=3,
)
'''

SUSPENDED = """
import os, signal, sys
from pathlib import Path
from jxfer import ablate, claims
from jxfer.loop import Session
from jxfer.overrides import load_experiment
from jxfer.session import prepare_jax

file, out, suspend_after = sys.argv[1:]
seen = []
claims.BEAT_SECS, claims.STALE_SECS = 0.2, 4.0

def progress(what, done, total):
    if "shots · seed" in what and "pre-training" not in what:
        seen.append(done)
        if len(seen) == int(suspend_after):
            os.kill(os.getpid(), signal.SIGSTOP)

prepare_jax()
note = lambda text: print(text, flush=True)
ablate.ablate(load_experiment(file), Path(out), Session(progress, lambda: False, note), command="test")
"""


@pytest.fixture(scope="module")
def child_env(tmp_path_factory) -> dict[str, str]:
    """One device, and a cache that the processes of this file share."""
    flags = {"XLA_FLAGS": "", "JXFER_CACHE": str(tmp_path_factory.mktemp("cache"))}
    return {**os.environ, **flags, "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    source = runs.write_folder(folder / "source", runs.SOURCE_CLASSES)
    target = runs.write_folder(folder / "target", runs.TARGET_CLASSES)
    (folder / "shared.py").write_text(EXPERIMENT.format(source=source, target=target, num_steps=30))
    return folder / "shared.py"


def start(file: Path, out: Path, env: dict[str, str]) -> subprocess.Popen:
    main = "import sys; from jxfer.cli import main; sys.exit(main())"
    args = [sys.executable, "-c", main, "ablate", str(file), "--out", str(out)]
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def alone(file, child_env, tmp_path_factory) -> Path:
    """What a single worker makes of it."""
    out = tmp_path_factory.mktemp("alone")
    worker = start(file, out, child_env)
    _, errors = worker.communicate(timeout=300)
    assert worker.returncode == 0, errors
    return out


def by_cell(out: Path) -> list[dict[str, Any]]:
    """Returns the rows without what differs between equal runs, in one order whoever wrote them."""
    return sorted(map(runs.timeless, runs.rows_on_disk(out)), key=lambda row: (row["method"], row["seed"]))


def assert_same_ablation(out: Path, expected: Path) -> None:
    assert by_cell(out) == by_cell(expected)
    finals = sorted(path.relative_to(expected) for path in expected.glob("**/checkpoints/final"))
    assert len(finals) == 7
    for final in finals:
        arrays, others = (checkpoint.load_arrays(folder / final)[0] for folder in (out, expected))
        assert {path: value.tobytes() for path, value in arrays.items()} == {
            path: value.tobytes() for path, value in others.items()
        }


def kill_one_that_trains(workers: list[subprocess.Popen], out: Path) -> tuple[subprocess.Popen, str]:
    """Kills a worker in the middle of a run and returns it with the name of the run."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for log in out.glob("runs/*/metrics.jsonl"):
            name = log.parent.name
            pid = holder_in(out, name)
            victim = next((worker for worker in workers if worker.pid == pid), None)
            if victim is not None and (out / "results.jsonl").exists():
                victim.send_signal(signal.SIGSTOP)
                wait_until_stopped(victim)
                if holder_in(out, name) == pid and name not in finished_in(out):
                    victim.kill()
                    return victim, name
                victim.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    raise AssertionError("nobody trained anything")


def wait_until_stopped(worker: subprocess.Popen) -> None:
    """Waits until a signal to stop has come, after which nothing that a look finds changes any more."""
    os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def finished_in(out: Path) -> set[str]:
    """Returns the runs whose row is there, though their holder may not have released them yet."""
    whole = (out / "results.jsonl").read_text().split("\n")[:-1]  # another worker may be writing the last line
    return {f"{row['method']}-shots{row['shots']}-seed{row['seed']}" for row in map(json.loads, whole)}


def holder_in(out: Path, name: str) -> int | None:
    for path in directory.claims_of(out).glob(f"{name}.*"):
        try:
            return json.loads(path.read_text()).get("pid")
        except (ValueError, FileNotFoundError):
            continue
    return None


def test_three_workers_of_which_one_is_killed_finish_one_ablation_together(file, child_env, alone, tmp_path):
    workers = [start(file, tmp_path, child_env) for _ in range(3)]
    victim, name = kill_one_that_trains(workers, tmp_path)
    outputs = {worker.pid: worker.communicate(timeout=300) for worker in workers}
    assert victim.returncode == -signal.SIGKILL
    left = [worker for worker in workers if worker is not victim]
    assert [worker.returncode for worker in left] == [0, 0], outputs
    assert_same_ablation(tmp_path, alone)
    tables = [outputs[worker.pid][0] for worker in left]
    assert tables[0] == tables[1]
    assert "linear_probe" in tables[0]
    told = [pid for pid, (_, errors) in outputs.items() if f"continuing what {os.uname().nodename}, pid" in errors]
    assert len(told) == 1, "one of the others continued it"
    assert not list(tmp_path.rglob("*.tmp"))
    assert claims.workers(directory.claims_of(tmp_path)) == []
    settings = json.loads((tmp_path / "runs" / name / "config.json").read_text())
    assert settings["hashes"]["config_hash"] in {row["config_hash"] for row in runs.rows_on_disk(tmp_path)}


def test_sigterm_ends_the_command_with_75_while_it_waits(file, alone, tmp_path, monkeypatch, capsys):
    out = runs.copy_of(alone, tmp_path / "out")
    rows = (out / "results.jsonl").read_text().splitlines()
    (out / "results.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    (found,) = (job for job in ablate.grid(load_experiment(file)) if job.name == "linear_probe-shots3-seed2")
    pause = ablate._pause

    def pause_and_stop(session: Session, stopped: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pause(session, stopped)

    monkeypatch.setattr(ablate, "_pause", pause_and_stop)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))  # leaves this process's jax as it is
    with claim(out, found):
        assert cli.main(["ablate", str(file), "--out", str(out)]) == 75
    told = f"stopped while waiting for {os.uname().nodename}, pid {os.getpid()}, which has {found.title}; run the same"
    assert told in capsys.readouterr().err


@pytest.mark.slow  # within a process it is test_a_worker_that_lost_a_run_writes_nothing_of_it_and_goes_on
def test_a_suspended_worker_finds_its_run_done_by_another_and_changes_nothing(file, child_env, alone, tmp_path):
    args = [sys.executable, "-c", SUSPENDED, str(file), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    sleeper = subprocess.Popen([*args, "45"], env=child_env, **pipes)
    state = os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert state.si_code == os.CLD_STOPPED, sleeper.communicate()
    (claim_of_sleeper,) = (path for path in directory.claims_of(tmp_path).glob("*-shots3-*") if path.stat().st_size > 9)
    ended = subprocess.run([*args, "0"], env=child_env, timeout=300, **pipes)
    assert ended.returncode == 0, ended.stderr
    assert f"continuing what {os.uname().nodename}, pid {sleeper.pid} left" in ended.stdout
    assert not claim_of_sleeper.exists()
    sleeper.send_signal(signal.SIGCONT)
    output, errors = sleeper.communicate(timeout=100)
    assert sleeper.returncode == 0, errors
    assert "has taken over scratch-shots3-seed1, as nothing was heard of this process for 4 s; going on" in output
    assert_same_ablation(tmp_path, alone)
