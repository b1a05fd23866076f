"""Models by name: published parameter counts, shapes, types, and errors for what does not fit."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jxfer import models
from jxfer.config import ModelConfig
from jxfer.typing import InputError

# He et al. 2015 and torchvision, less their 1000 outputs: the head here has 10.
COUNTS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet18": 11_689_512 - 513_000 + 5_130,
    "resnet34": 21_797_672 - 513_000 + 5_130,
    "resnet50": 25_557_032 - 2_049_000 + 20_490,
}

# One depth of each architecture: the others differ in nothing but repetition.
NAMES = ("convnet", "convnet_dropout", "resnet20", "resnet18", "resnet18_32", "resnet50")
QUICK = [pytest.param(name, marks=pytest.mark.slow if name == "resnet50" else ()) for name in NAMES]


def make(name: str, *, input_shape=(32, 32, 3), dtype="float32", num_classes=10, rngs: nnx.Rngs) -> nnx.Module:
    config = ModelConfig(name, dtype=dtype)
    return models.build(config, num_classes=num_classes, input_shape=input_shape, rngs=rngs)


def build(name: str, **settings) -> nnx.Module:
    return nnx.jit(lambda rngs: make(name, **settings, rngs=rngs))(nnx.Rngs(0))


@functools.cache
def abstract(name: str, **settings) -> nnx.Module:
    return nnx.eval_shape(lambda: make(name, **settings, rngs=nnx.Rngs(0)))


def param_paths(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, keys)): variable.get_value().shape for keys, variable in flat}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_counts_are_the_published_ones(name, count):
    assert sum(map(math.prod, param_paths(abstract(name)).values())) == count


def test_parameter_names_follow_torchvision():
    shapes = param_paths(abstract("resnet50"))
    assert shapes["stem/conv/kernel"] == (7, 7, 3, 64)
    assert shapes["layer1/0/downsample/conv/kernel"] == (1, 1, 64, 256)
    assert shapes["layer4/0/conv1/kernel"] == (1, 1, 1024, 512)
    assert shapes["layer4/2/bn3/scale"] == (2048,)
    assert shapes["head/kernel"] == (2048, 10)
    assert "layer4/1/downsample/conv/kernel" not in shapes


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("input_shape", [(32, 32, 1), (50, 37, 3)], ids=["grey", "oblong"])
def test_logits_and_features_have_their_shapes(name, input_shape):
    model = abstract(name, input_shape=input_shape, num_classes=7)
    image = jax.ShapeDtypeStruct((2, *input_shape), jnp.float32)
    logits, features = nnx.eval_shape(lambda m, x: (m(x), m.features(x)), model, image)
    assert logits.shape == (2, 7)
    assert features.shape == (2, model.head.in_features)


@pytest.mark.parametrize("name", QUICK)
def test_bfloat16_computes_in_bfloat16_around_float32_parameters_and_logits(name):
    model = abstract(name, dtype="bfloat16")
    assert {variable.get_value().dtype for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {
        jnp.dtype("float32")
    }
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    logits, features = nnx.eval_shape(lambda m, x: (m(x), m.features(x)), model, image)
    assert (features.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


def test_statistics_stay_float32_when_training_in_bfloat16():
    model = build("convnet", dtype="bfloat16", input_shape=(8, 8, 1))
    model(jnp.ones((4, 8, 8, 1)))
    for _, statistic in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        assert statistic.get_value().dtype == jnp.float32


def test_bfloat16_logits_are_near_the_float32_ones():
    image = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    exact, rounded = (build("convnet", dtype=dtype, input_shape=(8, 8, 1))(image) for dtype in ("float32", "bfloat16"))
    # A bfloat16 has 8 significant bits; three layers and their norms add up to a few units in the last place.
    np.testing.assert_allclose(rounded, exact, atol=0.03 * float(jnp.abs(exact).max()))


def test_dropout_is_random_in_training_and_absent_in_inference():
    image = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    model = build("convnet_dropout", input_shape=(8, 8, 1))
    assert not jnp.array_equal(model(image), model(image))
    inference = nnx.view(model, deterministic=True, use_running_average=True)
    assert jnp.array_equal(inference(image), inference(image))


def test_only_the_size_with_dropout_holds_random_keys():
    for name in NAMES:
        assert bool(nnx.to_flat_state(nnx.state(abstract(name), nnx.RngState))) == (name == "convnet_dropout")


def test_one_compilation_serves_all_batches_of_a_shape():
    model = build("convnet", input_shape=(8, 8, 1))
    graphdef, state = nnx.split(nnx.view(model, use_running_average=True))
    traces = []

    @jax.jit
    def logits(state, image):
        traces.append(None)
        return nnx.merge(graphdef, state)(image)

    for key in range(3):
        logits(nnx.to_pure_dict(state), jax.random.normal(jax.random.key(key), (2, 8, 8, 1)))
    assert len(traces) == 1


def test_equal_keys_give_equal_weights():
    first, second = (nnx.to_pure_dict(nnx.state(build("convnet", input_shape=(8, 8, 1)))) for _ in range(2))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, first, second))


@pytest.mark.parametrize(("name", "least"), [("convnet", 4), ("resnet56", 4), ("resnet18_32", 8), ("resnet18", 32)])
def test_images_smaller_than_the_total_stride_are_an_error(name, least):
    abstract(name, input_shape=(least, least, 3))
    with pytest.raises(InputError, match=f"images of {least}×{least - 1} are too small for `{name}`.*{least}×{least}"):
        abstract(name, input_shape=(least, least - 1, 3))


def test_an_unknown_model_is_an_error_that_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown model `resnet81`; nearest: .*`resnet18`"):
        build("resnet81")
