"""Memory and file handles of one process over many runs and many steps: what one run needs, the next one has back."""

import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import runs

from jxfer import ablate, methods
from jxfer.loop import Session

CHILD = """
import gc, json, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import runs
from jxfer import ablate, methods, session
from jxfer.config import ModelConfig, TrainConfig
import dataclasses

folder, method, num_runs, num_steps, every = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
experiment = dataclasses.replace(runs.write_data(Path(folder) / "data"), model=ModelConfig("convnet"))
train = TrainConfig(num_steps=num_steps, batch_size=16, eval_every=num_steps // 4, log_every=50, checkpoint_every=every)
experiment = runs.with_methods(experiment, methods.METHODS[method], seeds=num_runs, train=train)

def look():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    print(json.dumps([pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))]), flush=True)

def progress(what, done, total):
    counted = what == "runs" if num_runs > 1 else "pre-training" not in what
    if counted and total >= 200 and done and done % (total // 10) == 0:
        look()

session.prepare_jax()
ablate.ablate(experiment, Path(folder) / "out", runs.Session(progress, lambda: False), command="test")
"""


def open_files() -> list[str]:
    """Returns what this process holds open, by name."""
    found = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(handle))
    return sorted(found)


def test_runs_give_back_arrays_handles_threads_and_objects(tmp_path, monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)
    experiment = runs.with_methods(runs.write_data(tmp_path), methods.linear_probe, methods.fine_tuning, seeds=4)
    experiment = runs.with_train(experiment, num_steps=2, eval_every=1, checkpoint_every=1)
    held: dict[int, dict[str, int]] = {}
    opened: dict[int, list[str]] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what == "runs" and done >= 5:  # fine-tuning, after what the first runs leave for all
            gc.collect()
            opened[done] = open_files()
            held[done] = {
                "arrays": len(jax.live_arrays()),
                "threads": len(os.listdir("/proc/self/task")),
                # But for the lists of TensorStore's metrics, which it never frees: about 100 per run, of 70 kB in all.
                "objects": sum(type(each) is not list for each in gc.get_objects()),
            }

    ablate.ablate(experiment, tmp_path / "out", Session(progress, lambda: False), command="test")
    assert held[8]["arrays"] == held[6]["arrays"]
    # Event loops of threads that other tests of this process left open and close handles of their own in between.
    assert min(len(opened[7]), len(opened[8])) <= min(len(opened[5]), len(opened[6])), opened
    assert held[8]["threads"] <= held[6]["threads"] + 2
    assert held[8]["objects"] < held[6]["objects"] + 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "num_runs", "num_steps", "every"), [("linear_probe", 200, 4, 2), ("scratch", 1, 10_000, 500)]
)
def test_memory_and_handles_stay_flat_over(tmp_path, method, num_runs, num_steps, every):
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    code = CHILD.format(tests=str(Path(__file__).parent))
    args = [sys.executable, "-c", code, str(tmp_path), method, *map(str, (num_runs, num_steps, every))]
    ended = subprocess.run(args, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    looks = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(looks) >= 9
    resident, handles = zip(*looks[1:], strict=True)
    assert max(resident) < resident[0] + 100e6, resident  # what the allocator gives back in between is no growth
    half = len(handles) // 2  # a save that is under way has some open
    assert min(handles[half:]) <= min(handles[:half]) + 2, handles
