"""AlexNet, VGG, SqueezeNet, MobileNetV2 and ResNet-101: published counts, shapes, types, poolings and dropout."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jxfer.models import alexnet, blocks, mobilenet, resnet, squeezenet, vgg
from jxfer.models.alexnet import AlexNet, AlexNetConfig
from jxfer.models.mobilenet import MobileNetV2, MobileNetV2Config
from jxfer.models.resnet import ResNet
from jxfer.models.squeezenet import SqueezeNet, SqueezeNetConfig
from jxfer.models.stages import Staged, run_stages
from jxfer.models.vgg import VGG, VGGConfig
from jxfer.partition import Partition, frozen_boundary

# torchvision's documentation; that of SqueezeNet is without its top, and ours has none of its own here.
COUNTS = {
    "alexnet": 61_100_840,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "squeezenet1_1": 722_496 + 513 * 1000,
    "mobilenet_v2": 3_504_872,
    "resnet101": 44_549_160,
}
PUBLISHED: dict[str, tuple[Any, Any]] = {
    **{name: (AlexNet, size) for name, size in alexnet.CONFIGS.items()},
    **{name: (VGG, size) for name, size in vgg.CONFIGS.items()},
    **{name: (SqueezeNet, size) for name, size in squeezenet.CONFIGS.items()},
    **{name: (MobileNetV2, size) for name, size in mobilenet.CONFIGS.items()},
    "resnet101": (ResNet, resnet.CONFIGS["resnet101"]),
}
TINY: dict[str, tuple[Any, Any]] = {
    "alexnet": (AlexNet, AlexNetConfig(widths=(4, 5, 6, 7, 8), hidden_dim=10)),
    "vgg": (VGG, VGGConfig((1, 1, 1, 2, 1), widths=(4, 5, 6, 7, 8), hidden_dim=10)),
    "vgg_bn": (VGG, VGGConfig((1, 1, 1, 2, 1), batch_norm=True, widths=(4, 5, 6, 7, 8), hidden_dim=10)),
    "squeezenet": (SqueezeNet, SqueezeNetConfig(6, (2, 2, 3, 3, 4, 4, 5, 5), (3, 3, 4, 4, 5, 5, 6, 6))),
    "mobilenet": (MobileNetV2, MobileNetV2Config(width=0.1)),
}


def abstract(make: Any, size: Any, *, dtype="float32", num_classes=5) -> nnx.Module:
    settings = {"input_shape": (64, 64, 3), "num_classes": num_classes, "dtype": jnp.dtype(dtype)}
    return nnx.eval_shape(lambda: make(size, **settings, rngs=nnx.Rngs(0)))


DEEP = {"resnet101": pytest.mark.slow, "vgg16": pytest.mark.slow, "vgg16_bn": pytest.mark.slow}
"""More of the same: `test_models.py` has the other depths of a ResNet, `vgg11` is one here."""


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=DEEP.get(name, ())) for name in PUBLISHED], name="published"
)
def _published(request: pytest.FixtureRequest) -> tuple[str, nnx.Module]:
    return request.param, abstract(*PUBLISHED[request.param], dtype="bfloat16", num_classes=1000)


def test_published_sizes_have_the_published_counts_in_float32(published):
    name, model = published
    params = [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert sum(math.prod(param.shape) for param in params) == COUNTS[name]
    assert {param.dtype for param in params} == {jnp.dtype("float32")}


def test_bfloat16_features_and_float32_logits_come_from_full_images_and_from_the_smallest(published):
    name, model = published
    assert isinstance(model, Staged)
    least = PUBLISHED[name][1].total_stride
    for rows, columns in ((224, 224), (least, least + 9)):
        image = jax.ShapeDtypeStruct((2, rows, columns, 3), jnp.float32)
        features = nnx.eval_shape(lambda m, x: m.features(x), model, image)
        logits = nnx.eval_shape(lambda m, x: run_stages(m, x, start="head"), model, features)
        assert (features.shape, features.dtype) == ((2, model.head.in_features), jnp.bfloat16)
        assert (logits.shape, logits.dtype) == ((2, 1000), jnp.float32)


@pytest.mark.parametrize("name", ["alexnet", "vgg", "mobilenet"])
def test_dropout_is_random_in_training_and_absent_in_inference(name):
    stage = {
        "alexnet": lambda rngs: alexnet.HiddenLayer(64, 8, dropout=0.5, dtype=jnp.float32, rngs=rngs),
        "vgg": lambda rngs: vgg.HiddenLayer(8, 64, dropout=0.5, dtype=jnp.float32, rngs=rngs),
        "mobilenet": lambda rngs: mobilenet.Top(MobileNetV2Config(), 8, dtype=jnp.float32, rngs=rngs),
    }[name](nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), {"alexnet": (2, 64), "vgg": (2, 8), "mobilenet": (2, 3, 3, 8)}[name])
    assert not jnp.array_equal(stage(x), stage(x))
    inference = nnx.view(stage, deterministic=True, use_running_average=True, raise_if_not_found=False)
    assert jnp.array_equal(inference(x), inference(x))


@pytest.mark.parametrize("name", TINY)
def test_a_frozen_backbone_drops_nothing_out_so_that_its_features_can_be_stored(name):
    model = abstract(*TINY[name])
    partition = Partition.of(model, [("head/**", "head"), ("**", "frozen")])
    assert not [leaf.path for leaf in partition.leaves if leaf.moves and leaf.kind == "random"]
    assert frozen_boundary(partition, model.stages) == "head"


def test_a_size_without_dropout_holds_no_random_keys():
    for make, size in (
        (AlexNet, AlexNetConfig(dropout=0.0)),
        (VGG, VGGConfig((1, 1, 1, 1, 1), dropout=0.0)),
        (MobileNetV2, MobileNetV2Config(dropout=0.0)),
        (SqueezeNet, SqueezeNetConfig()),
    ):
        assert not nnx.to_flat_state(nnx.state(abstract(make, size), nnx.RngState))


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 13, 31])
def test_the_adaptive_pool_averages_windows_that_cover_the_image_and_may_overlap(rows):
    columns, side = 9, 6
    image = np.random.default_rng(0).normal(size=(2, rows, columns, 3)).astype(np.float32)
    windows = [
        image[:, math.floor(i * rows / side) : math.ceil((i + 1) * rows / side)][
            :, :, math.floor(j * columns / side) : math.ceil((j + 1) * columns / side)
        ].mean((1, 2))
        for i in range(side)
        for j in range(side)
    ]
    pooled = blocks.AdaptivePool(side)(jnp.asarray(image))
    np.testing.assert_allclose(pooled, np.concatenate(windows, axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("side", "down", "up"), [(3, 1, 1), (4, 1, 2), (5, 2, 2), (6, 2, 3), (13, 6, 6), (56, 27, 28)])
def test_a_maximum_that_rounds_up_lets_its_last_window_hang_over_the_edge(side, down, up):
    image = -1 - jnp.arange(side * side, dtype=jnp.float32).reshape(1, side, side, 1)
    assert blocks.MaxPool(3, 2)(image).shape == (1, down, down, 1)
    pooled = blocks.MaxPool(3, 2, round_up=True)(image)
    assert pooled.shape == (1, up, up, 1)
    assert pooled[0, -1, -1, 0] == image[0, 2 * (up - 1), 2 * (up - 1), 0]  # what hangs over is not zero


def test_widths_of_mobilenet_are_multiples_of_eight_and_keep_the_last_layer_wide():
    assert [MobileNetV2Config(width=0.35).channels(count) for count in (16, 24, 32, 96)] == [8, 8, 16, 32]
    assert [MobileNetV2Config(width=1.4).channels(count) for count in (16, 24, 32, 96)] == [24, 32, 48, 136]
    assert [MobileNetV2Config(width=width).last_channels for width in (0.5, 1.0, 1.4)] == [1280, 1280, 1792]


def test_depthwise_convolutions_see_one_channel_each():
    model = abstract(MobileNetV2, MobileNetV2Config())
    assert model.layer2[0].depthwise.conv.kernel.shape == (3, 3, 1, 96)
    assert model.layer1[0].expand is None
    assert [block.shortcut for block in model.layer3] == [False, True, True]
