"""Every experiment runs, shrunk: a few steps of each method, one seed, the first number of shots, and its report."""

import ast
import dataclasses
from pathlib import Path

import pytest
import runs

from jxfer import ablate, report
from jxfer.config import DataConfig, Experiment, SearchConfig, TrainConfig
from jxfer.overrides import load_experiment

pytestmark = pytest.mark.usefixtures("quick_compiles")

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("*.py"))


def shrink(train: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        train, num_steps=4, batch_size=16, eval_every=2, log_every=2, warmup_steps=0, checkpoint_every=None
    )


def shrunk(experiment: Experiment, folder: Path) -> Experiment:
    """Returns the experiment with little to do and its first four methods, as `test_run.py` has them all.

    A folder of the user's own is one that is written here.
    """
    target = experiment.target
    if target.name.startswith("folder:"):
        target = dataclasses.replace(target, name=runs.write_folder(folder, runs.TARGET_CLASSES))
    return dataclasses.replace(
        experiment,
        source=dataclasses.replace(experiment.source, train=shrink(experiment.source.train)),
        target=target,
        model=dataclasses.replace(experiment.model, name=f"tiny_{experiment.model.name}"),
        train=shrink(experiment.train),
        methods=experiment.methods[:4],
        search=SearchConfig(*(values[:1] for values in dataclasses.astuple(experiment.search))),
        shots=experiment.shots[:1],
        seeds=1,
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_experiment_runs_and_makes_its_report(file, tmp_path, monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)
    experiment = shrunk(load_experiment(file), tmp_path / "folder")
    rows = ablate.ablate(experiment, tmp_path / "out", runs.QUIET, command=f"jxfer ablate {file}")
    assert [(row["method"], row["status"], row["error"]) for row in rows] == [
        (method.name, "ok", None) for method in experiment.methods
    ]
    report.build(tmp_path / "out")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert all(method.name in text for method in experiment.methods)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_experiment_says_what_it_claims_and_how_to_run_it(file):
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert f"jxfer ablate experiments/{file.name}" in docstring
    assert load_experiment(file).name == file.stem


def test_there_is_an_experiment_on_a_folder_of_the_users_own():
    targets = [load_experiment(file).target for file in FILES]
    assert any(isinstance(target, DataConfig) and target.name.startswith("folder:") for target in targets)
