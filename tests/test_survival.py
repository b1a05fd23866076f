"""SIGKILL and bad disks wherever a process may be; after restarts the results are those of an undisturbed ablation."""

import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
from survival import KINDS, Starter, assert_same, assert_whole, starter

from jxfer import checkpoint

EXPERIMENT = '''"""Pre-training, stored features, a population of heads; a path, and fine-tuning from its head."""

from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SearchConfig, SourceConfig, TrainConfig

train = TrainConfig(num_steps=8, batch_size=16, eval_every=4, log_every=2, checkpoint_every=2)
experiment = Experiment(
    name="survives",
    source=SourceConfig(DataConfig({source!r}), train),
    target=DataConfig({target!r}),
    model=ModelConfig("convnet_dropout"),
    train=train,
    search=SearchConfig(learning_rate=(1e-3, 1e-2)),
    methods=(methods.linear_probe, methods.lp_ft),
    shots=(3,),
    seeds=1,
)
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survives")
    source = runs.write_folder(folder / "source", runs.SOURCE_CLASSES)
    target = runs.write_folder(folder / "target", runs.TARGET_CLASSES)
    (folder / "survives.py").write_text(EXPERIMENT.format(source=source, target=target))
    return folder / "survives.py"


@pytest.fixture(scope="module")
def starts(file) -> Iterator[Starter]:
    with starter(file, file.with_name("xla")) as starts:
        yield starts


@pytest.fixture(scope="module")
def expected(starts: Starter, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert starts.outlives(out / "out", out / "cache")
    assert len(runs.rows_on_disk(out / "out")) == 2
    return out / "out"


# In the order in which an ablation comes to them.
MOMENTS = [("save", 21), ("evaluate", 3), ("train", 3), ("extract", 9), ("torn", 1), ("solve", 2)]
ALL_MOMENTS = [
    ("claims", 3),
    ("records", 2),
    ("save", 21),
    ("train", 3),
    ("evaluate", 3),
    ("final", 2),
    ("extract", 9),
    ("torn", 1),
    ("append", 1),
    ("solve", 2),  # the second part of the path
    ("train", 11),  # fine-tuning of the second variant
]


@pytest.mark.parametrize("moments", [MOMENTS, pytest.param(ALL_MOMENTS, marks=pytest.mark.slow)], ids=["six", "all"])
def test_killed_at_each_kind_of_moment_an_ablation_ends_as_if_it_had_not_been(starts, expected, tmp_path, moments):
    out, cache = tmp_path / "out", tmp_path / "cache"
    for what, count in moments:
        assert not starts.outlives(out, cache, what, count), f"it was never at the {count}th {what}"
        leave_for_long(out)
    assert starts.outlives(out, cache)
    assert_same(out, expected)
    assert_whole(out, cache / "features")


# In pre-training, while features are stored, between the test split and the results, and in a path.
STOPS = [("train", 3), ("extract", 7), ("torn", 1), ("solve", 1)]
# And in a population, and in fine-tuning.
ALL_STOPS = [("train", 3), ("extract", 7), ("train", 3), ("torn", 1), ("solve", 1), ("train", 3)]


@pytest.mark.parametrize("moments", [STOPS, pytest.param(ALL_STOPS, marks=pytest.mark.slow)], ids=["four", "all"])
def test_sigterm_saves_within_seconds_wherever_it_comes(starts, expected, tmp_path, moments):
    for what, count in moments:
        began = time.monotonic()
        status, words = starts.start(tmp_path / "out", tmp_path / "cache", what, count, how="terminate")
        assert status == 75, (what, words)
        assert time.monotonic() - began < 30
        assert words.endswith("; run the same command again to continue\n"), words
    assert starts.outlives(tmp_path / "out", tmp_path / "cache")
    assert_same(tmp_path / "out", expected)


@pytest.mark.parametrize(
    ("what", "count", "when"),
    [
        ("check", 1, "the experiment was being checked"),
        ("open", 2, "data and weights were being opened"),
        ("plan", 2, "plans were being made"),
        ("look", 1, "checkpoints of pre-training · all shots · seed 0 were being checked"),
    ],
)
def test_sigterm_ends_what_comes_before_training_wherever_the_code_is(starts, expected, tmp_path, what, count, when):
    ended = starts.start(tmp_path / "out", tmp_path / "cache", what, count, how="terminate")
    assert ended == (75, f"jxfer: stopped while {when}; run the same command again to continue\n")
    assert not (tmp_path / "out" / "runs").exists()
    if what == "plan":
        assert starts.outlives(tmp_path / "out", tmp_path / "cache")
        assert_same(tmp_path / "out", expected)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_ablations_end_as_if_they_had_not_been(starts, expected, tmp_path):
    rng, killed = random.Random(0), Counter()
    most = {
        "train": 20,
        "evaluate": 12,
        "solve": 4,
        "save": 60,
        "final": 20,
        "extract": 20,
        "time": 3000,
        "records": 30,
        "claims": 40,
    }
    out, cache = tmp_path / "out", tmp_path / "cache"
    while sum(killed.values()) < 20 or out.exists():
        what = min(KINDS, key=lambda kind: (killed[kind], rng.random())) if sum(killed.values()) < 20 else "nothing"
        if not starts.outlives(out, cache, what, rng.randint(1, most.get(what, 2))):
            killed[what] += 1
            leave_for_long(out)
        else:
            assert_same(out, expected)
            assert_whole(out, cache / "features")
            shutil.rmtree(out)
            shutil.rmtree(cache)
    assert set(killed) == set(KINDS)


@pytest.fixture
def disk(tmp_path) -> Path:
    """A folder for a file system of its own, which only the processes that are started see."""
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def starts_there(disk, file, expected) -> Iterator[Starter]:
    """Starts processes to which `disk` is one of 64 MB, where this one may give them one."""
    mount = ["unshare", "-Urm", "bash", "-c", f'mount -t tmpfs -o size=64m tmpfs {disk} && exec "$@"', "bash"]
    may = shutil.which("unshare") and subprocess.run([*mount, "true"], capture_output=True).returncode == 0
    with starter(file, file.with_name("xla"), mount if may else ()) as starts:
        yield starts


NOTES = r"(.*: continuing what .* left\n)?"

SOME = [("fill", "save", 21), ("vanish", "train", 2), ("fill", "append", 1)]
MORE = [("fill", "train", 3), ("fill", "evaluate", 3), ("fill", "extract", 7), ("fill", "final", 12)]
MORE += [("vanish", "append", 1), ("fill", "report", 1)]


@pytest.mark.parametrize("faults", [SOME, pytest.param(MORE, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_or_gone_is_one_line_and_costs_nothing_that_was_saved(starts_there, disk, expected, faults):
    for how, what, count in faults:
        if how == "fill" and not starts_there.has_own_disk:
            how = "limit"
        status, words = starts_there.start(disk / "out", disk / "cache", what, count, how=how)
        assert status == 2, (what, words)
        problem = {"fill": "No space left on device", "limit": "File too large", "vanish": "it is gone"}[how]
        assert re.fullmatch(rf"{NOTES}jxfer: error: cannot write to .*: .*{problem}.*\n", words), words
        assert not list(starts_there.sees(disk).rglob("*tmp*"))
        assert starts_there.sees(disk / "out").exists() == (how != "vanish")
        if what == "save":
            assert checkpoint.newest_step(starts_there.sees(disk / "out/source/checkpoints/default/0")) == 2
    assert starts_there.outlives(disk / "out", disk / "cache")
    assert_same(starts_there.sees(disk / "out"), expected)
    assert_whole(starts_there.sees(disk / "out"), starts_there.sees(disk / "cache" / "features"))


def test_a_read_only_directory_is_one_line(starts_there, disk):
    if not starts_there.has_own_disk:
        pytest.skip("may not mount a file system to be read-only; the bits of a mode do not bind root")
    for begun in (False, True):
        if begun:
            assert not starts_there.outlives(disk / "out", disk / "cache", "train", 3)
        status, words = starts_there.start(disk / "out", disk / "cache", how="readonly")
        assert status == 2, words
        assert re.fullmatch(rf"{NOTES}jxfer: error: cannot write to .*: Read-only file system.*\n", words), words


def leave_for_long(out: Path) -> None:
    """Lets what a killed process left to tell the time with be old."""
    for path in out.glob(".claims/.now-*"):
        os.utime(path, (0, 0))
