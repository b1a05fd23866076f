"""Tests of stopping and continuing: whatever ends a process, starting it again ends as if nothing had happened."""

import dataclasses
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

from jxfer import checkpoint, methods, phase, run
from jxfer.config import Experiment, Group, ModelConfig, SearchConfig
from jxfer.loop import Session
from jxfer.search import Job
from jxfer.typing import InterruptedRun

STEPS = 12


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """Two phases, two learning rates, an average and random keys: all that a resumed run has to find again."""
    experiment = dataclasses.replace(
        runs.write_data(tmp_path_factory.mktemp("data")),
        model=ModelConfig("tiny_convnet_dropout"),
        search=SearchConfig(learning_rate=(1e-3, 1e-2)),
    )
    return runs.with_train(experiment, num_steps=STEPS, eval_every=2, ema_decay=0.8, keep_checkpoints=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> run.Source:
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs.add_models(monkeypatch)
        return runs.write_source(tmp_path_factory.mktemp("source") / "run", "tiny_convnet_dropout")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)


def run_with_stops(job: Job, directory: Path, source: run.Source, stops: tuple[int, ...] = ()) -> dict[str, Any]:
    """Runs a job, stopped each time after so many more steps, to its end."""
    for num_steps in stops:
        with pytest.raises(InterruptedRun):
            run.run(job, directory, runs.stop_after(num_steps), source=source)
    return run.run(job, directory, runs.QUIET, source=source)


def final_arrays(directory: Path) -> dict[str, np.ndarray]:
    return checkpoint.load_arrays(directory / "checkpoints" / "final")[0]


def assert_same_result(row: dict[str, Any], expected: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
    row, expected = runs.timeless(row), runs.timeless(expected)
    differ = {n: (row[n], expected[n]) for n in expected if n not in but and row[n] != expected[n]}
    assert row.keys() == expected.keys()
    assert differ == {}


def assert_same_bits(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert arrays.keys() == expected.keys()
    for path, value in expected.items():
        assert arrays[path].tobytes() == value.tobytes(), path


@pytest.mark.parametrize("checkpoint_every", [pytest.param(None, marks=pytest.mark.slow), 3])
def test_stopped_at_any_step_a_run_ends_as_if_it_had_not_been(experiment, source, tmp_path, checkpoint_every):
    expected = run_with_stops(Job(experiment, runs.TWO_PHASES, 3, 0), tmp_path / "undisturbed", source)
    job = Job(runs.with_train(experiment, checkpoint_every=checkpoint_every), runs.TWO_PHASES, 3, 0)
    row = run_with_stops(job, tmp_path / "stopped", source, (1, 4, 5, 3, 3))
    assert_same_result(row, expected, but=("config_hash",))
    assert_same_bits(final_arrays(tmp_path / "stopped"), final_arrays(tmp_path / "undisturbed"))
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("stopped", "undisturbed")
    ]
    stopped, undisturbed = ([row for row in log if row["split"] == "validation"] for log in logs)
    if checkpoint_every is not None:  # without, rows of steps that are taken again can be there twice
        assert stopped == undisturbed, "every row of the log is kept, and none is there twice"


class StopsInLook(Session):
    """A session that wants to stop in the `nth` look at the validation split."""

    def __init__(self, nth: int):
        super().__init__(lambda what, done, total: None, lambda: False)
        object.__setattr__(self, "left", iter(range(nth - 1)))

    def proceed(self, doing: str) -> None:
        if doing.startswith("looking at the validation split") and next(self.left, None) is None:
            raise InterruptedRun(f"stopped while {doing}")


@pytest.mark.parametrize(
    ("checkpoint_every", "population"),
    [
        (None, None),
        (4, 1),
        pytest.param(None, 1, marks=pytest.mark.slow),
        pytest.param(4, None, marks=pytest.mark.slow),
    ],
    ids=["None-together", "4-one by one", "None-one by one", "4-together"],
)
def test_stopped_in_a_look_a_run_saves_looks_again_and_ends_as_if_it_had_not_been(
    experiment, source, tmp_path, checkpoint_every, population
):
    search = dataclasses.replace(experiment.search, population=population)
    experiment = runs.with_train(dataclasses.replace(experiment, search=search), checkpoint_every=checkpoint_every)
    job = Job(experiment, methods.linear_probe, 3, 0)
    expected = run_with_stops(job, tmp_path / "undisturbed", source)
    newest = 0
    # The second time only the look that is owed comes, which is interrupted once more; the last look is one too.
    for nth, step in ((2, 4), (1, 4), (3, 8), (3, 12)):
        with pytest.raises(InterruptedRun, match=r"stopped while looking at"):
            run.run(job, tmp_path / "stopped", StopsInLook(nth), source=source)
        newest = max(int(path.name) for path in (tmp_path / "stopped" / "checkpoints").glob("*/0/*"))
        assert newest == step, "saved where it stopped"
    assert_same_result(run.run(job, tmp_path / "stopped", runs.QUIET, source=source), expected)
    assert_same_bits(final_arrays(tmp_path / "stopped"), final_arrays(tmp_path / "undisturbed"))
    looks = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("stopped", "undisturbed")
    ]
    assert looks[0][-1]["step"] == looks[1][-1]["step"]
    stopped, undisturbed = ([row for row in log if row["split"] == "validation"] for log in looks)
    assert stopped == undisturbed


