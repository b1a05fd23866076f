"""Traces that the profiler writes: there, readable, of the steps they say, and without a trace in the results."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import runs

from jxfer import ablate, checkpoint, methods, run
from jxfer.config import SearchConfig
from jxfer.search import Job
from jxfer.trace import traced
from jxfer.typing import InterruptedRun


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)
    return runs.with_train(runs.write_data(tmp_path / "data"), num_steps=12)


def names_in(directory: Path) -> set[str]:
    """Returns the names of the events in the one trace of a directory."""
    (file,) = directory.glob("plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))
    return {event.get("name", "") for event in (events["traceEvents"] if isinstance(events, dict) else events)}


def test_a_trace_names_the_jitted_step_and_changes_no_result(experiment, tmp_path):
    notes: list[str] = []
    session = dataclasses.replace(runs.QUIET, note=notes.append, trace_steps=2)
    job = Job(experiment, dataclasses.replace(runs.TWO_PHASES, start="scratch"), 3, 0)
    plain, row = (
        run.run(job, tmp_path / name, each, source=None) for name, each in (("a", runs.QUIET), ("b", session))
    )
    assert runs.timeless(row) == runs.timeless(plain)
    arrays = [checkpoint.load_arrays(tmp_path / name / "checkpoints" / "final")[0] for name in "ab"]
    assert all((arrays[0][path] == arrays[1][path]).all() for path in arrays[0])
    assert not (tmp_path / "a" / "profile").exists()
    for phase in ("probe", "tune"):
        names = names_in(tmp_path / "b" / "profile" / phase)
        assert any("train_step" in name for name in names), "the jitted step"
        (plane,) = (tmp_path / "b" / "profile" / phase).glob("plugins/profile/*/*.xplane.pb")
        assert b"train_step" in plane.read_bytes()
    assert len(notes) == 2
    assert f"trace of 2 steps: tensorboard --logdir {tmp_path / 'b' / 'profile' / 'probe'}" in notes[0]


def test_a_population_is_traced_and_of_variants_one_by_one_the_first(experiment, tmp_path):
    notes: list[str] = []
    session = dataclasses.replace(runs.QUIET, note=notes.append, trace_steps=3)
    for most, step in ((None, "population_step"), (1, "train_step")):
        search = SearchConfig(learning_rate=(0.01, 0.1), population=most)
        searching = dataclasses.replace(experiment, search=search)
        folder = tmp_path / str(most)
        source = runs.write_source(tmp_path / "source", experiment.model.name)
        run.run(Job(searching, methods.linear_probe, 3, 0), folder, session, source=source)
        (phase,) = (folder / "profile").iterdir()
        assert any(step in name for name in names_in(phase))
    assert len([note for note in notes if note.startswith("trace of")]) == 2


class Profiler:
    """Notes what is asked of jax's profiler, in place of it."""

    def __init__(self, monkeypatch):
        self.now, self.traced = 0, []
        monkeypatch.setattr("jax.profiler.start_trace", lambda directory, **kwargs: self.traced.append([self.now]))
        monkeypatch.setattr("jax.profiler.stop_trace", lambda: self.traced[-1].append(self.now))


def steps(profiler, hooks, first, last):
    for step in range(first, last + 1):
        profiler.now = step
        for hook in hooks:
            hook.call(step, np.zeros(1))


@pytest.mark.parametrize(
    ("asked", "start", "num_steps", "found"),
    [
        (4, 0, 100, [5, 9]),
        (4, 50, 100, [55, 59]),
        (4, 0, 6, [2, 6]),
        (4, 0, 3, [0, 3]),
        (10, 99, 100, [99, 100]),
    ],
    ids=["steady", "resumed", "a short phase", "a shorter one", "one step"],
)
def test_the_steps_traced_are_steady_where_there_are_enough(tmp_path, monkeypatch, asked, start, num_steps, found):
    profiler = Profiler(monkeypatch)
    profiler.now = start
    session = dataclasses.replace(runs.QUIET, trace_steps=asked)
    with traced(session, tmp_path / "profile", start=start, num_steps=num_steps) as hooks:
        steps(profiler, hooks, start + 1, num_steps)
    assert profiler.traced == [found]


def test_nothing_is_traced_unasked_or_twice_or_where_no_step_is_left(tmp_path, monkeypatch):
    profiler = Profiler(monkeypatch)
    asked = dataclasses.replace(runs.QUIET, trace_steps=2)
    for session, folder, start in ((runs.QUIET, "new", 0), (asked, ".", 0), (asked, "new", 9)):
        with traced(session, tmp_path / folder, start=start, num_steps=9) as hooks:
            assert hooks == ()
    assert profiler.traced == []


def test_a_loop_that_ends_early_leaves_the_profiler_stopped(tmp_path, monkeypatch):
    profiler = Profiler(monkeypatch)
    session = dataclasses.replace(runs.QUIET, trace_steps=50)

    def stopped_loop():
        with traced(session, tmp_path / "x", start=0, num_steps=90) as hooks:
            steps(profiler, hooks, 1, 7)
            raise InterruptedRun("stopped")

    with pytest.raises(InterruptedRun):
        stopped_loop()
    assert profiler.traced == [[5, 7]]


def test_of_pre_training_there_is_no_trace(experiment, tmp_path, monkeypatch):
    asked = []

    def fake_run(job, directory, session, *, source):
        asked.append(session.trace_steps)
        raise InterruptedRun("enough")

    monkeypatch.setattr(ablate, "run", fake_run)
    with pytest.raises(InterruptedRun, match="enough"):
        ablate.source_model(experiment, tmp_path, dataclasses.replace(runs.QUIET, trace_steps=2))
    assert asked == [None]
