"""Logs: rows as they were given, files that continue, and TensorBoard events read back from the bytes."""

import json
import struct
import sys
import types
from pathlib import Path

import pytest

from jxfer.logs import open_logs, rewind
from jxfer.typing import InputError

ROWS = [
    {"step": 5, "phase": "probe", "variant": "default", "split": "train", "loss": 1.25, "accuracy": 0.5},
    {"step": 10, "phase": "probe", "variant": "default", "split": "validation", "loss": 0.75, "accuracy": 1.0},
    {"step": 5, "phase": "tune", "variant": "learning_rate=0.01", "split": "train", "loss": 0.5, "grad_norm": 2.0},
]


def write(directory: Path, rows=ROWS, *, wandb: bool = False) -> None:
    with open_logs(directory, name="run", config={"a": 1}, wandb=wandb) as log:
        for row in rows:
            log(row)


def read(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def events(directory: Path) -> list[tuple[str, int, float]]:
    """Returns tag, step and value of every scalar; a record is length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.glob("events.*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            start += 12 + length + 4
    return found


def test_rows_are_lines_of_json_as_they_were_given(tmp_path):
    write(tmp_path)
    assert read(tmp_path) == ROWS


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with open_logs(tmp_path, name="run", config={}, wandb=False) as log:
        log(ROWS[0])
        assert read(tmp_path) == ROWS[:1]


def test_opening_again_continues_the_file(tmp_path):
    write(tmp_path, ROWS[:1])
    write(tmp_path, ROWS[1:])
    assert read(tmp_path) == ROWS


def test_tensorboard_events_hold_every_number(tmp_path):
    write(tmp_path)
    # TensorBoard's tags have no `=`.
    assert sorted(events(tmp_path)) == [
        ("default/probe/train/accuracy", 5, 0.5),
        ("default/probe/train/loss", 5, 1.25),
        ("default/probe/validation/accuracy", 10, 1.0),
        ("default/probe/validation/loss", 10, 0.75),
        ("learning_rate_0.01/tune/train/grad_norm", 5, 2.0),
        ("learning_rate_0.01/tune/train/loss", 5, 0.5),
    ]
    assert "tensorflow" not in sys.modules


def test_a_row_is_one_event_and_one_without_numbers_is_none(tmp_path):
    from tensorboardX.event_file_writer import EventsWriter

    written = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(EventsWriter, "write_event", lambda self, event: written.append(event))
        write(tmp_path, [*ROWS, {"step": 6, "phase": "tune", "split": "train", "rollbacks": 1, "why": "loss is nan"}])
    version, *events_of_rows = written
    assert version.file_version
    assert [len(event.summary.value) for event in events_of_rows] == [2, 2, 2]


def test_rows_of_a_run_without_variants_have_shorter_tags(tmp_path):
    write(tmp_path, [{"step": 1, "phase": "probe", "split": "train", "loss": 1.0}])
    assert [tag for tag, _, _ in events(tmp_path)] == ["probe/train/loss"]


@pytest.mark.parametrize("torn", ["", '{"step": 7, "ph', '{"step": 7, "phase": "tune", "loss": 0.123'])
def test_rewinding_drops_a_torn_last_line_and_what_keep_says(tmp_path, torn):
    write(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    rewind(tmp_path, keep=lambda row: row["step"] <= 5)
    assert read(tmp_path) == [ROWS[0], ROWS[2]]
    write(tmp_path, ROWS[1:2])
    assert read(tmp_path) == [ROWS[0], ROWS[2], ROWS[1]]


def test_rewinding_where_nothing_was_logged_does_nothing(tmp_path):
    rewind(tmp_path, keep=lambda row: True)
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"needs Weights & Biases: pip install wandb$"):
        write(tmp_path, wandb=True)


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
    logged: list = []
    session = types.SimpleNamespace(log=logged.append, finish=lambda: logged.append("finished"))
    fake = types.SimpleNamespace(init=lambda **settings: logged.append(settings) or session)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write(tmp_path, ROWS[:1], wandb=True)
    settings, row, end = logged
    assert settings["name"] == "run"
    assert settings["config"] == {"a": 1}
    assert row == {"default/probe/train/loss": 1.25, "default/probe/train/accuracy": 0.5, "step": 5}
    assert end == "finished"
