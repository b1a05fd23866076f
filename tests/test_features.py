"""The frozen boundary for every model kind and rule, and training on stored features equal to training online."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import runs
import tiny
from flax import nnx

from jxfer import data, models
from jxfer.config import Experiment, MeshConfig, Method, ModelConfig, Phase, TrainConfig
from jxfer.extract import make_feature_step
from jxfer.features import Extractor, stored_splits
from jxfer.models.stages import run_stages, stage_of
from jxfer.partition import Partition, arrays_of, frozen_boundary
from jxfer.plan import PlannedPhase, phase_steps, plan_phases, prepare_images, start_phase
from jxfer.sharding import make_mesh, put_batch
from jxfer.state import merge_state


@pytest.fixture(autouse=True)
def _tiny_models_and_a_store_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "_CONFIGS", tiny.CONFIGS)
    monkeypatch.setenv("JXFER_CACHE", str(tmp_path))


@functools.cache
def abstract(name: str) -> nnx.Module:
    return nnx.eval_shape(lambda: tiny.build(name))


def boundary(name: str, *patterns: str) -> str | None:
    """Returns the boundary where what the patterns match trains and the rest is frozen."""
    model = abstract(name)
    rules = [(pattern, "moving") for pattern in patterns] + ([] if "**" in patterns else [("**", "frozen")])
    return frozen_boundary(Partition.of(model, rules), model.stages)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_boundary_is_the_first_stage_that_moves(name):
    last = tiny.LAST_STAGE[name]
    assert boundary(name, "head/**") == "head"
    assert boundary(name, "head/**", f"{last}/**") == last
    assert boundary(name, f"{last}/**") == last, "a frozen head behind what moves"
    assert boundary(name, "**/bn/scale" if name.startswith("convnet") else "layer1/**/bn1/scale") == (
        None if name.startswith("convnet") else "layer1"
    )
    assert boundary(name, "stem/bn/scale") is None, "one norm in the first stage"
    assert boundary(name, "head/**", "stem/bn/*") is None
    assert boundary(name, "**") is None
    assert boundary(name) is None, "nothing moves, so there is nothing to store for"


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_nothing_before_the_boundary_moves_for_any_choice_of_stages(name):
    model = abstract(name)
    with_parameters = [stage for stage in model.stages if any(p.startswith(stage + "/") for p in arrays_of(model))]
    for count in range(1, len(with_parameters)):
        for chosen in itertools.combinations(with_parameters, count):
            expected = None if "stem" in chosen else chosen[0]
            assert boundary(name, *(f"{stage}/**" for stage in chosen)) == expected


def test_dropout_is_random_where_any_of_its_layer_trains():
    assert boundary("convnet_dropout", "layer1/bn/bias") == "layer1"
    assert boundary("convnet_dropout", "layer2/conv/kernel", "head/**") == "layer2"
    assert boundary("convnet_dropout", "head/**") == "head", "frozen layers drop nothing out"


class DropBetween(nnx.Module):
    """A stage without parameters that is random."""

    def __init__(self, rngs: nnx.Rngs):
        self.stages = ("body", "drop", "top", "head")
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.top = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


def test_a_random_stage_without_parameters_ends_the_frozen_prefix():
    model = DropBetween(nnx.Rngs(0))
    partition = Partition.of(model, [("head/**", "head"), ("**", "frozen")])
    assert frozen_boundary(partition, model.stages) == "drop"


class Shared(nnx.Module):
    """A trainable parameter that no stage owns."""

    def __init__(self, rngs: nnx.Rngs):
        self.stages = ("body", "head")
        self.scale = nnx.Param(rngs.params.normal((3,)))
        self.body = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)


def test_what_moves_outside_all_stages_leaves_nothing_to_store():
    model = Shared(nnx.Rngs(0))
    rules = [("head/**", "head"), ("scale", "scale"), ("**", "frozen")]
    assert frozen_boundary(Partition.of(model, rules), model.stages) is None


def test_a_model_without_stages_has_no_boundary():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert frozen_boundary(Partition.of(model, [("kernel", "head"), ("**", "frozen")]), ()) is None


def phase_of(name: str, first: str, *, model: nnx.Module, **settings):
    """Returns what trains the stages from `first` on: experiment, method, planned phase."""
    moving = model.stages[model.stages.index(first) :]
    rules = tuple((f"{s}/**", "moving") for s in moving if any(stage_of(p, (s,)) for p in arrays_of(model)))
    method = Method("some", rules=(*rules, ("**", "frozen")), phases=(Phase("train", train=("moving",)),))
    train = TrainConfig(num_steps=3, batch_size=6, learning_rate=0.01, clip_norm=1.0, schedule="constant")
    experiment = Experiment("test", model=ModelConfig(name), train=train, **settings)
    (planned,) = plan_phases(experiment, method, model)
    return experiment, method, planned


def extractor_of(experiment: Experiment, method: Method, planned: PlannedPhase, model: nnx.Module, **changes):
    """Returns what makes the features of a phase, on one device; `changes` are of its fields."""
    state, fixed = start_phase(experiment, method, planned, model, key=jax.random.key(1))
    dataset = data.Dataset("tiny", "1", tuple("abc"), {"train": tiny.make_split(13)}, tiny.IMAGE_SHAPE)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    values = {"session": runs.QUIET, "title": "test", "batch_size": 8} | changes
    return Extractor(experiment, dataset, planned.boundary, state, fixed, mesh, **values)


def train_phase(name: str, first: str, *, features: str):
    """Trains three steps and returns the evaluated logits, what moved, and the metrics of each step."""
    model = tiny.build(name)
    experiment, method, planned = phase_of(name, first, features=features, model=model)
    assert planned.stored == (features == "auto")
    assert planned.boundary == first
    extractor = extractor_of(experiment, method, planned, model)
    state, fixed, mesh = extractor.state, extractor.fixed, extractor.mesh
    split = tiny.make_split(13)
    if planned.stored:
        split, _, _ = stored_splits(extractor, split, split, num_steps=3)
    train_step, eval_step = phase_steps(experiment, method, planned, 3)
    history = []
    for batch in itertools.islice(data.batches(split, batch_size=6, seed=0), 3):
        state, metrics = train_step(state, fixed, put_batch(batch, mesh))
        history.append(jax.device_get(metrics))
    batch = next(data.eval_batches(split, batch_size=16))
    _, logits = eval_step(state, fixed, put_batch(batch, mesh))
    return logits, {**state.params, **state.variables}, history


QUICK = [("convnet_dropout", "layer2"), ("resnet20", "head"), ("resnet18_32", "layer4")]
ALL = [
    *itertools.product(("convnet", "convnet_dropout"), ("layer1", "layer2", "head")),
    *itertools.product(("resnet20",), ("layer1", "layer2", "layer3", "head")),
    *itertools.product(("resnet18_32",), ("layer1", "layer2", "layer3", "layer4", "head")),
]
CUTS = [*QUICK, *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ALL if cut not in QUICK)]


@pytest.mark.parametrize(("name", "first"), CUTS)
def test_training_on_stored_features_equals_training_online(name, first):
    logits, moved, history = train_phase(name, first, features="auto")
    online_logits, online_moved, online_history = train_phase(name, first, features="off")
    # float32: the same operations in two programs, which XLA may fuse differently.
    np.testing.assert_allclose(logits, online_logits, rtol=1e-5, atol=1e-5 * float(np.abs(online_logits).max()))
    for step, (one, other) in enumerate(zip(history, online_history, strict=True)):
        for key in other:
            np.testing.assert_allclose(one[key], other[key], rtol=1e-4, err_msg=f"{key} of step {step + 1}")
    for path, value in online_moved.items():
        if jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
            np.testing.assert_allclose(moved[path], value, rtol=1e-3, atol=1e-5, err_msg=path)
        else:
            assert path in moved


def prepared(experiment: Experiment, images: np.ndarray) -> jax.Array:
    batch = {"image": jax.numpy.asarray(images)}
    return prepare_images(experiment, 3, train=False)(jax.random.key(0), batch)["image"]


def run_prefix(extractor: Extractor, images: jax.Array) -> np.ndarray:
    """Runs the frozen stages without jit or store."""
    definition, arrays = extractor.fixed.definition, merge_state(extractor.state, extractor.fixed)
    whole = definition.partition.assemble(definition.eval_graphdef, arrays)
    return np.asarray(run_stages(whole, images, stop=extractor.boundary))


def test_features_are_those_of_each_example_in_order():
    model = tiny.build("convnet_dropout")
    experiment, method, planned = phase_of("convnet_dropout", "layer2", model=model)
    extractor = extractor_of(experiment, method, planned, model)
    examples = tiny.make_split(16)
    train, validation = data.Subset(examples, np.arange(13)), data.Subset(examples, np.array([15, 3, 14]))
    stored, checked, took = stored_splits(extractor, train, validation, num_steps=3)
    expected = run_prefix(extractor, prepared(experiment, examples.arrays["image"][:13]))
    np.testing.assert_allclose(stored.arrays["features"], expected, rtol=1e-4, atol=1e-6)
    expected = run_prefix(extractor, prepared(experiment, examples.arrays["image"][[15, 3, 14]]))
    np.testing.assert_allclose(checked.arrays["features"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(stored.labels, train.labels)
    np.testing.assert_array_equal(checked.ids, validation.ids)
    assert set(stored.arrays) == {"features"}, "the images are not kept"
    assert (took.examples, took.bytes) == (16, 16 * expected[0].nbytes)
    assert took.computed == 15, "one example is in both splits"


def test_equal_phases_share_their_steps():
    model = tiny.build("convnet")
    experiment, method, planned = phase_of("convnet", "head", model=model)
    other = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, learning_rate=1.0))
    assert phase_steps(experiment, method, planned, 3) == phase_steps(other, method, planned, 3)
    prepare = prepare_images(experiment, 3, train=False)
    again = prepare_images(other, 3, train=False)
    assert make_feature_step(prepare, stop="head") is make_feature_step(again, stop="head")
