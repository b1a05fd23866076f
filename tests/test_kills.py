"""The kill matrix: SIGKILL wherever a process may be, and after restarts the results of an undisturbed ablation."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import runs
from kills import KINDS, Starter, assert_same, assert_whole, starter

pytestmark = pytest.mark.usefixtures("quick_compiles")

EXPERIMENT = '''"""Pre-training, a population, stored features, a solver and fine-tuning from what it found."""

from jxfer import methods
from jxfer.config import DataConfig, Experiment, ModelConfig, SearchConfig, SourceConfig, TrainConfig

train = TrainConfig(num_steps=8, batch_size=16, eval_every=4, log_every=2, checkpoint_every=2)
experiment = Experiment(
    name="killed",
    source=SourceConfig(DataConfig({source!r}), train),
    target=DataConfig({target!r}),
    model=ModelConfig("convnet_dropout"),
    train=train,
    search=SearchConfig(learning_rate=(1e-3, 1e-2)),
    methods=(methods.linear_probe,),
    shots=(3,),
    seeds=2,
)
'''


@pytest.fixture(scope="module")
def starts(tmp_path_factory, quick_compiles):
    folder = tmp_path_factory.mktemp("killed")
    source = runs.write_folder(folder / "source", runs.SOURCE_CLASSES)
    target = runs.write_folder(folder / "target", runs.TARGET_CLASSES)
    (folder / "killed.py").write_text(EXPERIMENT.format(source=source, target=target))
    with starter(folder / "killed.py", folder / "errors", folder / "xla") as starts:
        yield starts


@pytest.fixture(scope="module")
def expected(starts: Starter, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert starts.start(out / "out", out / "cache")
    assert len(runs.rows_on_disk(out / "out")) == 2
    return out / "out"


def test_killed_at_each_kind_of_moment_an_ablation_ends_as_if_it_had_not_been(starts, expected, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    moments = {
        "claims": 3,
        "records": 2,
        "save": 21,
        "train": 3,
        "evaluate": 3,
        "final": 2,
        "extract": 9,
        "torn": 1,
        "append": 1,
    }
    for what, count in moments.items():
        assert not starts.start(out, cache, what, count), f"it was never at the {count}th {what}"
        leave_for_long(out)
    assert starts.start(out, cache)
    assert_same(out, expected)
    assert_whole(out, cache / "features")


@pytest.mark.slow
def test_killed_at_twenty_random_moments_ablations_end_as_if_they_had_not_been(starts, expected, tmp_path):
    rng, killed = random.Random(0), Counter()
    most = {
        "train": 9,
        "evaluate": 8,
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
        if not starts.start(out, cache, what, rng.randint(1, most.get(what, 2))):
            killed[what] += 1
            leave_for_long(out)
        else:
            assert_same(out, expected)
            assert_whole(out, cache / "features")
            shutil.rmtree(out)
            shutil.rmtree(cache)
    assert set(killed) == set(KINDS)


def leave_for_long(out: Path) -> None:
    """Lets what a killed process left to tell the time with be old."""
    for path in out.glob(".claims/.now-*"):
        os.utime(path, (0, 0))