def test_a_best_that_is_found_in_a_look_that_was_owed_stays(experiment, source, tmp_path, monkeypatch):
    experiment = runs.with_train(dataclasses.replace(experiment, search=SearchConfig()), checkpoint_every=2)
    job = Job(experiment, methods.linear_probe, 3, 0)
    run_with_stops(job, tmp_path / "first", source)
    log = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    (best,) = [row["loss"] for row in log if (row["split"], row["step"]) == ("validation", 4)]
    monkeypatch.setattr(phase, "rank", lambda metrics: metrics["loss"] == best)
    expected = run_with_stops(job, tmp_path / "undisturbed", source)
    for nth in (2, 2, 3):  # the look at step 4 is the first one owed
        with pytest.raises(InterruptedRun):
            run.run(job, tmp_path / "stopped", StopsInLook(nth), source=source)
    steps: list[int] = []
    session = Session(lambda what, done, total: steps.append(done), lambda: False)
    assert_same_result(run.run(job, tmp_path / "stopped", session, source=source), expected)
    assert_same_bits(final_arrays(tmp_path / "stopped"), final_arrays(tmp_path / "undisturbed"))
    assert steps[0] == 11, "without it, the checkpoint of step 10 would not have served"


def test_a_method_that_was_changed_does_not_continue_the_checkpoints_of_the_old(experiment, source, tmp_path):
    experiment = dataclasses.replace(runs.with_train(experiment, checkpoint_every=4), search=SearchConfig())
    old = Job(experiment, methods.linear_probe, 3, 0)
    phase = dataclasses.replace(old.method.phases[0], groups=(("head", Group(0.5)),))
    new = dataclasses.replace(old, method=dataclasses.replace(old.method, phases=(phase,)))
    with pytest.raises(InterruptedRun):
        run.run(old, tmp_path / "changed", runs.stop_after(5), source=source)
    changed = run_with_stops(new, tmp_path / "changed", source)
    assert_same_result(changed, run_with_stops(new, tmp_path / "fresh", source))


