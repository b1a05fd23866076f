"""Every method on every model kind: what trains, at which rate, and from which head."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from jxfer import models
from jxfer.config import Experiment, ModelConfig, TrainConfig
from jxfer.methods import METHODS
from jxfer.partition import FROZEN, arrays_of
from jxfer.plan import plan_phases, start_phase
from jxfer.task import base_model, target_model

NEW = "new"
"""A head that begins at zero, instead of the source's rows."""

TABLE = {
    "scratch": (["all"], None),
    "zero_shot": ([], "kept"),
    "norm_statistics": (["statistics"], "kept"),
    "linear_probe": (["head"], NEW),
    "logistic_probe": (["head"], NEW),
    "ridge_probe": (["head"], NEW),
    "nearest_mean": (["head"], NEW),
    "nearest_neighbours": (["head"], NEW),
    "head2toe": (["head"], NEW),
    "feature_retraining": (["head"], NEW),
    "fine_tuning": (["all"], NEW),
    "layer_decay": (["all"], NEW),
    "fine_tuning_kept_head": (["all"], "kept"),
    "partial": (["last"], NEW),
    "lp_ft": (["head", "all"], NEW),
    "l2_sp": (["all"], NEW),
    "lora": (["updates"], NEW),
}
"""Method -> what trains in each of its phases (`last`: the last stage and the head;
`updates`: those and the head), and the head it begins with."""


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch):
    monkeypatch.setattr(models, "_CONFIGS", tiny.CONFIGS)


def experiment_of(name: str) -> Experiment:
    return Experiment("test", model=ModelConfig(name), train=TrainConfig(num_steps=6))


def build(name: str, method, *, source=None, seed: int = 0) -> nnx.Module:
    model = base_model(ModelConfig(name), method, tiny.TASK, seed=seed)
    return target_model(model, method, tiny.TASK, source=source, seed=seed)


@functools.cache
def abstract(name: str, method_name: str) -> nnx.Module:
    return nnx.eval_shape(lambda: build(name, METHODS[method_name]))


def moving_stages(kind: str, name: str, model) -> set[str]:
    stages = {path.split("/")[0] for path in arrays_of(model)}
    return {"all": stages, "head": {"head"}, "last": {"head", tiny.LAST_STAGE[name]}}[kind]


def should_move(leaf, kind: str, name: str, model) -> bool:
    if kind == "statistics":
        return leaf.kind == "statistic"
    if kind == "updates":
        return leaf.kind == "random" or "/lora/" in leaf.path or leaf.path.startswith("head/")
    return leaf.path.split("/")[0] in moving_stages(kind, name, model)


def test_the_table_is_of_all_methods_under_their_names():
    assert set(TABLE) == set(METHODS)
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary


@pytest.mark.parametrize("method_name", METHODS)
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_what_trains_is_what_the_table_says(name, method_name):
    method, model = METHODS[method_name], abstract(name, method_name)
    planned = plan_phases(experiment_of(name), method, model)
    expected, _ = TABLE[method_name]
    assert len(planned) == len(expected)
    stepping = any(phase.solver is None for phase in method.phases)
    assert sum(phase.num_steps for phase in planned) == (6 if stepping else 0)
    for phase, kind in zip(planned, expected, strict=True):
        for leaf in phase.partition.leaves:
            assert (leaf.label != FROZEN) == should_move(leaf, kind, name, model), leaf.path


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_method_ends_in_outputs_for_the_targets_classes(name):
    for method_name in METHODS:
        shapes = {path: leaf.shape for path, leaf in arrays_of(abstract(name, method_name)).items()}
        if method_name == "nearest_neighbours":
            assert shapes["head/bank"] == (1, shapes["head/bank"][1]), "a task without examples"
            continue
        kernel = "head/out/kernel" if method_name == "feature_retraining" else "head/kernel"
        assert shapes[kernel][-1] == 3, method_name


@pytest.mark.parametrize("method_name", METHODS)
def test_heads_begin_new_or_as_the_rows_of_the_source(method_name):
    source = arrays_of(tiny.build("convnet", num_classes=6, seed=7))
    start = METHODS[method_name].start
    arrays = arrays_of(build("convnet", METHODS[method_name], source=source))
    same = np.array_equal(arrays["stem/conv/kernel"], source["stem/conv/kernel"])
    assert same == (start == "source"), "the backbone is the source's, except from scratch"
    head = TABLE[method_name][1]
    if head == NEW:
        kernel = next(arrays[path] for path in ("head/kernel", "head/out/kernel", "head/bank") if path in arrays)
        assert not np.any(kernel)
    if head == "kept":
        np.testing.assert_array_equal(arrays["head/kernel"], source["head/kernel"][:, [3, 1, 0]])


def test_only_gentle_phases_scale_their_rate():
    for name, method in METHODS.items():
        scales = {group.learning_rate_scale for phase in method.phases for _, group in phase.groups}
        assert scales == ({0.1} if name == "lp_ft" else set())


def test_l2_sp_pulls_everything_but_the_new_head():
    method, model = METHODS["l2_sp"], tiny.build("convnet")
    (planned,) = plan_phases(experiment_of("convnet"), method, model)
    _, fixed = start_phase(experiment_of("convnet"), method, planned, model, key=jax.random.key(0))
    paths = {leaf.path for leaf in planned.partition.trainable}
    assert set(fixed.reference) == {path for path in paths if not path.startswith("head/")}


def test_methods_print_all_that_they_are():
    for method in METHODS.values():
        for field in dataclasses.fields(method):
            assert repr(getattr(method, field.name)) in repr(method)
    assert len({repr(method) for method in METHODS.values()}) == len(METHODS)
