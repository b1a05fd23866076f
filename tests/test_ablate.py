"""Tests of jxfer/ablate.py: what is done stays done, what is left is run, and what does not fit is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import runs

from jxfer import ablate, cli, data, methods, run
from jxfer.config import Experiment, SearchConfig, SourceConfig
from jxfer.search import Job
from jxfer.task import load_data
from jxfer.typing import InputError, InterruptedRun

GRID = (methods.zero_shot, methods.linear_probe)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    """Two methods, two numbers of shots, two seeds, on the weights of a finished run."""
    experiment = runs.write_data(tmp_path_factory.mktemp("data"))
    directory = tmp_path_factory.mktemp("source") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs.add_models(monkeypatch)
        runs.use_devices(monkeypatch, 1)
        own = dataclasses.replace(experiment, target=experiment.source.data)
        run.run(Job(own, methods.scratch, None, 0), directory, runs.QUIET, source=None)
    source = dataclasses.replace(experiment.source, weights=f"run:{directory}")
    return dataclasses.replace(experiment, source=source, methods=GRID, shots=(1, 3), seeds=2)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory) -> Path:
    """The directory of the finished grid; not to be written to."""
    directory = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        runs.add_models(monkeypatch)
        runs.use_devices(monkeypatch, 1)
        rows = ablate.ablate(experiment, directory, runs.QUIET, command="jxfer ablate tiny")
    assert [row["status"] for row in rows] == ["ok"] * 8
    return directory


@pytest.fixture
def directory(finished, tmp_path) -> Path:
    """A copy of the finished grid."""
    return runs.copy_of(finished, tmp_path / "out")


def cells(rows: list[dict]) -> list[tuple]:
    return [(row["shots"], row["method"], row["seed"]) for row in rows]


def files_of(directory: Path) -> dict[str, int]:
    """Returns when each file of the runs and of their results was last written."""
    files = [directory / "results.jsonl", *(directory / "runs").rglob("*")]
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in files}


def times_of(directory: Path) -> dict[Path, int]:
    """Returns when everything was last written, but for the claims of workers."""
    found = [path for path in directory.rglob("*") if ".claims" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in found}


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("nothing is left to run")


def test_the_rows_come_in_the_order_of_the_grid(experiment, finished):
    expected = [(shots, method.name, seed) for shots in (1, 3) for method in GRID for seed in (0, 1)]
    assert cells(runs.rows_on_disk(finished)) == expected
    assert cells(ablate.ablate(experiment, finished, runs.QUIET, command="again")) == expected


def test_the_second_time_there_is_nothing_to_do(experiment, directory, monkeypatch):
    before = files_of(directory)
    rows = runs.rows_on_disk(directory)
    monkeypatch.setattr(ablate, "run", never)
    monkeypatch.setattr(ablate, "plan_method", never)
    assert ablate.ablate(experiment, directory, runs.QUIET, command="again") == rows
    assert files_of(directory) == before


@pytest.mark.parametrize(
    "narrower", [{"methods": GRID[1:]}, {"shots": (3,)}, {"seeds": 1}], ids=["methods", "shots", "seeds"]
)
def test_a_narrower_grid_is_done_and_the_rest_is_kept(experiment, directory, monkeypatch, narrower):
    rows = runs.rows_on_disk(directory)
    monkeypatch.setattr(ablate, "run", never)
    part = dataclasses.replace(experiment, **narrower)
    expected = [row for row in rows if (row["shots"], row["method"], row["seed"]) in cells_of_grid(part)]
    assert ablate.ablate(part, directory, runs.QUIET, command="again") == expected
    assert runs.rows_on_disk(directory) == rows


def cells_of_grid(experiment: Experiment) -> list[tuple]:
    return [(job.shots, job.method.name, job.seed) for job in ablate.grid(experiment)]


def test_a_wider_grid_runs_what_is_missing_alone(experiment, directory):
    old = runs.rows_on_disk(directory)
    wider = dataclasses.replace(experiment, methods=(methods.scratch, *GRID), shots=(1, 3, 2), seeds=1)
    rows = ablate.ablate(wider, directory, runs.QUIET, command="wider")
    assert cells(rows) == cells_of_grid(wider)
    assert {row["status"] for row in rows} == {"ok"}
    new = runs.rows_on_disk(directory)[len(old) :]
    assert runs.rows_on_disk(directory)[: len(old)] == old
    assert sorted(cells(new)) == sorted(set(cells_of_grid(wider)) - set(cells(old)))
    plans = json.loads((directory / "plans.json").read_text())
    assert {plan["method"] for plan in plans} == {"scratch", "zero_shot", "linear_probe"}


def test_one_cell_is_run_or_found(experiment, directory, monkeypatch):
    rows = runs.rows_on_disk(directory)
    monkeypatch.setattr(ablate, "run", never)
    found = ablate.run_one(experiment, "linear_probe", 3, 1, directory, runs.QUIET, command="one")
    assert found == rows[-1]
    with pytest.raises(InputError, match="unknown method `linear_prob`; nearest: `linear_probe`"):
        ablate.run_one(experiment, "linear_prob", 3, 1, directory, runs.QUIET, command="one")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda e: runs.with_train(e, num_steps=5), "train.num_steps was 4, is 5"),
        (lambda e: dataclasses.replace(e, name="other"), 'name was "tiny", is "other"'),
        (lambda e: dataclasses.replace(e, source=SourceConfig(seed=3, weights=e.source.weights)), "source.data.name"),
        (lambda e: dataclasses.replace(e, search=SearchConfig((1e-3,))), r"search.learning_rate was \[\], is \[0.001"),
    ],
)
def test_another_experiments_directory_is_refused_by_the_field_and_nothing_is_lost(experiment, directory, other, named):
    before = times_of(directory)
    with pytest.raises(InputError, match=named) as caught:
        ablate.ablate(other(experiment), directory, runs.QUIET, command="other")
    assert "holds another experiment" in str(caught.value)
    assert str(caught.value).endswith("choose another --out")
    assert "\n" not in str(caught.value)
    assert times_of(directory) == before


def test_a_torn_last_line_is_dropped_and_its_run_done_again(experiment, directory):
    rows = runs.rows_on_disk(directory)
    results = directory / "results.jsonl"
    results.write_bytes(results.read_bytes()[:-40])
    assert ablate.read_results(directory) == rows[:-1]
    again = ablate.ablate(experiment, directory, runs.QUIET, command="again")
    assert list(map(runs.timeless, again)) == list(map(runs.timeless, rows))
    assert list(map(runs.timeless, runs.rows_on_disk(directory))) == list(map(runs.timeless, rows))


def test_the_examples_of_a_run_are_pinned_and_the_test_split_is_everybodys(experiment, finished):
    rows = runs.rows_on_disk(finished)
    by_cell: dict[tuple, set[str]] = {}
    for row in rows:
        by_cell.setdefault((row["shots"], row["seed"]), set()).add(row["subset_hash"])
    assert all(len(hashes) == 1 for hashes in by_cell.values()), "the same for every method"
    assert len(set.union(*by_cell.values())) == len(by_cell), "another for every shots and seed"

    stored = [np.load(path, allow_pickle=False)["ids"].tolist() for path in finished.glob("runs/*/predictions.npz")]
    assert len(stored) == 8
    assert all(ids == stored[0] for ids in stored)
    for row in rows:
        drawn = data.draw(load_data(experiment.target), experiment.target, row["shots"], row["seed"])
        train, validation, test = (set(split.ids) for split in (drawn.train, drawn.validation, drawn.test))
        assert sorted(stored[0]) == sorted(test)
        assert not train & validation
        assert not test & (train | validation)
        assert len(train) == row["num_train"] == row["shots"] * len(runs.TARGET_CLASSES)


def test_a_directory_holds_what_the_report_needs(experiment, finished):
    classes = json.loads((finished / "classes.json").read_text())
    assert classes == {"source": list(runs.SOURCE_CLASSES), "target": list(runs.TARGET_CLASSES)}
    made_with = json.loads((finished / "versions.json").read_text())
    assert made_with["command"] == "jxfer ablate tiny"
    assert made_with["peak"] == "none stated for cpu"
    assert {"python", "jax", "flax", "optax", "device"} <= made_with.keys()
    with np.load(finished / "examples.npz", allow_pickle=False) as examples:
        assert examples["images"].shape[1:] == (8, 8, 1)
        assert len(examples["ids"]) == len(examples["images"])


def test_a_failed_run_is_a_row_and_the_ablation_goes_on(experiment, tmp_path):
    failing = runs.with_train(
        runs.with_methods(experiment, methods.fine_tuning, methods.zero_shot, shots=(3,), seeds=1), learning_rate=1e30
    )
    failed, fine = ablate.ablate(failing, tmp_path, runs.QUIET, command="test")
    assert (failed["method"], failed["status"]) == ("fine_tuning", "failed")
    assert failed["error"].startswith("loss is nan at step 2")
    assert (fine["method"], fine["status"]) == ("zero_shot", "ok")
    assert ablate.ablate(failing, tmp_path, runs.QUIET, command="test") == [failed, fine]


def test_the_command_says_which_run_failed_and_exits_with_3(experiment, tmp_path, monkeypatch, capsys, sketched):
    weights, source, target = experiment.source.weights, experiment.source.data.name, experiment.target.name
    file = tmp_path / "experiment.py"
    file.write_text(f'''"""A grid whose every step overflows."""
from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SourceConfig, TrainConfig

experiment = Experiment(
    name="diverges",
    source=SourceConfig(DataConfig({source!r}), weights={weights!r}),
    target=DataConfig({target!r}),
    model=ModelConfig("tiny_convnet"),
    train=TrainConfig(num_steps=4, batch_size=16, learning_rate=1e30),
    methods=(methods.fine_tuning, methods.zero_shot),
    shots=(3,),
    seeds=1,
)
''')
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))  # leaves this process's jax as it is
    assert cli.main(["ablate", str(file), "--out", str(tmp_path / "out")]) == 3
    assert "fine_tuning · 3 shots · seed 0: loss is nan at step 2" in capsys.readouterr().err
    assert [row["status"] for row in runs.rows_on_disk(tmp_path / "out")] == ["failed", "ok"]
    assert (tmp_path / "out" / "report.html").exists()


def test_stopped_between_and_in_runs_a_grid_ends_as_if_it_had_not_been(experiment, finished, tmp_path):
    for num_calls in (1, 5, 9):
        with pytest.raises(InterruptedRun):
            ablate.ablate(experiment, tmp_path, runs.stop_after(num_calls), command="test")
    rows = ablate.ablate(experiment, tmp_path, runs.QUIET, command="test")
    assert list(map(runs.timeless, rows)) == list(map(runs.timeless, runs.rows_on_disk(finished)))


def test_the_source_is_trained_once_and_shared(experiment, tmp_path, monkeypatch):
    own = dataclasses.replace(experiment, source=dataclasses.replace(experiment.source, weights=None))
    first = ablate.ablate(runs.with_methods(own, methods.zero_shot), tmp_path, runs.QUIET, command="test")
    before = (tmp_path / "source" / "result.json").stat().st_mtime_ns
    rows = ablate.ablate(own, tmp_path, runs.QUIET, command="test")
    assert (tmp_path / "source" / "result.json").stat().st_mtime_ns == before
    assert {row["weights_hash"] for row in (*rows, *first)} == {rows[0]["weights_hash"]}
    pretraining = json.loads((tmp_path / "source" / "result.json").read_text())
    assert (pretraining["status"], pretraining["method"]) == ("ok", "pre-training")


def test_a_source_that_diverges_is_one_line(experiment, tmp_path):
    train = dataclasses.replace(experiment.source.train, learning_rate=1e30)
    source = dataclasses.replace(experiment.source, weights=None, train=train)
    with pytest.raises(InputError, match=r"pre-training on folder:.* failed: loss is nan at step 2"):
        ablate.ablate(dataclasses.replace(experiment, source=source), tmp_path, runs.QUIET, command="test")
    assert not (tmp_path / "results.jsonl").exists()


def test_too_many_shots_are_refused_before_anything_runs(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "run", never)
    with pytest.raises(InputError, match="99 shots asked, but class 'b' has 11 training examples left"):
        ablate.ablate(dataclasses.replace(experiment, shots=(1, 99)), tmp_path, runs.QUIET, command="test")
