"""Tests of reading that goes wrong under a run: what does not come is said and waited for, what is damaged is named."""

import dataclasses
import re
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from flax import nnx
from networks import make_batch

from jxfer import data, methods
from jxfer.config import DataConfig
from jxfer.data import LazySplit, batches, images, load_dataset, opening
from jxfer.data.ahead import Ahead
from jxfer.data.stall import SECS, limit_secs
from jxfer.extract import _read_ahead
from jxfer.loop import Hook, train
from jxfer.objectives import classification
from jxfer.partition import Partition
from jxfer.run import run
from jxfer.search import Job
from jxfer.state import init_state
from jxfer.step import make_train_step
from jxfer.task import load_data
from jxfer.typing import InputError, InterruptedRun


class Disk:
    """A split of eight images of which number 3 does not come until somebody lets it."""

    def __init__(self):
        self.lets = threading.Event()
        ids = np.array([f"b/{index:03d}.png" for index in range(8)])
        self.split = LazySplit(ids, np.zeros(8, np.int32), self._read, where="/mnt/pets")

    def _read(self, index):
        if index == 3:
            self.lets.wait(20)
        return np.full((8, 8, 1), index, np.uint8)


def let_once_said(disk: Disk, capsys, words: str, seen: list[str]) -> threading.Thread:
    """Lets the disk go on once stderr has had the words; what it had goes to `seen`."""

    def watch():
        for _ in range(400):
            seen.append(capsys.readouterr().err)
            if words in "".join(seen):
                break
            threading.Event().wait(0.02)
        disk.lets.set()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_batch_that_does_not_come_is_said_with_what_is_read_and_waited_for(monkeypatch, capsys):
    monkeypatch.setenv(SECS, "0.1")
    disk, seen = Disk(), []
    watch = let_once_said(disk, capsys, "for 0.2", seen)  # said again at twice the time
    with Ahead(
        batches(disk.split, batch_size=4, seed=0), what=lambda taken: f"the batch of step {taken + 1}"
    ) as stream:
        got = np.concatenate([next(stream)["image"][:, 0, 0, 0] for _ in range(2)])
    watch.join()
    assert sorted(got) == list(range(8)), "nothing is lost"
    said = ("".join(seen) + capsys.readouterr().err).splitlines()
    assert len(said) >= 3
    assert said[0].startswith("jxfer: no sign of the batch of step ")
    place = r"is in `_example`, jxfer/data/dataset.py, line \d+"
    assert re.search(rf"` has been reading example 'b/003.png' of '/mnt/pets' for 0\.\d+ s, {place}", said[0])
    assert "came after 0." in said[-1]
    assert said[-1].endswith("s; going on")


def test_what_comes_in_time_is_not_said(monkeypatch, capsys):
    monkeypatch.setenv(SECS, "0")
    disk = Disk()
    timer = threading.Timer(0.3, disk.lets.set)
    timer.start()
    with Ahead(batches(disk.split, batch_size=8, seed=0)) as stream:
        next(stream)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_limit_that_is_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv(SECS, text)
    with pytest.raises(InputError, match=rf"^{SECS} is `{text}`; it takes a number of seconds, 0 for never$"):
        limit_secs()


def test_features_that_wait_for_examples_say_so(monkeypatch, capsys):
    monkeypatch.setenv(SECS, "0.1")
    disk, seen = Disk(), []
    watch = let_once_said(disk, capsys, "still waiting", seen)
    read = list(_read_ahead(disk.split, iter(np.split(np.arange(8), 4))))
    watch.join()
    assert [batch["image"][0, 0, 0, 0] for batch in read] == [0, 2, 4, 6]
    assert "no sign of the examples from 'b/002.png' on, whose features are computed," in "".join(seen)


@pytest.mark.parametrize("reads", ["headers", "images"])
def test_opening_a_folder_on_a_disk_that_does_not_answer_says_so(tmp_path, monkeypatch, capsys, reads):
    monkeypatch.setenv(SECS, "0.1")
    name, disk, seen = runs.write_folder(tmp_path / "set", ("a", "b")), Disk(), []

    def late(read):
        def wait_and_read(path, *args):
            if path.name == "004.png":
                disk.lets.wait(20)
            return read(path, *args)

        return wait_and_read

    if reads == "headers":
        monkeypatch.setitem(opening._HEADERS, "image", late(images.read_header))
    else:
        monkeypatch.setattr(images, "decode", late(images.decode))
    watch = let_once_said(disk, capsys, "still waiting", seen)
    assert len(load_dataset(DataConfig(name)).splits["train"]) == 60
    watch.join()
    said = "".join(seen).splitlines()[0]
    what = {"headers": f"the header of a file of '{tmp_path / 'set'}'", "images": "60 of 60 examples, which are read"}
    assert said.startswith(f"jxfer: no sign of {what[reads]}")
    assert "has been reading" in said
    assert "a/004.png'" in said


