"""Tests of jxfer/run.py and jxfer/phase.py: every method on every kind of model, and runs that must fail."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from flax import nnx

from jxfer import checkpoint, config, data, methods, partition, phase, run, source
from jxfer.config import Experiment, Group, MeshConfig, Method, ModelConfig, Phase, SearchConfig
from jxfer.search import Job
from jxfer.surgery.head import NewHead
from jxfer.task import load_data
from jxfer.typing import InputError

TRAINS = {
    "scratch": ("",),
    "zero_shot": (),
    "norm_statistics": (),
    "linear_probe": ("head/",),
    "logistic_probe": ("head/",),
    "ridge_probe": ("head/",),
    "nearest_mean": ("head/",),
    "nearest_neighbours": ("head/",),
    "head2toe": ("head/",),
    "feature_retraining": ("head/",),
    "fine_tuning": ("",),
    "layer_decay": ("",),
    "fine_tuning_kept_head": ("",),
    "partial": ("head/", "LAST/"),
    "lp_ft": ("",),
    "l2_sp": ("",),
    "lora": ("head/", "**/lora/"),
}
"""Method -> what the paths of the parameters that train begin with, or have in them."""

LAST_STAGES = {
    "tiny_convnet": "layer2",
    "tiny_convnet_dropout": "layer2",
    "tiny_resnet20": "layer3",
    "tiny_resnet18_32": "layer4",
}

FIELDS = {
    "experiment": str,
    "source": str | None,
    "target": str,
    "model": str,
    "method": str,
    "variant": str | None,
    "shots": int | None,
    "seed": int,
    "status": str,
    "error": str | None,
    "metrics": dict | None,
    "source_metrics": dict | None,
    "params_total": int | None,
    "params_trainable": int | None,
    "optimizer_bytes": int | None,
    "checkpoint_bytes": int | None,
    "step_flops": float | None,
    "steps": int | None,
    "seconds": float,
    "config_hash": str,
    "subset_hash": str,
    "weights_hash": str | None,
    "audit": dict | None,
}
"""What every row of `results.jsonl` has."""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    return runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    runs.add_models(monkeypatch)
    runs.use_devices(monkeypatch, 1)


def run_method(
    experiment: Experiment, method: Method, directory: Path, sources: Path, *, seed: int = 0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the row of a run and the arrays it ends with; none where it failed."""
    source = (
        runs.write_source(sources / experiment.model.name, experiment.model.name) if method.start == "source" else None
    )
    row = run.run(Job(experiment, method, experiment.shots[0], seed), directory, runs.QUIET, source=source)
    final = directory / "checkpoints" / "final"
    return row, checkpoint.load_arrays(final)[0] if final.exists() else {}


