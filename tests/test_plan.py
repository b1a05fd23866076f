"""Plans: phases resolved and costed without a weight, the promised JSON, and errors before anything trains."""

import dataclasses
import json
import re

import jax
import numpy as np
import optax
import pytest
import runs
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net

from jxfer import config, models, plan
from jxfer.config import (
    AugmentConfig,
    DataConfig,
    Experiment,
    Group,
    Method,
    ModelConfig,
    Phase,
    SourceConfig,
    TrainConfig,
)
from jxfer.data import Dataset
from jxfer.methods import feature_retraining, fine_tuning, linear_probe, partial, ridge_probe, zero_shot
from jxfer.partition import arrays_of
from jxfer.plan import plan_method, plan_phases, start_phase
from jxfer.task import Task, base_model, target_model
from jxfer.typing import InputError
from jxfer.variants import Variant

EXPERIMENT = Experiment("test", train=TrainConfig(num_steps=10, batch_size=4, weight_decay=0.2))
TASK = tiny.TASK


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch):
    monkeypatch.setattr(models, "_CONFIGS", models._CONFIGS | tiny.CONFIGS)


def with_phases(*phases: Phase, **changes) -> Method:
    return dataclasses.replace(fine_tuning, phases=phases, **changes)


def abstract(method: Method = fine_tuning, name: str = "convnet") -> nnx.Module:
    def build():
        return target_model(base_model(ModelConfig(name), method, TASK, seed=0), method, TASK, source=None, seed=0)

    return nnx.eval_shape(build)


def resolve(method: Method, *, experiment: Experiment = EXPERIMENT, name: str = "convnet"):
    return plan_phases(experiment, method, abstract(name=name))


@settings(deadline=None, max_examples=25)
@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=6), num_steps=st.integers(1, 1000))
def test_the_steps_of_the_phases_add_up_to_those_of_the_run(weights, num_steps):
    model = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    phases = tuple(Phase(str(i), train=("all",), share=weight / sum(weights)) for i, weight in enumerate(weights))
    method = Method("some", rules=(("**", "all"),), phases=phases)
    experiment = dataclasses.replace(EXPERIMENT, train=TrainConfig(num_steps=num_steps))
    steps = [planned.num_steps for planned in plan_phases(experiment, method, model)]
    assert sum(steps) == num_steps
    for count, weight in zip(steps, weights, strict=True):
        assert abs(count - num_steps * weight / sum(weights)) <= 1


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_last_is_the_last_stage_with_parameters_before_the_head(name):
    (planned,) = resolve(partial, name=name)
    last = {leaf.path.split("/")[0] for leaf in planned.partition.leaves if leaf.label == "last"}
    assert last == {tiny.LAST_STAGE[name]}


