"""Stages: any cut of a model composes to the whole, and paths know their stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jxfer import models
from jxfer.config import ModelConfig
from jxfer.models.cifar_resnet import CifarResNet, CifarResNetConfig
from jxfer.models.resnet import ResNet, ResNetConfig
from jxfer.models.stages import Staged, run_stages, stage_of
from jxfer.typing import InputError


def convnet(rngs: nnx.Rngs) -> nnx.Module:
    return models.build(ModelConfig("convnet"), num_classes=3, input_shape=(8, 8, 3), rngs=rngs)


def basic(rngs: nnx.Rngs) -> nnx.Module:
    config = CifarResNetConfig(num_blocks=1, widths=(4, 4, 6))
    return CifarResNet(config, input_shape=(32, 32, 3), num_classes=3, dtype=jnp.float32, rngs=rngs)


def bottleneck(rngs: nnx.Rngs) -> nnx.Module:
    config = ResNetConfig((1, 1, 1, 1), block="bottleneck", widths=(4, 4, 4, 4))
    return ResNet(config, input_shape=(32, 32, 3), num_classes=3, dtype=jnp.float32, rngs=rngs)


@pytest.fixture(scope="module", params=[convnet, basic, bottleneck], ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> nnx.Module:
    return nnx.view(nnx.jit(request.param)(nnx.Rngs(0)), use_running_average=True)


@pytest.fixture(scope="module")
def image() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


def test_running_up_to_any_stage_and_then_from_it_is_running_all(model, image):
    whole = np.asarray(model(image))
    for name in model.stages:
        np.testing.assert_array_equal(run_stages(model, run_stages(model, image, stop=name), start=name), whole)


def test_stages_compose_over_all_pairs_of_cuts(model, image):
    before = {name: run_stages(model, image, stop=name) for name in model.stages}
    for i, start in enumerate(model.stages):
        for stop in model.stages[i:]:
            np.testing.assert_array_equal(run_stages(model, before[start], start=start, stop=stop), before[stop])


def test_features_are_what_the_head_sees(model, image):
    features = model.features(image)
    assert features.shape == (2, model.head.in_features)
    np.testing.assert_array_equal(model.head(features), model(image))


def test_a_run_without_stages_is_the_identity(model, image):
    assert run_stages(model, image, stop=model.stages[0]) is image


def test_models_are_staged_and_end_with_the_head(model):
    assert isinstance(model, Staged)
    assert model.stages[-1] == "head"
    assert len(set(model.stages)) == len(model.stages)


def test_every_variable_lies_in_a_stage(model):
    for keys, _ in nnx.to_flat_state(nnx.state(model)):
        assert stage_of("/".join(map(str, keys)), model.stages) == keys[0]


def test_the_pool_has_no_variables(model):
    assert not nnx.to_flat_state(nnx.state(model.pool))


def test_a_path_outside_all_stages_has_no_stage():
    stages = ("stem", "layer1", "layer10", "head")
    assert stage_of("layer10/0/conv1/kernel", stages) == "layer10"
    assert stage_of("layer1", stages) == "layer1"
    assert stage_of("layer2/0/conv1/kernel", stages) is None
    assert stage_of("image/head/kernel", stages) is None


@pytest.mark.parametrize("cut", ["start", "stop"])
def test_an_unknown_stage_is_an_error_that_names_the_nearest(model, image, cut):
    with pytest.raises(InputError, match=r"unknown stage `layer9`; nearest: `layer\d`"):
        run_stages(model, image, **{cut: "layer9"})


def test_a_stop_before_the_start_is_an_error(model, image):
    with pytest.raises(InputError, match="from stage `head` up to `stem`"):
        run_stages(model, image, start="head", stop="stem")