def is_parameter(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in ("kernel", "bias", "scale", "bank") and not path.endswith("lora/scale")


def is_in(path: str, places: tuple[str, ...]) -> bool:
    """Tells whether a path begins with one of some prefixes, or has in it what follows a `**`."""
    return any(path.startswith(each) or (each.startswith("**") and each[2:] in path) for each in places)


def check_fields(row: dict[str, Any]) -> None:
    """Asserts that a row has every field that others read, of the right type, and is JSON."""
    assert {name: type(row[name]) for name, kind in FIELDS.items() if not isinstance(row[name], kind)} == {}
    assert json.loads(json.dumps(row)) == row


SOLVED = [name for name, m in methods.METHODS.items() if m.phases and all(p.solver is not None for p in m.phases)]
"""These see features, never the model: one kind of it is enough."""

QUICK = ("zero_shot", "norm_statistics", "linear_probe", "fine_tuning", "partial")
"""What the methods do to a model beyond its head, each once: these run quickly on every kind, all others on one."""

EACH = [
    pytest.param(model, name, marks=() if model == "tiny_convnet" or name in QUICK else pytest.mark.slow)
    for model in runs.MODELS
    for name in methods.METHODS
    if model == "tiny_convnet" or name not in SOLVED
]


@pytest.mark.parametrize(("model", "method"), EACH)
def test_every_method_runs_on_every_kind_of_model(experiment, sources, tmp_path, model, method):
    experiment = dataclasses.replace(experiment, model=ModelConfig(model))
    row, arrays = run_method(experiment, methods.METHODS[method], tmp_path, sources)

    assert (row["status"], row["error"], row["method"], row["model"]) == ("ok", None, method, model)
    check_fields(row)
    starts = tuple(start.replace("LAST", LAST_STAGES[model]) for start in TRAINS[method])
    trains = {path for path in arrays if is_parameter(path) and is_in(path, starts)}
    assert row["params_total"] == sum(arrays[path].size for path in arrays if is_parameter(path))
    assert row["params_trainable"] == sum(arrays[path].size for path in trains)
    assert row["audit"]["frozen_unchanged"]
    assert row["audit"]["trainable_moved"] == row["audit"]["trainable_total"]
    assert row["audit"]["trainable_total"] >= len(trains)
    steps = any(phase.solver is None for phase in methods.METHODS[method].phases)
    assert row["steps"] == (experiment.train.num_steps if steps else 0)
    assert (row["optimizer_bytes"] > 0) == (row["step_flops"] > 0) == steps
    assert row["num_train"] == 3 * len(runs.TARGET_CLASSES)
    check_that_only_what_trains_moved(row, arrays, starts, runs.write_source(sources / model, model).arrays)
    check_predictions(row, tmp_path / "predictions.npz")


def check_that_only_what_trains_moved(
    row: dict[str, Any], arrays: dict[str, np.ndarray], starts: tuple[str, ...], source: dict[str, np.ndarray]
) -> None:
    for path in source.keys() & arrays.keys():
        keeps_rows = row["method"] in ("zero_shot", "norm_statistics")
        if "rngs" in path or (keeps_rows and path.startswith("head/")):
            continue
        moved = not np.array_equal(arrays[path], source[path])
        statistic = row["method"] == "norm_statistics" and not is_parameter(path)
        assert moved == (statistic or is_in(path, starts)), path


def check_predictions(row: dict[str, Any], path: Path) -> None:
    """Asserts that the metrics are those of the predictions, computed by other means."""
    with np.load(path, allow_pickle=False) as stored:
        ids, labels, logits = stored["ids"], stored["labels"], stored["logits"].astype(np.float64)
    assert (ids.dtype.kind, labels.dtype, logits.shape) == ("U", np.int32, (len(ids), len(runs.TARGET_CLASSES)))
    loss = (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]).mean()
    assert row["metrics"]["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean(), abs=1e-12)
    assert row["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)  # float32 on the device


@pytest.mark.parametrize("model", runs.MODELS)
def test_zero_shot_gives_the_columns_of_the_sources_logits(experiment, sources, tmp_path, model):
    experiment = dataclasses.replace(experiment, model=ModelConfig(model))
    row, _ = run_method(experiment, methods.zero_shot, tmp_path, sources)
    assert (row["params_trainable"], row["steps"], row["train_flops"]) == (0, 0, 0)

    module = runs.build_source(model)
    source = runs.write_source(sources / model, model)
    full = partition.Partition.of(module, [("**", "frozen")])
    module = full.assemble(partition.eval_graphdef(module), partition.arrays_of(module) | source.arrays)
    test = data.draw(load_data(experiment.target), experiment.target, 3, 0).test
    images = (test.read(np.arange(len(test)))["image"] / np.float32(255) - 0.5) / 0.5
    columns = [runs.SOURCE_CLASSES.index(name) for name in runs.TARGET_CLASSES]
    with np.load(tmp_path / "predictions.npz", allow_pickle=False) as stored:
        np.testing.assert_allclose(
            stored["logits"], module(jax.numpy.asarray(images))[:, columns], rtol=1e-5, atol=1e-5
        )


def test_the_variants_of_a_search_are_listed_and_validation_chooses(experiment, sources, tmp_path):
    searching = dataclasses.replace(
        experiment, search=SearchConfig(learning_rate=(1e-5, 1e-2), weight_decay=(0.0, 1e-2))
    )
    row, _ = run_method(searching, methods.linear_probe, tmp_path / "search", sources)
    names = [variant["variant"] for variant in row["variants"]]
    assert names == [f"learning_rate={rate:g},weight_decay={decay:g}" for rate in (1e-5, 1e-2) for decay in (0, 1e-2)]
    best = max(row["variants"], key=lambda variant: phase.rank(variant["validation_metrics"]))
    assert (row["variant"], row["validation_metrics"]) == (best["variant"], best["validation_metrics"])

    alone = runs.with_train(experiment, learning_rate=1e-2, weight_decay=0.0)
    single, _ = run_method(alone, methods.linear_probe, tmp_path / "alone", sources)
    third = row["variants"][2]["validation_metrics"]
    assert single["validation_metrics"] == third, "a variant trains as it would have alone"
    flops = single["steps"] * single["step_flops"]
    assert single["train_flops"] == pytest.approx(flops + single["features"]["flops"])
    assert single["features"]["flops"] > 0, "computing the stored features counts too"
    # What XLA counts of four variants as one differs by what it fuses.
    assert row["train_flops"] == pytest.approx(4 * flops + single["features"]["flops"], rel=0.01), "and once for all"
    assert [phase["parts"] for phase in row["population"]] == [[4]]


def test_a_method_without_phases_has_nothing_to_search(experiment, sources, tmp_path):
    searching = dataclasses.replace(experiment, search=SearchConfig(learning_rate=(1e-3, 1e-2)))
    row, _ = run_method(searching, methods.zero_shot, tmp_path, sources)
    assert [variant["variant"] for variant in row["variants"]] == ["default"]


def test_a_variant_that_diverges_fails_alone(experiment, sources, tmp_path):
    searching = dataclasses.replace(experiment, search=SearchConfig(learning_rate=(1e30, 1e-2)))
    row, _ = run_method(searching, methods.fine_tuning, tmp_path, sources)
    assert (row["status"], row["variant"]) == ("ok", "learning_rate=0.01")
    errors = {variant["variant"]: variant.get("error") for variant in row["variants"]}
    assert errors["learning_rate=0.01"] is None
    failed_at = int(re.search(r"at step (\d+)", errors["learning_rate=1e+30"])[1])
    steps = row["steps"] + failed_at
    assert row["train_flops"] == pytest.approx(steps * row["step_flops"]), "what was tried in vain has its cost too"


def test_a_run_whose_every_variant_diverges_is_a_failed_row_naming_step_and_metric(experiment, sources, tmp_path):
    row, arrays = run_method(runs.with_train(experiment, learning_rate=1e30), methods.fine_tuning, tmp_path, sources)
    assert (row["status"], row["metrics"], row["audit"], arrays) == ("failed", None, None, {})
    assert row["error"].startswith("loss is nan at step 2;"), row["error"]
    check_fields(row)


def test_a_frozen_array_that_changed_fails_the_run(experiment, sources, tmp_path, monkeypatch):
    real = phase.train

    def leaking(train_step, state, fixed, *args, **kwargs):
        state = real(train_step, state, fixed, *args, **kwargs)
        fixed.params["stem/conv/kernel"] = fixed.params["stem/conv/kernel"].at[0, 0, 0, 0].add(1e-6)
        return state

    monkeypatch.setattr(phase, "train", leaking)
    row, _ = run_method(experiment, methods.linear_probe, tmp_path, sources)
    assert row["status"] == "failed"
    assert row["error"] == "audit of phase `probe`: frozen but changed or not deterministic: stem/conv/kernel"


def test_frozen_batch_norm_left_in_training_mode_fails_the_run(experiment, sources, tmp_path, monkeypatch):
    # A phase of its own, since equal definitions are made once and remembered.
    method = dataclasses.replace(methods.linear_probe, phases=(Phase("leaky", train=("head",)),))
    experiment = dataclasses.replace(runs.with_train(experiment, num_steps=3), features="off")
    monkeypatch.setattr(partition.Partition, "train_graphdef", lambda self, model: nnx.graphdef(model))
    row, _ = run_method(experiment, method, tmp_path, sources)
    assert row["status"] == "failed"
    assert row["error"].startswith("audit of phase `leaky`: frozen but changed or not deterministic: ")
    assert "stem/bn" in row["error"]


def test_a_trainable_leaf_that_never_moves_fails_the_run(experiment, sources, tmp_path):
    stuck = Phase("tune", train=methods.ALL, groups=(("backbone", Group(learning_rate_scale=0.0)),))
    method = Method("stuck", surgeries=(NewHead(),), phases=(stuck,))
    row, _ = run_method(experiment, method, tmp_path, sources)
    assert row["status"] == "failed"
    assert "trainable but never moved: layer1/bn/bias" in row["error"]


@pytest.mark.parametrize(
    ("method", "batch_size", "count", "mesh"),
    [
        pytest.param(methods.fine_tuning_kept_head, 16, 8, MeshConfig(), marks=pytest.mark.slow),
        (runs.TWO_PHASES, 16, 8, MeshConfig(fsdp=2)),
        pytest.param(methods.partial, 15, 3, MeshConfig(fsdp=3), marks=pytest.mark.slow),
        (methods.linear_probe, 15, 8, MeshConfig()),
    ],
    ids=["data 8", "data 4 × fsdp 2", "fsdp 3", "padded"],
)
def test_a_run_on_several_devices_gives_the_metrics_of_one(
    experiment, sources, tmp_path, monkeypatch, method, batch_size, count, mesh
):
    # sgd, because adamw makes a sign of what is rounding where a gradient is zero.
    settings = {"batch_size": batch_size, "optimizer": "sgd", "learning_rate": 0.05}
    experiment = runs.with_train(dataclasses.replace(experiment, model=ModelConfig("tiny_resnet20")), **settings)
    alone, arrays = run_method(experiment, method, tmp_path / "1", sources)
    runs.use_devices(monkeypatch, count)
    sharded = dataclasses.replace(experiment, mesh=mesh)
    row, sharded_arrays = run_method(sharded, method, tmp_path / "n", sources)
    assert row["status"] == "ok"
    assert row["metrics"]["loss"] == pytest.approx(alone["metrics"]["loss"], rel=1e-4)
    assert row["validation_metrics"]["loss"] == pytest.approx(alone["validation_metrics"]["loss"], rel=1e-4)
    assert row["metrics"]["accuracy"] == alone["metrics"]["accuracy"]
    for path, value in arrays.items():
        np.testing.assert_allclose(sharded_arrays[path], value, rtol=1e-3, atol=1e-5, err_msg=path)


def test_a_run_leaves_its_resolved_config_and_logs(experiment, sources, tmp_path):
    row, _ = run_method(experiment, runs.TWO_PHASES, tmp_path, sources)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["experiment"] == json.loads(json.dumps(config.to_dict(experiment)))
    assert (record["method"]["name"], record["shots"], record["seed"]) == ("two_phases", 3, 0)
    assert record["task"]["target_classes"] == list(runs.TARGET_CLASSES)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["phase"], r["split"], r["step"]) for r in logged if r["split"] == "validation"] == [
        ("probe", "validation", 2),
        ("tune", "validation", 2),
    ]
    assert all(np.isfinite(r["loss"]) and r["variant"] == "default" for r in logged)
    assert all(0 <= r["input_wait"] <= 1 and r["examples_per_sec"] > 0 for r in logged if r["split"] == "train")
    assert any(row["validation_metrics"].items() <= r.items() for r in logged)
    assert list(tmp_path.glob("events.*"))


