"""Tests of jxfer/solve.py: solved heads in runs, plans and predictions, and what must fail."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import runs

from jxfer import methods, phase, predict, run, solve
from jxfer.config import AugmentConfig, Method, ModelConfig, Phase, SearchConfig
from jxfer.plan import plan_experiment
from jxfer.run import Job
from jxfer.solvers import logistic
from jxfer.solvers.logistic import LogisticPath
from jxfer.source import load_run
from jxfer.surgery.head import NewHead
from jxfer.typing import InterruptedRun

SOLVED = ("logistic_probe", "ridge_probe", "nearest_mean", "nearest_neighbours", "head2toe")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        runs.add_models(patch)
        return runs.write_source(tmp_path_factory.mktemp("sources") / "tiny_convnet", "tiny_convnet")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)


def run_method(experiment, method: Method, directory, source) -> dict:
    return run.run(Job(experiment, method, 3, 0), directory, runs.QUIET, source=source)


@pytest.mark.parametrize("name", [*SOLVED[:-1], pytest.param("head2toe", marks=pytest.mark.slow)])
def test_the_variants_of_a_solver_are_its_path_and_a_search_changes_nothing(experiment, source, tmp_path, name):
    searching = dataclasses.replace(experiment, search=SearchConfig(learning_rate=(1e-3, 1e-2)))
    row = run_method(searching, methods.METHODS[name], tmp_path, source)
    assert (row["status"], row["error"]) == ("ok", None)
    names = [variant["variant"] for variant in row["variants"]]
    assert row["variant"] in names
    assert len(set(names)) == len(names)
    best = max(row["variants"], key=lambda v: (v["validation_metrics"]["accuracy"], -v["validation_metrics"]["loss"]))
    assert best["validation_metrics"]["accuracy"] == row["validation_metrics"]["accuracy"]
    assert (row["steps"], row["optimizer_bytes"]) == (0, 0)
    assert row["train_flops"] >= row["features"]["flops"] > 0
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["setting"] for line in logged] == names
    assert row["audit"] == {
        "frozen_unchanged": True,
        "trainable_moved": len(row_paths(name)),
        "trainable_total": len(row_paths(name)),
    }


def row_paths(name: str) -> tuple[str, ...]:
    return ("head/bank",) if name == "nearest_neighbours" else ("head/kernel", "head/bias")


@pytest.mark.parametrize("name", SOLVED)
def test_a_finished_run_with_a_solved_head_predicts_what_it_said_of_the_test_split(experiment, source, tmp_path, name):
    run_method(experiment, methods.METHODS[name], tmp_path, source)
    finished = load_run(tmp_path)
    with np.load(tmp_path / "predictions.npz") as stored:
        ids, expected = stored["ids"], stored["logits"]
    test = run.data.draw(run.load_data(experiment.target), experiment.target, 3, 0).test
    assert list(test.ids) == list(ids)
    logits = predict.classifier(finished)(test.read(np.arange(len(test)))["image"])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)  # other batches, float32


def test_a_run_on_all_stages_says_how_well_each_stage_does(experiment, source, tmp_path):
    row = run_method(experiment, methods.head2toe, tmp_path, source)
    assert [stage["stage"] for stage in row["stages"]] == ["stem", "layer1", "layer2"]
    assert all(0 <= stage["validation_metrics"]["accuracy"] <= 1 for stage in row["stages"])
    assert row["params_trainable"] == (4 + 6 + 8) * 3 + 3


def test_fine_tuning_starts_from_the_probe_and_takes_all_steps(experiment, source, tmp_path, monkeypatch):
    begins = []

    def run_phase(context, planned, model, splits, **kwargs):
        begins.append(phase.evaluate_model(context.experiment, context.num_classes, model, splits.validation)[0])
        return phase.run_phase(context, planned, model, splits, **kwargs)

    monkeypatch.setattr("jxfer.search.run_phase", run_phase)
    searching = dataclasses.replace(experiment, search=SearchConfig(learning_rate=(1e-3, 1e-2)))
    row = run_method(searching, methods.lp_ft, tmp_path, source)
    assert (row["status"], row["error"], row["steps"]) == ("ok", None, experiment.train.num_steps)
    assert [variant["variant"] for variant in row["variants"]] == ["learning_rate=0.001", "learning_rate=0.01"]
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    probe = [line for line in logged if line["phase"] == "probe"]
    assert len(probe) == len(LogisticPath().strengths), "solved once for both variants"
    best = max(probe, key=lambda line: (line["accuracy"], -line["loss"]))
    assert len(begins) == 2
    for metrics in begins:
        assert metrics["accuracy"] == best["accuracy"]
        assert metrics["loss"] == pytest.approx(best["loss"], rel=1e-3)  # float32, another program


@pytest.mark.parametrize("name", ["logistic_probe", "nearest_neighbours"])
def test_a_wish_to_stop_ends_a_solver_wherever_it_is_and_the_stored_features_stay(
    experiment, source, tmp_path, monkeypatch, name
):
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logistic, "STRETCH_FLOPS", 1.0)
    asked: list[None] = []

    def count():
        asked.append(None)
        return False

    job = Job(experiment, methods.METHODS[name], 3, 0)
    expected = run.run(job, tmp_path / "whole", runs.QUIET, source=source)
    assert expected["features"]["computed"] > 0
    run.run(job, tmp_path / "again", dataclasses.replace(runs.QUIET, should_stop=count), source=source)
    for most in (0, len(asked) // 2, len(asked) - 1):
        left = iter(range(most))
        session = dataclasses.replace(runs.QUIET, should_stop=lambda left=left: next(left, None) is None)
        with pytest.raises(InterruptedRun, match=r"stopped while (solving|evaluating) "):
            run.run(job, tmp_path / "stopped", session, source=source)
    row = run.run(job, tmp_path / "stopped", runs.QUIET, source=source)
    assert row["features"]["computed"] == 0
    assert runs.timeless(row) == runs.timeless(expected)


@pytest.mark.parametrize(
    "change", [{"features": "off"}, {"target": AugmentConfig(flip=True)}], ids=["features=off", "augmentation"]
)
def test_solvers_use_plain_features_whatever_is_stored(experiment, source, tmp_path, change):
    plain = run_method(experiment, methods.ridge_probe, tmp_path / "plain", source)
    if "target" in change:
        change = {"target": dataclasses.replace(experiment.target, augment=change["target"])}
    changed = dataclasses.replace(experiment, **change)
    row = run_method(changed, methods.ridge_probe, tmp_path / "changed", source)
    assert row["metrics"] == pytest.approx(plain["metrics"], rel=1e-5)
    assert row["train_flops"] == pytest.approx(plain["train_flops"], rel=1e-3)
    (planned,) = plan_experiment(changed, methods.ridge_probe).to_json()["phases"]
    assert ("without augmentation" in planned["features"]) == ("target" in change)
    assert ("features=off" in planned["features"]) == ("features" in change)


def test_a_path_of_which_nothing_is_solved_fails_the_run_and_one_unsolved_setting_is_not_chosen(
    experiment, source, tmp_path
):
    def method(strengths):
        solver = LogisticPath(strengths, max_iterations=1, tolerance=1e-4)
        return Method("hasty", surgeries=(NewHead(),), phases=(Phase("solve", ("head",), solver=solver),))

    row = run_method(experiment, method((1e-6,)), tmp_path / "none", source)
    assert row["status"] == "failed"
    assert "no setting of LogisticPath" in row["error"]
    row = run_method(experiment, method((1e-6, 1e4)), tmp_path / "one", source)
    assert row["variant"] == "strength=10000"
    assert row["variants"][0]["error"].startswith("not converged: the norm of the scaled gradient is")


def test_a_network_that_says_something_else_than_the_solver_fails_the_run(experiment, source, tmp_path, monkeypatch):
    real = solve._with_head
    monkeypatch.setattr(solve, "_with_head", lambda state, head: real(state, jax.tree.map(lambda x: 1.1 * x, head)))
    row = run_method(experiment, methods.logistic_probe, tmp_path, source)
    assert row["status"] == "failed"
    assert "the logits with the solved head in place are" in row["error"]


def test_a_plan_has_the_solvers_cost_and_no_steps(experiment):
    plan = plan_experiment(experiment, methods.logistic_probe)
    (planned,) = plan.to_json()["phases"]
    assert (planned["steps"], planned["optimizer_bytes"]) == (0, 0)
    assert planned["step_flops"] > 0
    assert planned["features"].startswith("solved: the frozen stages before `head` run once per example; 0.0 MB for")
    assert "solver: LogisticPath(" in str(plan)
    assert "one iteration:" in str(plan)
    (planned,) = plan_experiment(experiment, methods.nearest_neighbours).to_json()["phases"]
    bank = next(leaf for leaf in planned["leaves"] if leaf["path"] == "head/bank")
    assert bank["shape"] == [3 * len(runs.TARGET_CLASSES), 8]


def test_probes_of_a_computation_in_bfloat16_are_held_to_what_it_can_say(experiment, source, tmp_path):
    half = dataclasses.replace(experiment, model=ModelConfig("tiny_convnet", dtype="bfloat16"))
    row = run_method(half, methods.logistic_probe, tmp_path, source)
    assert (row["status"], row["error"]) == ("ok", None)