def test_a_model_without_stages_has_no_last_one():
    with pytest.raises(InputError, match=r"rule `\{last\}/\*\*` needs a stage before the head; Net.stages names none"):
        plan_phases(EXPERIMENT, partial, Net(nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("experiment", "method", "stored", "why"),
    [
        (EXPERIMENT, linear_probe, True, "the frozen stages before `head` run once per example"),
        (EXPERIMENT, fine_tuning, False, "the first stage trains"),
        (dataclasses.replace(EXPERIMENT, features="off"), linear_probe, False, "features=off"),
        (
            dataclasses.replace(EXPERIMENT, target=DataConfig(augment=AugmentConfig(flip=True))),
            linear_probe,
            False,
            "newly augmented",
        ),
    ],
)
def test_features_are_stored_where_that_gives_the_same_result(experiment, method, stored, why):
    (planned,) = resolve(method, experiment=experiment)
    assert planned.stored == stored
    assert why in planned.why


def test_a_phase_that_names_an_unknown_label_is_told_the_nearest():
    with pytest.raises(InputError, match=r"label in phase `tune` of method `fine_tuning`: `heads`; nearest: `head`"):
        resolve(with_phases(Phase("tune", train=("heads",))))
    phase = Phase("tune", train=("head",), groups=(("backbon", Group(0.1)),))
    with pytest.raises(InputError, match=r"`backbon`; nearest: `backbone`"):
        resolve(with_phases(phase))


def test_rules_that_do_not_fit_the_model_are_refused():
    phase = Phase("tune", train=("top",))
    with pytest.raises(InputError, match=r"no parameter matches `layer9/\*\*`; nearest: `layer[12]/\*\*`"):
        resolve(with_phases(phase, rules=(("layer9/**", "top"), ("**", "frozen"))))
    with pytest.raises(InputError, match=r"no rule covers parameter `layer1/.*end the rules with"):
        resolve(with_phases(phase, rules=(("head/**", "top"),)))


def test_a_method_that_keeps_the_head_of_other_classes_is_refused():
    keeps = dataclasses.replace(fine_tuning, name="keeps", surgeries=())
    with pytest.raises(InputError, match=r"`keeps` keeps the head of the source's 6 classes, .* target's 3; add"):
        plan_method(EXPERIMENT, keeps, TASK)
    same = Task(TASK.target_classes, TASK.target_classes, TASK.input_shape)
    model = base_model(ModelConfig(), keeps, same, seed=0)
    assert target_model(model, keeps, same, source=None, seed=0) is model


def test_a_seed_fixes_every_random_weight():
    def arrays(seed):
        model = base_model(ModelConfig(), feature_retraining, TASK, seed=seed)
        return arrays_of(target_model(model, feature_retraining, TASK, source=None, seed=seed))

    first, again, other = arrays(0), arrays(0), arrays(1)
    for path in ("stem/conv/kernel", "head/hidden/kernel"):
        np.testing.assert_array_equal(first[path], again[path])
        assert np.any(first[path] != other[path]), path


LEAF_TYPES = {
    "path": str,
    "shape": list,
    "label": str,
    "learning_rate_scale": float,
    "weight_decay": float,
    "dtype": str,
    "count": int,
}
PHASE_TYPES = {
    "name": str,
    "steps": int,
    "params_total": int,
    "params_trainable": int,
    "optimizer_bytes": int,
    "step_flops": float,
    "temp_bytes": int,
    "frozen_boundary": (str, type(None)),
    "leaves": list,
}


def test_the_json_has_every_promised_field():
    planned = json.loads(json.dumps(plan_method(EXPERIMENT, runs.TWO_PHASES, TASK).to_json()))
    assert planned["method"] == "two_phases"
    assert [(phase["name"], phase["steps"]) for phase in planned["phases"]] == [("probe", 5), ("tune", 5)]
    for phase in planned["phases"]:
        for name, kind in PHASE_TYPES.items():
            assert isinstance(phase[name], kind), name
        for leaf in phase["leaves"]:
            for name, kind in LEAF_TYPES.items():
                assert isinstance(leaf[name], kind), name
            assert leaf["count"] == int(np.prod(leaf["shape"]))
        parameters = [leaf for leaf in phase["leaves"] if leaf["kind"] == "parameter"]
        assert sum(leaf["count"] for leaf in parameters) == phase["params_total"]
        moving = [leaf for leaf in parameters if leaf["label"] != "frozen"]
        assert sum(leaf["count"] for leaf in moving) == phase["params_trainable"]
    probe, tune = ({leaf["path"]: leaf for leaf in phase["leaves"]} for phase in planned["phases"])
    assert planned["phases"][0]["frozen_boundary"] == "head"
    assert planned["phases"][1]["frozen_boundary"] is None
    assert probe["head/kernel"] | {"learning_rate_scale": 1.0, "weight_decay": 0.2} == probe["head/kernel"]
    assert probe["head/bias"]["weight_decay"] == 0
    assert probe["stem/conv/kernel"]["learning_rate_scale"] == 0
    assert tune["stem/conv/kernel"]["learning_rate_scale"] == pytest.approx(0.1)


def test_the_text_shows_phases_table_cost_and_features():
    text = str(plan_method(EXPERIMENT, linear_probe, TASK))
    head, table = text.split("\n")[:2]
    assert head == "linear_probe · phase probe · 10 steps"
    assert table.split() == ["path", "shape", "dtype", "count", "label", "rate", "×", "decay", "×"]
    assert "27 of " in text
    assert "FLOPs" in text
    assert "optimizer state: " in text
    assert text.endswith("features: stored: the frozen stages before `head` run once per example")


def test_a_method_without_phases_trains_nothing():
    planned = plan_method(EXPERIMENT, zero_shot, TASK)
    assert planned.to_json() == {"method": "zero_shot", "phases": []}
    assert str(planned) == "zero_shot: nothing trains"


def test_a_plan_costs_what_the_run_will_cost():
    (planned, cost), *_ = plan_method(EXPERIMENT, linear_probe, TASK).phases
    model = base_model(ModelConfig(), linear_probe, TASK, seed=0)
    model = target_model(model, linear_probe, TASK, source=None, seed=0)
    state, fixed = start_phase(EXPERIMENT, linear_probe, planned, model, key=jax.random.key(0))
    train_step, _ = plan.phase_steps(EXPERIMENT, linear_probe, planned, 3)
    batch = {"features": np.zeros((4, 8), np.float32), "label": np.zeros(4, np.int32), "mask": np.ones(4, np.float32)}
    assert plan.cost_of(train_step, state, fixed, batch) == cost


def test_a_run_starts_with_the_rate_that_the_plan_states_for_its_batch_size():
    experiment = runs.with_train(EXPERIMENT, learning_rate=0.1, base_batch_size=16)  # and batches of 4
    (planned, _), *_ = (planning := plan_method(experiment, linear_probe, TASK)).phases
    said = planning.to_json()["phases"][0]
    assert (said["learning_rate"], said["learning_rate_rule"].split(" ")[0]) == (pytest.approx(0.05), "square")
    expected = "learning rate: 0.05, which is 0.1 by square root (arXiv:2205.10287) from batches of 16 to 4, with adamw"
    assert expected in str(planning)
    model = base_model(ModelConfig(), linear_probe, TASK, seed=0)
    model = target_model(model, linear_probe, TASK, source=None, seed=0)
    state, _ = start_phase(experiment, linear_probe, planned, model, key=jax.random.key(0))
    assert optax.tree.get(state.opt_state, "learning_rate") == pytest.approx(0.05)
    tried = [Variant("a", experiment.train, linear_probe)]
    tried.append(dataclasses.replace(tried[0], train=dataclasses.replace(experiment.train, learning_rate=0.4)))
    population, _ = plan.start_population(tried, planned, [model, model], key=jax.random.key(0))
    np.testing.assert_allclose(optax.tree.get(population.state.opt_state, "learning_rate"), [0.05, 0.2], rtol=1e-6)
    unscaled = plan_method(EXPERIMENT, linear_probe, TASK)
    assert unscaled.to_json()["phases"][0]["learning_rate"] == EXPERIMENT.train.learning_rate
    assert "learning rate:" not in str(unscaled)


def test_planning_a_resnet50_makes_no_weight_and_a_probe_pays_for_its_head_alone(monkeypatch):
    costed, cost_of = [], plan.cost_of

    def spy(train_step, *shapes, **options):
        costed.extend(jax.tree.leaves(shapes))
        return cost_of(train_step, *shapes, **options)

    monkeypatch.setattr(plan, "cost_of", spy)
    experiment = dataclasses.replace(EXPERIMENT, model=ModelConfig("resnet50"))
    task = Task(tuple(map(str, range(1000))), tuple(map(str, range(10))), (224, 224, 3))
    live = sum(array.nbytes for array in jax.live_arrays())
    ((planned, cost),) = plan_method(experiment, linear_probe, task).phases
    assert sum(array.nbytes for array in jax.live_arrays()) - live < 10_000
    assert {type(leaf) for leaf in costed} == {jax.ShapeDtypeStruct}
    assert planned.partition.params_total == 25_557_032 - 2049 * 990
    head_bytes = 4 * (2048 * 10 + 10)
    assert planned.partition.params_trainable * 4 == head_bytes
    assert 2 * head_bytes <= cost.optimizer_bytes <= 2 * head_bytes + 64, "two moments and a few counters"
    assert planned.boundary == "head"


def test_shapes_of_stored_features_are_traced_once_for_equal_phases(monkeypatch):
    traced, run_stages = [], models.run_stages

    def spy(*args, **options):
        traced.append(options)
        return run_stages(*args, **options)

    monkeypatch.setattr(models, "run_stages", spy)
    plan._features.cache_clear()
    shapes = {}
    for size in (4, 4, 6):
        experiment = dataclasses.replace(EXPERIMENT, train=TrainConfig(num_steps=10, batch_size=size))
        (planned,) = resolve(linear_probe, experiment=experiment)
        shapes[size] = plan.abstract_batch(experiment, planned, abstract(linear_probe), TASK)["features"].shape
    assert traced == [{"stop": "head"}] * 2
    model = abstract(linear_probe)
    for size, shape in shapes.items():
        image = jax.ShapeDtypeStruct((size, *TASK.input_shape), np.float32)
        assert shape == nnx.eval_shape(lambda model, x: model.features(x), model, image).shape


def test_a_step_on_stored_features_costs_a_small_share_of_the_online_one(monkeypatch):
    # The published size: in a tiny one the head is no small part.
    monkeypatch.setenv("JXFER_FEATURES_GB", "0.001")
    experiment = dataclasses.replace(EXPERIMENT, model=ModelConfig("resnet18"))
    task = dataclasses.replace(TASK, input_shape=(32, 32, 3), num_examples=1000)
    ((planned, stored),) = plan_method(experiment, linear_probe, task).phases
    ((_, online),) = plan_method(dataclasses.replace(experiment, features="off"), linear_probe, task).phases
    assert 0 < stored.step_flops < online.step_flops / 100
    assert stored.optimizer_bytes == online.optimizer_bytes
    assert "; 2.0 MB for all 1,000 examples; " in planned.why
    assert planned.why.endswith("; more than JXFER_FEATURES_GB=0.001 allows")
    predicted = float(re.search(r"instead of (\S+),", planned.why)[1])
    epoch = online.step_flops / experiment.train.batch_size * 1000
    assert predicted == pytest.approx(epoch, rel=0.1), "before what XLA makes of it"


def test_the_plan_of_a_solver_says_what_its_features_take():
    task = dataclasses.replace(TASK, num_examples=1000)
    viewed = dataclasses.replace(EXPERIMENT, views=3)  # of which a solver sees none
    ((planned, _),) = plan_method(viewed, ridge_probe, task).phases
    width = abstract(ridge_probe).head.in_features
    assert f"; {4 * width / 1000:,.1f} MB for all 1,000 examples; computing them takes " in planned.why


def test_the_classes_come_from_the_data_and_from_the_record_of_a_run(tmp_path, monkeypatch):
    dataset = Dataset("fake", "1.0.0", tuple("xyz"), {}, (8, 8, 1))
    monkeypatch.setattr("jxfer.task.load_data", lambda config: dataset)
    assert plan.task_of(EXPERIMENT) == Task(tuple("xyz"), tuple("xyz"), (8, 8, 1))

    def task_from(weights):
        return plan.task_of(dataclasses.replace(EXPERIMENT, source=SourceConfig(weights=weights)))

    with pytest.raises(InputError, match=r"run:.*: no run there, '.*config.json' does not exist"):
        task_from(f"run:{tmp_path}")
    with pytest.raises(InputError, match="is of no known kind; use hf:OWNER"):
        task_from("/a/b")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "somebody else's"}))
    with pytest.raises(InputError, match="is not the record of a jxfer run"):
        task_from(f"run:{tmp_path}")
    task = {"target_classes": ["p", "q"], "input_shape": [8, 8, 1]}
    (tmp_path / "config.json").write_text(json.dumps({"task": task, "experiment": config.to_dict(EXPERIMENT)}))
    assert task_from(f"run:{tmp_path}").source_classes == ("p", "q")


def test_accumulation_does_not_hide_flops_in_its_loop():
    costs = []
    for num_microbatches in (1, 4):
        train = dataclasses.replace(EXPERIMENT.train, batch_size=16, num_microbatches=num_microbatches)
        experiment = dataclasses.replace(EXPERIMENT, train=train, model=ModelConfig("convnet"))
        ((_, cost),) = plan_method(experiment, fine_tuning, TASK).phases
        costs.append(cost.step_flops)
    # XLA fuses, and so counts, small parts a little differently; hidden they would be a quarter.
    assert costs[1] == pytest.approx(costs[0], rel=0.1)