def test_the_log_has_the_share_of_the_peak_that_the_devices_are_known_to_have(
    experiment, sources, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        "jxfer.context.peak_flops", lambda devices, dtype: asked.append((len(list(devices)), dtype)) or 1e12
    )
    row, _ = run_method(experiment, methods.linear_probe, tmp_path, sources)
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    windows = [r for r in logged if r["split"] == "train"]
    assert windows
    for window in windows:
        steps_per_sec = window["examples_per_sec"] / experiment.train.batch_size
        assert window["mfu"] == pytest.approx(row["step_flops"] * steps_per_sec / 1e12)
    assert set(asked) == {(1, "float32")}, "of the devices of the mesh"


def test_the_hash_of_a_config_changes_with_what_changes_results_and_nothing_else(experiment):
    job = Job(experiment, methods.linear_probe, 3, 0)
    other_grid = runs.with_methods(experiment, methods.scratch, shots=(1, 3), seeds=9, wandb=True)
    assert dataclasses.replace(job, experiment=other_grid).config_hash == job.config_hash
    for other in (
        dataclasses.replace(job, seed=1),
        dataclasses.replace(job, shots=2),
        dataclasses.replace(job, method=methods.partial),
        dataclasses.replace(job, experiment=runs.with_train(experiment, learning_rate=2e-2)),
    ):
        assert other.config_hash != job.config_hash


def test_the_weights_of_a_run_that_never_finished_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"no finished run in .*; run it to its end first"):
        source.load_source(tmp_path)