@pytest.fixture(scope="module")
def once_stopped(experiment, source, tmp_path_factory):
    """Makes, for each way to train the variants once, a probe that was stopped in `stopped`, and its result."""

    @functools.cache
    def make(population: int | None) -> tuple[Job, Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("once")
        search = dataclasses.replace(experiment.search, population=population)
        settings = dataclasses.replace(experiment, search=search)
        job = Job(runs.with_train(settings, checkpoint_every=1, keep_checkpoints=2), methods.linear_probe, 3, 0)
        expected = run_with_stops(job, folder / "undisturbed", source)
        with pytest.raises(InterruptedRun):
            run.run(job, folder / "stopped", runs.stop_after(5), source=source)
        return job, folder / "stopped", expected

    return make


def stopped_after_five(once_stopped, tmp_path, population) -> tuple[Job, Path, dict[str, Any]]:
    """Returns a probe that was stopped, now in `stopped`, the folder of its checkpoints, and its result undisturbed."""
    job, stopped, expected = once_stopped(population)
    (folder,) = (runs.copy_of(stopped, tmp_path / "stopped") / "checkpoints").glob("*/0")
    return job, folder, expected


@pytest.mark.parametrize("population", [None, 1], ids=["together", "one by one"])
def test_a_half_written_checkpoint_is_not_continued_from(once_stopped, source, tmp_path, population):
    job, folder, expected = stopped_after_five(once_stopped, tmp_path, population)
    files = [path for path in (folder / "5").rglob("*") if path.is_file() and path.stat().st_size > 100]
    os.truncate(max(files, key=lambda path: path.stat().st_size), 50)
    (folder / "6").mkdir()  # as a process leaves it that is killed while it saves
    steps = []
    session = Session(progress=lambda what, done, total: steps.append(done), should_stop=lambda: False)
    assert_same_result(run.run(job, tmp_path / "stopped", session, source=source), expected)
    assert steps[0] == 5, "continues from step 4"


DAMAGE = {"missing": "is missing", "cut": r"has 50 of [\d,]+ bytes", "flipped": "has other bytes than were written"}


@pytest.mark.parametrize("population", [None, 1], ids=["together", "one by one"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_an_older_one_continued_from(
    once_stopped, source, tmp_path, kind, population
):
    job, folder, expected = stopped_after_five(once_stopped, tmp_path, population)
    newest = folder / str(checkpoint.newest_step(folder))
    damage(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size), kind)
    notes: list[str] = []
    steps: list[int] = []
    session = Session(lambda what, done, total: steps.append(done), lambda: False, notes.append)
    assert_same_result(run.run(job, tmp_path / "stopped", session, source=source), expected)
    assert re.match(rf"checkpoint '{newest}' is damaged: '.*' {DAMAGE[kind]}; continuing without it", notes[0])
    assert steps[0] == int(newest.name), "continues from the step before"


def test_without_the_best_a_checkpoint_does_not_serve(experiment, source, tmp_path):
    settings = runs.with_train(dataclasses.replace(experiment, search=SearchConfig()), eval_every=3, checkpoint_every=1)
    job = Job(settings, methods.linear_probe, 3, 0)
    expected = run_with_stops(job, tmp_path / "undisturbed", source)
    with pytest.raises(InterruptedRun):
        run.run(job, tmp_path / "stopped", runs.stop_after(5), source=source)
    folder = tmp_path / "stopped" / "checkpoints" / "default" / "0"
    assert {path.name for path in folder.iterdir()} == {"3", "5"}
    damage(next(path for path in (folder / "3").rglob("*") if path.is_file() and path.stat().st_size > 50), "flipped")
    notes: list[str] = []
    session = Session(lambda what, done, total: None, lambda: False, notes.append)
    assert_same_result(run.run(job, tmp_path / "stopped", session, source=source), expected)
    assert ["3' is damaged" in notes[0], "5' needs that of step 3" in notes[1]] == [True, True]


def damage(file: Path, kind: str) -> None:
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:50] if kind == "cut" else bytes([content[0] ^ 1]) + content[1:])


def test_the_newest_checkpoints_and_the_best_on_validation_stay(experiment, source, tmp_path):
    experiment = dataclasses.replace(experiment, search=SearchConfig())
    job = Job(runs.with_train(experiment, checkpoint_every=1, keep_checkpoints=2), methods.linear_probe, 3, 0)
    row = run_with_stops(job, tmp_path, source)
    folder = tmp_path / "checkpoints" / "default" / "0"
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    looks = [row for row in log if row["split"] == "validation"]
    best = max(looks, key=lambda row: (row["accuracy"], -row["loss"], -row["step"]))
    assert {int(path.name) for path in folder.iterdir()} == {STEPS - 1, STEPS, best["step"]}
    assert row["validation_metrics"] == {name: best[name] for name in ("accuracy", "loss")}


EXPERIMENT = '''"""Two runs of all that a resumed process has to find again, from a source that is trained here too."""

import dataclasses

from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SearchConfig, SourceConfig, TrainConfig

train = TrainConfig(num_steps={num_steps}, batch_size=16, eval_every=4, log_every=4, checkpoint_every={every})
experiment = Experiment(
    name="killed",
    source=SourceConfig(DataConfig({source!r}), train),
    target=DataConfig({target!r}),
    model=ModelConfig("convnet_dropout"),
    train=dataclasses.replace(train, ema_decay=0.9),
    search=SearchConfig(learning_rate=(1e-3, 1e-2)),
    methods=(methods.scratch, methods.lp_ft),
    shots=(3,),
    seeds=1,
)
'''

CHILD = """
import os, signal, sys
from pathlib import Path
from jxfer import ablate
from jxfer.loop import Session
from jxfer.overrides import load_experiment
from jxfer.session import prepare_jax

file, out, kill_after = sys.argv[1:]
seen = []

def progress(what, done, total):
    if "shots" in what:
        seen.append(done)
        if len(seen) == int(kill_after):
            os.kill(os.getpid(), signal.SIGKILL)

prepare_jax()
ablate.ablate(load_experiment(file), Path(out), Session(progress, lambda: False), command="test")
print(len(seen))
"""


