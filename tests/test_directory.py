"""An ablation's directory: whose it is, what it was made from, and what a crash or a second process may do to it."""

import dataclasses
import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from jxfer import directory, methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SourceConfig
from jxfer.solvers import lbfgs
from jxfer.task import task_of
from jxfer.typing import InputError

EXPERIMENT = Experiment(name="mine", methods=(methods.scratch,), shots=(1,), seeds=1)


def test_a_start_that_failed_before_any_run_does_not_hold_the_directory(tmp_path):
    with directory.claimed(EXPERIMENT, tmp_path):
        pass
    corrected = dataclasses.replace(EXPERIMENT, model=ModelConfig("resnet20"))
    with directory.claimed(corrected, tmp_path):
        directory.append_result(tmp_path, {"method": "scratch"})
    with (
        pytest.raises(InputError, match=r'holds another experiment: model.name was "resnet20", is "convnet"'),
        directory.claimed(EXPERIMENT, tmp_path),
    ):
        pass


def test_a_narrower_call_does_not_unsay_a_wider_one(tmp_path):
    wide = dataclasses.replace(EXPERIMENT, methods=(methods.scratch, methods.zero_shot), shots=(1, None), seeds=5)
    with directory.claimed(wide, tmp_path):
        directory.append_result(tmp_path, {})
    with directory.claimed(dataclasses.replace(EXPERIMENT, shots=(2,)), tmp_path):
        pass
    record = json.loads((tmp_path / "experiment.json").read_text())
    assert [method["name"] for method in record["methods"]] == ["scratch", "zero_shot"]
    assert (record["shots"], record["seeds"]) == ([1, None, 2], 5)


def test_several_processes_work_at_one_experiment_and_none_begins_another_beside_them(tmp_path):
    other = dataclasses.replace(EXPERIMENT, model=ModelConfig("resnet20"))
    with directory.claimed(EXPERIMENT, tmp_path), directory.claimed(EXPERIMENT, tmp_path):
        with (
            pytest.raises(InputError, match=rf"is where .*, pid {os.getpid()} begins another experiment: model\.name"),
            directory.claimed(other, tmp_path),
        ):
            pass
        assert json.loads((tmp_path / "experiment.json").read_text())["model"]["name"] == "convnet"
    with directory.claimed(other, tmp_path):
        pass


@pytest.mark.parametrize(
    ("options", "flags"), [({"xla_a": False, "xla_b": True}, "--xla_a=false --xla_b=true"), (None, "")]
)
def test_the_flags_of_the_programs_with_flags_of_their_own_are_recorded(monkeypatch, options, flags):
    monkeypatch.setattr(lbfgs, "COMPILER_OPTIONS", options)
    made_with = directory.versions("jxfer")
    assert made_with["xla_flags_of_paths"] == flags
    assert made_with["xla_flags"] == os.environ.get("XLA_FLAGS", "")


def test_plans_of_several_workers_are_kept_together(tmp_path):
    directory.save_plans(tmp_path, {"scratch": {"method": "scratch", "phases": 1}})
    directory.save_plans(tmp_path, {"other": {"method": "other"}, "scratch": {"method": "scratch", "phases": 2}})
    plans = json.loads((tmp_path / "plans.json").read_text())
    assert plans == [{"method": "scratch", "phases": 2}, {"method": "other"}]


def test_a_file_that_several_write_at_once_is_always_whole(tmp_path):
    contents = [bytes([index]) * 100_000 for index in range(8)]
    seen = set()
    directory.write_file(tmp_path / "file", contents[0])
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            written = [pool.submit(directory.write_file, tmp_path / "file", contents[index]) for index in range(8)]
            while not all(each.done() for each in written):
                seen.add((tmp_path / "file").read_bytes())
    assert seen <= set(contents)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_that_cannot_be_a_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"), directory.claimed(EXPERIMENT, tmp_path / "file"):
        pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot write to '{}': No space .*: make room, and run"),
        (OSError(errno.EROFS, "Read-only", "{}/runs/a"), r"cannot write to '{}/runs/a': Read-only.*: make it writable"),
        (FileNotFoundError(errno.ENOENT, "No such file", "{}/gone/x"), None),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x.png"), None),
    ],
)
def test_what_the_disk_refuses_is_one_line_and_other_errors_are_what_they_were(tmp_path, error, message):
    if error.filename:
        error.filename = error.filename.format(tmp_path)
    expected = InputError if message else type(error)
    with pytest.raises(expected, match=message and message.format(*[tmp_path] * 2)), directory.reporting(tmp_path):
        raise error


def test_results_made_from_other_data_are_not_continued(tmp_path):
    directory.check_data(tmp_path, {"target data": "1.0.0"})
    directory.check_data(tmp_path, {"target data": "1.0.0", "source run": "abc"})
    with pytest.raises(InputError, match=r"the source run has changed .* \(abc then, abd now\)"):
        directory.check_data(tmp_path, {"target data": "1.0.0", "source run": "abd"})


def test_a_torn_last_line_is_dropped_and_a_damaged_one_named(tmp_path):
    directory.append_result(tmp_path, {"seed": 0})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"seed": 1, "met')
    assert directory.read_results(tmp_path) == [{"seed": 0}]
    directory.append_result(tmp_path, {"seed": 2})
    assert directory.read_results(tmp_path) == [{"seed": 0}, {"seed": 2}]
    (tmp_path / "results.jsonl").write_text('{"seed": 0}\n{"se\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        directory.read_results(tmp_path)


def test_a_source_of_other_channels_is_refused_before_anything_trains():
    experiment = dataclasses.replace(
        EXPERIMENT,
        source=SourceConfig(data=DataConfig("tfds:jxfer_digits", channels=3)),
        target=DataConfig("tfds:jxfer_digits"),
    )
    with pytest.raises(InputError, match=r"the source's images have 3 channels, .* set target\.channels=3"):
        task_of(experiment)
