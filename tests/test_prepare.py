"""Preparing our own data sets: once, whole or not at all, also by two processes at a time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jxfer.data.prepare import cache_dir, prepare
from jxfer.typing import InputError

PREPARE = "from jxfer.data.prepare import prepare; print(prepare('jxfer_digits', config=None, version=None))"


def start(cache):
    environment = {**os.environ, "JXFER_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_may_prepare_the_same_set_at_once(tmp_path):
    processes = [start(tmp_path) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [f"{tmp_path}/tfds/jxfer_digits/1.0.0\n"] * 2  # nothing but the path on standard output
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["jxfer_digits"]


def test_a_killed_preparation_leaves_nothing_that_is_taken_for_a_data_set(tmp_path):
    process = start(tmp_path)
    while not list(tmp_path.glob("tfds/preparing-*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "tfds" / "jxfer_digits" / "1.0.0").exists()
    assert start(tmp_path).communicate()[0].strip().endswith("1.0.0")
    assert (tmp_path / "tfds" / "jxfer_digits" / "1.0.0" / "dataset_info.json").is_file()


def test_the_second_time_nothing_is_prepared(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path))
    first = prepare("jxfer_digits", config=None, version=None)
    assert "preparing" in capfd.readouterr().err
    assert prepare("jxfer_digits", config=None, version="1.0.0") == first
    assert capfd.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write to the cache.*set JXFER_CACHE"):
        prepare("jxfer_digits", config=None, version=None)


def test_the_cache_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("JXFER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "jxfer"
