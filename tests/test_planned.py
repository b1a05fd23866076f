"""Phases resolved against networks whose stages are single blocks: the last layer, layer decay, loops over blocks."""

import dataclasses

import pytest
from flax import nnx

from jxfer import methods, models
from jxfer.config import Experiment, Group, Method, ModelConfig, Phase, TrainConfig
from jxfer.partition import FROZEN
from jxfer.plan import plan_method, plan_phases
from jxfer.surgery.head import NewHead
from jxfer.task import Task
from jxfer.typing import InputError

SIZE = (("hidden_dim", "64"), ("num_layers", "4"), ("num_heads", "2"), ("mlp_dim", "128"), ("patch_size", "4"))
TASK = Task(("a", "b"), ("a", "b"), (8, 8, 3))


def experiment_of(*, scan: str = "false") -> Experiment:
    model = ModelConfig("vit_ti_16", size=(*SIZE, ("scan", scan)))
    return Experiment("trial", model=model, train=TrainConfig(num_steps=4, batch_size=4))


def abstract(experiment: Experiment) -> nnx.Module:
    return nnx.eval_shape(
        lambda: models.build(experiment.model, num_classes=2, input_shape=TASK.input_shape, rngs=nnx.Rngs(0))
    )


def moving(method: Method) -> set[str]:
    experiment = experiment_of()
    (planned,) = plan_phases(experiment, method, abstract(experiment))
    stages = abstract(experiment).stages
    return {models.stage_of(leaf.path, stages) for leaf in planned.partition.leaves if leaf.label != FROZEN}


def test_the_last_layer_is_the_last_block_and_the_norm_after_it():
    assert moving(methods.partial) == {"blocks/3", "norm", "head"}


def test_rates_fall_with_the_distance_from_the_head_block_by_block():
    experiment = experiment_of()
    gentle = Phase("tune", methods.ALL, layer_decay=0.5, groups=(("backbone", Group(0.1)),))
    method = Method("decayed", surgeries=(NewHead(),), phases=(gentle,))
    (planned,) = plan_phases(experiment, method, abstract(experiment))
    scales = {leaf.path: planned.partition.scales(leaf)[0] for leaf in planned.partition.leaves}
    found = {stage: {scale for path, scale in scales.items() if path.startswith(stage)} for stage in ("embed", "head")}
    assert found == {"head": {1.0}, "embed": {0.1 * 0.5**5}}
    assert scales["norm/scale"] == scales["blocks/3/mlp/up/kernel"] == pytest.approx(0.05)
    assert scales["blocks/0/mlp/up/kernel"] == pytest.approx(0.1 * 0.5**4)


@pytest.mark.parametrize(
    "method",
    [methods.linear_probe, pytest.param(methods.fine_tuning, marks=pytest.mark.slow), methods.partial],
    ids=lambda m: m.name,
)
def test_a_loop_over_blocks_trains_the_same_leaves_for_the_same_flops(method):
    off = dataclasses.replace(experiment_of(), features="off")
    ((listed, cost),) = plan_method(off, method, TASK).phases
    scanned = dataclasses.replace(experiment_of(scan="true"), features="off")
    ((looped, looped_cost),) = plan_method(scanned, method, TASK).phases
    assert looped.partition == listed.partition
    # The body of the loop is counted before XLA writes out functions such as erf, the rest after.
    assert looped_cost.step_flops == pytest.approx(cost.step_flops, rel=0.1)


def test_rules_name_single_blocks_in_both_forms():
    rules = (("head/**", "head"), ("blocks/[2:]/**", "top"), ("**", "frozen"))
    method = Method("top", rules=rules, surgeries=(NewHead(),), phases=(Phase("tune", ("head", "top")),))
    for scan in ("false", "true"):
        experiment = experiment_of(scan=scan)
        model = abstract(experiment)
        (planned,) = plan_phases(experiment, method, model)
        assert planned.boundary == "blocks/2"
        view = nnx.merge(planned.partition.train_graphdef(model), nnx.state(model))
        cuts = [stage for stage in getattr(view, "cuts", ()) if stage.startswith("blocks/")]
        assert cuts == (["blocks/2"] if scan == "true" else [])


def test_statistics_cannot_be_estimated_where_there_are_none():
    experiment = experiment_of()
    with pytest.raises(InputError, match=r"phase `estimate` .* estimates statistics; ViT keeps none"):
        plan_phases(experiment, methods.norm_statistics, abstract(experiment))