def test_a_run_that_waits_for_a_batch_can_be_stopped(monkeypatch):
    monkeypatch.setattr("jxfer.data.ahead.GIVE_UP_SECS", 0.1)
    model = nnx.Linear(1, 5, rngs=nnx.Rngs(0))
    state, fixed = init_state(model, Partition.of(model, [("**", "all")]), optax.sgd(0.1))
    lets, steps, asked, saved = threading.Event(), [], [], []

    def stream():
        yield from (make_batch(seed=seed) for seed in range(2))
        lets.wait(20)

    def should_stop():
        asked.extend(steps[1:])
        return len(asked) > 1  # not yet right after the second step, but while the third batch is waited for

    def save(step, state):
        saved.append((step, int(state.step)))
        lets.set()

    step = make_train_step(classification(), apply=lambda model, batch: model(jnp.mean(batch["image"], (1, 2))))
    arguments = {"num_steps": 5, "log_every": 10, "on_window": lambda window: None, "on_stop": save}
    hooks = (Hook(1, lambda step, state: steps.append(step)),)
    with pytest.raises(InterruptedRun, match=r"^stopped while waiting for the batch of step 3$"):
        train(step, state, fixed, stream(), hooks=hooks, should_stop=should_stop, **arguments)
    assert saved == [(2, 2)]


@pytest.mark.parametrize("features", ["off", "auto"])
def test_an_image_damaged_under_a_run_ends_it_with_its_name(tmp_path, monkeypatch, features):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)
    monkeypatch.setattr("jxfer.data.opening.MEMORY_BYTES", 0)
    experiment = dataclasses.replace(runs.write_data(tmp_path), features=features, shots=(None,))
    train_ids = data.draw(load_data(experiment.target), experiment.target, None, 0).train.ids
    file = tmp_path / "target" / str(train_ids[7])
    file.write_bytes(file.read_bytes()[:60])
    job = Job(runs.with_train(experiment, num_steps=8), methods.linear_probe, None, 0)
    source = runs.write_source(tmp_path / "run", "tiny_convnet")
    with pytest.raises(
        InputError, match=rf"^example '{train_ids[7]}' of '{tmp_path / 'target'}' cannot be read: "
    ) as raised:
        run(job, tmp_path / "out", runs.QUIET, source=source)
    assert str(raised.value).endswith("; mend or remove it")
    assert "\n" not in str(raised.value)
    assert not [thread for thread in threading.enumerate() if thread.name == "jxfer-ahead"], "nothing is left behind"


def test_a_read_that_hangs_does_not_keep_the_process_from_ending():
    code = """
import sys, time
import numpy as np
from jxfer.data import LazySplit, ahead, batches
ahead._CLOSE_SECS = 0.2
split = LazySplit(np.array(["a", "b"]), np.zeros(2, np.int32), lambda index: time.sleep(60))
with ahead.Ahead(batches(split, batch_size=2, seed=0)):
    time.sleep(0.5)
print("left", flush=True)
sys.exit(75)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert (ended.returncode, ended.stdout) == (75, "left\n"), ended.stderr


EXPERIMENT = """
from jxfer import methods
from jxfer.config import DataConfig, Experiment
experiment = Experiment(name="hangs", target=DataConfig({target!r}), methods=(methods.scratch,))
"""


def test_sigterm_ends_a_command_whose_data_lie_on_a_disk_that_does_not_answer(tmp_path):
    name = runs.write_folder(tmp_path / "set", ("a", "b"))
    (tmp_path / "hangs.py").write_text(EXPERIMENT.format(target=name))
    code = """
import os, signal, sys, time
from jxfer.data import images, threads
def hang(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
images.decode, threads.LEAVE_SECS = hang, 0.2
from jxfer.cli import main
sys.exit(main())
"""
    command = [sys.executable, "-c", code, "run", str(tmp_path / "hangs.py"), "--method", "scratch"]
    ended = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=40)
    words = "jxfer: stopped while data and weights were being opened; run the same command again to continue\n"
    assert (ended.returncode, ended.stderr) == (75, words)