@pytest.fixture(scope="module")
def child_env(tmp_path_factory) -> dict[str, str]:
    """One device, and a cache of compiled programs that the processes of this file share."""
    flags = {"XLA_FLAGS": "", "JXFER_CACHE": str(tmp_path_factory.mktemp("cache"))}
    return {**os.environ, **flags, "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The child that kills itself, and beside it the experiment."""
    folder = tmp_path_factory.mktemp("child")
    source = runs.write_folder(folder / "source", runs.SOURCE_CLASSES)
    target = runs.write_folder(folder / "target", runs.TARGET_CLASSES)
    (folder / "child.py").write_text(CHILD)
    for name, num_steps, every in (("killed", 20, 5), ("long", 400, None)):
        text = EXPERIMENT.format(source=source, target=target, num_steps=num_steps, every=every)
        (folder / f"{name}.py").write_text(text)
    return folder / "child.py"


@pytest.fixture(scope="module")
def whole(script, child_env, tmp_path_factory) -> tuple[Path, int]:
    """The directory of a process that nothing disturbed, and how many steps it took."""
    directory = tmp_path_factory.mktemp("whole")
    ended = child(script, directory, 0, child_env)
    assert ended.returncode == 0, ended.stderr
    return directory, int(ended.stdout.split()[-1])


def child(script: Path, directory: Path, kill_after: int, env: dict[str, str]) -> subprocess.CompletedProcess:
    args = [sys.executable, str(script), str(script.with_name("killed.py")), str(directory), str(kill_after)]
    return subprocess.run(args, env=env, capture_output=True, text=True, timeout=300)


def assert_same_ablation(directory: Path, expected: Path) -> None:
    """Asserts equal results and bit-identical weights of every run."""
    rows, others = runs.rows_on_disk(directory), runs.rows_on_disk(expected)
    assert list(map(runs.timeless, rows)) == list(map(runs.timeless, others))
    finals = sorted(path.relative_to(expected) for path in expected.glob("**/checkpoints/final"))
    assert len(finals) == len(rows) + 1
    for final in finals:
        assert_same_bits(final_arrays((directory / final).parents[1]), final_arrays((expected / final).parents[1]))


@pytest.mark.slow  # kills of a small ablation are in test_survival.py
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_many_random_steps_an_ablation_ends_bit_for_bit_as_if_it_had_not_been(
    script, child_env, whole, tmp_path, seed
):
    expected, num_steps = whole
    rng = random.Random(seed)
    for _ in range(20):
        if child(script, tmp_path, rng.randrange(1, num_steps // 4), child_env).returncode == 0:
            break
    assert child(script, tmp_path, 0, child_env).returncode == 0
    assert_same_ablation(tmp_path, expected)


@pytest.mark.slow  # a stop in the process and a command stopped by a signal are tested by themselves
def test_sigterm_stops_the_command_with_75_and_the_same_command_continues(script, child_env, tmp_path):
    main = "import sys; from jxfer.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "run", str(script.with_name("long.py")), "--method", "scratch"]
    for name in ("stopped", "undisturbed"):
        if name == "stopped":
            stop_after_first_look([*command, "--out", str(tmp_path / name)], child_env, tmp_path / name)
            assert list((tmp_path / name).glob("runs/*/checkpoints/*/0/*/manifest.json")), "saved where it stopped"
        ended = subprocess.run([*command, "--out", str(tmp_path / name)], env=child_env, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
    rows = [runs.rows_on_disk(tmp_path / name) for name in ("stopped", "undisturbed")]
    assert_same_result(rows[0][0], rows[1][0])
    finals = [final_arrays(tmp_path / name / "runs" / "scratch-shots3-seed0") for name in ("stopped", "undisturbed")]
    assert_same_bits(*finals)


def stop_after_first_look(command: list[str], env: dict[str, str], directory: Path) -> None:
    """Starts a command, sends SIGTERM once it has looked at the validation split, and asserts how it ends."""
    metrics = directory / "runs" / "scratch-shots3-seed0" / "metrics.jsonl"
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 200
        while not (metrics.exists() and '"validation"' in metrics.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert time.monotonic() - sent < 30
    assert "run the same command again to continue" in errors
